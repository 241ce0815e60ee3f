"""What is written the same way in every form: tables, softmax, layer normalisation, and division.

Whole numbers are int64; softmax and layer normalisation follow their definitions operation by
operation (`narrows.ir.integer.statistics`), in types that hold what they hold there. No runtime
fuses these, so they mean the same everywhere.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import fx

from narrows.backends.onnx.integer.graph import Graph, given
from narrows.ir.integer.bounds import EXACT
from narrows.ir.integer.grid import CENTRE
from narrows.ir.integer.statistics import PLAIN_NORM
from narrows.ir.meta import Meta, shape_of


def quantize(graph: Graph, node: fx.Node) -> None:
    """Write floats becoming codes; ONNX rounds ties to even, as entries do."""
    args = given(node)
    low, high = args["low"], args["high"]
    whole = (low, high) == (0, 255)
    out = node.name if whole else f"{node.name}."
    x = args["x"]
    name = graph.name(x)
    if str(Meta(x).dtype) != "torch.float32":
        name = graph.cast(name, "float32", f"{node.name}.")
    scale = graph.scalar(2.0 ** -args["exponent"], "float32")
    x = graph.add("QuantizeLinear", [name, scale, graph.scalar(args["zero"], "uint8")], out)
    if not whole:
        clip(graph, x, low, high, node.name)


def dequantize(graph: Graph, node: fx.Node) -> None:
    """Write codes becoming floats.

    In front of an island it is plain arithmetic, as exact: a runtime takes a floating-point
    operator between DequantizeLinear and QuantizeLinear for one to be quantized, its weights, too.
    """
    args, at = given(node), f"{node.name}."
    x, scale, along = graph.name(args["x"]), steps(node), bool(args["powers"])
    if all(user.op == "output" for user in node.users):
        scale = scale.flatten() if along else scale
        zero = graph.constant(np.full(scale.shape, args["zero"]), "uint8")
        inputs = [x, graph.constant(scale, "float32"), zero]
        graph.add("DequantizeLinear", inputs, node.name, axis=args["axis"] if along else None)
        return
    x = graph.cast(x, "float32", at)
    if args["zero"]:
        x = graph.add("Sub", [x, graph.scalar(args["zero"], "float32")], at)
    graph.add("Mul", [x, graph.constant(scale, "float32")], node.name)


def steps(node: fx.Node) -> np.ndarray:
    """Return what the codes that a node dequantizes are multiplied by, to broadcast."""
    args, rank = given(node), len(shape_of(node))
    made = np.exp2([-float(args["exponent"] + p) for p in args["powers"] or [0]])
    lie = [-1 if a == args["axis"] else 1 for a in range(rank)] if args["powers"] else []
    return made.reshape(lie)


def clip(graph: Graph, x: str, low: int, high: int, out: str) -> str:
    """Return codes between two bounds."""
    return graph.add("Clip", [x, graph.scalar(low, "uint8"), graph.scalar(high, "uint8")], out)


def lookup(graph: Graph, node: fx.Node) -> None:
    """Write a table of 256 codes."""
    args = given(node)
    index = graph.cast(graph.name(args["x"]), "int32", f"{node.name}.")
    graph.add("Gather", [graph.name(args["table"]), index], node.name, axis=0)


def softmax(graph: Graph, node: fx.Node) -> None:
    """Write softmax over a table of exponentials, its quotient exact.

    The quotient of two whole numbers below 2**31 is at least ``2**-40`` away from any tie it does
    not meet, and binary64 is exact to ``2**-45`` there: dividing, then rounding, rounds once.
    """
    args, at = given(node), f"{node.name}."
    axes = graph.constant([args["axis"] % len(shape_of(node))], "int64")
    x = graph.cast(graph.name(args["x"]), "int32", at)
    top = graph.add("ReduceMax", [x, axes], at, keepdims=1)
    powers = graph.constant(graph.tensor(args["table"]).numpy(), "float64")
    powers = graph.add("Gather", [powers, graph.add("Sub", [top, x], at)], at, axis=0)
    total = graph.add("ReduceSum", [powers, axes], at, keepdims=1)
    total = graph.add("Mul", [total, graph.scalar(2.0 ** -args["exponent"], "float64")], at)
    settle_float(graph, node, graph.add("Div", [powers, total], at))


def layer_norm(graph: Graph, node: fx.Node) -> None:
    """Write layer normalisation, operation by operation as it is defined."""
    args, at = given(node), f"{node.name}."
    total, squares, d = moments(graph, node)
    y = normed(graph, node, variation(graph, node, total, squares, "float64"), d)
    if graph.half_up:  # rounded in float32, as it is defined; another rounding changes nothing
        y = graph.add("Floor", [graph.add("Add", [y, graph.scalar(0.5, "float32")], at)], at)
        settle_float(graph, node, graph.cast(y, "float64", at))
        return
    whole = (args["low"], args["high"]) == (0, 255)
    one, zero = graph.scalar(1.0, "float32"), graph.scalar(args["zero"], "uint8")
    codes = graph.add("QuantizeLinear", [y, one, zero], node.name if whole else at)
    if not whole:
        clip(graph, codes, args["low"], args["high"], node.name)


def normalised(node: fx.Node) -> tuple[int, ...]:
    """Return the sizes of the axes that a layer normalises over."""
    return shape_of(node)[-given(node)["axes"] :]


def moments(graph: Graph, node: fx.Node) -> tuple[str, str, str]:
    """Return ``sum(x)``, ``sum(x**2)`` and, in float32, ``n x - sum(x)``.

    Where the mean stays, ``sum(x)`` is empty and counts as 0. Where it goes, only differences of
    codes matter, so the zero point may stay in ``x``, or any other come out. The sums are float32
    where that holds every partial sum: ONNX Runtime adds those several times as fast as integers.
    """
    args, at = given(node), f"{node.name}."
    codes, grid, rank = graph.name(args["x"]), graph.grid(args["x"]), len(shape_of(node))
    count = math.prod(normalised(node))
    axes = graph.constant(list(range(rank - args["axes"], rank)), "int64")

    def summed(x: str) -> str:
        return graph.add("ReduceSum", [x, axes], at, keepdims=1)

    centre = 0 if count * grid.high**2 <= EXACT else CENTRE
    if not args["centred"]:
        centre = grid.zero
    quick = count * max(centre - grid.low, grid.high - centre) ** 2 <= EXACT
    centre = centre if quick or not args["centred"] else 0
    kind = "float32" if quick else "int32"
    x = graph.cast(codes, kind, at)
    if centre:
        x = graph.add("Sub", [x, graph.scalar(centre, kind)], at)
    total = summed(x) if args["centred"] else ""
    # Up to 2**15 elements sum(x**2) is an int32.
    wide = x if quick or count < 2**15 else graph.cast(x, "int64", at)
    squares = summed(graph.add("Mul", [wide, wide], at))
    if not quick and count > PLAIN_NORM:  # beyond float32, which rounds once then
        d = graph.add("Mul", [x, graph.scalar(count, "int32")], at)
        d = graph.add("Sub", [d, total], at) if total else d
        return total, squares, graph.cast(d, "float32", at)
    # One pass over bytes, which no other node reads: ONNX Runtime would copy a shared one.
    scale, zero = graph.scalar(count, "float32"), graph.scalar(centre, "uint8")
    d = graph.add("DequantizeLinear", [codes, scale, zero], at)
    if not total:
        return total, squares, d
    sums = total if quick else graph.cast(total, "float32", at)
    return total, squares, graph.add("Sub", [d, sums], at)


def variation(graph: Graph, node: fx.Node, total: str, squares: str, dtype: str) -> str:
    """Return ``n Q - S**2`` in float64, one number a row, formed in a type that holds it."""
    at = f"{node.name}."
    count = graph.scalar(math.prod(normalised(node)), dtype)
    above = graph.add("Mul", [graph.cast(squares, dtype, at), count], at)
    if total:
        total = graph.cast(total, dtype, at)
        above = graph.add("Sub", [above, graph.add("Mul", [total, total], at)], at)
    return above if dtype == "float64" else graph.cast(above, "float64", at)


def normed(graph: Graph, node: fx.Node, above: str, d: str) -> str:
    """Return a norm's result in steps, in float32 and not rounded yet.

    Args:
        graph: The graph.
        node: The norm.
        above: ``n Q - S**2`` in float64.
        d: ``n x - S`` in float32.
    """
    args, at, count = given(node), f"{node.name}.", math.prod(normalised(node))

    def number(value: float) -> str:
        return graph.scalar(value, "float64")

    variance = graph.add("Div", [above, number(float(count**2))], at)
    root = graph.add("Sqrt", [graph.add("Add", [variance, number(args["eps"])], at)], at)
    made = graph.add("Div", [number(1.0), graph.add("Mul", [root, number(count)], at)], at)
    y = graph.add("Mul", [d, graph.cast(made, "float32", at)], at)
    y = graph.add("Mul", [y, graph.name(args["gain"])], at)
    return graph.add("Add", [y, graph.name(args["offset"])], at)


def settle_float(graph: Graph, node: fx.Node, x: str) -> None:
    """Round float64 steps to codes."""
    args, at = given(node), f"{node.name}."
    if graph.half_up:
        x = graph.add("Floor", [graph.add("Add", [x, graph.scalar(0.5, "float64")], at)], at)
    else:
        x = graph.add("Round", [x], at)
    if args["zero"]:
        x = graph.add("Add", [x, graph.scalar(args["zero"], "float64")], at)
    bounds = [graph.scalar(args[k], "float64") for k in ("low", "high")]
    graph.cast(graph.add("Clip", [x, *bounds], at), "uint8", node.name)


def shifted(graph: Graph, acc: str, by: Any, node: fx.Node) -> None:
    """Write an int64 accumulator's shift, zero point and clip; ``by`` may be an array."""
    import numpy as np

    by = np.asarray(by)
    up, down = 2 ** np.maximum(-by, 0), 2 ** np.maximum(by, 0)
    if (by < 0).any():
        acc = graph.add("Mul", [acc, graph.constant(up, "int64")], f"{node.name}.")
    divided(graph, acc, graph.constant(down, "int64"), graph.constant(2 * down, "int64"), node)


def divided(graph: Graph, acc: str, by: str, twice: str, node: fx.Node) -> None:
    """Write ``acc / by`` rounded, the zero point and the clip.

    ``floor((2 a + d) / 2 d)`` rounds ties up; where one was met, half_even takes an odd result
    back by one. ONNX's integer Div truncates and its Mod is a floor's, so the remainder comes
    first.
    """
    at = f"{node.name}."
    doubled = graph.add("Add", [acc, acc], at)
    doubled = graph.add("Add", [doubled, by], at)
    rest = graph.add("Mod", [doubled, twice], at)
    result = graph.add("Div", [graph.add("Sub", [doubled, rest], at), twice], at)
    if not graph.half_up:
        tie = graph.add("Equal", [rest, graph.scalar(0, "int64")], at)
        tie = graph.cast(tie, "int64", at)
        odd = graph.add("Mod", [result, graph.scalar(2, "int64")], at)
        result = graph.add("Sub", [result, graph.add("Mul", [tie, odd], at)], at)
    settle(graph, result, node)


def settle(graph: Graph, value: str, node: fx.Node) -> None:
    """Write the zero point and the clip of a whole number."""
    args, at = given(node), f"{node.name}."
    value = graph.add("Add", [value, graph.scalar(args["zero"], "int64")], at)
    bounds = [graph.scalar(args[k], "int64") for k in ("low", "high")]
    graph.cast(graph.add("Clip", [value, *bounds], at), "uint8", node.name)


def whole(graph: Graph, node: fx.Node, zero: int, at: str) -> str:
    """Return codes without their zero point, in int64."""
    x = graph.cast(graph.name(node), "int64", at)
    return graph.add("Sub", [x, graph.scalar(zero, "int64")], at) if zero else x
