"""A float program as an ONNX model to be timed and not shipped, whatever operators it has.

What ships is written as a whole by rules, or exported as a whole, and held to the program
(`narrows.backends.onnx.target`). A contest of forms (`narrows.api.contest`) only wants to know how
fast the runtime is on each: here the operators without a rule alone go through the exporter.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from torch import Tensor, fx

from narrows.backends.onnx.floats import rule_of
from narrows.backends.onnx.integer.graph import Graph
from narrows.backends.onnx.integer.islands import Islands
from narrows.ir.graph import live_nodes
from narrows.ir.meta import Meta, shape_of
from narrows.ir.program import Program

LEAST = 1 << 10  # bytes from which a weight is left apart
APART = "apart"  # the file that would hold those


def draft(
    program: Program,
    outputs: Sequence[fx.Node],
    opset: int,
    apart: dict[str, np.ndarray] | None = None,
) -> onnx.ModelProto:
    """Return a model that takes as long as the program's.

    Args:
        program: The program, its norms folded as far as they can be.
        outputs: The nodes that the model returns.
        opset: The version of the ONNX operators.
        apart: Where the weights are left, by name, that the model itself is then without: a session
            takes them as they are, and nothing copies or parses them.

    Raises:
        LowerError: An operator has no ONNX form.
    """
    live = [n for n in live_nodes(program.graph) if n.op == "call_function"]
    live = [n for n in live if Meta(n).size is None]
    graph = Graph(program, half_up=False) if apart is None else _Without(program, apart)
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


class _Without(Graph):
    """A graph whose weights are elsewhere."""

    def __init__(self, program: Program, apart: dict[str, np.ndarray]) -> None:
        super().__init__(program, half_up=False)
        self.apart = apart

    def weight(self, node: fx.Node) -> str:
        """Return the constant that stands for a weight, under the weight's name."""
        found = self._left(str(node.target), self.tensor(node))
        return found or super().weight(node)

    def turned(self, node: fx.Node) -> str:
        """Return what stands for a matrix with its rows as columns."""
        if node.op != "get_attr":
            return super().turned(node)
        return self._left(f"{node.target}.T", self.tensor(node).t()) or super().turned(node)

    def _left(self, name: str, tensor: Tensor) -> str:
        """Leave a weight apart, and return what stands for it; nothing if it is small."""
        if name in self.constants:
            return name
        array = np.ascontiguousarray(tensor.detach().cpu().numpy())
        if array.dtype != np.float32 or array.nbytes < LEAST:
            return ""
        self.apart[name] = array
        made = onnx.TensorProto(name=name, data_type=onnx.TensorProto.FLOAT, dims=array.shape)
        made.data_location = onnx.TensorProto.EXTERNAL
        made.external_data.add(key="location", value=APART)
        self.constants[name] = made
        return name


__all__ = ["draft"]
