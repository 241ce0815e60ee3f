"""Rules for the operators of integer programs, ``narrows.*``, that are no layers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tvm import relax, tirx

from narrows.backends.tvm.kernels import codes
from narrows.backends.tvm.kernels.pooling import Pool
from narrows.backends.tvm.kernels.settling import HALF_EVEN, Settle
from narrows.backends.tvm.lowering import Lowering
from narrows.backends.tvm.rules.contractions import fixed
from narrows.backends.tvm.rules.integers import INT32, settle_of
from narrows.backends.tvm.rules.layout import joined
from narrows.backends.tvm.rules.norms import by_rows
from narrows.backends.tvm.rules.reductions import reduced
from narrows.backends.tvm.rules.resample import resampled
from narrows.backends.tvm.rules.table import Call, rule
from narrows.backends.tvm.values import Value

# The largest shift that keeps a code in 64 bits, with room for a sum and for rounding.
MOST_SHIFT = 52


def each(
    low: Lowering, values: Sequence[Value], function: Callable[..., Any], dtype: str, name: str
) -> Value:
    """Return a function of one element of each value, which are broadcast."""
    exprs, like = low.aligned(values)
    kernel = codes.pointwise(like.stored, function, name)
    alike = all(tuple(int(s) for s in e.ty.shape) == like.stored for e in exprs)
    return low.like(like, low.kernel(kernel, *exprs, name=name, alike=alike), dtype)


# ---------------------------------------------------------------------- in and out


@rule("narrows.quantize")
def _quantize(low: Lowering, call: Call) -> Value:
    args = call.args
    keys = ("exponent", "zero", "low", "high", "rounding")
    return each(low, [args["x"]], codes.quantized(*(args[k] for k in keys)), "uint8", "quantize")


@rule("narrows.dequantize")
def _dequantize(low: Lowering, call: Call) -> Value:
    x, zero, powers = call.args["x"], call.args["zero"], call.args["powers"]
    scale = 2.0 ** -call.args["exponent"]

    def number(code: Any, step: Any) -> Any:
        return tirx.Cast("float32", codes.whole(code, zero)) * step

    if not powers:
        step = tirx.const(scale, "float32")
        return each(low, [x], lambda code: number(code, step), "float32", "dequantize")
    lie = [len(powers) if a == call.args["axis"] else 1 for a in range(len(x.shape))]
    steps = (scale * np.exp2(-np.asarray(powers, "float64"))).astype("float32").reshape(lie)
    return each(low, [x, Value.constant(steps)], number, "float32", "dequantize")


# ---------------------------------------------------------------------- element by element


def _reach(zero: int) -> int:
    return max(255 - zero, zero)


@rule("narrows.add")
def _add(low: Lowering, call: Call) -> Value:
    args = call.args
    shifts = (args["a_shift"], args["b_shift"])
    zeros = (args["a_zero"], args["b_zero"])
    if max(shifts) > MOST_SHIFT:
        raise low.refuse(f"an operand that is shifted to the left by {max(shifts)}")
    bound = sum(_reach(zero) << by for zero, by in zip(zeros, shifts, strict=True))
    settle = settle_of(call, args["shift_by"], bound)

    def code(a: Any, b: Any) -> Any:
        left, right = (
            tirx.shift_left(whole, codes.number(by, settle.dtype)) if by else whole
            for whole, by in (
                (codes.whole(operand, zero, settle.dtype), by)
                for operand, zero, by in zip((a, b), zeros, shifts, strict=True)
            )
        )
        return settle.codes(left + right if args["sign"] == 1 else left - right)

    return each(low, [args["a"], args["b"]], code, "uint8", "add")


@rule("narrows.mul")
def _mul(low: Lowering, call: Call) -> Value:
    args = call.args
    zeros = (args["a_zero"], args["b_zero"])
    settle = settle_of(call, args["shift_by"], _reach(zeros[0]) * _reach(zeros[1]))

    def code(a: Any, b: Any) -> Any:
        return settle.codes(codes.whole(a, zeros[0]) * codes.whole(b, zeros[1]))

    return each(low, [args["a"], args["b"]], code, "uint8", "multiply")


@rule("narrows.prelu")
def _prelu(low: Lowering, call: Call) -> Value:
    args, zero, unit = call.args, call.args["x_zero"], 1 << call.args["unit"]
    slopes = fixed(low, args["slopes"], "the slopes of a prelu").astype("int32")
    bound = _reach(zero) * max(unit, int(np.abs(slopes).max()))
    settle = settle_of(call, args["shift_by"], bound)

    def code(x: Any, slope: Any) -> Any:
        whole = codes.whole(x, zero)
        factor = tirx.Select(whole > 0, codes.number(unit, "int32"), slope)
        return settle.codes(whole * factor)

    return each(low, [args["x"], Value.constant(slopes)], code, "uint8", "prelu")


@rule("narrows.rescale")
def _rescale(low: Lowering, call: Call) -> Value:
    settle = settle_of(call, call.args["shift_by"], _reach(call.args["x_zero"]))
    return _rescaled(low, call.args["x"], call.args["x_zero"], settle)


def _rescaled(low: Lowering, x: Value, zero: int, settle: Settle) -> Value:
    """Return codes on another grid, or clipped."""
    return each(
        low, [x], lambda code: settle.codes(codes.whole(code, zero)), "uint8", "rescale"
    )  # fmt: skip


@rule("narrows.concat")
def _concat(low: Lowering, call: Call) -> Value:
    args = call.args
    parts = []
    for x, by, zero in zip(args["xs"], args["shift_by"], args["zeros"], strict=True):
        settle = settle_of(call, by, _reach(zero))
        same = by == 0 and zero == settle.zero and (settle.low, settle.high) == (0, 255)
        parts.append(x if same else _rescaled(low, x, zero, settle))
    return joined(low, parts, args["axis"])


@rule("narrows.lookup")
def _lookup(low: Lowering, call: Call) -> Value:
    table = relax.const(fixed(low, call.args["table"], "a table"), "uint8")
    x = call.args["x"]
    return low.like(x, low.kernel(codes.looked_up, low.expr(x), table, name="lookup", alike=True))


# ---------------------------------------------------------------------- averages


@rule("narrows.mean")
def _mean(low: Lowering, call: Call) -> Value:
    x, axes, zero = call.args["x"], list(call.args["axes"]), call.args["x_zero"]
    count = math.prod(x.shape[a] for a in axes)
    kind = "int32" if count * 255 < INT32 else "int64"
    wide = each(low, [x], lambda code: codes.whole(code, zero, kind), kind, "whole")
    total = reduced(low, wide, axes, call.args["keepdim"], relax.op.sum)
    divisor = Value.constant(np.asarray(call.args["divisor"] or count, "int32"))
    return _average(low, call, total, divisor, count, zero)


def _average(
    low: Lowering, call: Call, total: Value, count: Value, most: int, zero: int
) -> Value:  # fmt: skip
    """Return codes of exact quotients of sums of at most ``most`` codes."""
    by = call.args["shift_by"]
    largest = 2 * ((most * _reach(zero)) << max(-by, 0)) + 3 * (most << max(by, 0))
    if largest >= 2**63:
        raise low.refuse(f"an average that is shifted by {by}")
    kind = "int32" if largest < INT32 else "int64"
    settle = settle_of(call, 0, 0)
    return each(low, [total, count], codes.averaged(settle, by, kind), "uint8", "average")


@rule("narrows.average_pool")
def _average_pool(low: Lowering, call: Call) -> Value:
    args, x, zero = call.args, call.args["x"], call.args["x_zero"]
    pool = Pool(
        tuple(args["kernel"]), tuple(args["stride"]), tuple(args["padding"]),
        (1,) * len(args["kernel"]), tuple(call.shape[2:]), False, bool(args["count_include_pad"]),
        0,
    )  # fmt: skip
    x = low.channels_last(x)
    expr = low.kernel(codes.window_sums(pool, zero), x.expr, name="pool")
    total = Value(call.shape, "int32", x.order, x.width, expr)
    counts = codes.counts_of(pool, x.shape[2:])
    most = max(int(counts.max()), args["divisor"])
    if args["divisor"]:
        counts = np.full_like(counts, args["divisor"])
    shown = counts if (counts != most).any() else counts.reshape(-1)[:1].reshape((1,) * counts.ndim)
    return _average(low, call, total, Value.constant(shown[None, None]), most, zero)


@rule("narrows.resample")
def _resample(low: Lowering, call: Call) -> Value:
    args, zero = call.args, call.args["x_zero"]
    places, weights = (
        [fixed(low, v, "a table of a resizing") for v in args[k]] for k in ("places", "weights")
    )
    bound = _reach(zero) * math.prod(int(np.abs(w).sum(1).max()) for w in weights)
    if bound >= INT32:
        raise low.refuse(f"weighted sums of up to {bound:,}")
    x = each(low, [low.channels_last(args["x"])], lambda c: codes.whole(c, zero), "int32", "whole")
    for axis, pair in enumerate(zip(places, weights, strict=True), x.rank - len(places)):
        x = resampled(low, x, axis, *pair)
    counts = np.ones((), "int64")
    for weight in weights:
        counts = np.multiply.outer(counts, weight.sum(1))
    most = int(counts.max())
    if (counts == most).all() and most & (most - 1) == 0:
        settle = settle_of(call, args["shift_by"] + most.bit_length() - 1, bound)
        return each(low, [x], settle.codes, "uint8", "resize")
    shown = counts.astype("int32")[(None,) * (x.rank - len(places))]
    return _average(low, call, x, Value.constant(shown), max(most, bound // _reach(zero)), zero)


# ---------------------------------------------------------------------- rows


def _plain_settle(call: Call) -> Settle:
    return settle_of(call, 0, 0)


@rule("narrows.softmax")
def _softmax(low: Lowering, call: Call) -> Value:
    x, exponent, axis = call.args["x"], call.args["exponent"], call.args["axis"]
    table = fixed(low, call.args["table"], "a table")
    size, most = x.shape[axis], int(table.max())
    if exponent > 40:
        raise low.refuse(f"a softmax with steps of 2^-{exponent}")
    # As `narrows.ir.integer.statistics.table_bits` says, by which such tables are made.
    bits = max(most - 1, 0).bit_length()
    divided = call.args["rounding"] == HALF_EVEN and bits <= min(
        15, 23 - exponent, 24 - math.ceil(math.log2(size))
    )
    lanes = low.machine.lanes_of("int32")
    kernel = codes.softmax(size, lanes, exponent, _plain_settle(call), divided)
    y = by_rows(low, x, axis, kernel, "softmax", relax.const(table, "int32"))
    return dataclasses.replace(y, dtype="uint8")


@rule("narrows.layer_norm")
def _layer_norm(low: Lowering, call: Call) -> Value:
    if low.machine.gpu:
        raise low.refuse("a layer norm of codes on a GPU, whose compilers round sums their own way")
    x, count = call.args["x"], call.args["axes"]
    size = math.prod(x.shape[-count:])
    flat = low.reshaped(x, (*x.shape[:-count], size)) if count > 1 else x
    lanes = low.machine.lanes_of("int32")
    kernel = codes.layer_norm(
        size, lanes, call.args["eps"], call.args["x_zero"], _plain_settle(call),
        call.args["centred"],
    )  # fmt: skip
    parameters = [
        _by_runs(fixed(low, call.args[k], "a parameter of a norm"), x.shape, count)
        for k in ("gain", "offset")
    ]
    if len(parameters[0]) > 1:  # they go by the axis before the last
        flat = low.ordered(flat, range(flat.rank))
    given = [relax.const(p, "float32") for p in parameters]
    return low.reshaped(by_rows(low, flat, -1, kernel, "layer_norm", *given), call.shape)


def _by_runs(array: np.ndarray, shape: tuple[int, ...], count: int) -> np.ndarray:
    """Return a parameter of a norm as ``[1 or rows, runs]``.

    Args:
        array: It, as it broadcasts.
        shape: Of what is normalised.
        count: How many trailing axes are.
    """
    array = array.reshape((1,) * (len(shape) - array.ndim) + array.shape)
    own, inner = array.shape[-count:], shape[-count:]
    runs = max((a + 1 for a in range(count) if own[a] != 1), default=0)
    if own[:runs] != inner[:runs]:
        array, runs = np.broadcast_to(array, (*array.shape[:-count], *inner)), count
    return np.ascontiguousarray(array.reshape(-1, math.prod(inner[:runs])))
