"""Floating-point islands of an integer program: exported alone and written into its graph."""

from __future__ import annotations

import operator
from typing import Any

import onnx
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from narrows.backends.onnx.integer.graph import Graph
from narrows.ir.editing import infer_shapes
from narrows.ir.program import Meta, Program, shape_of


def write_island(graph: Graph, node: fx.Node, opset: int) -> None:
    """Write one floating-point operator as the exporter of float programs does.

    One that has several results is written for each that is read.

    Raises:
        LowerError: It has no ONNX form.
    """
    import onnx_ir

    from narrows.backends.onnx.export import export

    if shape_of(node) is None:
        return
    cut = _Cut(graph.program)
    single, result = cut.program(node)
    model = onnx_ir.to_proto(export(single, [result], opset).model)
    names: dict[str, str] = {n.name: graph.name(n) for n in cut.operands}
    names |= {str(o.name): node.name for o in model.graph.output}
    inner = [str(i.name) for i in model.graph.initializer]
    inner += [str(name) for n in model.graph.node for name in n.output if name]
    for name in inner:
        if name not in names:
            names[name] = graph.fresh(f"{node.name}.{name}")
    for tensor in model.graph.initializer:
        tensor.name = names[tensor.name]
        graph.constants[tensor.name] = tensor
    for step in model.graph.node:
        made = onnx.NodeProto()
        made.CopyFrom(step)
        made.input[:] = [names.get(str(n), str(n)) for n in step.input]
        made.output[:] = [names.get(str(n), str(n)) for n in step.output]
        made.name = made.output[0]
        graph.domains.add(made.domain)
        graph.nodes.append(made)


class _Cut:
    """One operator cut out of a program.

    Attributes:
        operands: The tensors it reads, which become inputs.
    """

    def __init__(self, program: Program) -> None:
        self.whole = program
        self.graph = fx.Graph()
        self.operands: list[fx.Node] = []
        self.made: dict[fx.Node, fx.Node] = {}
        self.weights: dict[str, Tensor] = {}

    def program(self, node: fx.Node) -> tuple[Program, fx.Node]:
        """Return the program of a node alone, and the node in it."""
        core: Any = node.args[0] if node.target is operator.getitem else node
        self._collect(core, top=True)
        for operand in self.operands:  # placeholders come first
            self.made[operand] = self._described(operand, self.graph.placeholder(operand.name))
        result = self._emit(node)
        self.graph.output((result,))
        examples = tuple(torch.zeros(shape_of(n), dtype=Meta(n).dtype) for n in self.operands)
        specs = pytree.tree_structure((examples, {})), pytree.tree_structure((0,))
        single = Program(
            self.graph, self.weights, *specs, examples=examples,
            dynamic_batch=self.whole.dynamic_batch, name=node.name,
        )  # fmt: skip
        infer_shapes(single)
        return single, result

    def _collect(self, node: fx.Node, *, top: bool = False) -> None:
        """Note the tensors that a node reads, also through arithmetic on sizes."""
        if not top and shape_of(node) is not None:
            if node.op != "get_attr" and node not in self.operands:
                self.operands.append(node)
            return
        for operand in node.all_input_nodes:
            self._collect(operand)

    def _emit(self, node: fx.Node) -> fx.Node:
        if node in self.made:
            return self.made[node]
        for operand in node.all_input_nodes:
            self._emit(operand)
        if node.op == "get_attr":
            self.weights[str(node.target)] = self.whole.tensor(node)
        self.made[node] = self._described(node, self.graph.node_copy(node, self.made.__getitem__))
        return self.made[node]

    def _described(self, old: fx.Node, new: fx.Node) -> fx.Node:
        new.meta = {k: v for k, v in old.meta.items() if k != "grid"}
        return new
