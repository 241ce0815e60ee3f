"""The example inputs of a capture: their structure, their batch, and which axes are free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from narrows.errors import CaptureError
from narrows.frontend.containers import register_dataclasses

# torch.export takes sizes 0 and 1 for constants, so a free batch is traced at the next size.
TRACE_BATCH = 2


@dataclass(frozen=True)
class Inputs:
    """Example inputs as a flat list.

    Attributes:
        flat: The leaves of ``(args, kwargs)``.
        spec: Their structure.
        batch: The positions of the tensors whose axis 0 is the batch.
    """

    flat: tuple[Any, ...]
    spec: pytree.TreeSpec
    batch: tuple[int, ...] = ()

    @property
    def nested(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inputs as ``(args, kwargs)``."""
        return pytree.tree_unflatten(self.flat, self.spec)

    def resized(self, size: int = TRACE_BATCH) -> Inputs:
        """Return the inputs with a batch of ``size``, cut or repeated."""
        flat = list(self.flat)
        for i in self.batch:
            flat[i] = _resize(flat[i], size)
        return Inputs(tuple(flat), self.spec, self.batch)

    def fixed(self) -> Inputs:
        """Return the inputs with no free axis."""
        return Inputs(self.flat, self.spec)

    def copy(self) -> Inputs:
        """Return the inputs with tensors of their own, for a run that may write into them."""
        flat = tuple(v.detach().clone() if isinstance(v, Tensor) else v for v in self.flat)
        return Inputs(flat, self.spec, self.batch)

    def dynamic_shapes(self) -> Any:
        """Return what ``torch.export.export`` takes as ``dynamic_shapes``, or ``None``."""
        if not self.batch:
            return None
        batch = torch.export.Dim("batch")
        shapes = torch.export.ShapesCollection()
        for i in self.batch:
            shapes[self.flat[i]] = {0: batch}
        return shapes


def read_inputs(args: Any, kwargs: Any, dynamic_batch: bool) -> Inputs:
    """Return the example inputs, checked; one tensor stands for a tuple of one.

    The batch is axis 0 of the first tensor, and of every other tensor of the same size there.
    """
    if isinstance(args, Tensor):
        args = (args,)
    if isinstance(args, list):
        args = tuple(args)
    if not isinstance(args, tuple):
        raise CaptureError(
            f"example_inputs is a {type(args).__name__}",
            why="it holds the positional arguments of forward",
            hint="pass a tuple of tensors, and keyword arguments by kwargs={...}",
        )
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise CaptureError(
            f"kwargs is a {type(kwargs).__name__}",
            why="it holds the keyword arguments of forward by their names",
            hint="kwargs={'mask': mask}",
        )
    register_dataclasses((args, kwargs))
    flat, spec = pytree.tree_flatten((args, dict(kwargs or {})))
    tensors = [i for i, v in enumerate(flat) if isinstance(v, Tensor)]
    for i, value in enumerate(flat):
        _check_leaf(i, value)
    if not tensors:
        raise CaptureError("the example inputs hold no tensor", hint="pass at least one tensor")
    batch: tuple[int, ...] = ()
    if dynamic_batch and flat[tensors[0]].dim() > 0:
        size = flat[tensors[0]].shape[0]
        batch = tuple(i for i in tensors if flat[i].dim() > 0 and flat[i].shape[0] == size)
        if size == 0:
            raise CaptureError("the example batch is empty", hint="pass at least one sample")
    return Inputs(tuple(flat), spec, batch)


def _check_leaf(position: int, value: Any) -> None:
    if isinstance(value, Tensor):
        problem = unsupported(value)
        if problem:
            raise CaptureError(f"input {position} is {problem}", hint="pass dense real tensors")
        return
    if value is not None and not isinstance(value, (bool, int, float, str)):
        raise CaptureError(
            f"input {position} is a {type(value).__name__}",
            why="inputs are tensors, plain numbers, strings or None, in tuples, lists and dicts",
            hint="register the class with torch.utils._pytree, or pass its tensors",
        )


def unsupported(tensor: Tensor) -> str:
    """Return what of a tensor no program can hold (``complex64``, ``quantized``), or ``""``."""
    if tensor.is_quantized:
        return f"quantized ({tensor.dtype})"
    if tensor.is_complex():
        return f"complex ({tensor.dtype})"
    if tensor.layout is not torch.strided:
        return f"sparse ({tensor.layout})"
    return ""


def _resize(tensor: Tensor, size: int) -> Tensor:
    repeats = -(-size // tensor.shape[0])
    if repeats > 1:
        tensor = torch.cat([tensor] * repeats)
    # A copy, also where nothing changes: two inputs that are one tensor stay two inputs.
    return tensor[:size].detach().clone()
