"""Kernels over rows: statistics of the last axis, and every element rescaled by them.

All of them read the first ``size`` elements of a row, and write as many: what a padded operand
holds beyond is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import te, tirx

from narrows.backends.tvm.kernels import ROLE, ROWS

_ATTRS = {ROLE: ROWS}


def reduced(
    x: Any,
    size: int,
    lanes: int,
    function: Any,
    name: str,
    combine: Any = te.sum,
    dtype: str = "",
) -> Any:
    """Reduce rows; their length is rounded up to whole vectors, and what is beyond left out.

    Args:
        x: The rows.
        size: Their length.
        lanes: How many numbers a vector holds.
        function: Takes the index of a row and of an element, and returns what is reduced.
        name: The name of the block.
        combine: The reduction.
        dtype: Of what is reduced, where it is not that of ``x``.
    """
    k = te.reduce_axis((0, -(-size // lanes) * lanes), name="k")
    dtype = dtype or x.dtype
    neutral = tirx.const(0, dtype) if combine is te.sum else tirx.min_value(dtype)

    def at(*i: Any) -> Any:
        value = function(i, k)
        if size % lanes:
            value = tirx.if_then_else(k < size, value, neutral)
        return combine(value, axis=k)

    return te.compute(x.shape[:-1], at, name=name, attrs=_ATTRS)


def softmax(size: int, lanes: int, log: bool) -> Callable[[Any], Any]:
    """Return the kernel of softmax over the last axis, or of its logarithm."""

    def compute(x: Any) -> Any:
        shape = (*x.shape[:-1], size)
        top = reduced(x, size, lanes, lambda i, k: x[(*i, k)], "top", te.max)
        if log:
            total = reduced(x, size, lanes, lambda i, k: tirx.exp(x[(*i, k)] - top[i]), "total")
            return te.compute(
                shape,
                lambda *i: x[i] - top[i[:-1]] - tirx.log(total[i[:-1]]),
                name="log_softmax",
                attrs=_ATTRS,
            )
        lifted = te.compute(
            shape, lambda *i: tirx.exp(x[i] - top[i[:-1]]), name="lifted", attrs=_ATTRS
        )
        total = reduced(lifted, size, lanes, lambda i, k: lifted[(*i, k)], "total")
        return te.compute(shape, lambda *i: lifted[i] / total[i[:-1]], name="softmax", attrs=_ATTRS)

    return compute


def layer_norm(size: int, lanes: int, eps: float, centred: bool) -> Callable[..., Any]:
    """Return the kernel that scales rows to unit variance, or to unit mean square.

    It takes the rows, and where given a factor and a summand per element of a row.
    """

    def compute(x: Any, scale: Any = None, shift: Any = None) -> Any:
        shape = (*x.shape[:-1], size)
        share = tirx.const(1 / size, x.dtype)
        small = tirx.const(eps, x.dtype)
        moved = x
        if centred:
            total = reduced(x, size, lanes, lambda i, k: x[(*i, k)], "total")
            moved = te.compute(
                shape, lambda *i: x[i] - total[i[:-1]] * share, name="moved", attrs=_ATTRS
            )
        power = reduced(moved, size, lanes, lambda i, k: moved[(*i, k)] * moved[(*i, k)], "power")

        def at(*i: Any) -> Any:
            y = moved[i] * tirx.rsqrt(power[i[:-1]] * share + small)
            y = y if scale is None else y * scale[i[-1]]
            return y if shift is None else y + shift[i[-1]]

        return te.compute(shape, at, name="layer_norm", attrs=_ATTRS)

    return compute
