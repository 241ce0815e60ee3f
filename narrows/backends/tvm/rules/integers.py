"""Rules for the operators of integer programs, ``narrows.*``: layers and products."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from tvm import relax

from narrows.backends.tvm.kernels import codes, convolution, dots
from narrows.backends.tvm.kernels.convolution import Window
from narrows.backends.tvm.kernels.settling import Settle
from narrows.backends.tvm.lowering import Lowering
from narrows.backends.tvm.rules.contractions import as_matrices, fixed, transposed_window
from narrows.backends.tvm.rules.layout import part
from narrows.backends.tvm.rules.table import Call, rule
from narrows.backends.tvm.schedules.dots import DOTS
from narrows.backends.tvm.values import Value

INT32 = 2**31


def settle_of(call: Call, shifts: Any, bound: int) -> Settle:
    """Return how a call's accumulators become codes.

    Args:
        call: The call.
        shifts: One shift, or one per channel.
        bound: No accumulator is larger in magnitude.
    """
    args = call.args
    by = np.atleast_1d(np.asarray(shifts, "int64"))
    if (by == by[0]).all():
        by = by[:1]
    return Settle(by, args["zero"], args["low"], args["high"], args["rounding"], bound)


def settled(low: Lowering, acc: Value, settle: Settle, bias: np.ndarray | None = None) -> Value:
    """Return the codes of accumulators.

    Args:
        low: The lowering.
        acc: The accumulators.
        settle: What becomes of them.
        bias: int32 per channel, added first; channels are stored last.
    """
    more = settle.constants(acc.width)
    along = bool(more)
    if bias is not None:
        more.append(np.pad(bias, (0, acc.width - bias.size)))

    def code(value: Any, *constants: Any) -> Any:
        if bias is not None:
            value = value + constants[-1]
        return settle.codes(value, constants[0] if along else None)

    constants = [relax.const(array, array.dtype.name) for array in more]
    kernel = codes.pointwise(acc.stored, code, "settled")
    expr = low.kernel(kernel, low.expr(acc), *constants, name="settle", alike=True)
    return low.like(acc, expr, "uint8")


# ---------------------------------------------------------------------- layers


@rule("narrows.conv")
def _convolution(low: Lowering, call: Call) -> Value:
    weight = fixed(low, call.args["weight"], "the weight of a convolution")
    padding = tuple(call.args["padding"])
    window = Window(
        weight.shape[2:], tuple(call.args["stride"]), padding, padding,
        tuple(call.args["dilation"]), (1,) * len(padding),
    )  # fmt: skip
    return _slide(low, call, weight, window)


@rule("narrows.conv_transpose")
def _transposed(low: Lowering, call: Call) -> Value:
    weight = fixed(low, call.args["weight"], "the weight of a convolution")
    args = call.args
    given = [tuple(args[k]) for k in ("stride", "padding", "output_padding", "dilation")]
    return _slide(low, call, *transposed_window(low, weight, *given, args["groups"]))


def _slide(low: Lowering, call: Call, weight: np.ndarray, window: Window) -> Value:
    """Return the codes of a convolution; ``weight`` is int8 ``[O, I, *kernel]``."""
    x, outputs, groups = call.args["x"], weight.shape[0], call.args["groups"]
    if groups == x.shape[1] == outputs:
        expr, offset = _each(low, x, weight, window, call.args["x_zero"]), 0
    else:
        expr, offset = _all(low, x, weight, window, groups, call.args["x_zero"])
    shape = (x.shape[0], outputs, *window.outputs(x.shape[2:]))
    order = (0, *range(2, len(shape)), 1)
    acc = Value(shape, "int32", order, int(expr.ty.shape[-1]), expr)
    return _finished(low, call, acc, weight.reshape(outputs, -1), offset)


def _each(low: Lowering, x: Value, weight: np.ndarray, window: Window, zero: int) -> Any:
    """Return the sums of a filter per channel."""
    width = low.rounded(weight.shape[0], "int32")
    x = low.channels_last(x, width)
    if x.width % low.machine.lanes_of("int32"):
        x = low.widened(low.exact(x), width)
    dot = DOTS.get(low.machine.dot)
    if dot is not None and dot.packed:
        packed, kernel = dots.pack_columns(weight, x.width), dots.depthwise(window, zero)
    else:
        taps = np.moveaxis(weight[:, 0], 0, -1)
        more = [(0, 0)] * (taps.ndim - 1) + [(0, x.width - weight.shape[0])]
        packed, kernel = np.pad(taps, more), dots.depthwise_plain(window, zero)
    return low.kernel(kernel, x.expr, relax.const(packed, packed.dtype.name), name="depthwise")


def _all(
    low: Lowering, x: Value, weight: np.ndarray, window: Window, groups: int, zero: int
) -> tuple[Any, int]:
    """Return the sums of filters over all channels of a group, and what codes were lessened by."""
    lanes, quad, offset = _quads(low)
    if groups > 1:
        weight, groups, _ = convolution.merge_groups(weight, groups, lanes)
    inner = weight.shape[1]
    packed = dots.pack_quads(weight, lanes, quad)
    x = low.channels_last(x, (groups - 1) * inner + packed.shape[-3] * quad)
    kernel = dots.convolution(window, groups, inner, zero, offset)
    return low.kernel(kernel, x.expr, relax.const(packed, "int8"), name="conv"), offset


def _quads(low: Lowering) -> tuple[int, int, int]:
    """Return lanes, channels of a quad, and what the machine's instruction wants subtracted."""
    dot = DOTS.get(low.machine.dot)
    if dot is None:
        return low.machine.lanes_of("int32"), 1, 0
    return dot.lanes, dots.QUAD, dot.offset


def _finished(low: Lowering, call: Call, acc: Value, weight: np.ndarray, offset: int) -> Value:
    """Return the codes of a layer.

    Args:
        low: The lowering.
        call: The layer.
        acc: The sums of codes, less ``offset``, times weights.
        weight: int8 ``[O, ...]``, two axes.
        offset: What was subtracted from the codes, where it should have been their zero point. What
            is missing is the same everywhere, and goes into the bias.
    """
    zero, bias = call.args["x_zero"], call.args["bias"]
    rows = weight.astype("int64")
    known = np.zeros(len(rows), "int64") if bias is None else fixed(low, bias, "a bias")
    reach = np.abs(rows).sum(1) * max(255 - zero, zero) + np.abs(known.astype("int64"))
    # With the codes that can occur, it was proven to stay below 2^31.
    settle = settle_of(call, call.args["shift_by"], min(int(reach.max(initial=0)), INT32 - 1))
    moved = known + (offset - zero) * rows.sum(1)
    # It may leave 32 bits, as the sums then do; the two wrap around together.
    return settled(low, acc, settle, moved.astype("int32") if moved.any() else None)


@rule("narrows.linear")
def _linear(low: Lowering, call: Call) -> Value:
    weight = fixed(low, call.args["weight"], "the weight of a layer")
    x, (lanes, quad, offset) = call.args["x"], _quads(low)
    last = x.rank - 1
    x = low.ordered(x, (*(a for a in x.order if a != last), last))
    packed = dots.pack_quads(weight, lanes, quad)
    x = low.widened(x, packed.shape[-3] * quad)
    flat = x.rank == 1
    x = low.reshaped(x, (1, *x.shape)) if flat else x
    axis = x.order[-2]
    rows = x.shape[axis]
    more = _missing(rows) if quad > 1 else 0
    given = low.expr(x)
    if more:
        given = low.emit(relax.op.nn.pad(given, [0, 0] * (x.rank - 2) + [0, more, 0, 0]))
    constant = relax.const(packed, "int8")
    expr = low.kernel(dots.linear(offset), given, constant, name="linear")
    shape = (*x.shape[:axis], rows + more, *x.shape[axis + 1 : -1], weight.shape[0])
    acc = Value(shape, "int32", x.order, int(expr.ty.shape[-1]), expr)
    y = part(low, _finished(low, call, acc, weight, offset), axis, 0, rows)
    return low.reshaped(y, call.shape) if flat else y


TILES = range(5, 15)  # rows of a good tile


def _missing(rows: int) -> int:
    """Return how many rows more can be divided into good tiles."""
    if rows < TILES[0] or any(rows % tile == 0 for tile in TILES):
        return 0
    return min(-rows % tile for tile in TILES[3:])


@rule("narrows.matmul")
def _matmul(low: Lowering, call: Call) -> Value:
    a, b, args = call.args["a"], call.args["b"], call.args
    shape, inner = call.shape, a.shape[-1]
    a = low.reshaped(a, (1, *a.shape)) if a.rank == 1 else a
    b = low.reshaped(b, (*b.shape, 1)) if b.rank == 1 else b
    a, b, lead = as_matrices(low, a, b)
    rows, columns = a.shape[-2], b.shape[-1]
    b = low.widened(b, low.rounded(columns, "int32"))
    kernel = codes.matrices(inner, args["a_zero"], args["b_zero"])
    expr = low.kernel(kernel, low.expr(a), low.expr(b), name="matmul")
    flat = (math.prod(lead), rows, columns)
    acc = Value(flat, "int32", (0, 1, 2), int(expr.ty.shape[-1]), expr)
    reach = [max(255 - args[k], args[k]) for k in ("a_zero", "b_zero")]
    bound = min(inner * reach[0] * reach[1], INT32 - 1)  # proven with the codes that occur
    return low.reshaped(settled(low, acc, settle_of(call, args["shift_by"], bound)), shape)
