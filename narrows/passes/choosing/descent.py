"""Greedy removal over the whole network: what costs least for what it saves goes first."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import fx

from narrows.ir.labels import Bools, Ints
from narrows.passes.choosing.reads import Floats, Reads
from narrows.passes.choosing.surgeon import Surgeon

STEPS = 300  # of a descent that removes everything: so often costs and savings are found anew


def descend(
    reads: Reads,
    surgeons: Sequence[Surgeon | None],
    factors: Floats,
    there: Bools,
    each: Floats,
    goal: float,
    group: Ints | None = None,
    least: int = 1,
    open_past: Callable[[list[fx.Node]], bool] | None = None,
) -> Bools:
    """Return which reads are there when the cost has come down to a goal.

    Args:
        reads: The reads.
        surgeons: Per layer what its channels cost; they lose them here.
        factors: Per layer what its costs are multiplied with (`narrows.passes.choosing.scales`).
        there: Per read whether it is there.
        each: Per layer the cost of one input channel for one output channel (`Reads.macs`).
        goal: The cost to come down to. Where no more can go, more is left.
        group: Per read its group: those of one go together, those of -1 stay. Without groups every
            layer chooses for itself.
        least: How many reads every layer keeps at least.
        open_past: Whether a layer may lose even the last one: whether the network goes on when some
            layers read nothing. Without it none may.
    """
    return _Descent(reads, surgeons, factors, there, each, group, least, open_past).to(goal)


class _Descent:
    def __init__(
        self,
        reads: Reads,
        surgeons: Sequence[Surgeon | None],
        factors: Floats,
        there: Bools,
        each: Floats,
        group: Ints | None,
        least: int,
        open_past: Callable[[list[fx.Node]], bool] | None,
    ) -> None:
        self.reads, self.surgeons, self.factors = reads, surgeons, factors
        self.there, self.each, self.keep = there.copy(), each, least
        self.open_past = open_past if least == 1 else None
        self.group = np.arange(len(there)) if group is None else group
        self.alone = group is None
        self.moves = _members(self.group)
        self.barred = np.zeros(len(self.moves), dtype=bool)
        for number, move in enumerate(self.moves):
            self.barred[number] = not len(move) or not reads.free[move].all()
        self.scores = np.full(len(there), np.inf)
        self.count = max(1, round(int((~self.barred).sum()) / STEPS))

    def to(self, goal: float) -> Bools:
        """Go on until the cost is the goal."""
        stale = [j for j, s in enumerate(self.surgeons) if s is not None]
        total = self.reads.cost(self.there, self.each)
        while total > goal:
            for j in stale:
                surgeon = self.surgeons[j]
                assert surgeon is not None
                self.scores[self.reads.of_layer[j]] = self.factors[j] * surgeon.scores()
            taken = self._next(total - goal)
            if not taken:
                break
            stale = self._remove(np.concatenate([self.moves[m] for m in taken]))
            total = self.reads.cost(self.there, self.each)
        return self.there

    def _next(self, excess: float) -> list[int]:
        """Return the next moves: the best for what they save, until the excess is saved."""
        known, count = self.there & (self.group >= 0), len(self.moves)
        group = self.group[known]
        costs = np.bincount(group, self.scores[known], count)
        if self.alone:
            saved = self.reads.saved(self.there, self.each)
        else:
            saved = self.reads.saved_together(self.there, self.each, self.group)
        alive = np.bincount(group, minlength=count) > 0
        open_ = alive & ~self.barred & np.isfinite(costs) & (saved > 0)
        ratio = np.full(len(self.moves), np.inf)
        ratio[open_] = costs[open_] / saved[open_]
        left = np.bincount(self.reads.layer[self.there], minlength=len(self.reads.products))
        taken: list[int] = []
        gain = 0.0
        for move in np.argsort(ratio, kind="stable"):
            if len(taken) >= self.count or gain >= excess or not np.isfinite(ratio[move]):
                break
            own = self.moves[move]
            layers, counts = np.unique(self.reads.layer[own[self.there[own]]], return_counts=True)
            after = left[layers] - counts
            if (after < self.keep).any() and not self._goes_on(left, layers[after < self.keep]):
                continue
            left[layers] = after
            taken.append(int(move))
            gain += saved[move]
        return taken

    def _goes_on(self, left: Ints, layers: Ints) -> bool:
        """Whether the network goes on when layers lose all they read, as others have already."""
        if self.open_past is None:
            return False
        empty = [j for j, own in enumerate(self.reads.of_layer) if len(own) and not left[j]]
        nodes = [self.reads.products[j].layer.node for j in (*empty, *layers.tolist())]
        return self.open_past(nodes)

    def _remove(self, gone: Ints) -> list[int]:
        """Remove reads; return whose costs have changed by that."""
        gone = gone[self.there[gone]]
        self.there[gone] = False
        touched = np.unique(self.reads.layer[gone]).tolist()
        for j in touched:
            surgeon = self.surgeons[j]
            assert surgeon is not None
            surgeon.remove(self.reads.place[gone[self.reads.layer[gone] == j]].tolist())
        return touched


def together(reads: Reads, barred: Sequence[bool]) -> Ints:
    """Return groups of reads for a constrained choice: all that read one channel of a coupling.

    Args:
        reads: The reads.
        barred: Per coupling whether it keeps all its channels.
    """
    keys = list(zip(reads.tie.tolist(), reads.channel.tolist(), strict=True))
    numbers: dict[tuple[int, int], int] = {}
    for key in keys:
        if not barred[key[0]]:
            numbers.setdefault(key, len(numbers))
    return np.array([numbers.get(key, -1) for key in keys], dtype=np.int64)


def _members(group: Ints) -> list[Ints]:
    """Return the members of every group."""
    order = np.argsort(group, kind="stable")
    order = order[np.searchsorted(group[order], 0) :]
    ends = np.cumsum(np.bincount(group[order], minlength=int(group.max(initial=-1)) + 1))
    return np.split(order, ends[:-1]) if len(ends) else []


__all__ = ["descend", "together"]
