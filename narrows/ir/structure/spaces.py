"""Spaces: the tensors of a program that have the same channels.

What runs element by element hands its channels on: an activation, a norm of running statistics, a
pooling, a depthwise convolution, an addition. All tensors so joined form one *space*, and one set
of channels, the space's *live* set, is enough to describe them: the channels that any of them
needs. A space begins at its makers (convolutions, linear layers, embeddings), or it is *derived*
from other spaces (a concat, a split). It is read by contractions, each perhaps through a chain of
operators that serves it alone, its *tail*.

Ties are a program's, but spaces are a pruning's: which channels are live, what is a constant and
where a stream needs fewer of them is a matter of its masks. `spaces_of` finds them for a liveness,
`joined_spaces` which of them concats put side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from torch import fx

from narrows.ir.channels import Facts
from narrows.ir.labels import Bools, Value, how_many, same
from narrows.ir.liveness import Demand
from narrows.ir.ops import table
from narrows.ir.ops.join import Join
from narrows.ir.ops.layout import Layout
from narrows.ir.ops.selection import Selection
from narrows.ir.structure.leaders import Leaders


@dataclass(eq=False)
class Reader:
    """A contraction that reads a space.

    Attributes:
        node: The contraction.
        tail: The operators that serve it alone, from the space to the contraction.
        columns: The label of every input channel.
        wants: The labels that must be there for it.
        x: The tensor of the space that is read.
        rigid: Whether its groups fix which channels it can take.
    """

    node: fx.Node
    tail: list[fx.Node]
    columns: np.ndarray
    wants: Bools
    x: fx.Node
    rigid: bool = False

    def inputs(self, taken: Bools) -> int:
        """Return how many input channels the labels ``taken`` feed."""
        if len(self.columns) == 1:
            return how_many(taken[self.columns[0]])
        return how_many(np.any(taken[self.columns], axis=0))


@dataclass(eq=False)
class Space:
    """Tensors with the same channels.

    Attributes:
        nodes: The tensors, in execution order.
        live: The labels that any of them needs.
        makers: The nodes among them that make channels.
        entries: The nodes among them that take channels from other spaces.
        readers: The contractions that read them.
        others: Operators of other kinds that read them.
        fixed: Whether its width must stay as it is: it reaches an output or an operator that
            treats its channels as a whole.
    """

    nodes: list[fx.Node] = field(default_factory=list)
    live: Bools = field(default_factory=lambda: np.zeros(0, dtype=bool))
    makers: list[fx.Node] = field(default_factory=list)
    entries: list[fx.Node] = field(default_factory=list)
    readers: list[Reader] = field(default_factory=list)
    others: list[tuple[fx.Node, int]] = field(default_factory=list)
    fixed: bool = False

    @property
    def count(self) -> int:
        """How many labels it has."""
        return len(self.live)

    @cached_property
    def core(self) -> list[fx.Node]:
        """The nodes that are in no reader's tail."""
        tails = {n for r in self.readers for n in r.tail}
        return [n for n in self.nodes if n not in tails]


def spaces_of(facts: Facts, demand: Demand, *, even: bool = False) -> list[Space]:
    """Return the spaces of a program that anything needs, by their first node.

    With ``even``, a space ends at a sum that needs fewer channels than an operand, as a residual
    stream does after the last layer that reads some: what comes then is a space derived from it.
    """
    leaders = Leaders()
    for node in _tensors(facts, demand):
        leaders.add(node)
        slots = handed(facts, node)
        for slot in slots:
            operand = facts.flows[node].reads[slot].operand
            if operand not in leaders:  # it is a constant, replaced by a small tensor
                continue
            if not even or len(slots) == 1 or same(demand.needed(node), demand.needed(operand)):
                leaders.join(node, operand)
    spaces: dict[fx.Node, Space] = {}
    of: dict[fx.Node, Space] = {}
    for node in leaders:
        space = of[node] = spaces.setdefault(leaders.find(node), Space())
        space.nodes.append(node)
        need = demand.needed(node)
        space.live = need.copy() if len(space.nodes) == 1 else space.live | need
        inside = handed(facts, node)
        if inside and all(
            facts.flows[node].reads[slot].operand not in leaders
            or leaders.find(facts.flows[node].reads[slot].operand) is leaders.find(node)
            for slot in inside
        ):
            continue
        if _makes_channels(facts, node):
            space.makers.append(node)
        else:
            space.entries.append(node)
            space.fixed |= node.op == "placeholder"
    _find_readers(facts, demand, of)
    return list(spaces.values())


def joined_spaces(
    facts: Facts, spaces: Sequence[Space], joins: Callable[[fx.Node], bool] | None = None
) -> list[list[Space]]:
    """Return the spaces in families: concats join those of one; families and spaces in order.

    A space that no concat joins is a family of its own.

    Args:
        facts: The analysis.
        spaces: The spaces.
        joins: Which concats count; all by default.
    """
    of = {node: space for space in spaces for node in space.nodes}
    family = {space: [space] for space in spaces}
    for space in spaces:
        for entry in space.entries:
            if not table.concatenates(entry) or (joins and not joins(entry)):
                continue
            for read in facts.flows[entry].reads:
                other = of.get(read.operand, space)
                if family[other] is not family[space]:
                    family[space] += family[other]
                    family.update(dict.fromkeys(family[other], family[space]))
    found: dict[int, list[Space]] = {}
    for space in spaces:
        found.setdefault(id(family[space]), []).append(space)
    return list(found.values())


def _tensors(facts: Facts, demand: Demand) -> Iterator[fx.Node]:
    for node, flow in facts.flows.items():
        if isinstance(flow.value, Value) and not flow.value.free and demand.alive(node):
            yield node


def _makes_channels(facts: Facts, node: fx.Node) -> bool:
    if table.contraction(facts, node) is not None:
        return True
    row = table.find(node)
    return row is not None and row.makes_channels and not facts.flows[node].barrier


def handed(facts: Facts, node: fx.Node) -> tuple[int, ...]:
    """Return the slots of a node whose channels are those of its result, label by label."""
    flow, row = facts.flows[node], table.find(node)
    if row is None or flow.barrier or not flow.reads:
        return ()
    depthwise = row.contracts and flow.reads[0].source is not None
    if not row.passes_on and not depthwise:
        return ()
    count = facts.value(node).count
    return tuple(
        slot
        for slot, read in enumerate(flow.reads)
        if read.straight and facts.value(read.operand).count == count
    )


def _find_readers(facts: Facts, demand: Demand, of: dict[fx.Node, Space]) -> None:
    for user, flow in facts.flows.items():
        if user.op != "output" and not demand.alive(user):
            continue
        inside = handed(facts, user) if user.op != "output" else ()
        for slot, read in enumerate(flow.reads):
            space = of.get(read.operand)
            if space is None or slot in inside:
                continue
            row = table.find(user)
            if isinstance(flow.facts, tuple) and table.contraction(facts, user) is not None:
                c, columns = flow.facts
                tail = _tail(facts, user, read.operand)
                head = tail[0] if tail else user
                wants = demand.required(head, handed(facts, head)[0] if tail else slot)
                x = facts.flows[head].reads[0].operand
                space.readers.append(Reader(user, tail, columns, wants, x, c.groups > 1))
            elif isinstance(row, Join | Selection | Layout) and not flow.barrier:
                space.others.append((user, slot))
            else:
                space.others.append((user, slot))
                space.fixed = True


def _tail(facts: Facts, reader: fx.Node, node: fx.Node) -> list[fx.Node]:
    """Return the chain of operators before ``reader`` that serves it alone, in execution order."""
    tail: list[fx.Node] = []
    only = reader
    while set(node.users) == {only} and len(handed(facts, node)) == 1:
        if len(facts.flows[node].reads) > 1:
            break  # a gate: its other operand has channels, too
        tail.append(node)
        only, node = node, facts.flows[node].reads[handed(facts, node)[0]].operand
    return list(reversed(tail))


__all__ = ["Reader", "Space", "handed", "joined_spaces", "spaces_of"]
