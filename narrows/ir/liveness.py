"""Backward liveness: which channels of which tensors somebody needs.

`Demand` walks a program from its outputs to its inputs. A channel is needed when an output, a
barrier or a needed channel reads it. Constants that a consumer can fold into its bias are not
read. Where an operator can only keep more than that (equal widths per group, the statistics of a
norm), the channel stays and a note says why.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from narrows.ir.channels import Facts
from narrows.ir.labels import Bools, Value, same, some
from narrows.ir.meta import Meta, shape_of
from narrows.ir.ops import table
from narrows.ir.ops.flow import Read
from narrows.ir.program import Note
from narrows.ir.states import State


class Demand:
    """The channels that are needed, per node and per operand of a node.

    Attributes:
        facts: The forward analysis.
        notes: Per node and reason, how many channels stay that no consumer reads.
        given: The labels that nodes must hold, and the input channels that contractions must read,
            whatever reads them.
        uses: Per weight its uses: the node, and per weight axis what the node uses of it.
    """

    def __init__(
        self,
        facts: Facts,
        forced: dict[fx.Node, Bools] | None = None,
        columns: dict[fx.Node, Bools] | None = None,
    ) -> None:
        self.facts = facts
        self.uses: dict[fx.Node, list[tuple[fx.Node, dict[int, Bools]]]] = {}
        self.notes: dict[tuple[str, str], Note] = {}
        self.given = self._forced, self._columns = forced or {}, columns or {}
        self._need: dict[fx.Node, Bools] = {}
        self._valued: dict[fx.Node, Bools] = {}
        self._edges: dict[tuple[fx.Node, int], Bools] = {}
        self._asked: dict[fx.Node, Bools] = {}
        self._alive: set[fx.Node] = set()
        self._states: dict[str, Bools] = {}
        self._walk()
        while self._states_grow():
            for known in (self.uses, self.notes, self._need, self._valued, self._edges):
                known.clear()
            self._asked.clear()
            self._alive.clear()
            self._walk()

    # ------------------------------------------------------------------ for rows

    def needed(self, node: fx.Node) -> Bools:
        """Return which of the node's labels are needed."""
        need = self._need.get(node)
        if need is None:
            need = self._need[node] = np.zeros(self.facts.value(node).count, dtype=bool)
        return need

    def valued(self, node: fx.Node) -> Bools:
        """Return which of the needed labels must hold their value; the others only fill a place.

        A place is needed where a tensor would not be rectangular or a layer would have no input.
        What it holds is multiplied by zero later, so nothing has to be computed for it.
        """
        mask = self._valued.get(node)
        return np.zeros(self.facts.value(node).count, dtype=bool) if mask is None else mask

    def forced(self, node: fx.Node) -> Bools:
        """Return which labels must stay because a rewrite could not do without."""
        mask = self._forced.get(node)
        return np.zeros(self.facts.value(node).count, dtype=bool) if mask is None else mask

    def require(self, node: fx.Node, slot: int, mask: Bools, valued: Bools | None = None) -> None:
        """Say that ``node`` reads the labels ``mask`` of the operand of its ``slot``-th read.

        Of these only ``valued`` (all, if omitted) must hold their value.
        """
        self._edges[node, slot] = mask
        if not some(mask):
            return
        operand = self.facts.flows[node].reads[slot].operand
        need = self.needed(operand)
        need |= mask
        if valued is None:
            valued = mask
        if operand in self._alive:
            self._valued[operand] |= valued & mask
            self._asked[operand] |= mask
            return
        self._alive.add(operand)
        if operand in self._forced:
            need |= self._forced[operand]
        self._valued[operand] = valued & mask
        self._asked[operand] = mask.copy()

    def required(self, node: fx.Node, slot: int) -> Bools:
        """Return the labels that ``node`` reads of the operand of its ``slot``-th read."""
        mask = self._edges.get((node, slot))
        if mask is None:
            mask = np.zeros(
                self.facts.value(self.facts.flows[node].reads[slot].operand).count, dtype=bool
            )
        return mask

    def only_reader(self, node: fx.Node, slot: int) -> bool:
        """Whether ``node`` reads all that anybody reads of its operand.

        What the operand holds beyond that stays for another reason, and is in nobody's way.
        """
        operand = self.facts.flows[node].reads[slot].operand
        return same(self.required(node, slot), self._asked[operand])

    def extend(self, node: fx.Node, mask: Bools, reason: str, message: str) -> None:
        """Add labels that ``node`` has a place for although nobody reads them."""
        need = self.needed(node)
        extra = mask & ~need
        if some(extra):
            if reason:
                self.note(node, reason, message, extra)
            need |= mask

    def columns(self, node: fx.Node) -> Bools | None:
        """Return the input channels that other uses of the node's weight read, if there are any."""
        return self._columns.get(node)

    def use_weight(self, weight: fx.Node, node: fx.Node, parts: dict[int, Bools]) -> None:
        """Record which part of a weight ``node`` uses, per axis."""
        self.uses.setdefault(weight, []).append((node, parts))

    def note(self, node: fx.Node, reason: str, message: str, channels: Bools) -> None:
        """Record that channels stay although the plan could do without."""
        meta = Meta(node)
        self.notes[node.name, reason] = Note(
            node.name,
            reason,
            f"{staying(int(channels.sum()))}: {message}",
            int(channels.sum()),
            meta.source,
        )

    def alive(self, node: fx.Node) -> bool:
        """Whether anything of the node is needed."""
        return node in self._alive

    def constant_operands(self, node: fx.Node) -> set[int]:
        """Return the slots of an element-wise node whose needed channels are all constants.

        Such an operand is replaced by a small tensor of constants, as long as the others still give
        the result its shape and tell its channels apart.
        """
        reads = self.facts.flows[node].reads
        if not any(some(self.facts.value(r.operand).known()) for r in reads):
            return set()
        need, valued = self._need[node], self.valued(node)
        shape = shape_of(node)
        found: set[int] = set()
        for slot, read in enumerate(reads):
            value = self.facts.value(read.operand)
            if not some(read.reached(need, value.count)):
                continue
            if some(np.isnan(value.const[read.reached(valued, value.count)])):
                continue
            others = [r for s, r in enumerate(reads) if s != slot and s not in found]
            if any(shape_of(r.operand) == shape for r in others) and _tell_apart(others, need):
                found.add(slot)
        return found

    # ------------------------------------------------------------------ the walk

    def _walk(self) -> None:
        for node in reversed(self.facts.program.graph.nodes):
            flow = self.facts.flows[node]
            if node.op == "output":
                self._outputs(node, flow)
            elif node in self._alive and flow.reads:
                if flow.barrier:
                    self._barrier(node, flow)
                else:
                    row = table.find(node)
                    assert row is not None
                    row.demand(self, node)

    def _outputs(self, node: fx.Node, flow: Any) -> None:
        for slot, read in enumerate(flow.reads):
            value, state = self.facts.value(read.operand), flow.facts.get(slot)
            mask, what = np.ones(value.count, dtype=bool), "a model output"
            if state is not None:
                mask, what = self._returned(state, value.count), f"the state {state.name}"
            self.require(node, slot, mask)
            dead = value.known() & mask
            if some(dead):
                self.note(read.operand, "output", f"they are part of {what}", dead)

    def _returned(self, state: State, count: int) -> Bools:
        """Return which labels of an output are needed: those that the next call reads."""
        mask = np.zeros(count, dtype=bool)
        taken = self._states.get(state.name)
        if taken is not None:
            _, inner, outer = self.facts.tied(state)
            mask[outer[taken[inner]]] = True
        return mask

    def _states_grow(self) -> bool:
        """Whether more of a state is read than it was returned with; the next walk returns it.

        What is read grows with what is returned, so this ends, with the fewest channels that do. A
        tensor has one at least.
        """
        found: dict[str, Bools] = {}
        for state in self.facts.program.states:
            holder = self.facts.program.node(state.name)
            need = self.needed(holder)
            need |= self.forced(holder)
            need |= self._states.get(state.name, False)
            found[state.name] = need.copy()
        grew = any(some(m) and not same(m, self._states.get(n, ~m)) for n, m in found.items())
        for mask in () if grew else found.values():
            grew |= not some(mask)
            mask[0] |= not some(mask)
        self._states = found
        return grew

    def _barrier(self, node: fx.Node, flow: Any) -> None:
        if isinstance(flow.value, Value):
            self.needed(node)[:] = True
        for slot, read in enumerate(flow.reads):
            count = self.facts.value(read.operand).count
            self.require(node, slot, np.ones(count, dtype=bool))


def staying(count: int) -> str:
    """Return how a note begins that so many channels stay."""
    return "1 channel stays" if count == 1 else f"{count} channels stay"


def _tell_apart(reads: list[Read], need: Bools) -> bool:
    """Whether no two needed labels of the result read the same of all these operands."""
    code = np.zeros(int(need.sum()), dtype=np.int64)
    for read in reads:
        assert read.source is not None
        source = read.source[need]
        code = code * (int(source.max(initial=0)) + 1) + source
    return len(np.unique(code)) == len(code)
