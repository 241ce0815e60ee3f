"""Operators that the ONNX exporter would take apart, in a spelling that it translates as it stands.

Each function emits the replacement and returns its last node, which bears the replaced node's name,
or returns ``None`` to leave the operator to the exporter.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import fx

aten = torch.ops.aten

# By the number of axes, from one.
AVERAGES = (aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)
MAXIMA = (aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)


class Emits(Protocol):
    """Appends calls to the graph that is exported."""

    def emit(self, name: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Append a call."""
        ...


def _batch_norm(
    builder: Emits, name: str, x: fx.Node, weight: Any, bias: Any, mean: Any, var: Any,
    training: bool, momentum: float, eps: float, *_: Any,
) -> fx.Node | None:  # fmt: skip
    if training or mean is None or var is None:
        return None
    target = aten._native_batch_norm_legit_no_training.default
    args = (x, weight, bias, mean, var, momentum, eps)
    parts = builder.emit(f"{name}_parts", target, *args)
    return builder.emit(name, operator.getitem, parts, 0)


def _adaptive_avg_pool2d(builder: Emits, name: str, x: fx.Node, size: Any) -> fx.Node | None:
    if list(size) == [1, 1]:
        return builder.emit(name, aten.mean.dim, x, [-2, -1], True)
    kernel = _window(x, size)
    if kernel is None or kernel == [1, 1]:
        return x if kernel else None
    return builder.emit(name, aten.avg_pool2d.default, x, kernel, kernel)


def _window(x: fx.Node, size: Any) -> list[int] | None:
    """Return the window of an adaptive pooling, or ``None`` where its windows differ in size."""
    height, width = x.meta["val"].shape[-2:]
    if not isinstance(height, int) or not isinstance(width, int):
        return None
    if height % size[0] or width % size[1]:
        return None
    return [height // size[0], width // size[1]]


def _adaptive_avg_pool1d(builder: Emits, name: str, x: fx.Node, size: Any) -> fx.Node | None:
    if list(size) != [1]:
        return None
    return builder.emit(name, aten.mean.dim, x, [-1], True)


def _averaged(rank: int, target: Any) -> Callable[..., fx.Node | None]:
    """Return the spelling of an average pooling as ONNX has it.

    ONNX lacks a divisor of the user's: the input is padded by hand, so that every window is whole,
    and the mean of a window is scaled.
    """

    def legalize(
        builder: Emits, name: str, x: fx.Node, kernel: Any, stride: Any = (), padding: Any = 0,
        ceil: bool = False, count_padding: bool = True, divisor: int | None = None,
    ) -> fx.Node | None:  # fmt: skip
        axes = _axes(rank, x, kernel, stride, padding)
        if axes is None:
            return None
        if divisor is None:
            return _by_steps(builder, name, target, x, axes, ceil, count_padding)
        pads = [p for axis in reversed(axes) for p in _ends(axis, ceil)]
        if any(pads):
            x = builder.emit(f"{name}_padded", aten.pad.default, x, pads, "constant", 0.0)
        kernels, steps = [a.kernel for a in axes], [a.stride for a in axes]
        mean = builder.emit(f"{name}_mean", target, x, kernels, steps)
        return builder.emit(name, aten.mul.Tensor, mean, math.prod(kernels) / divisor)

    return legalize


def _largest(rank: int, target: Any) -> Callable[..., fx.Node | None]:
    """Return the spelling of a maximum pooling as ONNX has it."""

    def legalize(
        builder: Emits, name: str, x: fx.Node, kernel: Any, stride: Any = (), padding: Any = 0,
        dilation: Any = 1, ceil: bool = False,
    ) -> fx.Node | None:  # fmt: skip
        axes = _axes(rank, x, kernel, stride, padding, dilation)
        return None if axes is None else _by_steps(builder, name, target, x, axes, ceil)

    return legalize


class _Axis(NamedTuple):
    """What a pooling does along one axis."""

    size: int
    kernel: int
    stride: int
    padding: int
    dilation: int

    @property
    def steps(self) -> int:
        """How far the first window's beginning can move."""
        return self.size + 2 * self.padding - (self.kernel - 1) * self.dilation - 1

    def count(self, ceil: bool) -> int:
        """The number of windows: torch has none that begins in the padding behind, ONNX has."""
        count = self.named(ceil)
        return count - (ceil and (count - 1) * self.stride >= self.size + self.padding)

    def named(self, ceil: bool) -> int:
        """The number of windows that ONNX has."""
        return (-(-self.steps // self.stride) if ceil else self.steps // self.stride) + 1


def _axes(
    rank: int, x: fx.Node, kernel: Any, stride: Any, padding: Any, dilation: Any = 1
) -> list[_Axis] | None:
    """Return what a pooling does along each axis; ``None`` where an axis may have any size."""
    sizes = x.meta["val"].shape[-rank:]
    if not all(isinstance(s, int) for s in sizes):
        return None
    kernel = _each(kernel, rank)
    rest = _each(stride, rank) if stride else kernel, _each(padding, rank), _each(dilation, rank)
    return [_Axis(*of) for of in zip(sizes, kernel, *rest, strict=True)]


def _by_steps(
    builder: Emits, name: str, target: Any, x: fx.Node, axes: list[_Axis], ceil: bool,
    *rest: bool,
) -> fx.Node | None:  # fmt: skip
    """Pool first along the axes where torch rounds the number of windows down again, then along
    the others: a mean or a maximum over a window is one of those along its axes."""
    down = [axis.count(ceil) < axis.named(ceil) for axis in axes]
    if not any(down):
        return None
    idle = _Axis(1, 1, 1, 0, 1)
    if any(a.count(True) > a.count(False) for a in axes):
        parts = [[a if d is first else idle for a, d in zip(axes, down, strict=True)]
                 for first in (True, False)]  # fmt: skip
    else:
        parts = [axes]
    for number, part in enumerate(parts):
        _, *how = (list(values) for values in zip(*part, strict=True))
        how = how[:3] if rest else how  # averages know no dilation
        last = number == len(parts) - 1
        at = name if last else f"{name}_first"
        x = builder.emit(at, target, x, *how, last and len(parts) > 1, *rest)
    return x


def _each(value: Any, rank: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


def _ends(axis: _Axis, ceil: bool) -> tuple[int, int]:
    """Return the zeros before and after an axis by which the last window is a whole one."""
    missing = (axis.count(ceil) - 1) * axis.stride - axis.steps
    return axis.padding, axis.padding + max(0, missing)


def _dropout(builder: Emits, name: str, x: fx.Node, p: float, training: bool) -> fx.Node | None:
    return None if training else x


def _rrelu(
    builder: Emits, name: str, x: fx.Node, lower: float = 1 / 8, upper: float = 1 / 3,
    training: bool = False, *_: Any,
) -> fx.Node | None:  # fmt: skip
    if training:
        return None
    return builder.emit(name, aten.leaky_relu.default, x, (lower + upper) / 2)


LEGALIZE: dict[Any, Callable[..., fx.Node | None]] = {
    aten.batch_norm.default: _batch_norm,
    aten.adaptive_avg_pool2d.default: _adaptive_avg_pool2d,
    aten.adaptive_avg_pool1d.default: _adaptive_avg_pool1d,
    **{op: _averaged(rank, op) for rank, op in enumerate(AVERAGES, 1)},
    **{op: _largest(rank, op) for rank, op in enumerate(MAXIMA, 1)},
    aten.rrelu.default: _rrelu,
    aten.dropout.default: _dropout,
    aten.feature_dropout.default: _dropout,
    aten.alpha_dropout.default: _dropout,
    aten.feature_alpha_dropout.default: _dropout,
}
