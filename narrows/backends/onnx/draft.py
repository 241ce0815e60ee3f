"""A float program as an ONNX model in a fraction of an export's time, to be timed and not shipped.

What ships goes through ``torch.onnx`` and is held to the program (`narrows.backends.onnx.export`).
A contest of forms (`narrows.api.contest`) only wants to know how fast the runtime is on each, so
the operators that networks are made of are written straight from their arguments here. They become
the nodes that the export gives, as the runtime optimizes both. What has no rule goes through the
exporter, alone.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import onnx
import torch
from torch import fx

from narrows.backends.onnx.integer import moves
from narrows.backends.onnx.integer.graph import Graph, given
from narrows.backends.onnx.integer.islands import Islands
from narrows.ir.graph import live_nodes
from narrows.ir.meta import Meta, op_name, shape_of
from narrows.ir.ops.args import is_tensor
from narrows.ir.program import Program

Rule = Callable[[Graph, fx.Node], Any]
RULES: dict[str, Rule] = {}

# What moves floats as it moves codes.
MOVES = frozenset({
    "reshape", "unflatten", "flatten", "squeeze", "unsqueeze", "permute", "slice", "select",
    "index_select", "split", "getitem", "alias", "clone", "contiguous", "dropout",
    "feature_dropout", "channel_shuffle", "pixel_shuffle", "max_pool1d", "max_pool2d",
})  # fmt: skip


def draft(program: Program, outputs: Sequence[fx.Node], opset: int) -> onnx.ModelProto:
    """Return a model that takes as long as the program's.

    Args:
        program: The program, its norms folded as far as they can be.
        outputs: The nodes that the model returns.
        opset: The version of the ONNX operators.

    Raises:
        LowerError: An operator has no ONNX form.
    """
    live = [n for n in live_nodes(program.graph) if n.op == "call_function"]
    live = [n for n in live if Meta(n).size is None]
    graph = Graph(program, half_up=False)
    found = {node: write for node in live if (write := _rule(node)) is not None}
    islands = Islands(graph, [n for n in live if n not in found], opset)
    for node in live:
        if node in found:
            found[node](graph, node)
        else:
            islands.write(node)
    for node in outputs:
        if graph.name(node) != node.name:
            graph.add("Identity", [graph.renamed.pop(node)], node.name)
    inputs = [n for n in program.placeholders if shape_of(n) is not None]
    return graph.model(inputs, list(outputs), opset)


def _rule(node: fx.Node) -> Rule | None:
    """Return what writes a node, or ``None`` for what the exporter has to."""
    name = "getitem" if node.target is operator.getitem else op_name(node)
    if name.partition(".")[0] in MOVES and _is_plain(node):
        source = node.args[0] if name == "getitem" else node
        is_split = name != "getitem" or op_name(source).startswith("split")  # type: ignore[arg-type]
        return moves.find(node) if is_split else None
    fits = FITS.get(name)
    return RULES[name] if fits is not None and _is_plain(node) and fits(node) else None


def _is_plain(node: fx.Node) -> bool:
    """Whether a node is of float32 numbers and all its sizes but the batch are known."""
    if shape_of(node) is not None and Meta(node).dtype is not torch.float32:
        return False
    return all(Meta(n).size is None for n in node.all_input_nodes) and set(Meta(node).dynamic) <= {
        0
    }


# ------------------------------------------------------------------ rules

Fits = Callable[[fx.Node], bool]
FITS: dict[str, Fits] = {}


def rule(*names: str, fits: Fits = lambda node: True) -> Callable[[Rule], Rule]:
    """Enter a function for operators, by their names as ATen spells them, where they are alike."""

    def enter(function: Rule) -> Rule:
        RULES.update(dict[str, Rule].fromkeys(names, function))
        FITS.update(dict[str, Fits].fromkeys(names, fits))
        return function

    return enter


def _value(graph: Graph, value: Any) -> str:
    """Return an operand: a tensor, or a number as a constant."""
    return graph.name(value) if isinstance(value, fx.Node) else graph.scalar(value, "float32")


def _each(value: Any, rank: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


@rule("conv1d.default", "conv2d.default", "conv3d.default")
def _convolution(graph: Graph, node: fx.Node) -> None:
    args, rank = given(node), len(shape_of(node)) - 2
    operands = [args["input"], args["weight"], *([] if args["bias"] is None else [args["bias"]])]
    graph.add(
        "Conv", [graph.name(n) for n in operands], node.name,
        kernel_shape=list(shape_of(args["weight"])[2:]), strides=_each(args["stride"], rank),
        pads=_each(args["padding"], rank) * 2, dilations=_each(args["dilation"], rank),
        group=args["groups"],
    )  # fmt: skip


def _has_weight(node: fx.Node) -> bool:
    args = given(node)
    return args["weight"].op == "get_attr" and len(shape_of(args["weight"])) == 2


@rule("linear.default", fits=_has_weight)
def _linear(graph: Graph, node: fx.Node) -> None:
    args = given(node)
    x, bias = graph.name(args["input"]), args["bias"]
    if len(shape_of(node)) == 2:
        rest = [] if bias is None else [graph.name(bias)]
        graph.add("Gemm", [x, graph.name(args["weight"]), *rest], node.name, transB=1)
        return
    weight = graph.tensor(args["weight"]).detach().t().cpu().numpy()
    turned = graph.constant(weight, "float32", f"{args['weight'].target}.T")
    product = graph.add("MatMul", [x, turned], node.name if bias is None else f"{node.name}.")
    if bias is not None:
        graph.add("Add", [product, graph.name(bias)], node.name)


@rule("matmul.default", "bmm.default")
def _product(graph: Graph, node: fx.Node) -> None:
    graph.add("MatMul", [graph.name(n) for n in list(given(node).values())[:2]], node.name)


def _norm_fits(node: fx.Node) -> bool:
    args = given(node)
    parts = [args[k] for k in ("weight", "bias", "running_mean", "running_var")]
    return not args["training"] and all(isinstance(p, fx.Node) for p in parts)


@rule("batch_norm.default", fits=_norm_fits)
def _batch_norm(graph: Graph, node: fx.Node) -> None:
    args = given(node)
    names = ("input", "weight", "bias", "running_mean", "running_var")
    inputs = [graph.name(args[k]) for k in names]
    graph.add("BatchNormalization", inputs, node.name, epsilon=args["eps"])


def _over_last(node: fx.Node) -> bool:
    args = given(node)
    return len(args["normalized_shape"]) == 1 and is_tensor(args["weight"])


@rule("layer_norm.default", fits=_over_last)
def _layer_norm(graph: Graph, node: fx.Node) -> None:
    args = given(node)
    rest = [] if args["bias"] is None else [graph.name(args["bias"])]
    inputs = [graph.name(args["input"]), graph.name(args["weight"]), *rest]
    graph.add("LayerNormalization", inputs, node.name, axis=-1, epsilon=args["eps"])


UNARY = {"relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh", "hardswish": "HardSwish"}


@rule(*(f"{name}.default" for name in UNARY))
def _unary(graph: Graph, node: fx.Node) -> None:
    graph.add(UNARY[op_name(node).partition(".")[0]], [_first(graph, node)], node.name)


@rule("silu.default")
def _silu(graph: Graph, node: fx.Node) -> None:
    x = _first(graph, node)
    graph.add("Mul", [x, graph.add("Sigmoid", [x], f"{node.name}.")], node.name)


@rule("hardsigmoid.default")
def _hard_sigmoid(graph: Graph, node: fx.Node) -> None:
    graph.add("HardSigmoid", [_first(graph, node)], node.name, alpha=1 / 6, beta=0.5)


@rule("gelu.default")
def _gelu(graph: Graph, node: fx.Node) -> None:
    graph.add("Gelu", [_first(graph, node)], node.name, approximate=given(node)["approximate"])


@rule("hardtanh.default", "clamp.default")
def _clip(graph: Graph, node: fx.Node) -> None:
    _, low, high, *_ = given(node).values()
    ends = ["" if v is None else graph.scalar(v, "float32") for v in (low, high)]
    graph.add("Clip", [_first(graph, node), *ends], node.name)


@rule("softmax.int")
def _softmax(graph: Graph, node: fx.Node) -> None:
    graph.add("Softmax", [_first(graph, node)], node.name, axis=given(node)["dim"])


BINARY = {"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div"}


def _scaled_by_one(node: fx.Node) -> bool:
    args = given(node)
    floats = all(Meta(n).dtype is torch.float32 for n in node.all_input_nodes)
    return floats and args.get("alpha", 1) == 1 and args.get("rounding_mode") is None


@rule(*(f"{name}.Tensor" for name in BINARY), fits=_scaled_by_one)
def _binary(graph: Graph, node: fx.Node) -> None:
    args = given(node)
    pair = [_value(graph, args[k]) for k in ("self", "other")]
    graph.add(BINARY[op_name(node).partition(".")[0]], pair, node.name)


@rule("cat.default")
def _concat(graph: Graph, node: fx.Node) -> None:
    args = given(node)
    axis = args["dim"] % len(shape_of(node))
    graph.add("Concat", [graph.name(n) for n in args["tensors"]], node.name, axis=axis)


def _is_spatial(node: fx.Node) -> bool:
    rank, dims = len(shape_of(node.all_input_nodes[0])), given(node)["dim"]
    return rank > 2 and dims is not None and {d % rank for d in dims} == {*range(2, rank)}


@rule("mean.dim", fits=_is_spatial)
def _mean(graph: Graph, node: fx.Node) -> None:
    _pooled(graph, node, keep=given(node)["keepdim"])


def _to_one(node: fx.Node) -> bool:
    return set(given(node)["output_size"]) == {1}


@rule("adaptive_avg_pool2d.default", fits=_to_one)
def _adaptive(graph: Graph, node: fx.Node) -> None:
    _pooled(graph, node, keep=True)


def _pooled(graph: Graph, node: fx.Node, *, keep: bool) -> None:
    out = node.name if keep else f"{node.name}."
    made = graph.add("GlobalAveragePool", [_first(graph, node)], out)
    if not keep:
        graph.add("Flatten", [made], node.name, axis=1)


def _rounds_down(node: fx.Node) -> bool:
    args = given(node)
    return not args["ceil_mode"] and args["divisor_override"] is None


@rule("avg_pool2d.default", fits=_rounds_down)
def _average(graph: Graph, node: fx.Node) -> None:
    args = given(node)
    kernel = _each(args["kernel_size"], 2)
    graph.add(
        "AveragePool", [_first(graph, node)], node.name, kernel_shape=kernel,
        strides=_each(args["stride"], 2) if args["stride"] else kernel,
        pads=_each(args["padding"], 2) * 2, count_include_pad=int(args["count_include_pad"]),
    )  # fmt: skip


def _first(graph: Graph, node: fx.Node) -> str:
    return graph.name(next(iter(given(node).values())))


__all__ = ["draft"]
