"""Codes of more than 8 bits: whole numbers in float32, the same in every form.

ONNX Runtime has no layers of int16, and few operators that move it. A float32 holds every such
code, and all operators take it, so that is what a wide tensor is between two operators. A layer is
exact in float32 as long as its sums stay below 2**24. Where they may not, codes are split into
digits that keep them there, and the sums of the digits are put together in float64. Averages,
products of activations and long sums are formed in float64. No operator here is one that a runtime
fuses to integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from narrows.backends.onnx.integer import exact
from narrows.backends.onnx.integer.exact import steps
from narrows.backends.onnx.integer.graph import Graph, given, window_pads
from narrows.backends.onnx.integer.portable import free_count
from narrows.ir.integer.bounds import EXACT, WIDE_SAFE, accumulator_bound
from narrows.ir.integer.library import average_counts
from narrows.ir.meta import Meta, shape_of

# Up to here a float32 also holds what rounding adds to a number.
SHORT = EXACT // 2
DIGITS = range(8, 0, -1)  # how many bits a digit may have, the most first


def is_wide(node: fx.Node) -> bool:
    """Whether an operator takes or gives wide codes."""
    return any(Meta(n).dtype is torch.int16 for n in (node, *node.all_input_nodes))


def reach(graph: Graph, node: fx.Node) -> int:
    """Return the largest magnitude of a tensor's codes without their zero point."""
    grid = graph.grid(node)
    return max(grid.zero - grid.low, grid.high - grid.zero)


def centred(graph: Graph, node: fx.Node, at: str, dtype: str = "float32") -> str:
    """Return codes without their zero point."""
    x, zero = graph.name(node), graph.grid(node).zero
    if Meta(node).dtype is not torch.int16 or dtype != "float32":
        x = graph.cast(x, dtype, at)
    return graph.add("Sub", [x, graph.scalar(zero, dtype)], at) if zero else x


def settled(graph: Graph, node: fx.Node, x: str, dtype: str, by: Any, out: str = "") -> str:
    """Write ``x * 2**-by`` rounded, the zero point and the clip; ``by`` may be an array.

    Args:
        graph: The graph.
        node: Whose arguments say where it settles.
        x: Whole numbers, so small that ``dtype`` holds them and half of one more.
        dtype: ``float32`` or ``float64``.
        by: The shifts.
        out: The result's name, if not the node's.
    """
    args, at, out = given(node), f"{node.name}.", out or node.name
    by = np.asarray(by, dtype=np.float64)
    if by.any():
        x = graph.add("Mul", [x, graph.constant(np.exp2(-by), dtype)], at)
    if (by > 0).any():
        x = rounded(graph, x, dtype, at)
    return codes_of(graph, args, x, dtype, Meta(node).dtype is torch.int16, out)


def rounded(graph: Graph, x: str, dtype: str, at: str) -> str:
    """Return numbers rounded to whole ones."""
    if not graph.half_up:
        return graph.add("Round", [x], at)
    return graph.add("Floor", [graph.add("Add", [x, graph.scalar(0.5, dtype)], at)], at)


def codes_of(graph: Graph, args: dict[str, Any], x: str, dtype: str, wide: bool, out: str) -> str:
    """Write the zero point and the clip of whole numbers, and their type."""
    at = f"{out.rstrip('.')}."
    if args["zero"]:
        x = graph.add("Add", [x, graph.scalar(args["zero"], dtype)], at)
    bounds = [graph.scalar(args[k], dtype) for k in ("low", "high")]
    if wide and dtype == "float32":
        return graph.add("Clip", [x, *bounds], out)
    return graph.cast(graph.add("Clip", [x, *bounds], at), "float32" if wide else "uint8", out)


# ------------------------------------------------------------------ layers


Multiply = Callable[[str], str]


def summed(
    graph: Graph, node: fx.Node, multiply: Multiply, bound: int, weights: int, along: Sequence[int]
) -> tuple[str, str]:
    """Return the sums of a layer, with its bias, and their type.

    Args:
        graph: The graph.
        node: The layer.
        multiply: Writes the layer's products and sums of a float32 operand.
        bound: What a sum can reach.
        weights: What the magnitudes of the weights of a channel add up to, at most.
        along: The shape in which the bias broadcasts.
    """
    args, at = given(node), f"{node.name}."
    x, most = centred(graph, args["x"], at), reach(graph, args["x"])
    bias = args.get("bias")
    numbers = None if bias is None else graph.tensor(bias).numpy().reshape(along)
    if bound <= SHORT:
        acc, dtype = multiply(x), "float32"
    else:
        acc, dtype = _digit_by_digit(graph, node, x, most, multiply, weights), "float64"
    if numbers is not None:
        acc = graph.add("Add", [acc, graph.constant(numbers, dtype)], at)
    return acc, dtype


def _digit_by_digit(
    graph: Graph, node: fx.Node, x: str, most: int, multiply: Multiply, weights: int
) -> str:
    """Return sums in float64, put together from those of digits that float32 holds."""
    at = f"{node.name}."
    bits = next((k for k in DIGITS if weights << k - 1 <= EXACT), None)
    if bits is None:
        raise graph.refuse(
            node, f"{node.name} sums too many weights", "float32 does not hold their sum"
        )
    total, place, size = "", 0, 1 << bits
    while most:
        digit = x
        last = most * weights <= EXACT
        if not last:  # digits go from -size / 2 to size / 2 - 1
            x = graph.add("Add", [x, graph.scalar(size // 2, "float32")], at)
            x = graph.add("Floor", [graph.add("Mul", [x, graph.scalar(1 / size, "float32")], at)],
                          at)  # fmt: skip
            upper = graph.add("Mul", [x, graph.scalar(size, "float32")], at)
            digit = graph.add("Sub", [digit, upper], at)
        part = graph.cast(multiply(digit), "float64", at)
        if place:
            part = graph.add("Mul", [part, graph.scalar(2.0**place, "float64")], at)
        total = graph.add("Add", [total, part], at) if total else part
        if last:
            break
        place, most = place + bits, most // size + 1
    return total


def _bounds(graph: Graph, node: fx.Node) -> tuple[int, int]:
    """Return what a layer's sum can reach, and what its weights add up to, per channel at most."""
    args = given(node)
    turned = "output_padding" in args
    weight = graph.tensor(args["weight"])
    bias = None if args["bias"] is None else graph.tensor(args["bias"])
    axis, groups = int(turned), args["groups"] if turned else 1
    bound = accumulator_bound(weight, bias, graph.grid(args["x"]), axis, groups)
    rows = weight.to(torch.int64).abs()
    if turned and groups > 1:
        rows = rows.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
        axis = 0
    return int(bound.max()), int(rows.movedim(axis, 0).flatten(1).sum(1).max())


def _shifts(node: fx.Node, along: Sequence[int]) -> np.ndarray:
    by = np.asarray(given(node)["shift_by"])
    return by.reshape(along) if by.size > 1 else by.reshape(())


def _weight(graph: Graph, node: fx.Node) -> str:
    """Return a layer's weight in float32."""
    weight = given(node)["weight"]
    return graph.cast(graph.name(weight), "float32", f"{node.name}.")


def conv(graph: Graph, node: fx.Node) -> None:
    """Write a convolution, transposed or not."""
    args, at = given(node), f"{node.name}."
    weight, turned = _weight(graph, node), "output_padding" in args

    def multiply(x: str) -> str:
        return graph.add(
            "ConvTranspose" if turned else "Conv", [x, weight], at,
            kernel_shape=list(shape_of(args["weight"])[2:]), strides=args["stride"],
            pads=[*args["padding"], *args["padding"]], dilations=args["dilation"],
            group=args["groups"], output_padding=args.get("output_padding"),
        )  # fmt: skip

    along = [-1, *[1] * (len(shape_of(node)) - 2)]
    acc, dtype = summed(graph, node, multiply, *_bounds(graph, node), along)
    settled(graph, node, acc, dtype, _shifts(node, along))


def linear(graph: Graph, node: fx.Node) -> None:
    """Write a linear layer."""
    at = f"{node.name}."
    weight = graph.add("Transpose", [_weight(graph, node)], at, perm=[1, 0])

    def multiply(x: str) -> str:
        return graph.add("MatMul", [x, weight], at)

    acc, dtype = summed(graph, node, multiply, *_bounds(graph, node), [-1])
    settled(graph, node, acc, dtype, _shifts(node, [-1]))


# ------------------------------------------------------------------ two activations


def _pair(graph: Graph, node: fx.Node, bound: int) -> tuple[list[str], str]:
    """Return both operands in a type that holds what comes of them."""
    dtype = "float32" if bound <= SHORT else "float64"
    args, at = given(node), f"{node.name}."
    if bound >= WIDE_SAFE:
        raise graph.refuse(
            node, f"{node.name} would not be exact in ONNX",
            f"its results can reach {bound:,}, and float64 holds up to {WIDE_SAFE:,}",
            "quantize with fewer bits there",
        )  # fmt: skip
    return [centred(graph, args[side], at, dtype) for side in ("a", "b")], dtype


def matmul(graph: Graph, node: fx.Node) -> None:
    """Write a matrix product of two activations."""
    args, at = given(node), f"{node.name}."
    bound = shape_of(args["a"])[-1] * reach(graph, args["a"]) * reach(graph, args["b"])
    pair, dtype = _pair(graph, node, bound)
    settled(graph, node, graph.add("MatMul", pair, at), dtype, args["shift_by"])


def add(graph: Graph, node: fx.Node) -> None:
    """Write a sum or a difference."""
    args, at = given(node), f"{node.name}."
    ups = [args["a_shift"], args["b_shift"]]
    bound = sum(reach(graph, args[side]) << up for side, up in zip("ab", ups, strict=True))
    pair, dtype = _pair(graph, node, bound)
    for i, up in enumerate(ups):
        if up:
            pair[i] = graph.add("Mul", [pair[i], graph.scalar(2.0**up, dtype)], at)
    acc = graph.add("Add" if args["sign"] > 0 else "Sub", pair, at)
    settled(graph, node, acc, dtype, args["shift_by"])


def mul(graph: Graph, node: fx.Node) -> None:
    """Write a product."""
    args = given(node)
    pair, dtype = _pair(graph, node, reach(graph, args["a"]) * reach(graph, args["b"]))
    settled(graph, node, graph.add("Mul", pair, f"{node.name}."), dtype, args["shift_by"])


# ------------------------------------------------------------------ one activation


def rescale(graph: Graph, node: fx.Node) -> None:
    """Write codes that change their grid."""
    args = given(node)
    _moved(graph, node, args["x"], args["shift_by"], node.name)


def _moved(graph: Graph, node: fx.Node, source: fx.Node, by: int, out: str) -> str:
    """Return codes shifted to the grid of a node's result."""
    dtype = "float32" if reach(graph, source) << max(-by, 0) <= SHORT else "float64"
    x = centred(graph, source, f"{node.name}.", dtype)
    return settled(graph, node, x, dtype, by, out)


def concat(graph: Graph, node: fx.Node) -> None:
    """Write tensors side by side, each shifted to the result's grid."""
    args, grid = given(node), graph.grid(node)
    whole = (args["low"], args["high"]) == (grid.low, grid.high)
    parts = []
    for x, by in zip(args["xs"], args["shift_by"], strict=True):
        same = whole and graph.grid(x) == grid
        at = f"{node.name}."
        parts.append(graph.name(x) if same else _moved(graph, node, x, by, at))
    graph.add("Concat", parts, node.name, axis=args["axis"])


def lookup(graph: Graph, node: fx.Node) -> None:
    """Write a table."""
    args, at = given(node), f"{node.name}."
    index = graph.cast(graph.name(args["x"]), "int32", at)
    if args["first"]:
        index = graph.add("Sub", [index, graph.scalar(args["first"], "int32")], at)
    graph.add("Gather", [graph.name(args["table"]), index], node.name, axis=0)


def mean(graph: Graph, node: fx.Node) -> None:
    """Write an average over axes."""
    args, at = given(node), f"{node.name}."
    x = centred(graph, args["x"], at, "float64")
    axes = graph.constant(args["axes"], "int64")
    total = graph.add("ReduceSum", [x, axes], at, keepdims=int(args["keepdim"]))
    free = [a for a in args["axes"] if a in Meta(args["x"]).dynamic]
    if free and not args["divisor"]:
        count = graph.cast(free_count(graph, node, free[0]), "float64", at)
        count = graph.add("Mul", [count, graph.scalar(2.0 ** args["shift_by"], "float64")], at)
        _divided(graph, node, total, count)
        return
    count = args["divisor"] or math.prod(shape_of(args["x"])[a] for a in args["axes"])
    _average(graph, node, total, np.asarray(count))


def average_pool(graph: Graph, node: fx.Node) -> None:
    """Write average pooling: a sum by a convolution with ones, over the exact counts."""
    args, at = given(node), f"{node.name}."
    batch, width, *sizes = graph.sizes(args["x"])
    out, kernel = shape_of(node)[2:], args["kernel"]
    pads = window_pads(sizes, out, kernel, args["stride"], args["padding"])
    ones = graph.constant(np.ones((1, 1, *kernel)), "float32")

    def multiply(x: str) -> str:
        flat = graph.reshape(x, [-1, 1, *sizes])
        acc = graph.add("Conv", [flat, ones], at, strides=args["stride"], pads=pads)
        return graph.reshape(acc, [batch, width, *out])

    size = math.prod(kernel)
    acc, dtype = summed(graph, node, multiply, size * reach(graph, args["x"]), size, [])
    how = (kernel, args["stride"], args["padding"], args["ceil_mode"], args["count_include_pad"])
    counts = average_counts(sizes, *how).numpy()[0, 0]
    if args["divisor"]:
        counts = np.full_like(counts, args["divisor"])
    _average(graph, node, acc if dtype == "float64" else graph.cast(acc, "float64", at), counts)


def _average(graph: Graph, node: fx.Node, total: str, counts: np.ndarray) -> None:
    """Write an exact quotient, rounded once.

    It is ``1 / 2d`` away from a tie that it does not meet, for a divisor ``d``, and below 2**16
    where it is not clipped; float64 divides to 2**-38 there.
    """
    args = given(node)
    divisors = counts * 2.0 ** args["shift_by"]
    if divisors.max() >= 2.0**36:
        raise graph.refuse(node, f"{node.name} averages too much", "its quotient is no float64")
    _divided(graph, node, total, graph.constant(divisors, "float64"))


def _divided(graph: Graph, node: fx.Node, total: str, by: str) -> None:
    args, at = given(node), f"{node.name}."
    x = graph.add("Div", [total, by], at)
    x = rounded(graph, x, "float64", at)
    codes_of(graph, args, x, "float64", Meta(node).dtype is torch.int16, node.name)


def layer_norm(graph: Graph, node: fx.Node) -> None:
    """Write a normalisation, operation by operation as it is defined."""
    args, at = given(node), f"{node.name}."
    if Meta(args["x"]).dtype is torch.int16:
        above, d = _moments(graph, node)
    else:
        total, squares, d = exact.moments(graph, node)
        above = exact.variation(graph, node, total, squares, "float64")
    y = rounded(graph, exact.normed(graph, node, above, d), "float32", at)
    codes_of(graph, args, y, "float32", Meta(node).dtype is torch.int16, node.name)


def _moments(graph: Graph, node: fx.Node) -> tuple[str, str]:
    """Return ``n Q - S**2`` in float64 and ``n x - S`` in float32, of wide codes.

    The sums are float64, which holds them; what is formed of them is an int64 where it is larger.
    """
    args, at, sizes = given(node), f"{node.name}.", exact.normalised(node)
    count, most = math.prod(sizes), reach(graph, args["x"])
    rank = len(shape_of(node))
    axes = graph.constant(list(range(rank - len(sizes), rank)), "int64")
    narrow = graph.name(args["x"])
    x = graph.cast(narrow, "float64", at)
    total = graph.add("ReduceSum", [x, axes], at, keepdims=1) if args["centred"] else ""
    squares = graph.add("ReduceSum", [graph.add("Mul", [x, x], at), axes], at, keepdims=1)
    held = "float64" if (count * most) ** 2 < WIDE_SAFE else "int64"
    above = exact.variation(graph, node, total, squares, held)
    dtype = "float32" if 2 * count * most <= EXACT else "float64"
    d = narrow if dtype == "float32" else x
    d = graph.add("Mul", [d, graph.scalar(count, dtype)], at)
    if total:
        d = graph.add("Sub", [d, graph.cast(total, dtype, at)], at)
    return above, d if dtype == "float32" else graph.cast(d, "float32", at)


def quantize(graph: Graph, node: fx.Node) -> None:
    """Write floats becoming codes; ties go to the even one, as for all entries."""
    args, at = given(node), f"{node.name}."
    x = graph.name(args["x"])
    if Meta(args["x"]).dtype is not torch.float32:
        x = graph.cast(x, "float32", at)
    x = graph.add("Mul", [x, graph.scalar(2.0 ** args["exponent"], "float32")], at)
    x = graph.add("Round", [x], at)
    codes_of(graph, args, x, "float32", True, node.name)


def dequantize(graph: Graph, node: fx.Node) -> None:
    """Write codes becoming floats."""
    args = given(node)
    inputs = [graph.name(args["x"]), graph.constant(steps(node), "float32")]
    graph.add("Mul", inputs, node.name)


FORM: dict[str, Any] = {
    "conv": conv, "conv_transpose": conv, "linear": linear, "matmul": matmul, "add": add,
    "mul": mul, "rescale": rescale, "concat": concat, "mean": mean, "average_pool": average_pool,
    "lookup": lookup, "layer_norm": layer_norm, "quantize": quantize, "dequantize": dequantize,
}  # fmt: skip
