"""Choosing reads and widths by a target's costs.

For every space (`narrows.ir.structure.spaces`) there is a choice of exact forms. Its tensors can
hold just the live channels, or more of them, up to a width that the target likes. A reader that
needs a part of what they hold can have that part copied together (a gather), perhaps with a few
more channels to meet a better width, or read everything, with zero weights for what counts as zero.
A concat can take just what its readers need of each operand, or all of it. `Chooser` weighs these
by the seconds of the target's `Costs`, space by space, from the inputs on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
from torch import fx

from narrows.ir.channels import Facts
from narrows.ir.costs import Costs, rounded
from narrows.ir.labels import Bools, Ints, Value, how_many, same
from narrows.ir.liveness import Demand
from narrows.ir.meta import shape_of
from narrows.ir.ops import table as ops
from narrows.ir.ops.constants import as_array
from narrows.ir.structure.spaces import Reader, Space, joined_spaces, spaces_of
from narrows.ir.work import SUMMING, Work
from narrows.ir.workload import work_of

# What a width that is not chosen yet is taken for: the next multiple of that.
LIKELY = 16
# Seconds that weigh more than anything, for what is to be done only where nothing else can be.
AVOIDED = 1.0


@dataclass(frozen=True, eq=False)
class Take:
    """What a reader takes of a space.

    Attributes:
        labels: The labels that it reads: those held, or a part that is copied together.
        tail: The labels that the operators hold that serve it alone, before or behind the copy.
    """

    labels: Bools
    tail: Bools


@dataclass
class Decision:
    """What was chosen for one space, and the seconds that were weighed.

    Attributes:
        space: The space.
        start: The labels that it must hold at the least, in the form that was chosen.
        hold: The labels that its tensors hold.
        takes: What each reader takes.
        seconds: What all of it takes.
        making: The part of that which is spent before the readers.
    """

    space: Space
    start: Bools
    hold: Bools
    takes: list[Take]
    seconds: float = 0.0
    making: float = 0.0

    def reads_all(self, index: int) -> bool:
        """Whether a reader takes all that is held although a part would do."""
        return same(self.takes[index].labels, self.hold)


@dataclass(frozen=True)
class Entered:
    """How a space takes channels from elsewhere.

    Attributes:
        seconds: What that costs beyond its operators.
        cut: Whether it takes less than comes.
        plain: Whether its tensors lie plain, although the target has a layout of its own.
    """

    seconds: float
    cut: bool
    plain: bool


@dataclass
class Chooser:
    """Chooses space by space; what was chosen before tells the widths of what comes after.

    Attributes:
        facts: The analysis.
        demand: The liveness of the smallest form.
        costs: The target's costs.
        batch: The number of examples to choose for.
        fill: Whether channels stay wherever that costs nothing, those first that their readers
            weigh most; else only where it saves time, the first ones first.
    """

    facts: Facts
    demand: Demand
    costs: Costs
    batch: int = 1
    fill: bool = False
    _held: dict[fx.Node, Bools] = field(default_factory=dict)
    _taken: dict[fx.Node, int] = field(default_factory=dict)
    _whole: set[fx.Node] = field(default_factory=set)
    _works: dict[fx.Node, Work | None] = field(default_factory=dict)
    _ranks: dict[Space, Ints] = field(default_factory=dict)
    _known: dict[tuple[fx.Node, int, int, int, bool], float] = field(default_factory=dict)

    def run(self) -> list[Decision]:
        """Return a decision per space, in execution order.

        On some targets a concat hands on its layout only if every operand has a width that allows
        it. So the spaces that concats join are weighed together, with those that their makers read:
        all of them at such widths, or each as it is best by itself.
        """
        spaces = spaces_of(self.facts, self.demand, even=True)
        families = self._families(spaces)
        if not families:
            return self._decide(spaces, frozenset())
        single, whole = (self._decide(spaces, s) for s in (frozenset(), frozenset(families)))
        chosen: set[Space] = set()
        for family in set(families.values()):
            makers = {m for s in spaces if families.get(s) is family for m in s.makers}
            at = [
                i
                for i, s in enumerate(spaces)
                if families.get(s) is family or any(r.node in makers for r in s.readers)
            ]
            if sum(whole[i].seconds for i in at) < sum(single[i].seconds for i in at):
                chosen.update(s for s in spaces if families.get(s) is family)
        if not chosen:
            return single
        return whole if len(chosen) == len(families) else self._decide(spaces, frozenset(chosen))

    def _decide(self, spaces: list[Space], whole: frozenset[Space]) -> list[Decision]:
        self._held.clear()
        self._taken.clear()
        self._whole = {node for space in whole for node in space.makers}
        return [self.decide(space, space in whole) for space in spaces]

    def _families(self, spaces: list[Space]) -> dict[Space, Space]:
        """Return the spaces that concats join, each with the first one of its family."""
        if self.costs.join_step == 1:
            return {}

        def counts(entry: fx.Node) -> bool:
            return ops.concatenates(entry) and len(shape_of(entry)) == 4

        groups = joined_spaces(self.facts, spaces, counts)
        joined = [g for g in groups if any(counts(e) for s in g for e in s.entries)]
        return {space: group[0] for group in joined for space in group}

    # ------------------------------------------------------------------ one space

    def decide(self, space: Space, whole: bool = False) -> Decision:
        """Return the cheapest form of one space, and remember it for the spaces after it.

        With ``whole``, its width is a multiple of the `Costs.join_step` where it has the channels
        for that.
        """
        decision = self.weigh(space, whole)
        for node in space.nodes:
            self._held[node] = decision.hold
        for reader, take in zip(space.readers, decision.takes, strict=True):
            for node in reader.tail:
                self._held[node] = take.tail
            self._taken[reader.node] = reader.inputs(take.labels)
        return decision

    def weigh(self, space: Space, whole: bool = False) -> Decision:
        """Return the cheapest form of one space, given what was chosen before it."""
        free = self._free(space)
        widths = self._candidates(how_many(space.live), how_many(free), space)
        if whole:
            widths = [w for w in widths if w % self.costs.join_step == 0] or widths
        best: Decision | None = None
        for width in widths:
            hold = widened(space.live, width, free, self._rank(space))
            entered = self._enter(space, hold)
            seconds, takes = self._readers(space, hold, entered.plain)
            making = entered.seconds + self._made(space, width, entered.plain)
            seconds += making
            if best is None or seconds < best.seconds * (1 + 1e-9 if self.fill else 1 - 1e-9):
                start = hold if space.entries and not entered.cut else space.live
                best = Decision(space, start, hold, takes, seconds, making)
        assert best is not None
        return best

    def _rank(self, space: Space) -> Ints:
        """Return a space's labels in the order in which they are to stay for a width's sake."""
        if space not in self._ranks:
            weighed = np.zeros(space.count)
            for reader in space.readers if self.fill else ():
                c = ops.contraction(self.facts, reader.node)
                if c is not None and len(reader.columns) == 1 and c.groups == 1:
                    weighed[reader.columns[0]] += as_array(c.blocks.abs().sum((0, 1, 3)))
            self._ranks[space] = np.argsort(-weighed, kind="stable")
        return self._ranks[space]

    def _free(self, space: Space) -> Bools:
        """Return the labels that a space may hold: what comes from elsewhere is as wide as that."""
        if space.fixed:
            return space.live
        if space.entries:
            return space.live | self._arriving(space)
        flat = all(len(self.facts.value(n).axes) <= 1 for n in space.nodes)
        return np.ones_like(space.live) if flat else space.live

    def _candidates(self, least: int, most: int, space: Space) -> list[int]:
        if any(r.rigid for r in space.readers) or any(_is_grouped(n) for n in space.makers):
            return sorted({least, most})
        return self.costs.widths(least, most)

    def _made(self, space: Space, width: int, plain: bool) -> float:
        """Return the seconds of making a space at a width."""
        makers = sum(self.seconds(n, inputs=self._inputs(n), outputs=width) for n in space.makers)
        return makers + sum(self.passing_seconds(n, width, plain) for n in space.core)

    def _readers(self, space: Space, hold: Bools, plain: bool) -> tuple[float, list[Take]]:
        """Return the seconds of all reads of what ``hold`` says, and what each reader takes.

        Readers that want the same of one tensor share a copy of it.
        """
        groups: dict[tuple[fx.Node, bytes], list[int]] = {}
        for i, reader in enumerate(space.readers):
            groups.setdefault((reader.x, reader.wants.tobytes()), []).append(i)
        total, takes = 0.0, [Take(hold, hold)] * len(space.readers)
        for (x, _), members in groups.items():
            readers = [space.readers[i] for i in members]
            seconds, taken = self._read(readers, x, hold, plain, self._rank(space))
            total += seconds
            for i, take in zip(members, taken, strict=True):
                takes[i] = take
        return total, takes

    def _read(
        self, readers: list[Reader], x: fx.Node, hold: Bools, plain: bool, rank: Ints
    ) -> tuple[float, list[Take]]:
        """Return the seconds of those that want the same of ``x``, and what each takes.

        Each takes all, or a part that is copied behind what serves it alone; or they share a copy
        of a part of ``x`` itself.
        """
        wants = readers[0].wants & hold
        least, most = how_many(wants), how_many(hold)
        rigid = any(r.rigid for r in readers)
        widths = [] if least == most else [least] if rigid else self.costs.widths(least, most - 1)
        parts = [(w, widened(wants, w, hold, rank)) for w in widths]
        best, takes = 0.0, []
        for reader in readers:
            seconds, take = self._reading(reader, hold, hold, plain), Take(hold, hold)
            for width, part in parts if reader.tail else ():
                cost = self._reading(reader, part, hold, plain)
                cost += self.copy_seconds(reader.tail[-1], most, width, plain)
                if cost < seconds:
                    seconds, take = cost, Take(part, hold)
            best += seconds
            takes.append(take)
        for width, part in parts:
            cost = self.copy_seconds(x, most, width, plain)
            cost += sum(self._reading(r, part, part, True) for r in readers)
            if cost < best:
                best, takes = cost, [Take(part, part)] * len(readers)
        return best, takes

    def _reading(self, reader: Reader, taken: Bools, tail: Bools, plain: bool) -> float:
        """Return the seconds of a reader and of what serves it alone."""
        inputs = reader.inputs(taken)
        width, outputs = how_many(tail), self._outputs(reader.node)
        key = (reader.node, inputs, width, outputs, plain)
        seconds = self._known.get(key)
        if seconds is None:
            seconds = sum(self.passing_seconds(n, width, plain) for n in reader.tail)
            seconds += self.seconds(reader.node, inputs=inputs, outputs=outputs)
            self._known[key] = seconds
        work = self.work(reader.node)
        if reader.node in self._whole and work is not None:
            seconds += 0.0 if self.costs.fits(work.resized(inputs=inputs)) else AVOIDED
        return seconds

    # ------------------------------------------------------------------ what comes from elsewhere

    def _arriving(self, space: Space) -> Bools:
        """Return the labels of a derived space that come with what its sources hold."""
        found = np.ones(space.count, dtype=bool)
        for entry in space.entries:
            joined = ops.concatenates(entry)  # has every label from one operand
            come = np.full(space.count, not joined)
            for read in self.facts.flows[entry].reads:
                held = self._held.get(read.operand)
                if held is None and not joined and read.operand in space.nodes:
                    continue
                if read.source is None or held is None:
                    return np.zeros(space.count, dtype=bool)
                here = (read.source >= 0) & held[read.source]
                come = come | here if joined else come & here
            found &= come
        return found

    def _enter(self, space: Space, hold: Bools) -> Entered:
        """Return what taking ``hold`` of what the sources hold costs, and what comes of it."""
        total, cut, plain = 0.0, False, False
        for entry in space.entries:
            joined = ops.concatenates(entry)
            parts: list[tuple[fx.Node, int, int]] = []
            for read in self.facts.flows[entry].reads:
                held = self._held.get(read.operand)
                if held is not None and read.source is not None:
                    wanted = read.reached(hold, len(held)) & held
                    parts.append((read.operand, how_many(held), how_many(wanted)))
            cuts = [(x, have, take) for x, have, take in parts if 0 < take < have]
            cut |= bool(cuts)
            total += sum(self.copy_seconds(*c, plain=joined) for c in cuts)
            work = self.work(entry)
            if joined and work is not None:
                widths = [(have, take) for _, have, take in parts]
                made = self.costs.join(work, widths, how_many(hold))
                total, plain = total + made.seconds, plain or made.plain
        return Entered(total, cut, plain)

    # ------------------------------------------------------------------ seconds

    def _inputs(self, node: fx.Node) -> int | None:
        known = self._taken.get(node)
        if known is not None:
            return known
        flow = self.facts.flows[node]
        if not ops.contracts(node) or not isinstance(flow.facts, tuple):
            return None
        _, columns = flow.facts
        return rounded(int(self.demand.required(node, 0)[columns].any(0).sum()), LIKELY)

    def _outputs(self, node: fx.Node) -> int:
        held = self._held.get(node)
        if held is not None:
            return how_many(held)
        need = self.demand.needed(node)
        return min(len(need), rounded(how_many(need), LIKELY))

    def work(self, node: fx.Node) -> Work | None:
        """Return a node's work, for the batch to choose for."""
        if node not in self._works:
            work = work_of(node)
            if work is not None and work.kind not in ("matmul", "attention"):
                work = self._placed(node, work).resized(batch=self.batch)
            self._works[node] = work
        return self._works[node]

    def _placed(self, node: fx.Node, work: Work) -> Work:
        """Return a work with its channels where they are: no shape tells [b, h, w, c]."""
        shape, value = shape_of(node), self.facts.flows[node].value
        axis = value.axes[0] if isinstance(value, Value) and len(value.axes) == 1 else 0
        if shape is None or axis < 2:
            return work
        rest = math.prod(s for a, s in enumerate(shape) if a not in (0, axis))
        if work.kind in SUMMING:
            return replace(work, space=(rest,))
        return replace(work, inputs=shape[axis], outputs=shape[axis], space=(rest,))

    def seconds(self, node: fx.Node, *, inputs: int | None, outputs: int) -> float:
        """Return the seconds of a contraction at other widths."""
        work = self.work(node)
        if work is None or not outputs or inputs == 0:
            return 0.0
        if work.groups > 1:
            inputs = None if inputs is None else max(work.groups, inputs)
            outputs = max(work.groups, outputs)
        return self.costs.seconds(work.resized(inputs=inputs, outputs=outputs))

    def passing_seconds(self, node: fx.Node, width: int, plain: bool = False) -> float:
        """Return the seconds of an operator that hands channels on; 0 where it is fused."""
        idle = not width or node.op != "call_function"
        if (idle or ops.contraction(self.facts, node) is not None) and (
            not ops.contracts(node) or self.facts.flows[node].reads[0].source is None
        ):
            return 0.0
        work = self.work(node)
        if work is None or not width:
            return 0.0
        if work.kind in ("pointwise", "scale") and self._is_fused(node, work):
            return 0.0
        return self.costs.passing_seconds(work.resized(inputs=width), plain=plain)

    def _is_fused(self, node: fx.Node, work: Work) -> bool:
        """Whether an operator goes into the convolution before it."""
        operands = [r.operand for r in self.facts.flows[node].reads]
        if len(operands) != 1 or len(operands[0].users) != 1:
            return False
        (before,) = operands
        if ops.contracts(before):
            return work.kind == "scale" or self.costs.fuses(work)
        inner = self.work(before)
        return self.costs.fuses(work) and inner is not None and inner.kind == "scale"

    def copy_seconds(self, x: fx.Node, have: int, take: int, plain: bool = False) -> float:
        """Return the seconds of gathering ``take`` of the ``have`` channels of ``x``."""
        shape = shape_of(x)
        axes = self.facts.value(x).axes
        axis = axes[0] if len(axes) == 1 and axes[0] else 1
        kind = "pick" if math.prod(shape[axis + 1 :]) == 1 else "gather"
        space = (*shape[1:axis], *shape[axis + 1 :])
        plain = plain or len(shape) != 4 or axis != 1
        return self.costs.copy_seconds(kind, have, take, space, self.batch, plain=plain)


def _is_grouped(node: fx.Node) -> bool:
    work = work_of(node)
    return work is not None and work.kind == "grouped"


def widened(mask: Bools, width: int, among: Bools, rank: Ints) -> Bools:
    """Return ``mask`` with more of the labels ``among``, up to ``width``, in the order ``rank``."""
    missing = width - how_many(mask)
    if missing <= 0:
        return mask
    wider = mask.copy()
    wider[rank[(among & ~mask)[rank]][:missing]] = True
    return wider
