"""Sums of products of codes and int8 weights, over channels-last tensors.

Weights come packed in quads of input channels, ``[O / lanes, *kernel, I / 4, lanes, 4]``: four
codes times four weights is what the dot-product instructions of processors add to a number. Where
there are none (`Machine.dot` is empty), a quad holds one channel.

A filter per channel has no channels to add up. There, what lies above each other in the operand is
packed into one number, which then serves all windows that hold it (`depthwise`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import te, tirx

from narrows.backends.tvm.kernels import COLUMNS, DEPTHWISE, DOT, ROLE
from narrows.backends.tvm.kernels.convolution import Window, pack, padded

QUAD = 4


def product(code: Any, factor: Any, offset: int) -> Any:
    """Return ``(code - offset) * factor`` in int32."""
    code = tirx.Cast("int32", code)
    return (code - tirx.const(offset, "int32") if offset else code) * tirx.Cast("int32", factor)


def convolution(
    window: Window, groups: int, inner: int, zero: int, offset: int
) -> Callable[[Any, Any], Any]:
    """Return the kernel ``[N, *spatial, C], [O / v, *kernel, I / q, v, q] -> [N, *out, O]``, int32.

    Args:
        window: How it slides.
        groups: Vectors of output channels ``O / v / groups`` to a group read the channels of
            theirs.
        inner: The channels of a group. Where its last quad ends beyond, weights are zero there.
        zero: The code that stands around the operand.
        offset: What is subtracted from every code.
    """

    def compute(x: Any, weight: Any) -> Any:
        source = padded(x, window, zero)
        blocks, *_, steps, lanes, quad = (int(s) for s in weight.shape)
        axes = [te.reduce_axis((0, k), name=f"k{i}") for i, k in enumerate(window.kernel)]
        step, part = te.reduce_axis((0, steps), name="ki"), te.reduce_axis((0, quad), name="kq")
        share = blocks // groups

        def at(n: Any, *index: Any) -> Any:
            *place, o = index
            spots = [
                i * s + k * d
                for i, s, k, d in zip(place, window.stride, axes, window.dilation, strict=True)
            ]
            block = tirx.floordiv(o, lanes)
            read = step * quad + part
            if groups > 1:
                read = read + tirx.floordiv(block, share) * inner
            factor = weight[(block, *axes, step, tirx.floormod(o, lanes), part)]
            value = product(source[(n, *spots, read)], factor, offset)
            return te.sum(value, axis=[*axes, step, part])

        sizes = window.outputs([int(s) for s in x.shape[1:-1]])
        shape = (x.shape[0], *sizes, blocks * lanes)
        return te.compute(shape, at, name="contraction", attrs={ROLE: DOT})

    return compute


def linear(offset: int) -> Callable[[Any, Any], Any]:
    """Return the kernel ``[..., I], [O / v, I / q, v, q] -> [..., O]``, int32."""

    def compute(x: Any, weight: Any) -> Any:
        blocks, steps, lanes, quad = (int(s) for s in weight.shape)
        step, part = te.reduce_axis((0, steps), name="k"), te.reduce_axis((0, quad), name="kq")

        def at(*index: Any) -> Any:
            *lead, o = index
            factor = weight[tirx.floordiv(o, lanes), step, tirx.floormod(o, lanes), part]
            value = product(x[(*lead, step * quad + part)], factor, offset)
            return te.sum(value, axis=[step, part])

        shape = (*x.shape[:-1], blocks * lanes)
        return te.compute(shape, at, name="contraction", attrs={ROLE: DOT})

    return compute


def pack_quads(weight: np.ndarray, lanes: int, quad: int) -> np.ndarray:
    """Return int8 ``[O, I, *kernel]`` as ``[O / lanes, *kernel, I / quad, lanes, quad]``.

    It is filled up with zeros.
    """
    more = [(0, 0), (0, -weight.shape[1] % quad)] + [(0, 0)] * (weight.ndim - 2)
    packed = pack(np.pad(weight, more), lanes)  # [O / lanes, *kernel, I, lanes]
    *lead, inner, _ = packed.shape
    split = packed.reshape(*lead, inner // quad, quad, lanes)
    return np.ascontiguousarray(split.swapaxes(-1, -2))


# ---------------------------------------------------------------------- one filter a channel


def depthwise_plain(window: Window, zero: int) -> Callable[[Any, Any], Any]:
    """Return the kernel ``[N, *spatial, C], [*kernel, C] -> [N, *out, C]``, int32."""

    def compute(x: Any, weight: Any) -> Any:
        source = padded(x, window, zero)
        axes = [te.reduce_axis((0, k), name=f"k{i}") for i, k in enumerate(window.kernel)]

        def at(n: Any, *index: Any) -> Any:
            *place, c = index
            spots = [
                i * s + k * d
                for i, s, k, d in zip(place, window.stride, axes, window.dilation, strict=True)
            ]
            value = product(source[(n, *spots, c)], weight[(*axes, c)], 0)
            return te.sum(value, axis=axes)

        sizes = window.outputs([int(s) for s in x.shape[1:-1]])
        shape = (x.shape[0], *sizes, weight.shape[-1])
        return te.compute(shape, at, name="depthwise", attrs={ROLE: DEPTHWISE})

    return compute


def depthwise(window: Window, zero: int) -> Callable[[Any, Any], Any]:
    """Return the kernel ``[N, *spatial, C], [*kernel[1:], G, C] -> [N, *out, C]``, int32.

    The weight holds four rows of a filter in every number (`pack_columns`), and so does what is
    made of the operand.
    """

    def compute(x: Any, weight: Any) -> Any:
        source = padded(x, window, zero)
        sizes = window.outputs([int(s) for s in x.shape[1:-1]])
        rows, count = window.kernel[0], int(weight.shape[-2])
        stride, dilation = window.stride[0], window.dilation[0]

        def column(n: Any, place: Any, *index: Any) -> Any:
            *rest, group, c = index
            total = None
            for i in range(min(rows, QUAD)):
                # Beyond the last row the weight is zero, so that any row will do.
                row = tirx.min(group * QUAD + i, rows - 1) if count > 1 else i
                code = source[(n, place * stride + row * dilation, *rest, c)]
                term = tirx.Cast("int32", code)
                term = tirx.shift_left(term, tirx.const(8 * i, "int32")) if i else term
                total = term if total is None else tirx.bitwise_or(total, term)
            return total

        shape = (x.shape[0], sizes[0], *source.shape[2:-1], count, weight.shape[-1])
        columns = te.compute(shape, column, name="columns", attrs={ROLE: COLUMNS})
        axes = [te.reduce_axis((0, k), name=f"k{i}") for i, k in enumerate(window.kernel[1:])]
        group = te.reduce_axis((0, count), name="kg")

        def at(n: Any, first: Any, *index: Any) -> Any:
            *place, c = index
            spots = [
                i * s + k * d
                for i, s, k, d in zip(
                    place, window.stride[1:], axes, window.dilation[1:], strict=True
                )
            ]
            value = by_bytes(columns[(n, first, *spots, group, c)], weight[(*axes, group, c)])
            return te.sum(value, axis=[*axes, group])

        return te.compute(
            (x.shape[0], *sizes, weight.shape[-1]), at, name="depthwise", attrs={ROLE: DEPTHWISE}
        )

    return compute


def by_bytes(codes: Any, factors: Any) -> Any:
    """Return the sum of the products of four codes and four int8, each held in one int32."""
    total = None
    for i in range(QUAD):
        code = tirx.bitwise_and(
            tirx.shift_right(codes, tirx.const(8 * i, "int32")), tirx.const(255, "int32")
        )
        # Up to the sign, and down again with it.
        factor = tirx.shift_right(
            tirx.shift_left(factors, tirx.const(24 - 8 * i, "int32")), tirx.const(24, "int32")
        )
        total = code * factor if total is None else total + code * factor
    return total


def pack_columns(weight: np.ndarray, width: int) -> np.ndarray:
    """Return int8 ``[C, 1, *kernel]`` as int32 ``[*kernel[1:], G, width]``, four rows in each."""
    channels, _, rows, *rest = weight.shape
    more = [(0, width - channels), (0, -rows % QUAD)] + [(0, 0)] * len(rest)
    filled = np.pad(weight[:, 0], more).reshape(width, -1, QUAD, *rest)
    axes = (*range(3, filled.ndim), 1, 0, 2)
    return np.ascontiguousarray(filled.transpose(axes)).view("<i4")[..., 0]
