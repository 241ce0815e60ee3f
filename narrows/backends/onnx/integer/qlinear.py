"""The form ``qlinear``: integer operators, those of ONNX and those of ONNX Runtime.

Nothing is left to fusion. The kernels requantize by a float32 product and round ties to even, which
equals the shift for accumulators up to 2**24, and beyond them where the shift is 16 at most, as the
result then lies outside the codes. Ties upward exist for layers with a zero point of 0 alone: their
scale times ``1 + 2**-23`` moves a tie, and nothing but a tie, to the other side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import fx

from narrows.backends.onnx.integer import exact, portable, qdq
from narrows.backends.onnx.integer.graph import MICROSOFT, Graph, given
from narrows.backends.onnx.integer.resizing import resample
from narrows.ir.integer.grid import CENTRE, Grid
from narrows.ir.meta import shape_of

NUDGE = np.float32(1 + 2.0**-23)
NUDGED_SHIFTS = 14  # a float32 product still tells a tie from its neighbours


def terms(graph: Graph, grid: Grid) -> list[str]:
    """Return the constants of a grid: scale and zero point."""
    return [graph.scalar(grid.scale, "float32"), graph.scalar(grid.zero, "uint8")]


def operand(graph: Graph, node: fx.Node, name: str = "") -> list[str]:
    """Return the three inputs of an operand: codes, scale and zero point."""
    return [name or graph.name(node), *terms(graph, graph.grid(node))]


def settled(
    graph: Graph, op: str, inputs: Sequence[str], node: fx.Node, out: str = "", **how: Any
) -> str:
    """Write an operator, and a clip where the codes do not end where uint8 does."""
    args, out = given(node), out or node.name
    whole = (args["low"], args["high"]) == (0, 255)
    codes = graph.add(op, inputs, out if whole else f"{out}.", **how)
    return codes if whole else exact.clip(graph, codes, args["low"], args["high"], out)


def weight(graph: Graph, node: fx.Node) -> list[str]:
    """Return the three inputs of a layer's weight, its scale nudged where ties go up."""
    args = given(node)
    scale = qdq.scales(qdq.exponents(graph, node, args["x"]))
    if graph.half_up:
        rounds = max(args["shift_by"]) > 0
        if rounds and (args["zero"] != 0 or max(args["shift_by"]) > NUDGED_SHIFTS):
            raise half_up_refusal(graph, node)
        scale = scale * NUDGE if rounds else scale
    zero = np.full(scale.shape, CENTRE)
    return [graph.unsigned(args["weight"]), graph.constant(scale, "float32"),
            graph.constant(zero, "uint8")]  # fmt: skip


def half_up_refusal(graph: Graph, node: fx.Node) -> Exception:
    """Return the error for a tie that cannot be rounded up."""
    return graph.refuse(
        node,
        f"{node.name} cannot round ties up in this form",
        "the kernels round ties to even; a nudged scale moves ties away from zero, which is up "
        f"for layers with a zero point of 0 and shifts up to {NUDGED_SHIFTS} alone",
        'form="integer", or quantize with rounding="half_even"',
    )


def even(graph: Graph, node: fx.Node, *shifts: int) -> None:
    """Raise unless a node's ties are rounded to even, or it has none."""
    if graph.half_up and any(by > 0 for by in shifts):
        raise half_up_refusal(graph, node)


def conv(graph: Graph, node: fx.Node) -> None:
    """Write a convolution."""
    args = given(node)
    bias = [] if args["bias"] is None else [graph.name(args["bias"])]
    inputs = [*operand(graph, args["x"]), *weight(graph, node), *terms(graph, graph.grid(node))]
    settled(
        graph, "QLinearConv", [*inputs, *bias], node,
        kernel_shape=list(shape_of(args["weight"])[2:]), strides=args["stride"],
        pads=[*args["padding"], *args["padding"]], dilations=args["dilation"],
        group=args["groups"],
    )  # fmt: skip


def linear(graph: Graph, node: fx.Node) -> None:
    """Write a linear layer as ONNX Runtime's QGemm."""
    args = given(node)
    x, deep = qdq.rows(graph, node)
    bias = "" if args["bias"] is None else graph.name(args["bias"])
    inputs = [*operand(graph, args["x"], x), *weight(graph, node), bias,
              *terms(graph, graph.grid(node))]  # fmt: skip
    how: dict[str, Any] = {"domain": MICROSOFT, "transB": 1}
    if not deep:
        settled(graph, "QGemm", inputs, node, **how)
        return
    codes = settled(graph, "QGemm", inputs, node, graph.fresh(f"{node.name}.codes"), **how)
    graph.reshape(codes, graph.sizes(node), node.name)


def matmul(graph: Graph, node: fx.Node) -> None:
    """Write a matrix product of two activations."""
    args = given(node)
    even(graph, node, args["shift_by"])
    inputs = [*operand(graph, args["a"]), *operand(graph, args["b"])]
    settled(graph, "QLinearMatMul", [*inputs, *terms(graph, graph.grid(node))], node)


def _binary(op: str, graph: Graph, node: fx.Node) -> None:
    args = given(node)
    inputs = [*operand(graph, args["a"]), *operand(graph, args["b"])]
    settled(graph, op, [*inputs, *terms(graph, graph.grid(node))], node, domain=MICROSOFT)


def add(graph: Graph, node: fx.Node) -> None:
    """Write a sum; a difference has no kernel and is written in whole numbers."""
    args = given(node)
    even(graph, node, args["shift_by"])
    if args["sign"] < 0 or max(args["a_shift"], args["b_shift"]) > 15:
        portable.add(graph, node)
        return
    _binary("QLinearAdd", graph, node)


def mul(graph: Graph, node: fx.Node) -> None:
    """Write a product."""
    even(graph, node, given(node)["shift_by"])
    _binary("QLinearMul", graph, node)


def concat(graph: Graph, node: fx.Node) -> None:
    """Write tensors side by side, each aligned by the kernel."""
    args = given(node)
    even(graph, node, *args["shift_by"])
    if qdq.aligned(args):
        qdq.concat(graph, node)
        return
    parts = [name for x in args["xs"] for name in operand(graph, x)]
    how: dict[str, Any] = {"domain": MICROSOFT, "axis": args["axis"]}
    settled(graph, "QLinearConcat", [*terms(graph, graph.grid(node)), *parts], node, **how)


def mean(graph: Graph, node: fx.Node) -> None:
    """Write an average over the spatial axes, any other in whole numbers."""
    args = given(node)
    shape = shape_of(args["x"])
    count = int(np.prod([shape[a] for a in args["axes"]]))
    spatial = (len(shape), args["axes"]) == (4, [2, 3])
    if graph.half_up or args["divisor"] or not spatial or count > qdq.LARGEST_AVERAGE:
        portable.mean(graph, node)
        return
    if not qdq.pooled_exactly(count, args["shift_by"]):
        portable.mean(graph, node)
        return
    inputs = [*operand(graph, args["x"]), *terms(graph, graph.grid(node))]
    how: dict[str, Any] = {"domain": MICROSOFT, "channels_last": 0}
    if args["keepdim"]:
        settled(graph, "QLinearGlobalAveragePool", inputs, node, **how)
        return
    out = graph.fresh(f"{node.name}.codes")
    codes = settled(graph, "QLinearGlobalAveragePool", inputs, node, out, **how)
    graph.reshape(codes, graph.sizes(node), node.name)


def average_pool(graph: Graph, node: fx.Node) -> None:
    """Write average pooling."""
    args = given(node)
    by = args["shift_by"]
    exactly = all(qdq.pooled_exactly(n, by) for n in portable.divisors(node))
    pads = portable.countable_pads(node)
    if graph.half_up or args["divisor"] or pads is None or not exactly:
        portable.average_pool(graph, node)
        return
    inputs = [*operand(graph, args["x"]), *terms(graph, graph.grid(node))]
    settled(
        graph, "QLinearAveragePool", inputs, node, domain=MICROSOFT, kernel_shape=args["kernel"],
        strides=args["stride"], pads=pads, count_include_pad=int(args["count_include_pad"]),
    )  # fmt: skip


FORM: dict[str, Any] = {
    **portable.FORM, "conv": conv, "linear": linear, "matmul": matmul, "add": add, "mul": mul,
    "concat": concat,
    "mean": mean, "average_pool": average_pool, "resample": resample,
}  # fmt: skip
