"""Rules for statistics over axes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import relax

from narrows.backends.tvm.lowering import Lowering
from narrows.backends.tvm.rules.pointwise import binary, unary
from narrows.backends.tvm.rules.table import Call, rule
from narrows.backends.tvm.values import Value

op = relax.op


def reduced(
    low: Lowering, x: Value, axes: list[int], keep: bool, function: Callable[..., Any]
) -> Value:
    """Return ``function`` of a value over axes, which go away or stay with size 1."""
    axes = [a % x.rank for a in axes]
    if not axes:
        return x
    if x.order[-1] in axes:
        x = low.exact(x)
    places = sorted(x.at(a) for a in axes)
    expr = low.emit(function(low.expr(x), axis=places, keepdims=keep))
    shape = tuple(1 if a in axes else s for a, s in enumerate(x.shape))
    if keep:
        width = 1 if x.order[-1] in axes else x.width
        return Value(shape, x.dtype, x.order, width, expr)
    left = [a for a in range(x.rank) if a not in axes]
    order = tuple(left.index(a) for a in x.order if a not in axes)
    shape = tuple(x.shape[a] for a in left)
    padded = x.padded and x.order[-1] not in axes
    width = x.width if padded else (shape[order[-1]] if shape else 1)
    return Value(shape, x.dtype, order, width, expr)


def axes_of(call: Call, rank: int) -> list[int]:
    """Return the axes that a call reduces, all of them if it names none."""
    dims = call.args.get("dim")
    if dims is None or dims == []:
        return list(range(rank))
    return [dims] if isinstance(dims, int) else list(dims)


def _operand(low: Lowering, call: Call) -> tuple[Value, list[int], bool]:
    x = call.args["self"]
    if np.dtype(call.dtype).kind != "b":
        x = low.cast(x, call.dtype)
    return x, axes_of(call, x.rank), bool(call.args.get("keepdim", False))


def mean(low: Lowering, x: Value, axes: list[int], keep: bool) -> Value:
    """Return the mean over axes."""
    count = math.prod(x.shape[a] for a in axes)
    share = Value.constant(np.asarray(1 / count, x.dtype))
    return binary(low, reduced(low, x, axes, keep, op.sum), share, op.multiply)


@rule("mean.dim")
def _mean(low: Lowering, call: Call) -> Value:
    return mean(low, *_operand(low, call))


@rule("sum.dim_IntList")
def _sum(low: Lowering, call: Call) -> Value:
    return reduced(low, *_operand(low, call), op.sum)


@rule("amax")
def _max(low: Lowering, call: Call) -> Value:
    return reduced(low, *_operand(low, call), op.max)


@rule("amin")
def _min(low: Lowering, call: Call) -> Value:
    return reduced(low, *_operand(low, call), op.min)


@rule("prod.dim_int")
def _prod(low: Lowering, call: Call) -> Value:
    return reduced(low, *_operand(low, call), op.prod)


@rule("any.dim all.dim")
def _any(low: Lowering, call: Call) -> Value:
    x, axes, keep = _operand(low, call)
    function = op.max if call.op.startswith("any") else op.min
    return low.cast(reduced(low, low.cast(x, "int8"), axes, keep, function), "bool")


@rule("logsumexp")
def _logsumexp(low: Lowering, call: Call) -> Value:
    x, axes, keep = _operand(low, call)
    top = reduced(low, x, axes, True, op.max)
    lifted = unary(low, binary(low, x, top, op.subtract), op.exp)
    total = unary(low, reduced(low, lifted, axes, True, op.sum), op.log)
    y = binary(low, total, top, op.add)
    return y if keep else low.reshaped(y, call.shape)


@rule("var.correction std.correction")
def _variance(low: Lowering, call: Call) -> Value:
    x, axes, keep = _operand(low, call)
    given = call.args["correction"]
    correction = 1 if given is None else given
    count = math.prod(x.shape[a] for a in axes)
    centre = mean(low, x, axes, True)
    moved = binary(low, x, centre, op.subtract)
    total = reduced(low, unary(low, moved, lambda e: op.multiply(e, e)), axes, keep, op.sum)
    share = Value.constant(np.asarray(1 / max(count - correction, 0), x.dtype))
    y = binary(low, total, share, op.multiply)
    return unary(low, y, op.sqrt) if call.op.startswith("std") else y


@rule("linalg_vector_norm")
def _norm(low: Lowering, call: Call) -> Value:
    x, axes, keep = _operand(low, call)
    order = call.args["ord"]
    size = unary(low, x, op.abs)
    if order == math.inf:
        return reduced(low, size, axes, keep, op.max)
    if order == 1:
        return reduced(low, size, axes, keep, op.sum)
    if order != 2:
        raise low.refuse(f"a norm of order {order}")
    power = unary(low, x, lambda e: op.multiply(e, e))
    return unary(low, reduced(low, power, axes, keep, op.sum), op.sqrt)


@rule("cumsum cumprod")
def _running(low: Lowering, call: Call) -> Value:
    x, axis = low.cast(call.args["self"], call.dtype), call.args["dim"]
    function = op.cumsum if call.op.startswith("cumsum") else op.cumprod
    expr = low.emit(function(low.plain(x), axis=axis % x.rank))
    return low.made(expr, call.shape, call.dtype)


@rule("argmax argmin")
def _arg(low: Lowering, call: Call) -> Value:
    x, axis = call.args["self"], call.args["dim"]
    function = op.argmax if call.op.startswith("argmax") else op.argmin
    expr = low.emit(function(low.plain(x), axis=axis, keepdims=call.args["keepdim"]))
    return low.made(low.emit(op.astype(expr, call.dtype)), call.shape, call.dtype)
