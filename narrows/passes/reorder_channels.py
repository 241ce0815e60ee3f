"""`ReorderChannels`: one order for the channels of every tensor, so that readers read intervals.

A layer that reads a part of a tensor's channels needs them side by side; where they are an
interval, a slice will do, which eager PyTorch takes as a view. Channels may stand in any order as
long as everything that touches them agrees, so the order is chosen for all readers at once: the
consecutive-ones problem (`narrows.passes.forms.order`). Spaces that a concat joins are ordered
together, each operand's channels in one run, and the concat's operands in whatever order serves its
readers. Reordering for copies is UPSCALE's idea (Wan et al., arXiv 2307.08771).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from torch import fx

from narrows.ir.channels import Facts
from narrows.ir.labels import Ints
from narrows.ir.liveness import Demand
from narrows.ir.ops import table
from narrows.ir.ops.join import Join
from narrows.ir.program import Meta, Note, Program, shape_of
from narrows.ir.rewrite import Base
from narrows.passes.base import Fidelity, Pass, PassResult
from narrows.passes.forms.order import Order, Reader, choose_order
from narrows.passes.forms.spaces import Space, handed, spaces_of
from narrows.passes.prune_channels import emit, is_idle

# Looks at the order's tree per family of tensors; some 20 ms.
EFFORT = 100_000


@dataclass(frozen=True)
class ReorderChannels(Pass):
    """Permutes channels so that what a layer reads lies side by side."""

    name: ClassVar[str] = "reorder-channels"
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT
    requires: ClassVar[tuple[str, ...]] = ("prune-channels",)

    def run(self, program: Program) -> PassResult:
        """Return the program with its channels reordered; a note per order says what it serves."""
        base = program.base
        if base is None:
            note = Note(program.name, "idle", "prune-channels must run right before it")
            return PassResult(program, False, (note,))
        order, notes = orders(base)
        if not order:
            return PassResult(program, False, notes)
        made = emit(base.choose(replace(base.choices, order=order))).replace(notes=program.notes)
        if is_idle(program, made):
            return PassResult(program, False, notes)
        return PassResult(made, True, notes)


def orders(base: Base) -> tuple[dict[str, Ints], tuple[Note, ...]]:
    """Return a rank per channel for every node whose channels are to be permuted, and notes."""
    facts = base.facts
    demand = base.demand
    ranks: dict[str, Ints] = {}
    notes: list[Note] = []
    for family in _families(facts, spaces_of(facts, demand)):
        readers = [*family.readers(facts, demand)]
        if not any(family.is_cut(r) for r in readers):
            continue
        found = choose_order(
            range(family.count),
            [Reader(channels, weight) for _, channels, weight in readers],
            together=family.blocks(),
            effort=EFFORT,
        )
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

    def blocks(self) -> Iterator[list[int]]:
        """Yield what must stay together: the channels of each source."""
        for space in self.sources:
            live = self.channel[space]
            yield live[live >= 0].tolist()

    def readers(self, facts: Facts, demand: Demand) -> Iterator[tuple[fx.Node, list[int], float]]:
        """Yield every read: the reader, the channels that it reads, and the elements it copies."""
        for space in (*self.sources, *self.joined):
            channel = self.channel[space]
            for reader in space.readers:
                x = facts.flows[reader.tail[0] if reader.tail else reader.node].reads[0].operand
                yield reader.node, _picked(channel, reader.wants), _elements(x, reader.wants)
            for node, slot in space.others:
                wants = demand.required(node, slot)
                x = facts.flows[node].reads[slot].operand
                yield node, _picked(channel, wants), _elements(x, wants)
            tails = {n for reader in space.readers for n in reader.tail}
            for node in space.nodes:  # a stream whose later tensors have fewer channels
                for slot in () if node in tails else handed(facts, node):
                    x = facts.flows[node].reads[slot].operand
                    wants = demand.required(node, slot)
                    if demand.alive(x) and not np.array_equal(wants, demand.needed(x)):
                        yield node, _picked(channel, wants), _elements(x, wants)

    def is_cut(self, reader: tuple[fx.Node, list[int], float]) -> bool:
        """Whether a reader leaves out channels of a source that it reads."""
        taken = set(reader[1])
        return any(taken & b and not b <= taken for b in map(set, self.blocks()))

    def ordered(self) -> Iterator[tuple[fx.Node, Ints]]:
        """Yield the nodes that put channels in order, and their labels' channels."""
        for space in self.sources:
            for maker in space.makers:
                yield maker, self.channel[space]
        for space in self.joined:
            for entry in space.entries:
                yield entry, self.channel[space]


def _picked(channel: Ints, wants: np.ndarray) -> list[int]:
    found = channel[wants]
    return found[found >= 0].tolist()


def _elements(node: fx.Node, wants: np.ndarray) -> float:
    """Return how many numbers a copy of the channels ``wants`` moves, of one example."""
    shape = shape_of(node)
    space = shape[2:] if len(shape) > 3 else shape[1:-1]
    return float(wants.sum()) * max(1, math.prod(space))


def _families(facts: Facts, spaces: list[Space]) -> Iterator[Family]:
    of = {node: space for space in spaces for node in space.nodes}
    links: dict[Space, list[Space]] = {space: [] for space in spaces}
    for space in spaces:
        for node, _ in space.others:
            if node in of and isinstance(table.find(node), Join):
                links[space].append(of[node])
                links[of[node]].append(space)
    seen: set[Space] = set()
    for space in spaces:
        if space in seen:
            continue
        group, queue = [], [space]
        seen.add(space)
        while queue:
            current = queue.pop()
            group.append(current)
            for other in links[current]:
                if other not in seen:
                    seen.add(other)
                    queue.append(other)
        group.sort(key=spaces.index)
        if all(_is_free(facts, s) for s in group):
            family = _family(facts, group, of)
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
    joins = all(isinstance(table.find(n), Join) for n, _ in space.others)
    along = all(isinstance(facts.flows[n].facts, tuple) for n in space.entries)
    return joins and along and all(isinstance(table.find(n), Join) for n in space.entries)


def _family(facts: Facts, group: list[Space], of: dict[fx.Node, Space]) -> Family | None:
    """Return the family of some spaces, ``None`` if a concat's channels cannot be told apart."""
    sources = [s for s in group if not s.entries]
    joined = [s for s in group if s.entries]
    channel: dict[Space, Ints] = {}
    count = 0
    for space in sources:
        live = np.full(space.count, -1)
        live[space.live] = np.arange(count, count + int(space.live.sum()))
        channel[space] = live
        count += int(space.live.sum())
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
        family.count, Meta(node).source,
    )  # fmt: skip
