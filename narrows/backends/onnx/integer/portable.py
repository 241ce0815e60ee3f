"""The form ``integer``: ConvInteger, MatMulInteger, and int64 arithmetic.

Slow, and free of floating-point numbers but for the quotients that are defined in them. It reads
like the reference and fuses to nothing, which makes it the form to compare others with.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import fx

from narrows.backends.onnx.integer import exact
from narrows.backends.onnx.integer.graph import Graph, given, window_pads
from narrows.ir.integer.grid import CENTRE
from narrows.ir.integer.library import average_counts
from narrows.ir.integer.windows import totals
from narrows.ir.meta import Meta, shape_of


def conv(graph: Graph, node: fx.Node) -> None:
    """Write a convolution."""
    args, at = given(node), f"{node.name}."
    rank = len(shape_of(node))
    acc = graph.add(
        "ConvInteger",
        [graph.name(args["x"]), graph.name(args["weight"]), graph.scalar(args["x_zero"], "uint8")],
        at,
        strides=args["stride"],
        pads=[*args["padding"], *args["padding"]],
        dilations=args["dilation"],
        group=args["groups"],
    )
    _finish(graph, node, acc, 1, rank)


def conv_transpose(graph: Graph, node: fx.Node) -> None:
    """Write a transposed convolution: zeros between the codes, then a convolution with the kernel
    turned around.
    """
    args, at = given(node), f"{node.name}."
    axes, zero = len(args["stride"]), graph.scalar(args["x_zero"], "uint8")
    x = _spread(graph, node, graph.name(args["x"]), zero)
    reach = [
        d * (k - 1) for d, k in zip(args["dilation"], shape_of(args["weight"])[2:], strict=True)
    ]
    before = [r - p for r, p in zip(reach, args["padding"], strict=True)]
    after = [b + o for b, o in zip(before, args["output_padding"], strict=True)]
    pads = graph.constant([0, 0, *before, 0, 0, *after], "int64")
    x = graph.add("Pad", [x, pads, zero], at)
    groups, weight = args["groups"], graph.tensor(args["weight"])
    turned = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    turned = turned.flip(list(range(2, 2 + axes))).contiguous().numpy()
    inputs = [x, graph.constant(turned, "int8", f"{at}turned"), zero]
    acc = graph.add("ConvInteger", inputs, at, dilations=args["dilation"], group=groups)
    _finish(graph, node, acc, 1, 2 + axes)


def _spread(graph: Graph, node: fx.Node, x: str, zero: str) -> str:
    """Return codes with ``stride - 1`` zeros after each along the spatial axes, but the last."""
    args, at = given(node), f"{node.name}."
    batch, width, *sizes = graph.sizes(args["x"])
    for axis, stride in enumerate(args["stride"]):
        if stride == 1:
            continue
        lead = [batch, width, *sizes[: axis + 1]]
        x = graph.reshape(x, [*lead, 1, *sizes[axis + 1 :]])
        rank = 3 + len(sizes)
        pads = [0] * 2 * rank
        pads[rank + axis + 3] = stride - 1
        x = graph.add("Pad", [x, graph.constant(pads, "int64"), zero], at)
        sizes[axis] *= stride
        x = graph.reshape(x, [batch, width, *sizes])
        cut = [0] * 2 * (2 + len(sizes))
        cut[2 + len(sizes) + axis + 2] = 1 - stride
        x = graph.add("Pad", [x, graph.constant(cut, "int64"), zero], at)
        sizes[axis] -= stride - 1
    return x


def linear(graph: Graph, node: fx.Node) -> None:
    """Write a linear layer."""
    args, at = given(node), f"{node.name}."
    weight = graph.add("Transpose", [graph.unsigned(args["weight"])], at, perm=[1, 0])
    zeros = [graph.scalar(zero, "uint8") for zero in (args["x_zero"], CENTRE)]
    acc = graph.add("MatMulInteger", [graph.name(args["x"]), weight, *zeros], at)
    rank = len(shape_of(node))
    _finish(graph, node, acc, rank - 1, rank)


def _finish(graph: Graph, node: fx.Node, acc: str, axis: int, rank: int) -> None:
    args, at = given(node), f"{node.name}."
    along = [-1 if a == axis else 1 for a in range(axis, rank)]
    acc = graph.cast(acc, "int64", at)
    if args["bias"] is not None:
        bias = graph.tensor(args["bias"]).numpy().astype(np.int64).reshape(along)
        acc = graph.add("Add", [acc, graph.constant(bias, "int64")], at)
    by = np.asarray(args["shift_by"])
    exact.shifted(graph, acc, by.reshape(along) if by.size > 1 else by.reshape(()), node)


def matmul(graph: Graph, node: fx.Node) -> None:
    """Write a matrix product of two activations."""
    args, at = given(node), f"{node.name}."
    zeros = [graph.scalar(args[k], "uint8") for k in ("a_zero", "b_zero")]
    inputs = [graph.name(args["a"]), graph.name(args["b"]), *zeros]
    acc = graph.cast(graph.add("MatMulInteger", inputs, at), "int64", at)
    exact.shifted(graph, acc, args["shift_by"], node)


def add(graph: Graph, node: fx.Node) -> None:
    """Write a sum or a difference."""
    args, at = given(node), f"{node.name}."
    parts = []
    for side in ("a", "b"):
        x = exact.whole(graph, args[side], args[f"{side}_zero"], at)
        if args[f"{side}_shift"]:
            x = graph.add("Mul", [x, graph.scalar(2 ** args[f"{side}_shift"], "int64")], at)
        parts.append(x)
    acc = graph.add("Add" if args["sign"] > 0 else "Sub", parts, at)
    exact.shifted(graph, acc, args["shift_by"], node)


def mul(graph: Graph, node: fx.Node) -> None:
    """Write a product."""
    args, at = given(node), f"{node.name}."
    parts = [exact.whole(graph, args[s], args[f"{s}_zero"], at) for s in ("a", "b")]
    exact.shifted(graph, graph.add("Mul", parts, at), args["shift_by"], node)


def prelu(graph: Graph, node: fx.Node) -> None:
    """Write a product with 1 or with the channel's slope."""
    args, at = given(node), f"{node.name}."
    x = exact.whole(graph, args["x"], args["x_zero"], at)
    slopes = graph.constant(graph.tensor(args["slopes"]).numpy(), "int64")
    above = graph.add("Greater", [x, graph.scalar(0, "int64")], at)
    factor = graph.add("Where", [above, graph.scalar(1 << args["unit"], "int64"), slopes], at)
    exact.shifted(graph, graph.add("Mul", [x, factor], at), args["shift_by"], node)


def rescale(graph: Graph, node: fx.Node) -> None:
    """Write codes that change their grid."""
    args = given(node)
    acc = exact.whole(graph, args["x"], args["x_zero"], f"{node.name}.")
    exact.shifted(graph, acc, args["shift_by"], node)


def concat(graph: Graph, node: fx.Node) -> None:
    """Write tensors side by side, each with its shift as a table of codes."""
    args, at = given(node), f"{node.name}."
    tail = args["zero"], args["low"], args["high"]
    parts = [
        regrid(graph, graph.name(x), by, zero, tail, at)
        for x, by, zero in zip(args["xs"], args["shift_by"], args["zeros"], strict=True)
    ]
    graph.add("Concat", parts, node.name, axis=args["axis"])


def regrid(graph: Graph, x: str, by: int, zero: int, tail: tuple[int, int, int], at: str) -> str:
    """Return codes on another grid: a table, or the codes themselves where nothing changes."""
    table = moved(by, zero, tail, "half_up" if graph.half_up else "half_even")
    if (table == np.arange(256)).all():
        return x
    index = graph.cast(x, "int32", at)
    return graph.add("Gather", [graph.constant(table, "uint8"), index], at, axis=0)


def moved(by: int, zero: int, tail: tuple[int, int, int], rounding: str) -> np.ndarray:
    """Return the 256 codes that a shift and a change of zero point make."""
    import torch

    from narrows.ir.integer.rounding import settle, shift

    return settle(shift(torch.arange(256) - zero, by, rounding), *tail).numpy()


def mean(graph: Graph, node: fx.Node) -> None:
    """Write an average over axes."""
    args, at = given(node), f"{node.name}."
    shape = shape_of(args["x"])
    acc = exact.whole(graph, args["x"], args["x_zero"], at)
    axes = graph.constant(args["axes"], "int64")
    acc = graph.add("ReduceSum", [acc, axes], at, keepdims=int(args["keepdim"]))
    free = [a for a in args["axes"] if a in Meta(args["x"]).dynamic]
    if free and not args["divisor"]:
        _free_average(graph, node, acc, free[0])
        return
    count = args["divisor"] or math.prod(shape[a] for a in args["axes"])
    _average(graph, node, acc, np.asarray(count))


def free_count(graph: Graph, node: fx.Node, free: int) -> str:
    """Return how many elements a mean averages where one of its axes is free, in int64."""
    args, at = given(node), f"{node.name}."
    size = graph.add("Shape", [graph.name(args["x"])], at, start=free, end=free + 1)
    size = graph.add("Squeeze", [size, graph.constant([0], "int64")], at)
    shape = shape_of(args["x"])
    rest = math.prod(shape[a] for a in args["axes"] if a != free)
    return graph.add("Mul", [size, graph.scalar(rest, "int64")], at)


def _free_average(graph: Graph, node: fx.Node, acc: str, free: int) -> None:
    by, at = given(node)["shift_by"], f"{node.name}."
    count = free_count(graph, node, free)
    if by < 0:
        acc = graph.add("Mul", [acc, graph.scalar(2**-by, "int64")], at)
    elif by > 0:
        count = graph.add("Mul", [count, graph.scalar(2**by, "int64")], at)
    exact.divided(graph, acc, count, graph.add("Add", [count, count], at), node)


def average_pool(graph: Graph, node: fx.Node) -> None:
    """Write average pooling: a sum by a convolution with ones, over the exact counts."""
    args, at = given(node), f"{node.name}."
    batch, width, *sizes = graph.sizes(args["x"])
    x = graph.reshape(graph.name(args["x"]), [-1, 1, *sizes])
    zero = graph.scalar(args["x_zero"], "uint8")
    out = shape_of(node)[2:]
    pads = window_pads(sizes, out, *(args[k] for k in ("kernel", "stride", "padding")))
    kernel = graph.constant(np.ones((1, 1, *args["kernel"])), "int8")
    acc = graph.add("ConvInteger", [x, kernel, zero], at, strides=args["stride"], pads=pads)
    acc = graph.reshape(graph.cast(acc, "int64", at), [batch, width, *out])
    counts = average_counts(sizes, *_window(args)).numpy()[0, 0]
    _average(graph, node, acc, np.asarray(args["divisor"] or counts))


def divisors(node: fx.Node) -> list[int]:
    """Return what the windows of an average pooling are divided by, each number once."""
    args = given(node)
    counts = average_counts(shape_of(args["x"])[2:], *_window(args))
    return counts.unique().tolist()


def _window(args: dict[str, Any]) -> tuple[Any, ...]:
    names = ("kernel", "stride", "padding", "ceil_mode", "count_include_pad")
    return tuple(args[n] for n in names)


def countable_pads(node: fx.Node) -> list[int] | None:
    """Return the padding by which ONNX's own operator counts as the program does, if it can.

    ONNX lets windows begin behind the tensor where ``ceil_mode`` asks for more of them. So what the
    last ones need is spelled out, which is right where padding is not counted.
    """
    args = given(node)
    padding = list(args["padding"])
    if not args["ceil_mode"]:
        return [*padding, *padding]
    sizes, out = shape_of(args["x"])[2:], shape_of(node)[2:]
    pads = window_pads(sizes, out, args["kernel"], args["stride"], padding)
    more = any(a > p for a, p in zip(pads[len(padding) :], padding, strict=True))
    return None if args["count_include_pad"] and more else pads


def resample(graph: Graph, node: fx.Node) -> None:
    """Write weighted averages: what every tap picks, times its weight, axis by axis."""
    args, at = given(node), f"{node.name}."
    x, rank = exact.whole(graph, args["x"], args["x_zero"], at), len(shape_of(node))
    pairs = list(zip(args["places"], args["weights"], strict=True))
    for axis, (place, weight) in enumerate(pairs, rank - len(pairs)):
        places, weights = graph.tensor(place), graph.tensor(weight).to(torch.int64)
        along, terms = [-1, *[1] * (rank - 1 - axis)], []
        for tap in range(places.shape[1]):
            taken = graph.constant(places[:, tap].numpy(), "int64")
            factor = graph.constant(weights[:, tap].reshape(along).numpy(), "int64")
            picked = graph.add("Gather", [x, taken], at, axis=axis)
            terms.append(graph.add("Mul", [picked, factor], at))
        x = _sum(graph, terms, at)
    counts = totals([graph.tensor(w) for w in args["weights"]])
    _average(graph, node, x, counts.numpy())


def _sum(graph: Graph, terms: list[str], at: str) -> str:
    """Return a sum; ONNX's own takes no integers."""
    total = terms[0]
    for term in terms[1:]:
        total = graph.add("Add", [total, term], at)
    return total


def _average(graph: Graph, node: fx.Node, acc: str, count: np.ndarray) -> None:
    by = given(node)["shift_by"]
    if by < 0:
        acc = graph.add("Mul", [acc, graph.scalar(2**-by, "int64")], f"{node.name}.")
    count = count.astype(np.int64) << max(by, 0)
    d, twice = (graph.constant(c, "int64") for c in (count, 2 * count))
    exact.divided(graph, acc, d, twice, node)


FORM: dict[str, Any] = {
    "conv": conv, "conv_transpose": conv_transpose, "linear": linear, "matmul": matmul,
    "add": add, "mul": mul, "rescale": rescale, "prelu": prelu, "concat": concat, "mean": mean,
    "average_pool": average_pool, "resample": resample, "lookup": exact.lookup,
    "softmax": exact.softmax, "layer_norm": exact.layer_norm,
    "quantize": exact.quantize, "dequantize": exact.dequantize,
}  # fmt: skip
