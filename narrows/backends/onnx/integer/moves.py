"""Operators that move codes, or pick the largest: the same in every form, on uint8 directly."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx

from narrows.backends.onnx.integer.graph import Graph, given, window_pads
from narrows.ir.meta import Meta, op_name, shape_of
from narrows.ir.ops.args import call

Emit = Callable[[Graph, fx.Node], None]

MOVES: dict[str, Emit] = {}


def moves(*names: str) -> Callable[[Emit], Emit]:
    """Enter a function for operators by their names, ``.default`` left out."""

    def enter(function: Emit) -> Emit:
        MOVES.update({n if "." in n else f"{n}.default": function for n in names})
        return function

    return enter


def find(node: fx.Node) -> Emit | None:
    """Return what writes a node, or ``None``."""
    return MOVES.get("getitem.default" if node.target is operator.getitem else op_name(node))


def _first(graph: Graph, node: fx.Node) -> str:
    return graph.name(next(iter(given(node).values())))


def _rank(node: fx.Node) -> int:
    return len(shape_of(node))


def _source(node: fx.Node) -> fx.Node:
    return node.all_input_nodes[0]


@moves("alias", "clone", "contiguous", "dropout", "feature_dropout", "alpha_dropout",
       "feature_alpha_dropout")  # fmt: skip
def _same(graph: Graph, node: fx.Node) -> None:
    graph.renamed[node] = _first(graph, node)


@moves("reshape", "unflatten.int", "flatten.using_ints", "squeeze", "squeeze.dim", "squeeze.dims",
       "unsqueeze")  # fmt: skip
def _reshape(graph: Graph, node: fx.Node) -> None:
    graph.reshape(_first(graph, node), graph.sizes(node), node.name)


@moves("permute")
def _permute(graph: Graph, node: fx.Node) -> None:
    rank = _rank(node)
    perm = [d % rank for d in given(node)["dims"]]
    graph.add("Transpose", [_first(graph, node)], node.name, perm=perm)


@moves("slice.Tensor")
def _slice(graph: Graph, node: fx.Node) -> None:
    args = given(node)
    shape = shape_of(_source(node))
    axis = args["dim"] % len(shape)
    start, end, step = args["start"] or 0, args["end"], args["step"]
    whole = 2**62
    end = whole if end is None or (isinstance(end, int) and end > whole) else end
    _cut(graph, node, axis, start, end, step, node.name)


def _cut(graph: Graph, node: fx.Node, axis: int, start: Any, end: Any, step: int, out: str) -> str:
    bounds = [number(graph, b) for b in (start, end)]
    rest = [graph.constant([axis], "int64"), graph.constant([step], "int64")]
    return graph.add("Slice", [_first(graph, node), *bounds, *rest], out)


def number(graph: Graph, value: Any) -> str:
    """Return a size as an int64 vector of length 1."""
    if not isinstance(value, fx.Node):
        return graph.constant([value], "int64")
    if op_name(value) == "sym_size.int":
        x, axis = value.args
        axis = axis % _rank(x)  # type: ignore[operator, arg-type]
        return graph.add("Shape", [graph.name(x)], f"{value.name}.", start=axis, end=axis + 1)  # type: ignore[arg-type]
    raise graph.refuse(
        value,
        f"{op_name(value)} of sizes has no ONNX form here",
        "only the batch size itself can be used",
        "capture with dynamic_batch=False",
    )


@moves("select.int")
def _select(graph: Graph, node: fx.Node) -> None:
    args = given(node)
    index = graph.constant(args["index"], "int64")
    axis = args["dim"] % (_rank(node) + 1)
    graph.add("Gather", [_first(graph, node), index], node.name, axis=axis)


@moves("index_select")
def _index_select(graph: Graph, node: fx.Node) -> None:
    args = given(node)
    inputs = [_first(graph, node), graph.name(args["index"])]
    graph.add("Gather", inputs, node.name, axis=args["dim"] % _rank(node))


@moves("split.sizes")
def _split(graph: Graph, node: fx.Node) -> None:
    """Nothing: every part that is read is cut out on its own, by ``getitem``."""


@moves("getitem")
def _getitem(graph: Graph, node: fx.Node) -> None:
    parts, index = node.args
    args = given(parts)  # type: ignore[arg-type]
    source = next(iter(args.values()))
    axis = args["dim"] % _rank(source)
    start = sum(args["split_size"][:index])
    bounds = [graph.constant([v], "int64") for v in (start, start + shape_of(node)[axis])]
    rest = [graph.constant([v], "int64") for v in (axis, 1)]
    graph.add("Slice", [graph.name(source), *bounds, *rest], node.name)


@moves("expand")
def _expand(graph: Graph, node: fx.Node) -> None:
    args = given(node)
    source = Meta(_source(node))
    lead = len(args["size"]) - len(source.shape)
    sizes = []
    for axis, size in enumerate(args["size"]):
        kept = axis >= lead and (size == -1 or axis - lead in source.dynamic)
        sizes.append(number(graph, 1 if kept else size))
    shape = graph.add("Concat", sizes, f"{node.name}.", axis=0)
    graph.add("Expand", [_first(graph, node), shape], node.name)


@moves("repeat")
def _tile(graph: Graph, node: fx.Node) -> None:
    args = given(node)
    counts = [number(graph, c) for c in args["repeats"]]
    x = _first(graph, node)
    rank = _rank(_source(node))
    if len(counts) > rank:
        x = graph.reshape(x, [1] * (len(counts) - rank) + graph.sizes(_source(node)))
    counts = [graph.constant([1], "int64")] * (rank - len(counts)) + counts
    graph.add("Tile", [x, graph.add("Concat", counts, f"{node.name}.", axis=0)], node.name)


@moves("flip", "roll")
def _reorder(graph: Graph, node: fx.Node) -> None:
    args, rank = given(node), _rank(node)
    axes = [d % rank for d in args["dims"]]
    shifts = args.get("shifts") or [None] * len(axes)
    if not axes or any(a in Meta(node).dynamic for a in axes):
        raise graph.refuse(node, f"{op_name(node)} has no ONNX form here", "it reorders the batch")
    x = _first(graph, node)
    for i, (axis, by) in enumerate(zip(axes, shifts, strict=True)):
        order = np.arange(shape_of(node)[axis])
        order = order[::-1] if by is None else np.roll(order, by)
        out = node.name if i == len(axes) - 1 else f"{node.name}."
        x = graph.add("Gather", [x, graph.constant(order.copy(), "int64")], out, axis=axis)


@moves("repeat_interleave.self_int")
def _repeat_interleave(graph: Graph, node: fx.Node) -> None:
    args, rank = given(node), _rank(node)
    axis = (args["dim"] or 0) % rank
    size = shape_of(_source(node))[axis]
    if args["dim"] is None or axis in Meta(node).dynamic:
        raise graph.refuse(node, "repeat_interleave has no ONNX form here", "it repeats the batch")
    order = np.repeat(np.arange(size), args["repeats"])
    inputs = [_first(graph, node), graph.constant(order, "int64")]
    graph.add("Gather", inputs, node.name, axis=axis)


@moves("pad")
def _pad(graph: Graph, node: fx.Node) -> None:
    args, rank = given(node), _rank(node)
    before, after = [0] * rank, [0] * rank
    for i in range(len(args["pad"]) // 2):
        before[rank - 1 - i], after[rank - 1 - i] = args["pad"][2 * i : 2 * i + 2]
    pads = graph.constant([*before, *after], "int64")
    dtype = "float32" if Meta(node).dtype is torch.int16 else "uint8"
    value = graph.scalar(int(args["value"] or 0), dtype)
    graph.add("Pad", [_first(graph, node), pads, value], node.name)


@moves("pixel_shuffle")
def _pixel_shuffle(graph: Graph, node: fx.Node) -> None:
    block = given(node)["upscale_factor"]
    batch, width, h, w = graph.sizes(node)
    h, w = h // block, w // block
    x = graph.reshape(_first(graph, node), [batch, width, block, block, h, w])
    x = graph.add("Transpose", [x], f"{node.name}.", perm=[0, 1, 4, 2, 5, 3])
    graph.reshape(x, graph.sizes(node), node.name)


@moves("pixel_unshuffle")
def _pixel_unshuffle(graph: Graph, node: fx.Node) -> None:
    block = given(node)["downscale_factor"]
    batch, width, h, w = graph.sizes(node)
    x = graph.reshape(_first(graph, node), [batch, width // block**2, h, block, w, block])
    x = graph.add("Transpose", [x], f"{node.name}.", perm=[0, 1, 3, 5, 2, 4])
    graph.reshape(x, graph.sizes(node), node.name)


@moves("channel_shuffle")
def _channel_shuffle(graph: Graph, node: fx.Node) -> None:
    groups = given(node)["groups"]
    batch, width, *spatial = graph.sizes(node)
    x = graph.reshape(_first(graph, node), [batch, groups, width // groups, *spatial])
    perm = [0, 2, 1, *range(3, 3 + len(spatial))]
    x = graph.add("Transpose", [x], f"{node.name}.", perm=perm)
    graph.reshape(x, graph.sizes(node), node.name)


@moves("max_pool1d", "max_pool2d", "max_pool3d")
def _max_pool(graph: Graph, node: fx.Node) -> None:
    args = given(node)
    axes = int(op_name(node)[8])

    def spread(value: Any) -> list[int]:
        values = list(value) if isinstance(value, list | tuple) else [value]
        return values * axes if len(values) == 1 else values

    kernel, dilation = spread(args["kernel_size"]), spread(args["dilation"])
    stride = spread(args["stride"]) if args["stride"] else kernel
    padding = spread(args["padding"])
    pads, ceil = padding * 2, 0
    if args["ceil_mode"]:  # ONNX lets windows begin behind the tensor
        sizes, out = shape_of(_source(node))[-axes:], shape_of(node)[-axes:]
        pads = window_pads(sizes, out, kernel, stride, padding, dilation)
        if any(pad >= k for pad, k in zip(pads[axes:], kernel, strict=True)):
            # So much padding runtimes refuse. A window of spread taps needs it only where it begins
            # within the tensor, and there both round alike.
            pads, ceil = padding * 2, 1
    how: dict[str, Any] = {"kernel_shape": kernel, "strides": stride, "pads": pads}
    how |= {"dilations": dilation, "ceil_mode": ceil}
    x = _first(graph, node)
    if _rank(node) == axes + 2:
        graph.add("MaxPool", [x], node.name, **how)
        return
    # One image without a batch axis, which torch pools and ONNX does not.
    x = graph.reshape(x, [1, *graph.sizes(_source(node))], f"{node.name}.")
    x = graph.add("MaxPool", [x], f"{node.name}.", **how)
    graph.reshape(x, graph.sizes(node), node.name)


@moves("upsample_nearest1d.vec", "upsample_nearest2d.vec", "upsample_nearest3d.vec")
def _nearest(graph: Graph, node: fx.Node) -> None:
    old, new = shape_of(_source(node))[2:], shape_of(node)[2:]
    picked = _picked(node)
    ratios = [n // o for n, o in zip(new, old, strict=True)]
    plain = [np.repeat(np.arange(o), r) for o, r in zip(old, ratios, strict=True)]
    if not all(map(np.array_equal, picked, plain)):  # runtimes round positions in their own ways
        _pick(graph, node, picked)
        return
    scales = graph.constant([1.0, 1.0, *ratios], "float32")
    graph.add(
        "Resize", [_first(graph, node), "", scales], node.name, mode="nearest",
        coordinate_transformation_mode="asymmetric", nearest_mode="floor",
    )  # fmt: skip


def _picked(node: fx.Node) -> list[np.ndarray]:
    """Return the positions that torch picks, axis by axis: those that it finds among positions."""
    sizes, picked = shape_of(_source(node))[2:], []
    for axis, size in enumerate(sizes):
        line = torch.arange(size, dtype=torch.float64)
        line = line.reshape([-1 if a == axis else 1 for a in range(len(sizes))])
        found = call(node, {_source(node): line.expand(1, 1, *sizes).contiguous()})[0, 0]
        along = tuple(slice(None) if a == axis else 0 for a in range(len(sizes)))
        picked.append(found[along].long().numpy())
    return picked


def _pick(graph: Graph, node: fx.Node, picked: list[np.ndarray]) -> None:
    """Write nearest resizing as positions, axis by axis."""
    x, rank = _first(graph, node), _rank(node)
    for axis, positions in enumerate(picked, 2):
        out = node.name if axis == rank - 1 else f"{node.name}."
        x = graph.add("Gather", [x, graph.constant(positions, "int64")], out, axis=axis)


@moves("amax", "amin", "max", "min")
def _extremum(graph: Graph, node: fx.Node) -> None:
    args = given(node)
    rank = _rank(_source(node))
    axes = [d % rank for d in args.get("dim", ())] or list(range(rank))
    op = "ReduceMax" if op_name(node).startswith(("amax", "max")) else "ReduceMin"
    inputs = [_first(graph, node), graph.constant(axes, "int64")]
    graph.add(op, inputs, node.name, keepdims=int(args.get("keepdim", False)))


@moves("embedding")
def _embedding(graph: Graph, node: fx.Node) -> None:
    args = given(node)
    graph.add(
        "Gather", [graph.name(args["weight"]), graph.name(args["indices"])], node.name, axis=0
    )


@moves("where.self")
def _where(graph: Graph, node: fx.Node) -> None:
    args = given(node)
    inputs = [graph.name(args[k]) for k in ("condition", "self", "other")]
    graph.add("Where", inputs, node.name)


@moves("maximum", "minimum")
def _extreme(graph: Graph, node: fx.Node) -> None:
    args, at = given(node), f"{node.name}."
    op = "Max" if op_name(node).startswith("max") else "Min"
    wide = Meta(node).dtype is torch.int16  # that is float32 here
    pair = [graph.name(args[k]) for k in ("self", "other")]
    pair = pair if wide else [graph.cast(x, "int32", at) for x in pair]
    made = graph.add(op, pair, node.name if wide else at)
    if not wide:
        graph.cast(made, "uint8", node.name)
