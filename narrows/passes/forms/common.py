"""Forms in which every layer reads all that its tensor holds: the common mask.

A channel goes where every reader of it is without it, and stays for all of them where one reads it;
the others have zero weights for it. No channels are copied together. `Common` finds the channels
that stay so, over everything that hands channels on: activations, depthwise convolutions, sums,
splits, concats. `Common.widen` rounds widths up to those that a target likes, wherever channels are
made, split or joined.

Such forms are what structured pruning makes of masks, and where a search for a target's form
begins (`narrows.passes.pruning.rivals`).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np
from torch import fx

from narrows.ir.channels import Facts
from narrows.ir.choices import Choices
from narrows.ir.labels import Bools, Ints, Value, some
from narrows.ir.liveness import Demand
from narrows.ir.ops import table as ops
from narrows.ir.ops.constants import as_array
from narrows.ir.ops.flow import Read
from narrows.ir.program import Program
from narrows.ir.structure import structure_of
from narrows.ir.structure.spaces import Space, handed, spaces_of

# Rounds in which what operators ask for beside (equal widths of groups) is taken in.
ROUNDS = 4


class Common:
    """The channels that stay when every reader of a tensor reads all of it.

    Attributes:
        facts: The analysis.
        demand: The liveness of the smallest form.
        fill: Whether, of the channels that stay for a width's sake, those come first that their
            readers weigh most (L1); else the first ones.
        streams: Whether a residual stream, and what a concat joins, stays as wide as it was made;
            else it is cut where its later readers need less.
        held: Per tensor the labels that it holds.
    """

    def __init__(
        self, facts: Facts, demand: Demand, *, streams: bool = True, fill: bool = False
    ) -> None:
        self.facts, self.demand, self.streams, self.fill = facts, demand, streams, fill
        self.held: dict[fx.Node, Bools] = {
            node: np.zeros(flow.value.count, dtype=bool)
            for node, flow in facts.flows.items()
            if isinstance(flow.value, Value) and not flow.value.free and demand.alive(node)
        }
        self._before: dict[fx.Node, list[Read]] = {node: [] for node in self.held}
        self._after: dict[fx.Node, list[tuple[fx.Node, Read]]] = {node: [] for node in self.held}
        for node in self.held:
            for read in () if makes(facts, node) else facts.flows[node].reads:
                if read.source is not None and read.operand in self.held:
                    self._before[node].append(read)
                    self._after[read.operand].append((node, read))
        self._settle(demand)

    def _settle(self, demand: Demand) -> None:
        """Hold what a liveness needs, and what that liveness needs then."""
        for _ in range(ROUNDS):
            grew = [self.add(node, demand.needed(node)) for node in self.held]
            if not any(grew):
                return
            choices = self.choices()
            nodes = {node.name: node for node in self.held}
            forced = {nodes[name]: mask for name, mask in choices.forced.items()}
            columns = {nodes[name]: mask for name, mask in choices.columns.items()}
            demand = Demand(self.facts, forced, columns)

    def add(self, node: fx.Node, labels: Bools) -> bool:
        """Hold more labels of a tensor, and of all that hands them on; whether there were any."""
        todo = [(node, labels)]
        before = some(labels & ~self.held[node])
        while todo:
            at, wanted = todo.pop()
            new = wanted & ~self.held[at]
            if not some(new):
                continue
            self.held[at] |= new
            for read in self._before[at]:
                todo.append((read.operand, read.reached(new, len(self.held[read.operand]))))
            for user, read in self._after[at]:
                if self.streams or len(self._before[user]) == 1:
                    source = read.source
                    assert source is not None
                    todo.append((user, (source >= 0) & new[source]))
        return before

    def widen(self, step: int) -> None:
        """Hold more channels, until they are multiples of ``step`` wherever there are so many.

        Channels that are made, split, joined and read alike are rounded up by themselves, so that
        every part of a split and every operand of a concat is as wide as a target likes.
        """
        for node, rows in _alike(self.facts.program):
            if node in self.held:
                self._round_up(node, rows, step)
        if not self.streams:  # what a stream is cut to, from its end on
            for space in reversed(spaces_of(self.facts, self.demand, even=True)):
                node = space.nodes[0]
                if node in self.held and _can_widen(self.facts, space):
                    self._round_up(node, np.arange(space.count)[:, None], step)
        self._settle(self.demand)

    def _round_up(self, node: fx.Node, rows: Ints, step: int) -> None:
        """Hold more of some channels of a tensor.

        Args:
            node: The tensor.
            rows: Per channel its labels, ``[channels, labels]``.
            step: What their number is to be a multiple of.
        """
        there = np.any(self.held[node][rows], axis=1)
        missing = -int(np.count_nonzero(there)) % step
        if not missing:
            return
        spare = np.flatnonzero(~there)
        if self.fill:
            weighed = self._weights[node][rows[spare]].sum(1)
            spare = spare[np.argsort(-weighed, kind="stable")]
        spare = spare[:missing]
        more = np.zeros_like(self.held[node])
        more[rows[spare]] = True
        self.add(node, more)

    @cached_property
    def _weights(self) -> dict[fx.Node, np.ndarray]:
        """Per tensor and label, the sum of the absolute weights by which contractions read it."""
        found = {node: np.zeros(len(held)) for node, held in self.held.items()}
        for node in self.held:
            c = ops.contraction(self.facts, node) if makes(self.facts, node) else None
            flow = self.facts.flows[node]
            x = flow.reads[0].operand if c is not None and flow.reads else None
            if c is None or x not in found or c.groups != 1 or len(flow.facts[1]) != 1:
                continue
            np.add.at(found[x], flow.facts[1][0], as_array(c.blocks.abs().sum((0, 1, 3))))
        for node in reversed(self.held):
            for read in self._before[node]:
                source = read.source
                assert source is not None
                np.add.at(found[read.operand], source[source >= 0], found[node][source >= 0])
        return found

    def choices(self) -> Choices:
        """Return the form."""
        columns: dict[str, Bools] = {}
        for node in self.held:
            flow = self.facts.flows[node]
            if not flow.reads or not isinstance(flow.facts, tuple) or handed(self.facts, node):
                continue
            if ops.contraction(self.facts, node) is None:
                continue
            operand = self.held.get(flow.reads[0].operand)
            if operand is not None:
                columns[node.name] = np.any(operand[flow.facts[1]], axis=0)
        return Choices({node.name: held.copy() for node, held in self.held.items()}, columns)


def makes(facts: Facts, node: fx.Node) -> bool:
    """Whether a node's channels are other ones than those that it reads."""
    return ops.contraction(facts, node) is not None and not handed(facts, node)


def _alike(program: Program) -> Iterator[tuple[fx.Node, Ints]]:
    """Yield what a layer makes, with the labels of channels that live or die together."""
    structure = structure_of(program)
    nodes = {node.name: node for node in program.graph.nodes}
    for tie in structure.ties:
        made = {m.weight: m.positions for m in tie.members if m.role == "out"}
        for name in () if tie.barrier else tie.nodes:
            layer = structure.layer_at.get(name)
            if layer is not None and layer.weight in made:
                yield nodes[name], made[layer.weight]


def _can_widen(facts: Facts, space: Space) -> bool:
    if space.fixed or any(ops.concatenates(n) for n in space.entries):
        return False
    return all(len(facts.value(n).axes) <= 1 for n in space.nodes)


def common(
    facts: Facts, demand: Demand, step: int = 1, *, streams: bool = True, fill: bool = False
) -> Choices:
    """Return the form of the common mask, its widths rounded up to multiples of ``step``.

    The other arguments are those of `Common`, as attributes.
    """
    found = Common(facts, demand, streams=streams, fill=fill)
    if step > 1:
        found.widen(step)
    return found.choices()


__all__ = ["Common", "common", "makes"]
