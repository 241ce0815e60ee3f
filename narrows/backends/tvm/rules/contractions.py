"""Rules for what sums over a weight or over another activation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from tvm import relax

from narrows.backends.tvm.kernels import convolution as kernels
from narrows.backends.tvm.kernels.convolution import Window
from narrows.backends.tvm.lowering import Lowering
from narrows.backends.tvm.rules.pointwise import binary
from narrows.backends.tvm.rules.table import Call, rule
from narrows.backends.tvm.values import Value

op = relax.op


def fixed(low: Lowering, value: Value, what: str) -> np.ndarray:
    """Return the numbers of a constant argument."""
    if value.array is None:
        raise low.refuse(f"{what} is computed at run time")
    return value.array


# ---------------------------------------------------------------------- convolutions


@rule("conv1d conv2d conv3d conv1d.padding conv2d.padding conv3d.padding")
def _convolution(low: Lowering, call: Call) -> Value:
    weight = fixed(low, call.args["weight"], "the weight of a convolution")
    rank = weight.ndim - 2
    stride, dilation = (_spread(call.args[k], rank) for k in ("stride", "dilation"))
    before, after = _padding(call.args["padding"], weight.shape[2:], dilation)
    window = Window(weight.shape[2:], stride, before, after, dilation, (1,) * rank)
    return _slide(low, call, weight, window, call.args["groups"])


@rule("conv_transpose1d conv_transpose2d.input conv_transpose3d.input")
def _transposed(low: Lowering, call: Call) -> Value:
    weight = fixed(low, call.args["weight"], "the weight of a convolution")
    rank, groups = weight.ndim - 2, call.args["groups"]
    stride, dilation, padding, more = (
        _spread(call.args[k], rank) for k in ("stride", "dilation", "padding", "output_padding")
    )
    flipped, window = transposed_window(low, weight, stride, padding, more, dilation, groups)
    return _slide(low, call, flipped, window, groups, wants=call.shape[2:])


def transposed_window(
    low: Lowering,
    weight: np.ndarray,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    more: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> tuple[np.ndarray, Window]:
    """Return the weight ``[O, I, *kernel]`` and the window of a transposed convolution.

    Args:
        low: The lowering.
        weight: ``[I, O / groups, *kernel]``.
        stride: Steps between the operand's elements in the result.
        padding: What is cut off the result.
        more: What is added to it.
        dilation: Steps between the kernel's elements.
        groups: How many groups there are.
    """
    inputs, outputs = weight.shape[:2]
    split = weight.reshape(groups, inputs // groups, outputs, *weight.shape[2:])
    turned = split.swapaxes(1, 2).reshape(groups * outputs, inputs // groups, *weight.shape[2:])
    flipped = np.flip(turned, tuple(range(2, weight.ndim)))
    reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    before = tuple(r - p for r, p in zip(reach, padding, strict=True))
    after = tuple(b + m for b, m in zip(before, more, strict=True))
    if min(*before, *after) < 0:
        raise low.refuse("a transposed convolution that is padded by more than its kernel")
    window = Window(weight.shape[2:], (1,) * len(reach), before, after, dilation, stride)
    return np.ascontiguousarray(flipped), window


def _spread(value: Any, rank: int) -> tuple[int, ...]:
    values = [value] if isinstance(value, int) else list(value)
    return tuple(values * rank if len(values) == 1 else values)


def _padding(
    padding: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the zeros before and behind each axis."""
    if padding == "valid":
        return (0,) * len(kernel), (0,) * len(kernel)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        before = tuple(t // 2 for t in total)
        return before, tuple(t - b for t, b in zip(total, before, strict=True))
    sides = _spread(padding, len(kernel))
    return sides, sides


def _slide(
    low: Lowering,
    call: Call,
    weight: np.ndarray,
    window: Window,
    groups: int,
    wants: tuple[int, ...] = (),
) -> Value:
    """Return a convolution of the call's first argument, bias included.

    Args:
        low: The lowering.
        call: The call.
        weight: ``[O, I, *kernel]``.
        window: How it slides.
        groups: How many groups there are.
        wants: The spatial sizes of the result, where rounding leaves a choice.
    """
    x, outputs = call.args["input"], weight.shape[0]
    batched = x.rank == weight.ndim
    if not batched:
        x = low.reshaped(x, (1, *x.shape))
    lanes = low.machine.lanes_of(call.dtype)
    each = groups == x.shape[1] == outputs
    if each:
        width = low.rounded(outputs, call.dtype)
        x = low.channels_last(x, width)
        taps = np.moveaxis(weight[:, 0], 0, -1)
        more = [(0, 0)] * (taps.ndim - 1) + [(0, x.width - outputs)]
        packed, kernel, name = np.pad(taps, more), kernels.depthwise(window), "depthwise"
    else:
        reads = 0
        if groups > 1:
            weight, groups, reads = kernels.merge_groups(weight, groups, lanes)
        x = low.channels_last(x, reads if reads > x.shape[1] else 0)
        packed, kernel = kernels.pack(weight, lanes), kernels.convolution(window, groups)
        name = "conv"
    expr = low.kernel(kernel, x.expr, relax.const(packed, call.dtype), name=name)
    sizes = window.outputs(x.shape[2:])
    assert not wants or sizes == tuple(wants)
    shape = (x.shape[0], outputs, *sizes)
    width = int(expr.ty.shape[-1])
    y = Value(shape, call.dtype, (0, *range(2, len(shape)), 1), width, expr)
    y = _biased(low, y, call.args["bias"], axis=1)
    return y if batched else low.reshaped(y, call.shape)


def _biased(low: Lowering, y: Value, bias: Value | None, axis: int) -> Value:
    if bias is None:
        return y
    shape = [1] * y.rank
    shape[axis] = bias.shape[0]
    return binary(low, y, low.reshaped(bias, shape), op.add)


# ---------------------------------------------------------------------- matrices


@rule("linear")
def _linear(low: Lowering, call: Call) -> Value:
    x, weight = call.args["input"], call.args["weight"]
    if weight.array is None or x.array is not None:
        y = multiplied(low, x, weight.permuted((1, 0)), call.dtype)
    else:
        y = by_weight(low, x, weight.array)
    return _biased(low, y, call.args["bias"], axis=-1)


def by_weight(low: Lowering, x: Value, weight: np.ndarray) -> Value:
    """Return ``x [..., I]`` times ``weight [O, I]``, transposed."""
    last = x.rank - 1
    x = low.ordered(x, (*(a for a in x.order if a != last), last))
    packed = kernels.pack(weight, low.machine.lanes_of(x.dtype))
    expr = low.kernel(kernels.linear, x.expr, relax.const(packed, x.dtype), name="linear")
    shape = (*x.shape[:-1], weight.shape[0])
    return Value(shape, x.dtype, x.order, int(expr.ty.shape[-1]), expr)


@rule("addmm")
def _addmm(low: Lowering, call: Call) -> Value:
    y = multiplied(low, call.args["mat1"], call.args["mat2"], call.dtype)
    bias = call.args["self"]
    for value, key in ((y, "alpha"), (bias, "beta")):
        number = call.args[key]
        if number != 1:
            factor = Value.constant(np.asarray(number, call.dtype))
            value = binary(low, value, factor, op.multiply)
        y, bias = (value, bias) if key == "alpha" else (y, value)
    return binary(low, y, bias, op.add)


@rule("matmul")
def _matmul(low: Lowering, call: Call) -> Value:
    a, b = call.args["self"], call.args.get("other", call.args.get("mat2"))
    y = multiplied(low, a, b, call.dtype)
    return low.reshaped(y, call.shape)


def multiplied(low: Lowering, a: Value, b: Value, dtype: str) -> Value:
    """Return the matrix product of two values, as ``torch.matmul`` defines it."""
    if np.dtype(dtype).kind != "f":
        expr = low.emit(op.matmul(low.plain(a), low.plain(b)))
        return low.made(expr, [int(s) for s in expr.ty.shape], dtype)
    drop_rows, drop_columns = a.rank == 1, b.rank == 1
    a = low.reshaped(a, (1, *a.shape)) if drop_rows else a
    b = low.reshaped(b, (*b.shape, 1)) if drop_columns else b
    if b.rank == 2 and b.array is not None and a.array is None:
        y = by_weight(low, a, np.ascontiguousarray(b.array.T))
    else:
        y = _batched(low, a, b, dtype)
    if drop_rows or drop_columns:
        rows = () if drop_rows else y.shape[-2:-1]
        columns = () if drop_columns else y.shape[-1:]
        y = low.reshaped(y, (*y.shape[:-2], *rows, *columns))
    return y


def _batched(low: Lowering, a: Value, b: Value, dtype: str) -> Value:
    """Return ``[..., M, K]`` times ``[..., K, N]``; the leading axes broadcast."""
    inner = a.shape[-1]
    a, b, lead = as_matrices(low, a, b)
    rows, columns = a.shape[-2], b.shape[-1]
    b = low.widened(b, low.rounded(columns, dtype))
    expr = low.kernel(kernels.product(inner), low.expr(a), b.expr, name="matmul")
    flat = Value((math.prod(lead), rows, columns), dtype, (0, 1, 2), b.width, expr)
    return low.reshaped(flat, (*lead, rows, columns))


def as_matrices(low: Lowering, a: Value, b: Value) -> tuple[Value, Value, tuple[int, ...]]:
    """Return two operands of a product as ``[B, M, K]`` and ``[B or 1, K, N]``, and their lead."""
    lead = tuple(np.broadcast_shapes(a.shape[:-2], b.shape[:-2]))
    return (
        _matrices(low, a, lead),
        _matrices(low, b, lead if math.prod(b.shape[:-2]) != 1 else ()),
        lead,
    )


def _matrices(low: Lowering, value: Value, lead: tuple[int, ...]) -> Value:
    """Return a value as ``[B, M, N]``, stored so, with its leading axes broadcast to ``lead``."""
    matrix = value.shape[-2:]
    if lead and value.shape[:-2] != lead:
        shape = (*lead, *matrix)
        raised = low.reshaped(value, (1,) * (len(lead) + 2 - value.rank) + value.shape)
        expr = low.emit(op.broadcast_to(low.plain(raised), shape))
        value = low.made(expr, shape, value.dtype)
    value = low.ordered(value, range(value.rank))
    value = low.reshaped(value, (math.prod(lead), *matrix))
    return low.ordered(value, (0, 1, 2))


@rule("embedding")
def _embedding(low: Lowering, call: Call) -> Value:
    table, indices = call.args["weight"], call.args["indices"]
    expr = low.emit(op.take(low.plain(table), low.plain(indices), axis=0, mode="fast"))
    return low.made(expr, call.shape, call.dtype)
