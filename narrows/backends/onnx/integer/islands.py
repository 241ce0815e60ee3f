"""Floating-point islands of an integer program: exported on their own and written into its graph."""

from __future__ import annotations

import onnx
import torch
import torch.utils._pytree as pytree
from torch import fx

from narrows.backends.onnx.integer.graph import Graph
from narrows.ir.program import Meta, Program, infer_shapes


def write_island(graph: Graph, node: fx.Node, opset: int) -> None:
    """Write one floating-point operator as the exporter of float programs does.

    Raises:
        LowerError: It has no ONNX form.
    """
    import onnx_ir

    from narrows.backends.onnx.export import export

    single, result = _single(graph.program, node)
    exported = export(single, [result], opset)
    model = onnx_ir.to_proto(exported.model)
    names = {i.name: graph.name(n) for i, n in zip(model.graph.input, _operands(node), strict=True)}
    names |= {o.name: node.name for o in model.graph.output}
    inner = [i.name for i in model.graph.initializer]
    inner += [name for n in model.graph.node for name in n.output]
    for name in inner:
        if name not in names:
            names[name] = graph.fresh(f"{node.name}.{name}")
    for tensor in model.graph.initializer:
        tensor.name = names[tensor.name]
        graph.constants[tensor.name] = tensor
    for step in model.graph.node:
        made = onnx.NodeProto()
        made.CopyFrom(step)
        made.input[:] = [names.get(n, n) for n in step.input]
        made.output[:] = [names.get(n, n) for n in step.output]
        made.name = made.output[0]
        graph.domains.add(made.domain)
        graph.nodes.append(made)


def _operands(node: fx.Node) -> list[fx.Node]:
    """Return the computed tensors that a node reads."""
    return [n for n in node.all_input_nodes if n.op != "get_attr" and Meta(n).shape is not None]


def _single(program: Program, node: fx.Node) -> tuple[Program, fx.Node]:
    """Return the program of one node, and the node in it."""
    small = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    examples = []
    for operand in _operands(node):
        made[operand] = small.placeholder(operand.name)
        made[operand].meta = {k: v for k, v in operand.meta.items() if k != "grid"}
        dtype = Meta(operand).dtype
        examples.append(torch.zeros(Meta(operand).shape, dtype=dtype))
    weights = {}
    for operand in node.all_input_nodes:
        if operand in made:
            continue
        if operand.op == "get_attr":
            weights[str(operand.target)] = program.tensor(operand)
        made[operand] = small.node_copy(operand, lambda n: made[n])
        made[operand].meta = dict(operand.meta)
    result = small.node_copy(node, lambda n: made[n])
    result.meta = dict(node.meta)
    small.output((result,))
    specs = pytree.tree_structure((tuple(examples), {})), pytree.tree_structure((0,))
    single = Program(
        small, weights, *specs, examples=tuple(examples), dynamic_batch=program.dynamic_batch,
        name=node.name,
    )  # fmt: skip
    infer_shapes(single)
    return single, result
