"""Families: the tensors whose channels are put in order together, and the order they get.

Spaces that a concat joins are one family: each operand's channels stay in one run, and the runs may
stand in whatever order serves the concat's readers. `orders` finds the families of a program and
chooses an order for each (`narrows.passes.forms.order`); `Choices.order` takes what it returns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import fx

from narrows.ir.channels import Facts
from narrows.ir.labels import Bools, Ints, how_many, same, some
from narrows.ir.liveness import Demand
from narrows.ir.meta import Meta, shape_of
from narrows.ir.ops import table
from narrows.ir.program import Note, Pruning
from narrows.ir.rewrite import demand_of, facts_of
from narrows.ir.structure.spaces import Space, handed, joined_spaces, spaces_of
from narrows.passes.forms.order import Order, Reader, choose_order

# Looks at the order's tree per family of tensors.
EFFORT = 100_000


def orders(pruning: Pruning) -> tuple[dict[str, Ints], tuple[Note, ...]]:
    """Return a rank per channel for every node whose channels are to be permuted, and notes."""
    facts, demand = facts_of(pruning), demand_of(pruning)
    ranks: dict[str, Ints] = {}
    notes: list[Note] = []
    for family in _families(facts, spaces_of(facts, demand)):
        readers = [*family.readers(facts, demand)]
        if not any(family.is_cut(reader) for reader in readers):
            continue
        together = family.blocks()
        found = choose_order(np.arange(family.count), readers, together=together, effort=EFFORT)
        notes.append(_note(family, readers, found))
        place = np.empty(family.count, dtype=np.int64)
        place[list(found.channels)] = np.arange(family.count)
        for node, channel in family.ordered():
            ranks[node.name] = np.where(channel < 0, family.count, place[channel])
    return ranks, tuple(notes)


@dataclass(eq=False)
class Family:
    """Spaces that concats join: their channels are ordered together.

    Attributes:
        sources: The spaces that make channels.
        joined: The spaces that concats make of them.
        channel: Per space the family's channel of each label, -1 where the label is not live.
        count: How many channels the family has.
    """

    sources: list[Space]
    joined: list[Space]
    channel: dict[Space, Ints]
    count: int

    @cached_property
    def sizes(self) -> Ints:
        """How many channels each source has: a range of the family's, one source after another."""
        return np.array([how_many(space.live) for space in self.sources], dtype=np.int64)

    @cached_property
    def source(self) -> Ints:
        """The number of the source of each channel."""
        return np.repeat(np.arange(len(self.sizes)), self.sizes)

    def blocks(self) -> list[Ints]:
        """Return what must stay together: the channels of each source."""
        return np.split(np.arange(self.count), np.cumsum(self.sizes)[:-1])

    def readers(self, facts: Facts, demand: Demand) -> Iterator[Reader]:
        """Yield every read: the channels that it takes, weighed by the elements that it copies."""
        for space in (*self.sources, *self.joined):
            channel = self.channel[space]
            for reader in space.readers:
                yield _reader(reader.x, channel, reader.wants)
            for node, slot in space.others:
                x = facts.flows[node].reads[slot].operand
                yield _reader(x, channel, demand.required(node, slot))
            tails = {n for reader in space.readers for n in reader.tail}
            for node in space.nodes:  # a stream whose later tensors have fewer channels
                for slot in () if node in tails else handed(facts, node):
                    x = facts.flows[node].reads[slot].operand
                    wants = demand.required(node, slot)
                    if demand.alive(x) and not same(wants, demand.needed(x)):
                        yield _reader(x, channel, wants)

    def is_cut(self, reader: Reader) -> bool:
        """Whether a reader leaves out channels of a source that it reads."""
        taken = np.bincount(self.source[np.asarray(reader.channels)], minlength=len(self.sizes))
        return some((taken > 0) & (taken < self.sizes))

    def ordered(self) -> Iterator[tuple[fx.Node, Ints]]:
        """Yield the nodes that put channels in order, and their labels' channels."""
        for space in self.sources:
            for maker in space.makers:
                yield maker, self.channel[space]
        for space in self.joined:
            for entry in space.entries:
                yield entry, self.channel[space]


def _reader(node: fx.Node, channel: Ints, wants: Bools) -> Reader:
    """Return the read of the labels ``wants`` of a node, whose labels are these channels."""
    found = channel[wants]
    shape = shape_of(node)
    space = shape[2:] if len(shape) > 3 else shape[1:-1]
    copied = how_many(wants) * max(1, math.prod(space))  # elements, of one example
    return Reader(found[found >= 0], float(copied))


def _families(facts: Facts, spaces: list[Space]) -> Iterator[Family]:
    of = {node: space for space in spaces for node in space.nodes}
    for group in joined_spaces(facts, spaces):
        family = _family(facts, group, of) if all(_is_free(facts, s) for s in group) else None
        if family is not None:
            yield family


def _is_free(facts: Facts, space: Space) -> bool:
    """Whether the order of a space's channels is free."""
    if space.fixed or any(r.rigid for r in space.readers):
        return False
    if any(len(facts.value(node).axes) > 1 for node in space.nodes):
        return False
    for node in (*space.makers, *(r.node for r in space.readers)):
        c = table.contraction(facts, node)
        if c is not None and (c.groups > 1 or len(c.weight.users) > 1):
            return False
    joins = all(table.concatenates(n) for n, _ in space.others)
    along = all(isinstance(facts.flows[n].facts, tuple) for n in space.entries)
    return joins and along and all(table.concatenates(n) for n in space.entries)


def _family(facts: Facts, group: list[Space], of: dict[fx.Node, Space]) -> Family | None:
    """Return the family of some spaces, ``None`` if a concat's channels cannot be told apart."""
    sources = [s for s in group if not s.entries]
    joined = [s for s in group if s.entries]
    channel: dict[Space, Ints] = {}
    count = 0
    for space in sources:
        live = np.full(space.count, -1)
        size = how_many(space.live)
        live[space.live] = np.arange(count, count + size)
        channel[space] = live
        count += size
    for space in joined:  # in execution order: what it joins is known
        if len(space.entries) > 1 or space.makers:
            return None
        found = np.full(space.count, -1)
        for read in facts.flows[space.entries[0]].reads:
            source = read.source
            before = channel.get(of[read.operand]) if read.operand in of else None
            if source is None or before is None:
                return None
            found = np.where((source >= 0) & space.live, before[source], found)
        known = found[found >= 0]
        if (found[space.live] < 0).any() or len(np.unique(known)) != len(known):
            return None
        channel[space] = found
    return Family(sources, joined, channel, count)


def _note(family: Family, readers: list, found: Order) -> Note:
    served = sum(found.satisfied)
    node = (family.sources or family.joined)[0].nodes[0]
    gap = "" if found.exact else f"; a better order could save {found.gap:,.0f} elements at most"
    return Note(
        node.name, "order", f"{served} of {len(readers)} readers read an interval{gap}",
        0, Meta(node).source,
    )  # fmt: skip


__all__ = ["Family", "orders"]
