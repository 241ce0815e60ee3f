"""Convolutions, products, norms, attention and pooling of floats."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from narrows.backends.onnx.floats.rules import rule
from narrows.backends.onnx.integer.graph import Graph, given
from narrows.ir.meta import Meta, shape_of
from narrows.ir.ops.args import is_tensor


def each(value: Any, rank: int) -> list[int]:
    """Return a size per spatial axis."""
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


def first(graph: Graph, node: fx.Node) -> str:
    """Return the value of a node's first operand."""
    return graph.name(next(iter(given(node).values())))


def _operands(graph: Graph, node: fx.Node) -> list[str]:
    """Return input, weight and, where there is one, bias."""
    args = given(node)
    return [graph.name(args[k]) for k in ("input", "weight", "bias") if args[k] is not None]


def _is_batched(node: fx.Node) -> bool:
    args = given(node)
    return len(shape_of(node)) == len(shape_of(args["weight"]))


@rule("conv1d.default", "conv2d.default", "conv3d.default", fits=_is_batched)
def _convolution(graph: Graph, node: fx.Node) -> None:
    args, rank = given(node), len(shape_of(node)) - 2
    graph.add(
        "Conv", _operands(graph, node), node.name, kernel_shape=list(shape_of(args["weight"])[2:]),
        strides=each(args["stride"], rank), pads=each(args["padding"], rank) * 2,
        dilations=each(args["dilation"], rank), group=args["groups"],
    )  # fmt: skip


@rule(
    "conv_transpose1d.default", "conv_transpose2d.input", "conv_transpose3d.input",
    fits=_is_batched,
)  # fmt: skip
def _transposed(graph: Graph, node: fx.Node) -> None:
    args, rank = given(node), len(shape_of(node)) - 2
    graph.add(
        "ConvTranspose", _operands(graph, node), node.name,
        kernel_shape=list(shape_of(args["weight"])[2:]), strides=each(args["stride"], rank),
        pads=each(args["padding"], rank) * 2, dilations=each(args["dilation"], rank),
        output_padding=each(args["output_padding"], rank), group=args["groups"],
    )  # fmt: skip


# ------------------------------------------------------------------ products


@rule("linear.default", fits=lambda node: len(shape_of(given(node)["weight"])) == 2)
def _linear(graph: Graph, node: fx.Node) -> None:
    args = given(node)
    if len(shape_of(node)) == 2:
        graph.add("Gemm", _operands(graph, node), node.name, transB=1)
        return
    bias = args["bias"]
    out = node.name if bias is None else f"{node.name}."
    product = graph.add("MatMul", [first(graph, node), graph.turned(args["weight"])], out)
    if bias is not None:
        graph.add("Add", [product, graph.name(bias)], node.name)


@rule("matmul.default", "bmm.default", "mm.default")
def _product(graph: Graph, node: fx.Node) -> None:
    graph.add("MatMul", [graph.name(n) for n in list(given(node).values())[:2]], node.name)


def _is_plain_attention(node: fx.Node) -> bool:
    args = given(node)
    mask = args["attn_mask"]
    known = mask is None or Meta(mask).dtype is torch.float32
    return known and not (args["dropout_p"] or args["is_causal"] or args["enable_gqa"])


@rule("scaled_dot_product_attention.default", fits=_is_plain_attention)
def _attention(graph: Graph, node: fx.Node) -> None:
    args, at = given(node), f"{node.name}."
    query, key, value = (graph.name(args[k]) for k in ("query", "key", "value"))
    rank, width = len(shape_of(node)), shape_of(args["query"])[-1]
    scale = 1 / math.sqrt(width) if args["scale"] is None else args["scale"]
    scaled = graph.add("Mul", [query, graph.scalar(scale, "float32")], at)
    order = [*range(rank - 2), rank - 1, rank - 2]
    scores = graph.add("MatMul", [scaled, graph.add("Transpose", [key], at, perm=order)], at)
    if args["attn_mask"] is not None:
        scores = graph.add("Add", [scores, graph.name(args["attn_mask"])], at)
    graph.add("MatMul", [graph.add("Softmax", [scores], at, axis=-1), value], node.name)


# ------------------------------------------------------------------ norms


def _has_statistics(node: fx.Node) -> bool:
    args = given(node)
    parts = [args[k] for k in ("weight", "bias", "running_mean", "running_var")]
    return not args["training"] and all(isinstance(p, fx.Node) for p in parts)


@rule("batch_norm.default", fits=_has_statistics)
def _batch_norm(graph: Graph, node: fx.Node) -> None:
    args = given(node)
    names = ("input", "weight", "bias", "running_mean", "running_var")
    inputs = [graph.name(args[k]) for k in names]
    graph.add("BatchNormalization", inputs, node.name, epsilon=args["eps"])


@rule("layer_norm.default", fits=lambda node: is_tensor(given(node)["weight"]))
def _layer_norm(graph: Graph, node: fx.Node) -> None:
    args = given(node)
    axis = -len(args["normalized_shape"])
    operands = _operands(graph, node)
    graph.add("LayerNormalization", operands, node.name, axis=axis, epsilon=args["eps"])


def _is_image(node: fx.Node) -> bool:
    return len(shape_of(node)) > 2


@rule("group_norm.default", fits=_is_image)
def _group_norm(graph: Graph, node: fx.Node) -> None:
    """Groups are instances of one channel: ONNX has gains per group, torch per channel."""
    args, at = given(node), f"{node.name}."
    groups, sizes, affine = args["num_groups"], graph.sizes(node), args["weight"] is not None
    x = graph.reshape(first(graph, node), [sizes[0], groups, -1 if sizes[0] > 0 else _rest(node)])
    ones = [graph.constant([v] * groups, "float32") for v in (1.0, 0.0)]
    x = graph.add("InstanceNormalization", [x, *ones], at, epsilon=args["eps"])
    x = graph.reshape(x, sizes, at if affine or args["bias"] is not None else node.name)
    _affine(graph, node, x)


def _rest(node: fx.Node) -> int:
    return math.prod(shape_of(node)[1:]) // given(node)["num_groups"]


def _affine(graph: Graph, node: fx.Node, x: str) -> None:
    """Multiply by a gain and add a bias, each of a number per channel, where there are any."""
    args = given(node)
    present = [
        (op, args[k]) for op, k in (("Mul", "weight"), ("Add", "bias")) if args[k] is not None
    ]
    for op, weight in present:
        last = op == present[-1][0]
        each_one = graph.reshape(graph.name(weight), [-1] + [1] * (len(shape_of(node)) - 2))
        x = graph.add(op, [x, each_one], node.name if last else f"{node.name}.")


def _is_of_the_instance(node: fx.Node) -> bool:
    args = given(node)
    return args["use_input_stats"] and all(is_tensor(args[k]) for k in ("weight", "bias"))


@rule("instance_norm.default", fits=_is_of_the_instance)
def _instance_norm(graph: Graph, node: fx.Node) -> None:
    inputs = _operands(graph, node)
    graph.add("InstanceNormalization", inputs, node.name, epsilon=given(node)["eps"])


# ------------------------------------------------------------------ pooling


def _rounds_down(node: fx.Node) -> bool:
    args = given(node)
    return _is_image(node) and not args["ceil_mode"] and not args.get("divisor_override")


@rule("avg_pool1d.default", "avg_pool2d.default", "avg_pool3d.default", fits=_rounds_down)
def _average(graph: Graph, node: fx.Node) -> None:
    args, rank = given(node), len(shape_of(node)) - 2
    kernel = each(args["kernel_size"], rank)
    graph.add(
        "AveragePool", [first(graph, node)], node.name, kernel_shape=kernel,
        strides=each(args["stride"], rank) if args["stride"] else kernel,
        pads=each(args["padding"], rank) * 2, count_include_pad=int(args["count_include_pad"]),
    )  # fmt: skip


def _window(node: fx.Node) -> list[int] | None:
    """Return the window of an adaptive pooling, or ``None`` where its windows differ in size."""
    sizes = shape_of(node.all_input_nodes[0])[2:]
    wanted = each(given(node)["output_size"], len(sizes))
    if any(s % w for s, w in zip(sizes, wanted, strict=True)):
        return None
    return [s // w for s, w in zip(sizes, wanted, strict=True)]


def _comes_out_even(node: fx.Node) -> bool:
    return _is_image(node) and _window(node) is not None


@rule("adaptive_avg_pool1d.default", "adaptive_avg_pool2d.default", fits=_comes_out_even)
def _adaptive(graph: Graph, node: fx.Node) -> None:
    window = _window(node)
    if set(shape_of(node)[2:]) == {1}:
        graph.add("GlobalAveragePool", [first(graph, node)], node.name)
    else:
        graph.add(
            "AveragePool", [first(graph, node)], node.name, kernel_shape=window, strides=window
        )
