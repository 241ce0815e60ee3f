"""Rules for norms and softmax."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import relax

from narrows.backends.tvm.kernels import rows
from narrows.backends.tvm.lowering import Lowering
from narrows.backends.tvm.rules.contractions import fixed
from narrows.backends.tvm.rules.pointwise import binary
from narrows.backends.tvm.rules.table import Call, rule
from narrows.backends.tvm.values import Value

op = relax.op


def by_rows(
    low: Lowering, x: Value, axis: int, kernel: Callable[..., Any], name: str, *more: Any
) -> Value:
    """Return a kernel over rows applied along an axis, which is stored last for it.

    Args:
        low: The lowering.
        x: The value.
        axis: The axis that holds the rows.
        kernel: The kernel.
        name: Its name.
        more: Its further operands, as expressions.
    """
    axis %= x.rank
    if x.order[-1] != axis:
        x = low.ordered(x, (*(a for a in x.order if a != axis), axis))
    expr = low.kernel(kernel, low.expr(x), *more, name=name)
    return Value(x.shape, x.dtype, x.order, int(expr.ty.shape[-1]), expr)


def softmax(low: Lowering, x: Value, axis: int, log: bool = False) -> Value:
    """Return softmax along an axis, or its logarithm."""
    kernel = rows.softmax(x.shape[axis], low.machine.lanes_of(x.dtype), log)
    return by_rows(low, x, axis, kernel, "log_softmax" if log else "softmax")


@rule("softmax.int _softmax _safe_softmax log_softmax.int _log_softmax")
def _softmax(low: Lowering, call: Call) -> Value:
    x = low.cast(call.args["self"], call.dtype)
    return softmax(low, x, call.args["dim"], "log_softmax" in call.op)


@rule("layer_norm rms_norm")
def _layer_norm(low: Lowering, call: Call) -> Value:
    x, count = call.args["input"], len(call.args["normalized_shape"])
    size = math.prod(x.shape[-count:])
    flat = low.reshaped(x, (*x.shape[:-count], size)) if count > 1 else x
    centred = call.op.startswith("layer")
    eps = call.args["eps"]
    eps = float(np.finfo(call.dtype).eps) if eps is None else eps
    lanes = low.machine.lanes_of(call.dtype)
    kernel, name = (
        rows.layer_norm(size, lanes, eps, centred),
        "layer_norm" if centred else "rms_norm",
    )
    given = (call.args["weight"], call.args.get("bias"))
    weight, bias = (None if p is None else low.reshaped(p, (size,)) for p in given)
    inside = [] if weight is None else [weight] if bias is None else [weight, bias]
    y = by_rows(low, flat, -1, kernel, name, *map(low.plain, inside))
    return low.reshaped(_scaled(low, y, None, bias if weight is None else None), call.shape)


def _scaled(low: Lowering, y: Value, weight: Value | None, bias: Value | None) -> Value:
    if weight is not None:
        y = binary(low, y, weight, op.multiply)
    return y if bias is None else binary(low, y, bias, op.add)


@rule("group_norm")
def _group_norm(low: Lowering, call: Call) -> Value:
    x, groups = call.args["input"], call.args["num_groups"]
    return _grouped(low, call, x, groups, call.args["eps"])


@rule("instance_norm")
def _instance_norm(low: Lowering, call: Call) -> Value:
    x = call.args["input"]
    if call.args["use_input_stats"]:
        return _grouped(low, call, x, x.shape[1], call.args["eps"])
    return _by_running_statistics(low, call)


def _grouped(low: Lowering, call: Call, x: Value, groups: int, eps: float) -> Value:
    """Return each group of channels normalised by its own mean and variance."""
    size = math.prod(x.shape[1:]) // groups
    flat = low.reshaped(x, (x.shape[0], groups, size))
    kernel = rows.layer_norm(size, low.machine.lanes_of(x.dtype), eps, centred=True)
    y = by_rows(low, flat, -1, kernel, "group_norm")
    y = low.reshaped(y, x.shape)
    along = (x.shape[1], *(1,) * (x.rank - 2))
    parameters = [call.args["weight"], call.args["bias"]]
    shaped = [None if p is None else low.reshaped(p, along) for p in parameters]
    return _scaled(low, y, *shaped)


@rule("batch_norm")
def _batch_norm(low: Lowering, call: Call) -> Value:
    if call.args["training"]:
        raise low.refuse("a batch norm that uses the statistics of its batch")
    return _by_running_statistics(low, call)


def _by_running_statistics(low: Lowering, call: Call) -> Value:
    x = call.args["input"]
    mean, var = (
        fixed(low, call.args[k], "a statistic of a norm").astype("float64")
        for k in ("running_mean", "running_var")
    )
    scale = 1 / np.sqrt(var + call.args["eps"])
    weight, bias = call.args["weight"], call.args["bias"]
    if weight is not None:
        scale = scale * fixed(low, weight, "the weight of a norm")
    shift = -mean * scale
    if bias is not None:
        shift = shift + fixed(low, bias, "the bias of a norm")
    along = (-1, *(1,) * (x.rank - 2))
    factors = [Value.constant(a.astype(call.dtype).reshape(along)) for a in (scale, shift)]
    return binary(low, binary(low, x, factors[0], op.multiply), factors[1], op.add)
