"""Kernels on codes that are not sums against a weight: element by element, products, statistics.

All of them give what `narrows.ir.integer.library` defines, in 32 bits where those suffice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tvm import te, tirx
from tvm.script import tirx as T  # pyright: ignore[reportMissingModuleSource]

from narrows.backends.tvm.kernels import CONTRACTION, ROLE, ROWS, WINDOW
from narrows.backends.tvm.kernels.pooling import Pool, spots_of
from narrows.backends.tvm.kernels.rows import reduced
from narrows.backends.tvm.kernels.settling import HALF_EVEN, Settle, quotient


def number(value: float, dtype: str) -> Any:
    """Return a constant."""
    return tirx.const(value, dtype)


def whole(code: Any, zero: int, dtype: str = "int32") -> Any:
    """Return a code without its zero point."""
    code = tirx.Cast(dtype, code)
    return code - number(zero, dtype) if zero else code


def pointwise(shape: Sequence[int], function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Return the kernel of a function of one element of each operand; operands are broadcast.

    Args:
        shape: The result's.
        function: Takes the elements.
        name: The name of the block.
    """

    def compute(*operands: Any) -> Any:
        def at(*index: Any) -> Any:
            found = []
            for operand in operands:
                own = index[len(index) - len(operand.shape) :]
                sizes = zip(operand.shape, shape[len(shape) - len(own) :], own, strict=True)
                found.append(operand(*(i if int(s) == full else 0 for s, full, i in sizes)))
            return function(*found)

        return te.compute(tuple(shape), at, name=name)

    return compute


def quantized(exponent: int, zero: int, low: int, high: int, rounding: str) -> Callable[[Any], Any]:
    """Return the function from a floating-point number to its code."""

    def code(x: Any) -> Any:
        dtype = str(x.ty.dtype)
        scaled = x * number(2.0**exponent, dtype)
        if rounding != HALF_EVEN:
            scaled = tirx.floor(scaled + number(0.5, dtype))
        # Ends are whole, so that it is clipped first and then rounded, in numbers of few digits.
        ends = [number(end - zero, dtype) for end in (low, high)]
        scaled = tirx.min(tirx.max(scaled, ends[0]), ends[1])
        return tirx.Cast("uint8", tirx.Cast("int32", tirx.nearbyint(scaled)) + zero)

    return code


def looked_up(x: Any, table: Any) -> Any:
    """Compute ``table[x]``."""
    return te.compute(x.shape, lambda *i: table[tirx.Cast("int32", x[i])], name="lookup")


def matrices(inner: int, a_zero: int, b_zero: int) -> Callable[[Any, Any], Any]:
    """Return the kernel ``[B, M, K'], [B or 1, K, N] -> [B, M, N]``, int32; K' >= K = ``inner``."""

    def compute(a: Any, b: Any) -> Any:
        k = te.reduce_axis((0, inner), name="k")
        alone = int(b.shape[0]) == 1

        def at(i: Any, m: Any, n: Any) -> Any:
            left = whole(a[i, m, k], a_zero)
            return te.sum(left * whole(b[0 if alone else i, k, n], b_zero), axis=k)

        shape = (a.shape[0], a.shape[1], b.shape[2])
        return te.compute(shape, at, name="contraction", attrs={ROLE: CONTRACTION})

    return compute


def window_sums(pool: Pool, zero: int) -> Callable[[Any], Any]:
    """Return the kernel ``[N, *spatial, C] -> [N, *out, C]`` of sums over windows, int32."""

    def compute(x: Any) -> Any:
        sizes = [int(s) for s in x.shape[1:-1]]
        axes = [te.reduce_axis((0, k), name=f"k{i}") for i, k in enumerate(pool.kernel)]

        def at(n: Any, *index: Any) -> Any:
            *place, c = index
            spots, tests = spots_of(pool, sizes, place, axes)
            value = whole(x[(n, *spots, c)], zero)
            if tests:
                value = tirx.if_then_else(tirx.all(*tests), value, number(0, "int32"))
            return te.sum(value, axis=axes)

        shape = (x.shape[0], *pool.outputs, x.shape[-1])
        return te.compute(shape, at, name="total", attrs={ROLE: WINDOW})

    return compute


def averaged(settle: Settle, by: int, kind: str) -> Callable[[Any, Any], Any]:
    """Return the function from a sum and a count to the code of their quotient.

    Args:
        settle: The zero point, the clip and the rounding.
        by: What it is shifted by.
        kind: The dtype that is large enough.
    """

    def code(total: Any, count: Any) -> Any:
        total, count = (tirx.Cast(kind, v) for v in (total, count))
        total = tirx.shift_left(total, number(-by, kind)) if by < 0 else total
        count = tirx.shift_left(count, number(by, kind)) if by > 0 else count
        return clipped(quotient(total, count, settle.rounding, kind), settle, kind)

    return code


def clipped(value: Any, settle: Settle, kind: str) -> Any:
    """Return the code of a whole number."""
    value = value + number(settle.zero, kind)
    value = tirx.min(tirx.max(value, number(settle.low, kind)), number(settle.high, kind))
    return tirx.Cast("uint8", value)


# ---------------------------------------------------------------------- rows


def softmax(
    size: int, lanes: int, exponent: int, settle: Settle, divided: bool
) -> Callable[[Any, Any], Any]:
    """Return the kernel of softmax over the last axis, of codes and a table of exponentials.

    Args:
        size: The length of a row.
        lanes: How many numbers a vector holds.
        exponent: The result's step is ``2**-exponent``.
        settle: The zero point, the clip and the rounding.
        divided: Whether the quotient, divided in float32 and then rounded, is the exact one.
    """
    attrs = {ROLE: ROWS}

    def compute(x: Any, table: Any) -> Any:
        shape = (*x.shape[:-1], size)
        top = reduced(x, size, lanes, lambda i, k: x[(*i, k)], "top", te.max)

        def lift(*i: Any) -> Any:
            return table[tirx.Cast("int32", top[i[:-1]]) - tirx.Cast("int32", x[i])]

        lifted = te.compute(shape, lift, name="lifted", attrs=attrs)
        total = reduced(lifted, size, lanes, lambda i, k: lifted[(*i, k)], "total")

        def quick(*i: Any) -> Any:
            power = tirx.Cast("float32", lifted[i]) * number(2.0**exponent, "float32")
            part = tirx.nearbyint(power / tirx.Cast("float32", total[i[:-1]]))
            # A number between 0 and 2^exponent; beyond the codes it is clipped in any case.
            part = tirx.min(part, number(1024, "float32"))
            return clipped(tirx.Cast("int32", part), settle, "int32")

        def exact(*i: Any) -> Any:
            power, sums = tirx.Cast("int64", lifted[i]), tirx.Cast("int64", total[i[:-1]])
            power = tirx.shift_left(power, number(max(exponent, 0), "int64"))
            sums = tirx.shift_left(sums, number(max(-exponent, 0), "int64"))
            return clipped(quotient(power, sums, settle.rounding, "int64"), settle, "int64")

        return te.compute(shape, quick if divided else exact, name="softmax", attrs=attrs)

    return compute


def layer_norm(
    size: int, lanes: int, eps: float, zero: int, settle: Settle, centred: bool
) -> Callable[..., Any]:
    """Return the kernel that normalises rows of codes.

    It takes a factor and a summand per run of elements, ``[1, runs]``, or ``[rows, runs]`` where
    they differ along the axis before the last.

    Args:
        size: The length of a row.
        lanes: How many numbers a vector holds.
        eps: In squared steps of the operand.
        zero: The operand's zero point.
        settle: The zero point, the clip and the rounding of the result.
        centred: Whether the mean is taken away.
    """
    attrs = {ROLE: ROWS}
    kind = "int32" if size * 255**2 < 2**31 else "int64"

    def compute(x: Any, gain: Any, offset: Any) -> Any:
        def code(i: Any, k: Any, dtype: str) -> Any:
            return whole(x[(*i, k)], zero, dtype)

        total = reduced(x, size, lanes, lambda i, k: code(i, k, "int32"), "total", dtype="int32")
        squares = reduced(
            x, size, lanes, lambda i, k: code(i, k, kind) * code(i, k, kind), "squares",
            dtype=kind,
        )  # fmt: skip

        def spread(*i: Any) -> Any:
            mean, power = tirx.Cast("int64", total[i]), tirx.Cast("int64", squares[i])
            above = power * number(size, "int64")
            above = tirx.Cast("float64", above - mean * mean if centred else above)
            variance = above / number(float(size**2), "float64")
            root = tirx.sqrt(variance + number(eps, "float64")) * number(float(size), "float64")
            return tirx.Cast("float32", number(1.0, "float64") / root)

        spreads = te.compute(x.shape[:-1], spread, name="spread", attrs=attrs)

        def at(*i: Any) -> Any:
            row, run = i[:-1], size // int(gain.shape[1])
            own = (i[-2] if int(gain.shape[0]) > 1 else 0, i[-1] if run == 1 else i[-1] // run)
            apart = whole(x[i], zero) * number(size, "int32")
            apart = apart - total[row] if centred else apart
            y = _once(_once(tirx.Cast("float32", apart) * spreads[row]) * gain[own])
            y = y + offset[own]
            if settle.rounding != HALF_EVEN:
                y = tirx.floor(y + number(0.5, "float32"))
            y = tirx.max(y, number(settle.low - settle.zero, "float32"))
            y = tirx.min(y, number(settle.high - settle.zero, "float32"))
            return clipped(tirx.Cast("int32", tirx.nearbyint(y)), settle, "int32")

        return te.compute((*x.shape[:-1], size), at, name="layer_norm", attrs=attrs)

    return compute


def _once(value: Any) -> Any:
    """Return a product that is rounded before it is added to anything.

    TVM lets LLVM make one operation of a product and a sum, which rounds once instead of twice.
    """
    fence = T.llvm_lookup_intrinsic_id("llvm.arithmetic.fence")
    return T.call_llvm_pure_intrin(fence, value, dtype="float32")


def counts_of(pool: Pool, sizes: Sequence[int]) -> np.ndarray:
    """Return what every window of an average is divided by: int32 ``[*out]``."""
    found = np.ones((), "int64")
    around = pool.padding if pool.count_padding else (0,) * len(sizes)
    for i, size in enumerate(sizes):
        start = np.arange(pool.outputs[i]) * pool.stride[i] - pool.padding[i]
        stop = np.minimum(start + pool.kernel[i], size + around[i])
        count = stop - np.maximum(start, -around[i])
        found = np.multiply.outer(found, count)
    return found.astype("int32")
