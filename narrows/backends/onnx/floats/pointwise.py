"""Functions of one number and of two, and reductions, of floats."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from narrows.backends.onnx.floats.layers import first
from narrows.backends.onnx.floats.rules import rule
from narrows.backends.onnx.integer.graph import Graph, given
from narrows.ir.meta import Meta, op_name, shape_of

UNARY = {
    "relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh", "hardswish": "HardSwish", "exp": "Exp",
    "log": "Log", "sqrt": "Sqrt", "neg": "Neg", "abs": "Abs", "erf": "Erf", "floor": "Floor",
    "ceil": "Ceil", "sin": "Sin", "cos": "Cos", "reciprocal": "Reciprocal", "mish": "Mish",
    "selu": "Selu", "sign": "Sign",
}  # fmt: skip


def _kind(node: fx.Node) -> str:
    return op_name(node).partition(".")[0]


@rule(*(f"{name}.default" for name in UNARY))
def _unary(graph: Graph, node: fx.Node) -> None:
    graph.add(UNARY[_kind(node)], [first(graph, node)], node.name)


@rule("silu.default")
def _silu(graph: Graph, node: fx.Node) -> None:
    x = first(graph, node)
    graph.add("Mul", [x, graph.add("Sigmoid", [x], f"{node.name}.")], node.name)


@rule("rsqrt.default")
def _rsqrt(graph: Graph, node: fx.Node) -> None:
    root = graph.add("Sqrt", [first(graph, node)], f"{node.name}.")
    graph.add("Reciprocal", [root], node.name)


@rule("hardsigmoid.default")
def _hard_sigmoid(graph: Graph, node: fx.Node) -> None:
    graph.add("HardSigmoid", [first(graph, node)], node.name, alpha=1 / 6, beta=0.5)


@rule("gelu.default", opset=20)
def _gelu(graph: Graph, node: fx.Node) -> None:
    graph.add("Gelu", [first(graph, node)], node.name, approximate=given(node)["approximate"])


def _is_plain_elu(node: fx.Node) -> bool:
    args = given(node)
    return args["scale"] == 1 and args["input_scale"] == 1


@rule("elu.default", fits=_is_plain_elu)
def _elu(graph: Graph, node: fx.Node) -> None:
    graph.add("Elu", [first(graph, node)], node.name, alpha=float(given(node)["alpha"]))


@rule("leaky_relu.default")
def _leaky_relu(graph: Graph, node: fx.Node) -> None:
    slope = float(given(node)["negative_slope"])
    graph.add("LeakyRelu", [first(graph, node)], node.name, alpha=slope)


@rule("prelu.default", fits=lambda node: len(shape_of(node)) > 1)
def _prelu(graph: Graph, node: fx.Node) -> None:
    slope = graph.name(given(node)["weight"])
    slope = graph.reshape(slope, [-1] + [1] * (len(shape_of(node)) - 2))
    graph.add("PRelu", [first(graph, node), slope], node.name)


def _has_the_usual_threshold(node: fx.Node) -> bool:
    args = given(node)
    return args["beta"] == 1 and args["threshold"] >= 20  # above, float32 cannot tell the two


@rule("softplus.default", fits=_has_the_usual_threshold)
def _softplus(graph: Graph, node: fx.Node) -> None:
    graph.add("Softplus", [first(graph, node)], node.name)


@rule("hardtanh.default", "clamp.default", "relu6.default")
def _clip(graph: Graph, node: fx.Node) -> None:
    ends: list[Any] = [0.0, 6.0] if _kind(node) == "relu6" else list(given(node).values())[1:3]
    names = ["" if v is None else graph.scalar(v, "float32") for v in ends]
    graph.add("Clip", [first(graph, node), *names], node.name)


def _in_its_own_type(node: fx.Node) -> bool:
    return given(node)["dtype"] in (None, torch.float32)


@rule("softmax.int", "log_softmax.int", fits=_in_its_own_type)
def _softmax(graph: Graph, node: fx.Node) -> None:
    op = "Softmax" if _kind(node) == "softmax" else "LogSoftmax"
    graph.add(op, [first(graph, node)], node.name, axis=given(node)["dim"])


# ------------------------------------------------------------------ of two

BINARY = {"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div"}
LARGER = {"maximum": "Max", "minimum": "Min"}


def _value(graph: Graph, value: Any) -> str:
    """Return an operand: a tensor, or a number as a constant."""
    return graph.name(value) if isinstance(value, fx.Node) else graph.scalar(value, "float32")


def _is_unscaled(node: fx.Node) -> bool:
    args = given(node)
    return args.get("alpha", 1) == 1 and args.get("rounding_mode") is None


@rule(
    *(f"{name}.{kind}" for name in BINARY for kind in ("Tensor", "Scalar")),
    *(f"{name}.default" for name in LARGER), fits=_is_unscaled,
)  # fmt: skip
def _binary(graph: Graph, node: fx.Node) -> None:
    args = given(node)
    pair = [_value(graph, args[k]) for k in ("self", "other")]
    graph.add({**BINARY, **LARGER}[_kind(node)], pair, node.name)


@rule("rsub.Scalar", fits=_is_unscaled)
def _reversed(graph: Graph, node: fx.Node) -> None:
    args = given(node)
    graph.add("Sub", [_value(graph, args[k]) for k in ("other", "self")], node.name)


@rule("pow.Tensor_Scalar")
def _power(graph: Graph, node: fx.Node) -> None:
    args = given(node)
    exponent = graph.scalar(args["exponent"], "float32")
    graph.add("Pow", [first(graph, node), exponent], node.name)


@rule("where.self")
def _where(graph: Graph, node: fx.Node) -> None:
    args = given(node)
    graph.add("Where", [graph.name(args[k]) for k in ("condition", "self", "other")], node.name)


# ------------------------------------------------------------------ reductions

REDUCED = {"mean.dim": "ReduceMean", "sum.dim_IntList": "ReduceSum",
           "linalg_vector_norm.default": "ReduceL2"}  # fmt: skip


def _reduces(node: fx.Node) -> bool:
    """Whether a reduction is over axes that are named, which the batch is not among."""
    args, x = given(node), node.all_input_nodes[0]
    if not args["dim"] or not _in_its_own_type(node) or args.get("ord", 2) != 2:
        return False
    return not {d % len(shape_of(x)) for d in args["dim"]} & {*Meta(x).dynamic}


@rule(*REDUCED, fits=_reduces)
def _reduced(graph: Graph, node: fx.Node) -> None:
    args, x = given(node), first(graph, node)
    rank = len(shape_of(node.all_input_nodes[0]))
    axes = sorted(d % rank for d in args["dim"])
    op = REDUCED[op_name(node)]
    if op == "ReduceMean" and rank > 2 and axes == [*range(2, rank)]:  # runtimes know it by name
        out = node.name if args["keepdim"] else f"{node.name}."
        x = graph.add("GlobalAveragePool", [x], out)
        if not args["keepdim"]:
            graph.add("Flatten", [x], node.name, axis=1)
        return
    kept = int(args["keepdim"])
    graph.add(op, [x, graph.constant(axes, "int64")], node.name, keepdims=kept)
