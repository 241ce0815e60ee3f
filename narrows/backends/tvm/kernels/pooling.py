"""Pooling over channels-last tensors, of any number of spatial axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import te, tirx

from narrows.backends.tvm.kernels import ROLE, WINDOW


@dataclass(frozen=True)
class Pool:
    """A pooling; one entry a spatial axis.

    Attributes:
        kernel: The window's sizes.
        stride: Steps between windows.
        padding: What lies around the operand on both sides.
        dilation: Steps between the window's elements.
        outputs: The result's sizes.
        largest: Whether it is the largest element, or else the mean.
        count_padding: Whether a mean counts what lies around.
        divisor: What a mean divides by; 0 for the count.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    outputs: tuple[int, ...]
    largest: bool
    count_padding: bool
    divisor: int


def pooling(pool: Pool) -> Callable[[Any], Any]:
    """Return the kernel ``[N, *spatial, C] -> [N, *out, C]``."""

    def compute(x: Any) -> Any:
        sizes = [int(s) for s in x.shape[1:-1]]
        axes = [te.reduce_axis((0, k), name=f"k{i}") for i, k in enumerate(pool.kernel)]
        shape = (x.shape[0], *pool.outputs, x.shape[-1])
        beyond = _beyond(pool, sizes)

        def largest(n: Any, *index: Any) -> Any:
            *place, c = index
            if max(pool.dilation) == 1:
                # An element met twice does not change a maximum: the border stands for what is
                # beyond it.
                zipped = zip(_spots(pool, place, axes), sizes, beyond, strict=True)
                near = [
                    tirx.max(tirx.min(spot, size - 1), 0) if out else spot
                    for spot, size, out in zipped
                ]
                return te.max(x[(n, *near, c)], axis=axes)
            spots, tests = spots_of(pool, sizes, place, axes)
            value = x[(n, *spots, c)]
            if tests:
                value = tirx.if_then_else(tirx.all(*tests), value, tirx.min_value(x.dtype))
            return te.max(value, axis=axes)

        def total(n: Any, *index: Any) -> Any:
            *place, c = index
            spots, tests = spots_of(pool, sizes, place, axes)
            value = x[(n, *spots, c)]
            if tests:
                value = tirx.if_then_else(tirx.all(*tests), value, tirx.const(0, x.dtype))
            return te.sum(value, axis=axes)

        attrs = {ROLE: WINDOW}
        if pool.largest:
            return te.compute(shape, largest, name="largest", attrs=attrs)
        summed = te.compute(shape, total, name="total", attrs=attrs)
        return te.compute(
            shape,
            lambda *index: summed[index] * _share(pool, sizes, index[1:-1], x.dtype),
            name="mean",
        )

    return compute


def spots_of(
    pool: Pool, sizes: Sequence[int], place: Sequence[Any], axes: Sequence[Any]
) -> tuple[list[Any], list[Any]]:
    """Return where an element of a window lies in the operand, and the tests that it does.

    Args:
        pool: The pooling.
        sizes: The operand's spatial sizes.
        place: The window's index.
        axes: The element's.
    """
    spots = _spots(pool, place, axes)
    zipped = zip(spots, sizes, _beyond(pool, sizes), strict=True)
    return spots, [t for spot, size, out in zipped if out for t in (spot >= 0, spot < size)]


def _spots(pool: Pool, place: Sequence[Any], axes: Sequence[Any]) -> list[Any]:
    zipped = zip(place, pool.stride, axes, pool.dilation, pool.padding, strict=True)
    return [i * s + k * d - p for i, s, k, d, p in zipped]


def _beyond(pool: Pool, sizes: Sequence[int]) -> list[bool]:
    """Return per axis whether a window reaches out of the operand."""
    zipped = zip(
        pool.outputs, pool.stride, pool.kernel, pool.dilation, pool.padding, sizes, strict=True
    )
    return [bool(p) or (o - 1) * s + (k - 1) * d >= size for o, s, k, d, p, size in zipped]


def _share(pool: Pool, sizes: list[int], place: Any, dtype: str) -> Any:
    """Return what the sum of a window is multiplied by."""
    if pool.divisor:
        return tirx.const(1 / pool.divisor, dtype)
    around = pool.padding if pool.count_padding else (0,) * len(sizes)
    if not any(_beyond(pool, sizes)):
        return tirx.const(1 / math.prod(pool.kernel), dtype)
    counts = []
    for i, s, k, p, a, size in zip(
        place, pool.stride, pool.kernel, pool.padding, around, sizes, strict=True
    ):
        start = i * s - p
        stop = tirx.min(start + k, size + a)
        counts.append(stop - tirx.max(start, -a))
    product = counts[0]
    for count in counts[1:]:
        product = product * count
    return tirx.const(1, dtype) / tirx.Cast(dtype, product)
