"""Rules for operators that move elements; most change only how a value says it is stored."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from tvm import relax

from narrows.backends.tvm.kernels.concatenation import concatenation
from narrows.backends.tvm.lowering import Lowering
from narrows.backends.tvm.rules.pointwise import binary
from narrows.backends.tvm.rules.resample import nearest, resampled
from narrows.backends.tvm.rules.table import Call, rule
from narrows.backends.tvm.values import Value

op = relax.op


@rule("reshape flatten.using_ints squeeze squeeze.dim squeeze.dims unsqueeze unflatten.int")
def _reshape(low: Lowering, call: Call) -> Value:
    return low.reshaped(call.args["self"], call.shape)


@rule("permute")
def _permute(low: Lowering, call: Call) -> Value:
    x = call.args["self"]
    return x.permuted(tuple(d % x.rank for d in call.args["dims"]))


@rule("expand")
def _expand(low: Lowering, call: Call) -> Value:
    x = call.args["self"]
    if x.shape == call.shape:
        return x
    if x.array is not None:
        return Value.constant(np.broadcast_to(x.array, call.shape))
    raised = low.reshaped(x, (1,) * (call.rank - x.rank) + x.shape)
    if raised.shape[raised.order[-1]] == 1:
        raised = low.exact(raised)
    width = raised.width if raised.padded else call.shape[raised.order[-1]]
    stored = (*(call.shape[a] for a in raised.order[:-1]), width)
    expr = low.emit(op.broadcast_to(raised.expr, stored))
    return Value(call.shape, x.dtype, raised.order, width, expr)


@rule("repeat")
def _repeat(low: Lowering, call: Call) -> Value:
    x = call.args["self"]
    times = call.args["repeats"]
    times = [1] * (call.rank - len(times)) + list(times)
    expr = low.emit(op.tile(low.plain(x), times))
    return low.made(expr, call.shape, call.dtype)


@rule("repeat_interleave.self_int")
def _repeat_interleave(low: Lowering, call: Call) -> Value:
    x, times, axis = call.args["self"], call.args["repeats"], call.args["dim"]
    if axis is None:
        x, axis = low.reshaped(x, (int(np.prod(x.shape)),)), 0
    indices = np.repeat(np.arange(x.shape[axis]), times)
    return taken(low, x, axis, indices)


@rule("flip")
def _flip(low: Lowering, call: Call) -> Value:
    x = call.args["self"]
    for axis in call.args["dims"]:
        x = taken(low, x, axis, np.arange(x.shape[axis])[::-1])
    return x


@rule("roll")
def _roll(low: Lowering, call: Call) -> Value:
    x, axes = call.args["self"], call.args["dims"]
    if not axes:
        flat = low.reshaped(x, (int(np.prod(x.shape)),))
        rolled = taken(low, flat, 0, np.roll(np.arange(flat.shape[0]), call.args["shifts"][0]))
        return low.reshaped(rolled, call.shape)
    for axis, shift in zip(axes, call.args["shifts"], strict=True):
        size = x.shape[axis]
        cut = -shift % size
        if cut:
            parts = [part(low, x, axis, cut, size), part(low, x, axis, 0, cut)]
            x = joined(low, parts, axis)
    return x


@rule("rot90")
def _rot90(low: Lowering, call: Call) -> Value:
    x, (first, second) = call.args["self"], call.args["dims"]
    turns = call.args["k"] % 4
    axes = list(range(x.rank))
    axes[first], axes[second] = axes[second], axes[first]
    if turns == 2:
        for axis in (first, second):
            x = taken(low, x, axis, np.arange(x.shape[axis])[::-1])
        return x
    if turns == 0:
        return x
    backwards = second if turns == 1 else first
    x = taken(low, x, backwards, np.arange(x.shape[backwards])[::-1])
    return x.permuted(tuple(axes))


@rule("pixel_shuffle")
def _pixel_shuffle(low: Lowering, call: Call) -> Value:
    x, r = call.args["self"], call.args["upscale_factor"]
    *lead, channels, height, width = x.shape
    k = len(lead)
    split = low.reshaped(x, (*lead, channels // (r * r), r, r, height, width))
    axes = (*range(k), k, k + 3, k + 1, k + 4, k + 2)
    return low.reshaped(split.permuted(axes), call.shape)


@rule("pixel_unshuffle")
def _pixel_unshuffle(low: Lowering, call: Call) -> Value:
    x, r = call.args["self"], call.args["downscale_factor"]
    *lead, channels, height, width = x.shape
    k = len(lead)
    split = low.reshaped(x, (*lead, channels, height // r, r, width // r, r))
    axes = (*range(k), k, k + 2, k + 4, k + 1, k + 3)
    return low.reshaped(split.permuted(axes), call.shape)


@rule("channel_shuffle")
def _channel_shuffle(low: Lowering, call: Call) -> Value:
    x, groups = call.args["self"], call.args["groups"]
    size = x.shape[1]
    order = np.arange(size).reshape(groups, size // groups).T.ravel()
    return taken(low, x, 1, order)


@rule("unfold")
def _unfold(low: Lowering, call: Call) -> Value:
    x, axis = call.args["self"], call.args["dimension"] % call.args["self"].rank
    size, step = call.args["size"], call.args["step"]
    count = (x.shape[axis] - size) // step + 1
    indices = (np.arange(count)[:, None] * step + np.arange(size)).ravel()
    windows = taken(low, x, axis, indices)
    split = low.reshaped(windows, (*x.shape[:axis], count, size, *x.shape[axis + 1 :]))
    axes = [a for a in range(split.rank) if a != axis + 1]
    return split.permuted((*axes, axis + 1))


# ---------------------------------------------------------------------- parts


def part(low: Lowering, x: Value, axis: int, start: int, stop: int, step: int = 1) -> Value:
    """Return the indices ``start, start + step, ...`` below ``stop`` of an axis."""
    axis %= x.rank
    size = len(range(start, stop, step))
    if size == x.shape[axis]:
        return x
    shape = (*x.shape[:axis], size, *x.shape[axis + 1 :])
    if x.array is not None:
        return Value.constant(np.take(x.array, np.arange(start, stop, step), axis))
    place = x.at(axis)
    expr = low.emit(op.strided_slice(x.expr, [place], [start], [stop], [step]))
    width = size if place == x.rank - 1 else x.width
    return Value(shape, x.dtype, x.order, width, expr)


def taken(low: Lowering, x: Value, axis: int, indices: np.ndarray) -> Value:
    """Return the values of an axis at fixed indices."""
    axis %= x.rank
    shape = (*x.shape[:axis], len(indices), *x.shape[axis + 1 :])
    if x.array is not None:
        return Value.constant(np.take(x.array, indices, axis))
    place = x.at(axis)
    table = relax.const(np.ascontiguousarray(indices, dtype="int32"), "int32")
    expr = low.emit(op.take(x.expr, table, axis=place, mode="fast"))
    width = len(indices) if place == x.rank - 1 else x.width
    return Value(shape, x.dtype, x.order, width, expr)


@rule("slice.Tensor")
def _slice(low: Lowering, call: Call) -> Value:
    x, axis = call.args["self"], call.args["dim"]
    bounds = slice(call.args["start"], call.args["end"], call.args["step"])
    return part(low, x, axis, *bounds.indices(x.shape[axis]))


@rule("split.sizes")
def _split(low: Lowering, call: Call) -> list[Value]:
    x, axis = call.args["self"], call.args["dim"]
    sizes = [shape[axis] for shape in call.shape]  # type: ignore[index]
    ends = list(itertools.accumulate(sizes))
    return [part(low, x, axis, end - size, end) for size, end in zip(sizes, ends, strict=True)]


@rule("getitem")
def _getitem(low: Lowering, call: Call) -> Value:
    return call.args["self"][call.args["index"]]


@rule("index_select")
def _index_select(low: Lowering, call: Call) -> Value:
    x, index = call.args["self"], call.args["index"]
    if index.array is not None:
        return taken(low, x, call.args["dim"], index.array)
    x = low.exact(x)
    expr = op.take(x.expr, low.plain(index), axis=x.at(call.args["dim"]))
    return low.made(low.emit(expr), call.shape, x.dtype, x.order)


@rule("select.int")
def _select(low: Lowering, call: Call) -> Value:
    x, axis = call.args["self"], call.args["dim"]
    index = call.args["index"] % x.shape[axis]
    return low.reshaped(part(low, x, axis, index, index + 1), call.shape)


# ---------------------------------------------------------------------- side by side


def joined(low: Lowering, values: list[Value], axis: int) -> Value:
    """Return values side by side along an axis, in the order that the largest is stored in."""
    axis %= values[0].rank
    leader = max(values, key=lambda v: (v.array is None, int(np.prod(v.shape))))
    order = leader.order
    values = [low.ordered(v, order) for v in values]
    place = order.index(axis)
    last = place == len(order) - 1
    lanes = low.machine.lanes_of(leader.dtype)
    if last and lanes > 1:
        kernel = concatenation([v.shape[axis] for v in values], lanes)
        expr = low.kernel(kernel, *map(low.expr, values), name="concatenate")
    else:
        if last or len({v.width for v in values}) > 1:
            values = [low.exact(v) for v in values]
        expr = low.emit(op.concat([low.expr(v) for v in values], axis=place))
    size = sum(v.shape[axis] for v in values)
    shape = (*leader.shape[:axis], size, *leader.shape[axis + 1 :])
    width = size if last else values[0].width
    return Value(shape, leader.dtype, order, width, expr)


@rule("cat")
def _cat(low: Lowering, call: Call) -> Value:
    tensors = call.args["tensors"]
    kept = [low.cast(t, call.dtype) for t in tensors if t.shape != (0,)]
    return joined(low, kept, call.args["dim"])


@rule("stack")
def _stack(low: Lowering, call: Call) -> Value:
    axis = call.args["dim"] % call.rank
    shape = (*call.shape[:axis], 1, *call.shape[axis + 1 :])
    parts = [low.reshaped(low.cast(t, call.dtype), shape) for t in call.args["tensors"]]
    return joined(low, parts, axis)


@rule("glu")
def _glu(low: Lowering, call: Call) -> Value:
    x, axis = call.args["self"], call.args["dim"]
    half = x.shape[axis] // 2
    first, second = part(low, x, axis, 0, half), part(low, x, axis, half, 2 * half)
    return binary(low, first, second, lambda a, b: op.multiply(a, op.sigmoid(b)))


# ---------------------------------------------------------------------- around


@rule("pad")
def _pad(low: Lowering, call: Call) -> Value:
    x, pad, mode = (call.args[k] for k in ("self", "pad", "mode"))
    around = [(pad[i], pad[i + 1]) for i in range(0, len(pad), 2)]
    around = [(0, 0)] * (x.rank - len(around)) + around[::-1]
    if mode == "constant":
        return _constant_pad(low, x, around, call.args.get("value") or 0)
    for axis, (before, after) in enumerate(around):
        if before or after:
            named = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}[mode]
            indices = np.pad(np.arange(x.shape[axis]), (before, after), named)
            x = resampled(low, x, axis, *nearest(indices))
    return x


def _constant_pad(low: Lowering, x: Value, around: list[tuple[int, int]], number: Any) -> Value:
    for axis, (before, after) in enumerate(around):  # negative padding cuts off
        size = x.shape[axis]
        x = part(low, x, axis, max(0, -before), size - max(0, -after))
    around = [(max(0, before), max(0, after)) for before, after in around]
    if not any(map(sum, around)):
        return x
    if sum(around[x.order[-1]]):
        x = low.exact(x)
    shape = tuple(s + sum(a) for s, a in zip(x.shape, around, strict=True))
    widths = [w for axis in x.order for w in around[axis]]
    expr = low.emit(op.nn.pad(low.expr(x), widths, "constant", number))
    width = x.width + sum(around[x.order[-1]])
    return Value(shape, x.dtype, x.order, width, expr)


@rule("tril triu")
def _triangle(low: Lowering, call: Call) -> Value:
    x = call.args["self"]
    kind = np.tril if call.op.startswith("tril") else np.triu
    mask = kind(np.ones(x.shape[-2:], bool), call.args["diagonal"])
    exprs, like = low.aligned([Value.constant(mask), x, Value.constant(np.zeros((), x.dtype))])
    return low.like(like, low.emit(op.where(*exprs)), x.dtype)
