"""Layers: where a program makes channels of a weight, which a channel plan can speak of.

A *layer* is one node that contracts with a weight (convolution, linear layer, matrix product) or
looks its rows up (embedding): one use of the weight, which may have several. Start at `layers_of`.
It reads the graph alone, no weight's values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from narrows.ir.channels import Facts
from narrows.ir.labels import Ints, free
from narrows.ir.meta import Meta, shape_of
from narrows.ir.ops import table
from narrows.ir.ops.args import arguments, call, is_tensor
from narrows.ir.ops.contraction import Contraction
from narrows.ir.ops.flow import Flow
from narrows.ir.ops.lookup import Lookup
from narrows.ir.program import Program

SIDES = ("inputs", "outputs")


@dataclass(frozen=True, eq=False)
class Layer:
    """One node that makes channels of a weight.

    Attributes:
        weight: The weight's name.
        node: The node.
        argument: The node's argument that holds the weight.
        chain: The layout operators between the weight and the node, first one first.
        inputs: How many channels it sums over; 0 for a lookup, which sums over none.
        outputs: How many channels it makes.
        in_axis: The weight's axis of the inputs; -1 for a lookup.
        out_axis: The weight's axis of the outputs.
        groups: How many independent parts the channels fall into.
        transposed: Whether the groups lie on the input axis, as in transposed convolutions.
        y_axis: The result's axis of the outputs.
        bias: The node of the bias, or ``None``.
        bias_argument: The argument that holds the bias.
        contraction: The contraction, ``None`` for a lookup.
    """

    weight: str
    node: fx.Node
    argument: str
    chain: tuple[fx.Node, ...]
    inputs: int
    outputs: int
    in_axis: int
    out_axis: int
    groups: int
    transposed: bool
    y_axis: int
    bias: fx.Node | None
    bias_argument: str
    contraction: Contraction | None

    @property
    def x(self) -> fx.Node | None:
        """The activation it sums over; ``None`` for a lookup."""
        return None if self.contraction is None else self.contraction.x

    @property
    def sums(self) -> bool:
        """Whether it sums over several channels for each one that it makes."""
        return self.inputs > self.groups

    def width(self, side: str) -> int:
        """Return how many channels it has on a side, ``inputs`` or ``outputs``."""
        return self.inputs if side == "inputs" else self.outputs

    def axis(self, side: str) -> int:
        """Return the weight's axis of a side; -1 for the inputs of a lookup."""
        return self.in_axis if side == "inputs" else self.out_axis

    def spans_groups(self, side: str) -> bool:
        """Whether the weight's axis of a side has the channels of all groups, one after another.

        Of a weight in several groups one axis does; along the other lie those of one group.
        """
        return self.groups == 1 or (side == "inputs") == self.transposed

    def channels(self, side: str, positions: Ints) -> Ints:
        """Return a side's channels at positions of its weight axis, in every group: ``[n, each]``.

        Args:
            side: The side.
            positions: Positions of the axis, ``[n, each]``.
        """
        if self.spans_groups(side):
            return positions
        each = self.width(side) // self.groups
        starts = each * np.arange(self.groups)[:, None]
        return (positions[:, None] + starts).reshape(len(positions), -1)


def layers_of(program: Program) -> dict[str, tuple[Layer, ...]]:
    """Return every weight's layers by its name, both in execution order."""
    return program.memo("layers", lambda: _layers_of(program))


def _layers_of(program: Program) -> dict[str, tuple[Layer, ...]]:
    facts = outline(program)
    found: dict[str, list[Layer]] = {}
    for node in program.graph.nodes:
        layer = _layer(facts, node) if node.op == "call_function" else None
        if layer is not None:
            found.setdefault(layer.weight, []).append(layer)
    return {name: tuple(layers) for name, layers in found.items()}


def outline(program: Program) -> Facts:
    """Return facts that know which nodes depend on weights alone, and nothing else."""
    facts = Facts(program)
    known = facts.flows
    for node in program.graph.nodes:
        if node.op == "get_attr":
            known[node] = Flow(free(program.tensor(node).shape))
        elif node.op == "call_function" and _is_free(node, known) and Meta(node).size is None:
            known[node] = Flow(free(shape_of(node) or ()))  # of a split weight, too
    return facts


def _is_free(node: fx.Node, known: Mapping[fx.Node, Flow]) -> bool:
    read = node.all_input_nodes
    if not all(n in known or shape_of(n) is None for n in read):
        return False
    return any(n in known for n in read)


def _layer(facts: Facts, node: fx.Node) -> Layer | None:
    c = table.contraction(facts, node)
    if c is None:
        return _lookup(facts, node)
    root, chain = root_of(c.weight)
    axes = root_axes(facts.program, root, chain, (c.out_axis, c.in_axis))
    if axes is None:
        return None
    return Layer(
        weight=str(root.target), node=node, argument=c.names[1], chain=chain, inputs=c.inputs,
        outputs=c.outputs, out_axis=axes[0], in_axis=axes[1], groups=c.groups,
        transposed=c.transposed, y_axis=c.y_axis, bias=c.bias, bias_argument=c.names[2],
        contraction=c,
    )  # fmt: skip


def _lookup(facts: Facts, node: fx.Node) -> Layer | None:
    if not isinstance(table.find(node), Lookup):
        return None
    weight = arguments(node)["weight"]
    if weight.op != "get_attr":
        return None
    return Layer(
        weight=str(weight.target), node=node, argument="weight", chain=(), inputs=0,
        outputs=facts.program.tensor(weight).shape[1], out_axis=1, in_axis=-1, groups=1,
        transposed=False, y_axis=len(shape_of(node)) - 1, bias=None, bias_argument="",
        contraction=None,
    )  # fmt: skip


def root_of(node: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """Return the node where a chain of layout operators begins, and the chain up to ``node``."""
    chain: list[fx.Node] = []
    while table.keeps_all(node):
        tensors = [n for n in node.all_input_nodes if is_tensor(n)]
        if len(tensors) != 1:
            break
        chain.append(node)
        node = tensors[0]
    return node, tuple(reversed(chain))


def root_axes(
    program: Program, root: fx.Node, chain: tuple[fx.Node, ...], axes: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Return the axes of ``root`` that a chain brings to ``axes``, or ``None`` if it mixes them."""
    if root.op != "get_attr":
        return None
    if not chain:
        return axes
    shape = program.tensor(root).shape
    found: dict[int, int] = {}
    for own in range(len(shape)):
        ruler = torch.arange(shape[own]).view([-1 if a == own else 1 for a in range(len(shape))])
        result: Any = ruler.expand(shape)
        before = root
        for step in chain:
            result, before = call(step, {before: result}), step
        for axis in axes:
            rows = result.movedim(axis, 0).reshape(result.shape[axis], -1)
            line = torch.arange(shape[own])[:, None]
            if len(rows) == shape[own] and bool((rows == line).all()):
                found[axis] = own
    return tuple(found[a] for a in axes) if len(found) == len(set(axes)) else None


def positions(shape: tuple[int, ...], axis: int) -> Tensor:
    """Return the channel of every element of a tensor of ``shape``, without storing one each."""
    view = [-1 if a == axis else 1 for a in range(len(shape))]
    return torch.arange(shape[axis]).view(view).expand(shape)
