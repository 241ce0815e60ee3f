"""Operators that the ONNX exporter would take apart, in a spelling that it translates as it stands.

Each function emits the replacement and returns its last node, which bears the replaced node's name,
or returns ``None`` to leave the operator to the exporter.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import fx

aten = torch.ops.aten


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


def _adaptive_max_pool2d(builder: Emits, name: str, x: fx.Node, size: Any) -> fx.Node | None:
    kernel = _window(x, size)
    if kernel is None:
        return None
    return builder.emit(name, aten.max_pool2d_with_indices.default, x, kernel, kernel)


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


def _divided(rank: int, target: Any) -> Callable[..., fx.Node | None]:
    """Return the spelling of an average pooling with a divisor of the user's, which ONNX lacks.

    The input is padded by hand, so that every window is whole, and the mean of a window is scaled.
    """

    def legalize(
        builder: Emits, name: str, x: fx.Node, kernel: Any, stride: Any = (), padding: Any = 0,
        ceil: bool = False, count_padding: bool = True, divisor: int | None = None,
    ) -> fx.Node | None:  # fmt: skip
        sizes = x.meta["val"].shape[-rank:]
        if divisor is None or not all(isinstance(s, int) for s in sizes):
            return None
        kernel, padding = _each(kernel, rank), _each(padding, rank)
        stride = _each(stride, rank) if stride else kernel
        axes = list(zip(sizes, kernel, stride, padding, strict=True))
        pads = [p for s, k, step, p in reversed(axes) for p in _ends(s, k, step, p, ceil)]
        if any(pads):
            x = builder.emit(f"{name}_padded", aten.pad.default, x, pads, "constant", 0.0)
        mean = builder.emit(f"{name}_mean", target, x, kernel, stride)
        return builder.emit(name, aten.mul.Tensor, mean, math.prod(kernel) / divisor)

    return legalize


def _each(value: Any, rank: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


def _ends(size: int, kernel: int, stride: int, padding: int, ceil: bool) -> tuple[int, int]:
    """Return the zeros before and after an axis by which the last window is a whole one."""
    steps = size + 2 * padding - kernel
    count = (-(-steps // stride) if ceil else steps // stride) + 1
    if ceil and (count - 1) * stride >= size + padding:
        count -= 1  # torch has no window that begins in the padding behind
    missing = (count - 1) * stride + kernel - (size + 2 * padding)
    return padding, padding + max(0, missing)


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
    aten.adaptive_max_pool2d.default: _adaptive_max_pool2d,
    aten.adaptive_avg_pool1d.default: _adaptive_avg_pool1d,
    aten.avg_pool2d.default: _divided(2, aten.avg_pool2d.default),
    aten.avg_pool3d.default: _divided(3, aten.avg_pool3d.default),
    aten.rrelu.default: _rrelu,
    aten.dropout.default: _dropout,
    aten.feature_dropout.default: _dropout,
    aten.alpha_dropout.default: _dropout,
    aten.feature_alpha_dropout.default: _dropout,
}
