"""What moves floats, fills in around them, or fills in between."""

from __future__ import annotations

import torch
from torch import fx

from narrows.backends.onnx.floats.layers import first
from narrows.backends.onnx.floats.rules import rule
from narrows.backends.onnx.integer.graph import Graph, given
from narrows.ir.meta import Meta, op_name, shape_of

MODES = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}


@rule("cat.default")
def _concat(graph: Graph, node: fx.Node) -> None:
    args = given(node)
    axis = args["dim"] % len(shape_of(node))
    graph.add("Concat", [graph.name(n) for n in args["tensors"]], node.name, axis=axis)


@rule("stack.default")
def _stack(graph: Graph, node: fx.Node) -> None:
    args = given(node)
    axis = args["dim"] % len(shape_of(node))
    axes = graph.constant([axis], "int64")
    parts = [
        graph.add("Unsqueeze", [graph.name(n), axes], f"{node.name}.") for n in args["tensors"]
    ]
    graph.add("Concat", parts, node.name, axis=axis)


@rule("to.dtype")
def _to(graph: Graph, node: fx.Node) -> None:
    source = node.all_input_nodes[0]
    if Meta(source).dtype is torch.float32:
        graph.renamed[node] = graph.name(source)
    else:
        graph.cast(graph.name(source), "float32", node.name)


@rule("pad.default", fits=lambda node: given(node)["mode"] in MODES)
def _pad(graph: Graph, node: fx.Node) -> None:
    args, rank = given(node), len(shape_of(node))
    before, after = [0] * rank, [0] * rank
    for i in range(len(args["pad"]) // 2):
        before[rank - 1 - i], after[rank - 1 - i] = args["pad"][2 * i : 2 * i + 2]
    inputs = [first(graph, node), graph.constant([*before, *after], "int64")]
    if args["mode"] == "constant":
        inputs.append(graph.scalar(args["value"] or 0.0, "float32"))
    graph.add("Pad", inputs, node.name, mode=MODES[args["mode"]])


# ------------------------------------------------------------------ resizing

RESIZED = {"upsample_bilinear2d.vec": "linear", "upsample_bicubic2d.vec": "cubic"}


def _resizes_evenly(node: fx.Node) -> bool:
    """Whether sizes alone say where numbers are taken, and no scale of the user's does."""
    args = given(node)
    if args["scale_factors"] is None:
        return True
    old, new = shape_of(node.all_input_nodes[0])[2:], shape_of(node)[2:]
    return all(o * f == n for o, f, n in zip(old, args["scale_factors"], new, strict=True))


@rule(*RESIZED, fits=_resizes_evenly)
def _resize(graph: Graph, node: fx.Node) -> None:
    args = given(node)
    mode = RESIZED[op_name(node)]
    sizes = graph.constant(list(shape_of(node)[2:]), "int64")
    corners = "align_corners" if args["align_corners"] else "half_pixel"
    graph.add(
        "Resize", [first(graph, node), "", "", sizes], node.name, axes=[2, 3], mode=mode,
        coordinate_transformation_mode=corners,
        cubic_coeff_a=-0.75 if mode == "cubic" else None,
    )  # fmt: skip
