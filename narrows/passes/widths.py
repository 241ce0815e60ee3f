"""Choosing reads and widths by a target's costs.

For every space (`narrows.passes.spaces`) there is a choice of exact forms. Its tensors can hold
just the live channels, or more of them, up to a width that the target likes. A reader that needs a
part of what they hold can have that part copied together (a gather), perhaps with a few more
channels to meet a better width, or read everything, with zero weights for what counts as zero. A
concat can take just what its readers need of each operand, or all of it. `Chooser` weighs these by
the seconds of a `CostTable`, space by space, from the inputs on.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from torch import fx

from narrows.ir.channels import Facts
from narrows.ir.cost import CostTable
from narrows.ir.labels import Bools
from narrows.ir.liveness import Demand
from narrows.ir.ops import table as ops
from narrows.ir.ops.contract import Contract
from narrows.ir.program import Meta
from narrows.ir.work import Work, work_of
from narrows.passes.spaces import Reader, Space, spaces_of

# Widths that targets like: vector registers, blocks of a layout, sets of blocks.
STEPS = (4, 8, 16, 32, 64)


@dataclass
class Decision:
    """What was chosen for one space.

    Attributes:
        space: The space.
        start: The labels that it must hold at the least, in the form that was chosen.
        hold: The labels that its tensors hold.
        takes: Per reader the labels that are there for it: those held, or a gathered part.
    """

    space: Space
    start: Bools
    hold: Bools
    takes: list[Bools]

    def reads_all(self, index: int) -> bool:
        """Whether a reader takes all that is held although a part would do."""
        return np.array_equal(self.takes[index], self.hold)


@dataclass
class Chooser:
    """Chooses space by space; what was chosen before tells the widths of what comes after.

    Attributes:
        facts: The analysis.
        demand: The liveness of the smallest form.
        table: The target's costs.
        batch: The number of examples to choose for.
    """

    facts: Facts
    demand: Demand
    table: CostTable
    batch: int = 1
    _held: dict[fx.Node, Bools] = field(default_factory=dict)
    _taken: dict[fx.Node, int] = field(default_factory=dict)
    _works: dict[fx.Node, Work | None] = field(default_factory=dict)
    _seconds: dict[Work, float] = field(default_factory=dict)

    def run(self) -> list[Decision]:
        """Return a decision per space, in execution order."""
        return [self.decide(space) for space in spaces_of(self.facts, self.demand)]

    # ------------------------------------------------------------------ one space

    def decide(self, space: Space) -> Decision:
        """Return the cheapest form of one space, given what was chosen before it."""
        starts = [space.live]
        if space.entries and not space.fixed:
            starts.append(space.live | self._arriving(space))
        best: tuple[float, Bools, Bools, list[Bools]] | None = None
        for start in starts:
            copies = self._entry_seconds(space, start)
            most = self._most(space, start)
            for width in self._candidates(int(start.sum()), most, space):
                hold = widened(start, width)
                seconds, takes = self._readers(space, hold)
                seconds += copies + self._made(space, width)
                if best is None or seconds < best[0] * (1 - 1e-9):
                    best = seconds, start, hold, takes
        assert best is not None
        _, start, hold, takes = best
        for node in space.nodes:
            self._held[node] = hold
        for reader, taken in zip(space.readers, takes, strict=True):
            for node in reader.tail:
                self._held[node] = taken
            self._taken[reader.node] = int(taken[reader.columns].any(0).sum())
        return Decision(space, start, hold, takes)

    def _most(self, space: Space, start: Bools) -> int:
        """Return how wide a space can be made: what comes from elsewhere cannot be widened here."""
        width = int(start.sum())
        flat = all(len(self.facts.value(n).axes) <= 1 for n in space.nodes)
        if space.fixed or space.entries or not flat:
            return width
        return space.count

    def _candidates(self, least: int, most: int, space: Space) -> list[int]:
        if any(r.rigid for r in space.readers) or any(_is_grouped(n) for n in space.makers):
            return sorted({least, most})
        return candidates(least, most)

    def _made(self, space: Space, width: int) -> float:
        """Return the seconds of making a space at a width."""
        makers = sum(self.seconds(n, inputs=self._inputs(n), outputs=width) for n in space.makers)
        return makers + sum(self.passing_seconds(n, width) for n in space.core)

    def _readers(self, space: Space, hold: Bools) -> tuple[float, list[Bools]]:
        """Return the seconds of all reads of what ``hold`` says, and what each reader takes."""
        total, takes = 0.0, []
        for reader in space.readers:
            seconds, taken = self._read(reader, hold)
            total += seconds
            takes.append(taken)
        return total, takes

    def _read(self, reader: Reader, hold: Bools) -> tuple[float, Bools]:
        outputs = self._outputs(reader.node)

        def seconds(taken: Bools) -> float:
            inputs = int(taken[reader.columns].any(0).sum())
            chain = sum(self.passing_seconds(n, int(taken.sum())) for n in reader.tail)
            return chain + self.seconds(reader.node, inputs=inputs, outputs=outputs)

        best, taken = seconds(hold), hold
        if np.array_equal(hold, reader.wants):
            return best, taken
        wants = reader.wants & hold
        head = reader.tail[0] if reader.tail else reader.node
        x = self.facts.flows[head].reads[0].operand
        most = int(hold.sum())
        for width in [int(wants.sum())] if reader.rigid else candidates(int(wants.sum()), most - 1):
            part = widened(wants, width, hold)
            cost = seconds(part) + self.copy_seconds(x, most, width)
            if cost < best:
                best, taken = cost, part
        return best, taken

    # ------------------------------------------------------------------ what comes from elsewhere

    def _arriving(self, space: Space) -> Bools:
        """Return the labels of a derived space that come with what its sources hold."""
        found = np.zeros(space.count, dtype=bool)
        for entry in space.entries:
            for read in self.facts.flows[entry].reads:
                held = self._held.get(read.operand)
                if read.source is None or held is None:
                    return np.zeros(space.count, dtype=bool)
                known = read.source >= 0
                found[known] |= held[read.source[known]]
        return found

    def _entry_seconds(self, space: Space, hold: Bools) -> float:
        """Return the seconds of taking just ``hold`` of what the sources hold.

        The parts go on together in the plain layout; their sources are brought there for all
        readers at once.
        """
        total = 0.0
        for entry in space.entries:
            cut = False
            for read in self.facts.flows[entry].reads:
                held = self._held.get(read.operand)
                if held is None or read.source is None:
                    continue
                wanted = read.reached(hold, len(held)) & held
                if wanted.any() and not np.array_equal(wanted, held):
                    cut = True
                    total += self.copy_seconds(
                        read.operand, int(held.sum()), int(wanted.sum()), blocked=False
                    )
            work = self.work(entry) if cut else None
            if work is not None:
                total += self.table.reorder_seconds(work.resized(inputs=int(hold.sum())), out=False)
        return total

    # ------------------------------------------------------------------ seconds

    def _inputs(self, node: fx.Node) -> int | None:
        known = self._taken.get(node)
        if known is not None:
            return known
        flow = self.facts.flows[node]
        if not isinstance(ops.find(node), Contract) or not isinstance(flow.facts, tuple):
            return None
        _, columns = flow.facts
        return rounded(int(self.demand.required(node, 0)[columns].any(0).sum()))

    def _outputs(self, node: fx.Node) -> int:
        held = self._held.get(node)
        if held is not None:
            return int(held.sum())
        need = self.demand.needed(node)
        return min(len(need), rounded(int(need.sum())))

    def work(self, node: fx.Node) -> Work | None:
        """Return a node's work, for the batch to choose for."""
        if node not in self._works:
            work = work_of(node)
            if work is not None and work.kind not in ("matmul", "attention"):
                work = work.resized(batch=self.batch)
            self._works[node] = work
        return self._works[node]

    def _time(self, work: Work) -> float:
        if work not in self._seconds:
            self._seconds[work] = self.table.seconds(work)
        return self._seconds[work]

    def seconds(self, node: fx.Node, *, inputs: int | None, outputs: int) -> float:
        """Return the seconds of a contraction at other widths."""
        work = self.work(node)
        if work is None or not outputs or inputs == 0:
            return 0.0
        if work.groups > 1:
            inputs = None if inputs is None else max(work.groups, inputs)
            outputs = max(work.groups, outputs)
        return self._time(work.resized(inputs=inputs, outputs=outputs))

    def passing_seconds(self, node: fx.Node, width: int) -> float:
        """Return the seconds of an operator that hands channels on; 0 where it is fused."""
        if not width or node.op != "call_function" or ops.contraction(self.facts, node) is not None:
            row = ops.find(node)
            if not isinstance(row, Contract) or self.facts.flows[node].reads[0].source is None:
                return 0.0
        work = self.work(node)
        if work is None or not width:
            return 0.0
        if work.kind in ("pointwise", "scale") and self._is_fused(node, work):
            return 0.0
        return self._time(work.resized(inputs=width))

    def _is_fused(self, node: fx.Node, work: Work) -> bool:
        """Whether an operator goes into the convolution before it."""
        operands = [r.operand for r in self.facts.flows[node].reads]
        if len(operands) != 1 or len(operands[0].users) != 1:
            return False
        (before,) = operands
        if isinstance(ops.find(before), Contract):
            return work.kind == "scale" or work.op in self.table.layout.fused
        inner = self.work(before)
        return work.op in self.table.layout.fused and inner is not None and inner.kind == "scale"

    def copy_seconds(self, x: fx.Node, have: int, take: int, blocked: bool = True) -> float:
        """Return the seconds of gathering ``take`` of the ``have`` channels of ``x``."""
        shape = Meta(x).shape
        space = shape[2:] if len(shape) > 3 else shape[1:-1]
        return self.table.copy_seconds(
            "gather", have, take, space, self.batch, blocked=blocked and len(shape) == 4
        )


def _is_grouped(node: fx.Node) -> bool:
    work = work_of(node)
    return work is not None and work.kind == "grouped"


def rounded(width: int, step: int = 16) -> int:
    """Return the next multiple of ``step``."""
    return -(-width // step) * step


def candidates(least: int, most: int) -> list[int]:
    """Return the widths worth looking at between two."""
    if most <= least:
        return [least]
    found = {least, most, *(rounded(least, s) for s in STEPS)}
    return sorted(w for w in found if least <= w <= most)


def widened(mask: Bools, width: int, among: Bools | None = None) -> Bools:
    """Return ``mask`` with more of the labels ``among`` (all, if omitted), up to ``width``."""
    missing = width - int(mask.sum())
    if missing <= 0:
        return mask
    free = ~mask if among is None else among & ~mask
    wider = mask.copy()
    wider[np.flatnonzero(free)[:missing]] = True
    return wider
