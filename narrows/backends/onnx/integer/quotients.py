"""Quotients of two activations, and vector norms: in float64, whatever the width of codes.

A quotient of codes that meets no tie is ``2**-18`` away from it, at least, and below 2**16 where it
is not clipped; float64 divides to 2**-37 there. Of a norm `narrows.ir.integer.quotients` says why.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from narrows.backends.onnx.integer.graph import Graph, given
from narrows.backends.onnx.integer.wide import centred, codes_of, rounded
from narrows.ir.integer.quotients import BEYOND
from narrows.ir.meta import Meta


def div(graph: Graph, node: fx.Node) -> None:
    """Write a quotient; what is divided by zero is beyond the codes, or zero."""
    args, at = given(node), f"{node.name}."
    over, under = (centred(graph, args[side], at, "float64") for side in ("a", "b"))
    one, nothing = graph.scalar(1.0, "float64"), graph.scalar(0.0, "float64")
    none = graph.add("Equal", [under, nothing], at)
    by = graph.scalar(2.0 ** -args["shift_by"], "float64")
    made = graph.add("Div", [over, graph.add("Where", [none, one, under], at)], at)
    made = graph.add("Mul", [made, by], at)
    beyond = graph.add("Mul", [over, graph.scalar(float(BEYOND), "float64")], at)
    _settled(graph, node, graph.add("Where", [none, beyond, made], at))


def vector_norm(graph: Graph, node: fx.Node) -> None:
    """Write a norm of order 1, 2 or infinity."""
    args, at = given(node), f"{node.name}."
    x = centred(graph, args["x"], at, "float64")
    axes, keeps = graph.constant(list(args["axes"]), "int64"), int(args["keepdim"])
    square = args["order"] == 2
    x = graph.add("Mul", [x, x], at) if square else graph.add("Abs", [x], at)
    reduced = "ReduceMax" if args["order"] == math.inf else "ReduceSum"
    made = graph.add(reduced, [x, axes], at, keepdims=keeps)
    made = graph.add("Sqrt", [made], at) if square else made
    by = graph.scalar(2.0 ** -args["shift_by"], "float64")
    _settled(graph, node, graph.add("Mul", [made, by], at))


def _settled(graph: Graph, node: fx.Node, x: str) -> None:
    x = rounded(graph, x, "float64", f"{node.name}.")
    wide = Meta(node).dtype is torch.int16
    codes_of(graph, given(node), x, "float64", wide, node.name)


FORM: dict[str, Any] = {"div": div, "vector_norm": vector_norm}
