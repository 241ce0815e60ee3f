"""A float program as an ONNX model to be timed and not shipped, whatever operators it has.

What ships is written as a whole by rules, or exported as a whole, and held to the program
(`narrows.backends.onnx.target`). A contest of forms (`narrows.api.contest`) only wants to know how
fast the runtime is on each: here the operators without a rule alone go through the exporter.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from torch import fx

from narrows.backends.onnx.floats import rule_of
from narrows.backends.onnx.integer.graph import Graph
from narrows.backends.onnx.integer.islands import Islands
from narrows.ir.graph import live_nodes
from narrows.ir.meta import Meta, shape_of
from narrows.ir.program import Program


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
    found = {node: write for node in live if (write := rule_of(node, opset)) is not None}
    islands = Islands(graph, [n for n in live if n not in found], opset)
    for node in live:
        if node in found:
            found[node](graph, node)
        else:
            islands.write(node)
    graph.give(outputs)
    inputs = [n for n in program.placeholders if shape_of(n) is not None]
    return graph.model(inputs, list(outputs), opset)


__all__ = ["draft"]
