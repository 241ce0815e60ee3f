"""Floating-point islands of an integer program: exported alone and written into its graph."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from narrows.backends.onnx.integer.graph import Graph
from narrows.ir.editing import infer_shapes
from narrows.ir.meta import Meta, shape_of
from narrows.ir.program import Draft, Program


class Islands:
    """The floating-point operators of an integer program, exported in one go, written one by one.

    Args:
        graph: The graph that they are written into.
        nodes: All of them, in order.
        opset: The version of the ONNX operators.
    """

    def __init__(self, graph: Graph, nodes: Sequence[fx.Node], opset: int) -> None:
        self.graph, self.nodes, self.opset = graph, nodes, opset
        self.operands: dict[str, fx.Node] = {}  # by name, what islands read
        self.names: dict[str, str] = {}  # of the exported model's values, in the graph
        self.makers: dict[str, onnx.NodeProto] = {}  # by result, what is not written yet
        self.constants: dict[str, onnx.TensorProto] = {}

    def write(self, node: fx.Node) -> None:
        """Write one as the exporter of float programs does, after what it reads.

        One that has several results is written with the first that is read.

        Raises:
            LowerError: One of them all has no ONNX form.
        """
        if not self.names:
            self._export()
        if shape_of(node) is not None:
            self._write(node.name, f"{node.name}.")

    def _export(self) -> None:
        import onnx_ir

        from narrows.backends.onnx.export import export

        whole = self.graph.program
        results = [n for n in self.nodes if shape_of(n) is not None]
        cut = _Cut(whole, set(self.nodes))
        single, made = cut.program(results)
        batch = next((shape_of(n)[a] for n in whole.placeholders for a in Meta(n).dynamic), 1)
        model = onnx_ir.to_proto(export(single, made, self.opset, batch).model)
        self.operands = {n.name: n for n in cut.operands}
        shown = [str(o.name) for o in model.graph.output]
        self.names = dict(zip(shown, (n.name for n in results), strict=True))
        # A result that is made of weights alone is a constant, too, and stands under its own name.
        named = {str(t.name): t for t in model.graph.initializer}
        self.constants = {self.names.get(name, name): t for name, t in named.items()}
        for step in model.graph.node:
            self.makers |= {self.names.get(str(o), str(o)): step for o in step.output if o}

    def _write(self, value: str, at: str) -> str:
        """Return the name of a value of the exported model in the graph, where it is then."""
        if value in self.operands:
            return self.graph.name(self.operands[value])
        if value in self.constants:
            return self._constant(value, at)
        step = self.makers.pop(value, None)
        if step is not None:
            for result in step.output:
                self.makers.pop(self.names.get(str(result), str(result)), None)
            read = [
                self._write(self.names.get(str(n), str(n)), at) if n else "" for n in step.input
            ]
            made = onnx.NodeProto()
            made.CopyFrom(step)
            made.input[:] = read
            made.output[:] = [self._named(str(n), at) if n else "" for n in step.output]
            made.name = made.output[0]
            self.graph.domains.add(made.domain)
            self.graph.nodes.append(made)
        return self.names.get(value, value)

    def _constant(self, value: str, at: str) -> str:
        tensor, name = self.constants[value], self._named(value, at)
        if name not in self.graph.constants:
            tensor.name = name
            self.graph.constants[name] = tensor
        return name

    def _named(self, value: str, at: str) -> str:
        """Return the name in the graph of a result, or of an inner value of an island."""
        return self.names.setdefault(value, self.graph.fresh(f"{at}{value}"))


class _Cut:
    """Operators cut out of a program.

    Attributes:
        operands: The tensors they read, which become inputs.
    """

    def __init__(self, program: Program, inside: set[fx.Node]) -> None:
        self.whole, self.inside = program, inside
        self.graph = fx.Graph()
        self.operands: list[fx.Node] = []
        self.made: dict[fx.Node, fx.Node] = {}
        self.weights: dict[str, Tensor] = {}

    def program(self, results: Sequence[fx.Node]) -> tuple[Program, list[fx.Node]]:
        """Return the program of these operators alone, and their nodes in it."""
        for node in self.inside:
            self._collect(node, top=True)
        known = set(self.operands)
        self.operands = [n for n in self.whole.graph.nodes if n in known]
        for operand in self.operands:  # placeholders come first
            # By `placeholder` alone, fx would spell the name in its own way.
            made = self.graph.create_node("placeholder", operand.name, name=operand.name)
            self.made[operand] = self._described(operand, made)
        given = [self._emit(node) for node in results]
        self.graph.output(tuple(given))
        examples = tuple(torch.zeros(shape_of(n), dtype=Meta(n).dtype) for n in self.operands)
        specs = pytree.tree_structure((examples, {})), pytree.tree_structure((0,) * len(given))
        single = Draft(
            self.graph, self.weights, *specs, examples=examples,
            dynamic_batch=self.whole.dynamic_batch, name=self.whole.name,
        )  # fmt: skip
        infer_shapes(single)
        return single.seal(), given

    def _collect(self, node: fx.Node, *, top: bool = False) -> None:
        """Note the tensors that a node reads, also through arithmetic on sizes."""
        if not top and node in self.inside:
            return
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
