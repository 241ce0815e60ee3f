"""Where a program makes channels of a weight: what a channel plan can speak of.

A *use* is one node that contracts with a weight (convolution, linear layer, matrix product) or
looks its rows up (embedding). Start at `uses_of`. It reads the graph alone, no weight's values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from narrows.errors import PlanUsageError, suggest
from narrows.ir.channels import Facts
from narrows.ir.labels import free
from narrows.ir.meta import op_name, shape_of, where
from narrows.ir.ops import table
from narrows.ir.ops.args import arguments, call, is_tensor
from narrows.ir.ops.contract import Contract
from narrows.ir.ops.contraction import Contraction
from narrows.ir.ops.flow import Flow
from narrows.ir.ops.layout import Layout
from narrows.ir.ops.lookup import Lookup
from narrows.ir.program import Program

SIDES = ("inputs", "outputs")


@dataclass(frozen=True, eq=False)
class Use:
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

    def width(self, side: str) -> int:
        """Return how many channels it has on a side, ``inputs`` or ``outputs``."""
        return self.inputs if side == "inputs" else self.outputs


def uses_of(program: Program) -> dict[str, tuple[Use, ...]]:
    """Return every weight's uses by its name, both in execution order."""
    return program.memo("uses", lambda: _uses_of(program))


def _uses_of(program: Program) -> dict[str, tuple[Use, ...]]:
    facts = outline(program)
    found: dict[str, list[Use]] = {}
    for node in program.graph.nodes:
        use = _use(facts, node) if node.op == "call_function" else None
        if use is not None:
            found.setdefault(use.weight, []).append(use)
    return {name: tuple(uses) for name, uses in found.items()}


def outline(program: Program) -> Facts:
    """Return facts that know which nodes depend on weights alone, and nothing else."""
    facts = Facts(program)
    known = facts.flows
    for node in program.graph.nodes:
        if node.op == "get_attr":
            known[node] = Flow(free(program.tensor(node).shape))
        elif node.op == "call_function" and _is_free(node, known) and shape_of(node) is not None:
            known[node] = Flow(free(shape_of(node)))
    return facts


def _is_free(node: fx.Node, known: Mapping[fx.Node, Flow]) -> bool:
    read = node.all_input_nodes
    if not all(n in known or shape_of(n) is None for n in read):
        return False
    return any(n in known for n in read)


def _use(facts: Facts, node: fx.Node) -> Use | None:
    c = table.contraction(facts, node)
    if c is None:
        return _lookup(facts, node)
    root, chain = root_of(c.weight)
    axes = root_axes(facts.program, root, chain, (c.out_axis, c.in_axis))
    if axes is None:
        return None
    return Use(
        weight=str(root.target), node=node, argument=c.names[1], chain=chain, inputs=c.inputs,
        outputs=c.outputs, out_axis=axes[0], in_axis=axes[1], groups=c.groups,
        transposed=c.transposed, y_axis=c.y_axis, bias=c.bias, bias_argument=c.names[2],
        contraction=c,
    )  # fmt: skip


def _lookup(facts: Facts, node: fx.Node) -> Use | None:
    if not isinstance(table.find(node), Lookup):
        return None
    weight = arguments(node)["weight"]
    if weight.op != "get_attr":
        return None
    return Use(
        weight=str(weight.target), node=node, argument="weight", chain=(), inputs=0,
        outputs=facts.program.tensor(weight).shape[1], out_axis=1, in_axis=-1, groups=1,
        transposed=False, y_axis=len(shape_of(node)) - 1, bias=None, bias_argument="",
        contraction=None,
    )  # fmt: skip


def root_of(node: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """Return the node where a chain of layout operators begins, and the chain up to ``node``."""
    chain: list[fx.Node] = []
    while isinstance(table.find(node), Layout):
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


# ------------------------------------------------------------------ finding by name


def find_uses(
    program: Program, uses: Mapping[str, tuple[Use, ...]], weight: str, side: str
) -> tuple[Use, ...]:
    """Return the uses of ``weight`` that have a ``side``, contractions before lookups.

    `PlanUsageError` says why there are none.
    """
    name = program.aliases.get(weight, weight)
    if name not in program.weights:
        hint = suggest(weight, uses) or suggest(weight, [*program.weights, *program.aliases])
        raise PlanUsageError(f"{program.name} has no weight {weight!r}", hint=hint)
    found = [u for u in uses.get(name, ()) if u.width(side)]
    if found:
        return tuple(sorted(found, key=lambda u: u.contraction is None))
    readers = program.users_of(name)
    raise PlanUsageError(
        f"{weight!r} takes no mask on its {side}",
        where=where(readers[0]) if readers else "",
        why=_why_not(program, readers, side),
        hint="mask the weight of a convolution, a linear layer or a matrix product",
    )


def _why_not(program: Program, readers: list[fx.Node], side: str) -> str:
    if not readers:
        return "nothing reads it"
    node = readers[0]
    row = table.find(node)
    if row is None:
        return f"{op_name(node)} has no row in the op table and is a barrier"
    if isinstance(row, Lookup):
        return "a lookup sums over no channels"
    if isinstance(row, Contract):
        return f"{op_name(node)} reads another weight as its input, or one computed from inputs"
    return f"{op_name(node)} makes no channels with it"
