"""The form ``qdq``: every operator in floating-point, between DequantizeLinear and QuantizeLinear.

All numbers on the way are whole multiples of a power of two, so float32 holds them exactly up to
2**24 steps; and where ONNX Runtime fuses an operator to its integer kernel, that rounds as the
reference does (activations uint8 with an even zero point, weights int8, ties to even). A tensor
between two operators is stored as codes, which is what operators that only move them read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from narrows.backends.onnx.integer import exact, portable
from narrows.backends.onnx.integer.graph import Graph, given
from narrows.backends.onnx.integer.resizing import resample
from narrows.ir.integer.bounds import EXACT
from narrows.ir.integer.grid import Grid
from narrows.ir.integer.statistics import distinct
from narrows.ir.meta import Meta, shape_of

# Up to this many numbers a sum of codes is a float32. ONNX Runtime's averages were compared with
# the exact ones at every tie and next to it.
LARGEST_AVERAGE = 2**16


def dequantized(graph: Graph, x: str, grid: Grid, at: str) -> str:
    """Return an operand in floating-point."""
    scale, zero = graph.scalar(grid.scale, "float32"), graph.scalar(grid.zero, "uint8")
    return graph.add("DequantizeLinear", [x, scale, zero], at)


def quantized(graph: Graph, y: str, node: fx.Node, out: str = "") -> str:
    """Write a result's codes, with a clip where the codes do not end where uint8 does."""
    args, grid = given(node), graph.grid(node)
    out = out or node.name
    whole = (args["low"], args["high"]) == (0, 255)
    scale, zero = graph.scalar(grid.scale, "float32"), graph.scalar(grid.zero, "uint8")
    codes = graph.add("QuantizeLinear", [y, scale, zero], out if whole else f"{out}.")
    return codes if whole else exact.clip(graph, codes, args["low"], args["high"], out)


def exponents(graph: Graph, node: fx.Node, operand: fx.Node) -> list[int]:
    """Return the exponents of a layer's weight, from its shifts: ``x + w - y``."""
    y, x = graph.grid(node).exponent, graph.grid(operand).exponent
    return [by + y - x for by in given(node)["shift_by"]]


def scales(values: Sequence[int]) -> np.ndarray:
    """Return ``2**-e`` for exponents, a scalar for a single one."""
    made = np.exp2(-np.asarray(values, dtype=np.float64)).astype(np.float32)
    return made if made.size > 1 else made.reshape(())


def layer(graph: Graph, node: fx.Node, x: str, *, axis: int = 0) -> list[str]:
    """Return the dequantized operand, weight and bias of a layer."""
    args, at = given(node), f"{node.name}."
    grid = graph.grid(args["x"])
    finer = exponents(graph, node, args["x"])
    scale = scales(finer)
    # A weight and a zero point of its own: where ONNX Runtime makes uint8 of them, it fails at one
    # that two layers read.
    zero = graph.constant(np.zeros(scale.shape), "int8", f"{at}zero")
    weight = graph.add(
        "DequantizeLinear",
        [graph.own(args["weight"], at), graph.constant(scale, "float32"), zero],
        at,
        axis=axis if len(finer) > 1 else None,
    )
    inputs = [dequantized(graph, x, grid, at), weight]
    if args["bias"] is None:
        return inputs
    # A scale per channel even where all are one: ONNX Runtime reads the bias along axis 0.
    both = np.broadcast_to(scales([grid.exponent + e for e in finer]), shape_of(args["bias"]))
    terms = [graph.constant(both, "float32"), graph.constant(np.zeros(both.shape), "int32")]
    bias = graph.add("DequantizeLinear", [graph.name(args["bias"]), *terms], at, axis=0)
    return [*inputs, bias]


def conv(graph: Graph, node: fx.Node) -> None:
    """Write a convolution."""
    args = given(node)
    y = graph.add(
        "Conv", layer(graph, node, graph.name(args["x"])), f"{node.name}.",
        kernel_shape=list(shape_of(args["weight"])[2:]), strides=args["stride"],
        pads=[*args["padding"], *args["padding"]], dilations=args["dilation"],
        group=args["groups"],
    )  # fmt: skip
    quantized(graph, y, node)


def conv_transpose(graph: Graph, node: fx.Node) -> None:
    """Write a transposed convolution, which stays floating-point in ONNX Runtime, and exact."""
    args = given(node)
    y = graph.add(
        "ConvTranspose", layer(graph, node, graph.name(args["x"]), axis=1), f"{node.name}.",
        kernel_shape=list(shape_of(args["weight"])[2:]), strides=args["stride"],
        pads=[*args["padding"], *args["padding"]], dilations=args["dilation"],
        output_padding=args["output_padding"], group=args["groups"],
    )  # fmt: skip
    quantized(graph, y, node)


def rows(graph: Graph, node: fx.Node) -> tuple[str, bool]:
    """Return a linear layer's operand as a matrix, and whether it had more axes."""
    x = given(node)["x"]
    shape = shape_of(x)
    if len(shape) == 2:
        return graph.name(x), False
    return graph.reshape(graph.name(x), [-1, shape[-1]], graph.fresh(f"{node.name}.rows")), True


def linear(graph: Graph, node: fx.Node) -> None:
    """Write a linear layer as Gemm, which is fused together with its bias; MatMul is not."""
    x, deep = rows(graph, node)
    y = graph.add("Gemm", layer(graph, node, x), f"{node.name}.", transB=1)
    if not deep:
        quantized(graph, y, node)
        return
    codes = quantized(graph, y, node, graph.fresh(f"{node.name}.codes"))
    graph.reshape(codes, graph.sizes(node), node.name)


def _binary(op: str, graph: Graph, node: fx.Node) -> None:
    args, at = given(node), f"{node.name}."
    pair = [dequantized(graph, graph.name(args[s]), graph.grid(args[s]), at) for s in ("a", "b")]
    quantized(graph, graph.add(op, pair, at), node)


def matmul(graph: Graph, node: fx.Node) -> None:
    """Write a matrix product of two activations."""
    _binary("MatMul", graph, node)


def add(graph: Graph, node: fx.Node) -> None:
    """Write a sum or a difference; float32 holds it while the operands' steps are close."""
    args = given(node)
    if max(args["a_shift"], args["b_shift"]) > 15:
        portable.add(graph, node)
        return
    _binary("Add" if args["sign"] > 0 else "Sub", graph, node)


def mul(graph: Graph, node: fx.Node) -> None:
    """Write a product."""
    _binary("Mul", graph, node)


def prelu(graph: Graph, node: fx.Node) -> None:
    """Write a slope per channel; a code times one is a float32."""
    args, at = given(node), f"{node.name}."
    slopes = graph.tensor(args["slopes"]).numpy() * np.float32(2.0 ** -args["unit"])
    x = dequantized(graph, graph.name(args["x"]), graph.grid(args["x"]), at)
    quantized(graph, graph.add("PRelu", [x, graph.constant(slopes, "float32")], at), node)


def rescale(graph: Graph, node: fx.Node) -> None:
    """Write codes that change their grid, as a table.

    A pair of DequantizeLinear and QuantizeLinear would say the same, but ONNX Runtime merges it
    with its neighbours and rounds once where the program rounds twice.
    """
    args, at = given(node), f"{node.name}."
    tail = args["zero"], args["low"], args["high"]
    x = portable.regrid(graph, graph.name(args["x"]), args["shift_by"], args["x_zero"], tail, at)
    graph.add("Identity", [x], node.name)


# Operators of functions without parameters.
FUNCTIONS = {"sigmoid": "Sigmoid", "tanh": "Tanh", "gelu": "Gelu", "silu": "", "hardsigmoid": ""}

# How far float32 kernels may be from the true value, relative to it: their approximations of exp
# and erf are good to a few units of 2**-24.
KERNEL_ERROR = 2.0**-19


def lookup(graph: Graph, node: fx.Node) -> None:
    """Write a function as its operator where no kernel can miss a code, else as a table.

    The true value of each of the 256 codes has to be further from a tie than any kernel's error.
    """
    args, at = given(node), f"{node.name}."
    function = args["function"]
    if function not in FUNCTIONS or graph.half_up or not _distinct(graph, node):
        exact.lookup(graph, node)
        return
    x = dequantized(graph, graph.name(args["x"]), graph.grid(args["x"]), at)
    if function == "silu":
        y = graph.add("Mul", [x, graph.add("Sigmoid", [x], at)], at)
    elif function == "hardsigmoid":
        y = graph.add("HardSigmoid", [x], at, alpha=1 / 6, beta=0.5)
    else:
        y = graph.add(FUNCTIONS[function], [x], at)
    grid = graph.grid(node)
    scale, zero = graph.scalar(grid.scale, "float32"), graph.scalar(grid.zero, "uint8")
    graph.add("QuantizeLinear", [y, scale, zero], node.name)


def _distinct(graph: Graph, node: fx.Node) -> bool:
    """Whether every code of a function is far enough from its neighbours' reach."""
    args = given(node)
    source, grid = graph.grid(args["x"]), graph.grid(node)
    x = (torch.arange(256, dtype=torch.float64) - source.zero) * source.scale
    y = getattr(torch.nn.functional, args["function"])(x) / grid.scale
    codes = (y.round() + grid.zero).clamp(0, 255).to(torch.uint8)
    error = y.abs() * KERNEL_ERROR + 2.0**-20
    # Beyond the ends of the codes a tie decides nothing.
    inner = (y + grid.zero > -0.4) & (y + grid.zero < 255.4)
    ties = (y - y.floor() - 0.5).abs()
    return bool(((ties > error) | ~inner).all()) and torch.equal(codes, graph.tensor(args["table"]))


def softmax(graph: Graph, node: fx.Node) -> None:
    """Write softmax in float32 where that is exact (`narrows.ir.integer.statistics`)."""
    args, at = given(node), f"{node.name}."
    shape, source = shape_of(node), graph.grid(args["x"])
    axis = args["axis"] % len(shape)
    table = graph.tensor(args["table"])
    most = int(table[0])
    narrow = most * shape[axis] <= EXACT and most * 2.0 ** args["exponent"] <= 2**23
    if graph.half_up or not narrow or not distinct(table, source.exponent):
        exact.softmax(graph, node)
        return
    axes = graph.constant([axis], "int64")
    top = graph.add("ReduceMax", [graph.name(args["x"]), axes], at, keepdims=1)
    pair = [dequantized(graph, x, source, at) for x in (graph.name(args["x"]), top)]
    powers = graph.add("Exp", [graph.add("Sub", pair, at)], at)
    powers = graph.add("Mul", [powers, graph.scalar(most, "float32")], at)
    powers = graph.add("Round", [powers], at)
    total = graph.add("ReduceSum", [powers, axes], at, keepdims=1)
    quantized(graph, graph.add("Div", [powers, total], at), node)


def concat(graph: Graph, node: fx.Node) -> None:
    """Write tensors side by side; those on one grid are joined as codes."""
    args, at = given(node), f"{node.name}."
    if aligned(args):
        graph.add("Concat", [graph.name(x) for x in args["xs"]], node.name, axis=args["axis"])
        return
    parts = [dequantized(graph, graph.name(x), graph.grid(x), at) for x in args["xs"]]
    quantized(graph, graph.add("Concat", parts, at, axis=args["axis"]), node)


def aligned(args: dict[str, Any]) -> bool:
    """Whether the operands of a concat lie on the grid of the result."""
    same = set(args["zeros"]) == {args["zero"]} and set(args["shift_by"]) == {0}
    return same and (args["low"], args["high"]) == (0, 255)


def mean(graph: Graph, node: fx.Node) -> None:
    """Write an average as GlobalAveragePool, with the averaged axes last."""
    args, at = given(node), f"{node.name}."
    shape = shape_of(args["x"])
    axes = args["axes"]
    count = math.prod(shape[a] for a in axes)
    others = [a for a in range(len(shape)) if a not in axes]
    unlike = not others or any(a in Meta(args["x"]).dynamic for a in (*axes, *others[1:]))
    if args["divisor"]:
        _total(graph, node, count)
        return
    if unlike or count > LARGEST_AVERAGE or not pooled_exactly(count, args["shift_by"]):
        portable.mean(graph, node)
        return
    x = graph.name(args["x"])
    if (len(shape), axes) != (4, [2, 3]):
        if [*others, *axes] != list(range(len(shape))):
            x = graph.add("Transpose", [x], at, perm=[*others, *axes])
        rest = math.prod(shape[a] for a in others[1:])
        x = graph.reshape(x, [graph.sizes(args["x"])[others[0]], rest, count, 1])
    keeps = len(shape) == 4 and args["keepdim"] and axes == [2, 3]
    grid = graph.grid(args["x"])
    y = graph.add("GlobalAveragePool", [dequantized(graph, x, grid, at)], at)
    if keeps:
        quantized(graph, y, node)
        return
    codes = quantized(graph, y, node, graph.fresh(f"{node.name}.codes"))
    graph.reshape(codes, graph.sizes(node), node.name)


def _total(graph: Graph, node: fx.Node, count: int) -> None:
    """Write sums, in float32 where it holds every partial one."""
    args, at = given(node), f"{node.name}."
    free = any(a in Meta(args["x"]).dynamic for a in args["axes"])
    if args["divisor"] != 1 or free or count * 255 > EXACT:
        portable.mean(graph, node)
        return
    x = dequantized(graph, graph.name(args["x"]), graph.grid(args["x"]), at)
    axes = graph.constant(args["axes"], "int64")
    total = graph.add("ReduceSum", [x, axes], at, keepdims=int(args["keepdim"]))
    quantized(graph, total, node)


def pooled_exactly(count: int, by: int) -> bool:
    """Whether the kernels round every average of ``count`` codes, shifted by ``by``, as is right.

    Quotients are ``2**-by / 2 count`` away from a tie that they do not meet, at least, and those up
    to 2**8 are off by 2**-16 in float32. A tie itself has to come out as one, which is the question
    where a kernel multiplies by the rounded ``1 / count``: it fails for 7, shifted to the right.
    """
    if by < -8 or 2 * count * 2.0 ** max(by, 0) >= 2**15:
        return False
    halves = np.arange(-256, 512) + 0.5
    sums = halves * count * 2.0**by
    met = sums == np.floor(sums)
    products = sums[met].astype(np.float32) * np.float32(2.0**-by / count)
    return bool((products == halves[met].astype(np.float32)).all())


def average_pool(graph: Graph, node: fx.Node) -> None:
    """Write average pooling."""
    args, at = given(node), f"{node.name}."
    exactly = all(pooled_exactly(n, args["shift_by"]) for n in portable.divisors(node))
    pads = portable.countable_pads(node)
    if args["divisor"] or pads is None or not exactly:
        portable.average_pool(graph, node)
        return
    x = dequantized(graph, graph.name(args["x"]), graph.grid(args["x"]), at)
    y = graph.add(
        "AveragePool", [x], at, kernel_shape=args["kernel"], strides=args["stride"], pads=pads,
        count_include_pad=int(args["count_include_pad"]),
    )  # fmt: skip
    quantized(graph, y, node)


FORM: dict[str, Any] = {
    **portable.FORM, "conv": conv, "conv_transpose": conv_transpose, "linear": linear,
    "matmul": matmul, "add": add, "mul": mul, "rescale": rescale, "prelu": prelu, "concat": concat,
    "mean": mean, "average_pool": average_pool, "resample": resample, "lookup": lookup,
    "softmax": softmax,
}  # fmt: skip
