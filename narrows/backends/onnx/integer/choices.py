"""Comparisons of codes, the same in every form and for codes of any width."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from narrows.backends.onnx.integer.graph import Graph, given
from narrows.backends.onnx.integer.wide import centred, reach
from narrows.ir.integer.bounds import EXACT
from narrows.ir.meta import Meta

OPERATORS = {
    "lt": "Less", "le": "LessOrEqual", "eq": "Equal", "ge": "GreaterOrEqual", "gt": "Greater",
}  # fmt: skip


def compare(graph: Graph, node: fx.Node) -> None:
    """Write a comparison of two tensors, in floating-point that holds both."""
    args, at = given(node), f"{node.name}."
    ups = {side: args[f"{side}_shift"] for side in ("a", "b")}
    bound = max(reach(graph, args[side]) << up for side, up in ups.items())
    dtype = "float32" if bound <= EXACT else "float64"  # a code of 16 bits, shifted by 31 at most
    pair = []
    for side, up in ups.items():
        x = centred(graph, args[side], at, dtype)
        pair.append(graph.add("Mul", [x, graph.scalar(2.0**up, dtype)], at) if up else x)
    _answered(graph, node, pair)


def compare_number(graph: Graph, node: fx.Node) -> None:
    """Write a comparison with a number."""
    args, at = given(node), f"{node.name}."
    x = graph.name(args["x"])
    if Meta(args["x"]).dtype is not torch.int16:  # that is float32 here
        x = graph.cast(x, "float32", at)
    _answered(graph, node, [x, graph.scalar(args["code"], "float32")])


def _answered(graph: Graph, node: fx.Node, pair: list[str]) -> None:
    how = given(node)["how"]
    if how == "ne":
        graph.add("Not", [graph.add("Equal", pair, f"{node.name}.")], node.name)
    else:
        graph.add(OPERATORS[how], pair, node.name)


FORM: dict[str, Any] = {"compare": compare, "compare_number": compare_number}
