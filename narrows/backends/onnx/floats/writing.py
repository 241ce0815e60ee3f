"""`written`: a whole program by rules, or not at all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from onnx import helper, numpy_helper
from torch import Tensor, fx

from narrows.backends.leaves import example_batch
from narrows.backends.onnx.floats.finding import rule_of
from narrows.backends.onnx.integer.graph import TYPES, Graph
from narrows.backends.onnx.simplify import WEIGHT_SIZE, put_weights
from narrows.ir.graph import live_nodes
from narrows.ir.meta import Meta, shape_of
from narrows.ir.ops.args import call
from narrows.ir.program import Program

SEEDED = torch.Tag.nondeterministic_seeded

# Bytes of a constant in place of what is computed of weights alone; larger if they are, too.
FOLDED = 1 << 20


class Light(Graph):
    """A graph whose large weights stay with the program: they are its inputs, to be put in later.

    Attributes:
        held: These weights by name.
    """

    def __init__(self, program: Program, fixed: Mapping[fx.Node, Tensor]) -> None:
        super().__init__(program, half_up=False)
        self.held: dict[str, Tensor] = {}
        self._fixed = fixed

    def name(self, node: fx.Node) -> str:
        """Return the ONNX value that holds a node's result."""
        if node in self._fixed:
            return self.hold(node.name, self._fixed[node])
        return super().name(node)

    def weight(self, node: fx.Node) -> str:
        """Return the name of a weight."""
        return self.hold(str(node.target), self.tensor(node))

    def hold(self, name: str, tensor: Tensor) -> str:
        """Return the name of a tensor, which is not copied if it is large."""
        if tensor.numel() >= WEIGHT_SIZE:
            self.held[name] = tensor.detach()
        elif name not in self.constants:
            array = np.array(tensor.detach().cpu().numpy(), order="C")
            self.constants[name] = numpy_helper.from_array(array, name)
        return name

    def turned(self, node: fx.Node) -> str:
        """Return the name of a matrix with its rows as columns."""
        if node in self._fixed:
            return self.hold(f"{node.name}.T", self._fixed[node].t())
        if node.op != "get_attr":
            return super().turned(node)
        return self.hold(f"{node.target}.T", self.tensor(node).t())


def written(program: Program, outputs: Sequence[fx.Node], opset: int) -> Any:
    """Return the `onnx_ir.Model` that computes ``outputs``, or ``None`` if no rule writes a node.

    Args:
        program: The program.
        outputs: The nodes that the model returns.
        opset: The version of the ONNX operators.
    """
    live = [*live_nodes(program.graph)]
    calls = [n for n in live if n.op == "call_function" and Meta(n).size is None]
    fixed = _fixed(program, calls)
    made = {n: rule_of(n, opset) for n in calls if n not in fixed}
    if None in made.values() or not _named_apart(program, live):
        return None
    if not all(n in made and _follows_batch(program, n) for n in outputs):
        return None
    graph = Light(program, fixed)
    for node, write in made.items():
        assert write is not None
        write(graph, node)
    graph.give(outputs)
    return _model(graph, outputs, opset)


def _model(graph: Light, outputs: Sequence[fx.Node], opset: int) -> Any:
    import onnx_ir
    from onnx_ir.tensor_adapters import TorchTensor

    weights = [
        helper.make_tensor_value_info(name, TYPES[_kind(tensor)], list(tensor.shape))
        for name, tensor in graph.held.items()
    ]
    inputs = [n for n in graph.program.placeholders if shape_of(n) is not None]
    model = onnx_ir.from_proto(graph.model(inputs, list(outputs), opset, weights))
    put_weights(model, {n: TorchTensor(t, name=n) for n, t in graph.held.items()})
    return model


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _fixed(program: Program, calls: Sequence[fx.Node]) -> dict[fx.Node, Tensor]:
    """Return what is made of weights alone, as long as that is not much larger than they are."""
    values: dict[fx.Node, Tensor] = {}
    found: dict[fx.Node, Tensor] = {}
    for node in calls:
        reads = node.all_input_nodes
        tags = getattr(node.target, "tags", ())
        if not all(n.op == "get_attr" or n in found for n in reads) or SEEDED in tags:
            continue
        if shape_of(node) is None or _kind_of(node) not in TYPES:
            continue
        values |= {n: program.tensor(n) for n in reads if n.op == "get_attr"}
        room = max([FOLDED, *(values[n].nbytes for n in reads)])
        if math.prod(shape_of(node)) * Meta(node).dtype.itemsize <= room:
            found[node] = values[node] = call(node, values)
    return found


def _kind_of(node: fx.Node) -> str:
    return str(Meta(node).dtype).removeprefix("torch.")


def _named_apart(program: Program, live: Sequence[fx.Node]) -> bool:
    """Whether no weight has the name of another value, and all are of a type that ONNX has."""
    weights = {str(n.target): n for n in live if n.op == "get_attr"}
    known = all(_kind(program.tensor(n)) in TYPES for n in weights.values())
    return known and not weights.keys() & {n.name for n in live if n.op != "get_attr"}


def _follows_batch(program: Program, node: fx.Node) -> bool:
    """Whether the free axis of a result is the batch itself, and no multiple of it."""
    meta = Meta(node)
    return all(meta.shape[a] == example_batch(program) for a in meta.dynamic)
