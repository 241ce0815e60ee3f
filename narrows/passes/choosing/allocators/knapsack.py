"""`Knapsack`: one number of channels of each, the least loss within the budgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from narrows.ir.labels import Ints
from narrows.passes.choosing.allocators.base import ByWidths
from narrows.passes.choosing.allocators.scalar import bisected, filled
from narrows.passes.choosing.budgets.base import Limit
from narrows.passes.choosing.reads import Floats
from narrows.passes.plans.candidates import Candidates, Widths

STOPS = 64  # at most, of one candidate
CELLS = 4096  # in which what items cost is counted
TURNS = 3  # in which costs are found anew around what was chosen
HALVINGS = 14  # of the capacity


@dataclass(frozen=True)
class Knapsack(ByWidths):
    """A multiple-choice knapsack: of each layer or coupling one width is taken, as one item.

    What an item loses is what the channels that go are worth. What it costs is read off the
    budgets, staircases included, with the others as wide as they were chosen the time before. It is
    solved exactly, by a dynamic program over costs in 4,096 cells, and the capacity is bisected
    until the costs of all together are within the budgets.
    """

    name: ClassVar[str] = "knapsack"
    paper: ClassVar[str] = "Humble et al., Soft masking for cost-constrained pruning, ECCV 2022"

    def widths(self, candidates: Candidates, limits: Sequence[Limit]) -> Sequence[int]:
        """Return the widths of the least loss that were found within the limits."""
        return packed(candidates, limits, candidates.lost)


def packed(
    candidates: Candidates, limits: Sequence[Limit], lost: Sequence[Floats]
) -> Sequence[int]:
    """Return the widths of the least loss that were found within limits, the least if none are.

    Args:
        candidates: What may go.
        limits: The limits.
        lost: Per candidate what 0, 1, 2 ... channels that stay lose.
    """
    stops = [stops_of(least, full) for least, full in _ends(candidates)]

    def proportional(share: float) -> list[int]:
        return [max(least, int(full * (1 - share) + 1e-9)) for least, full in _ends(candidates)]

    around: Widths = proportional(bisected(candidates, limits, proportional))
    best, least_loss = list(candidates.least), np.inf
    for _ in range(TURNS):
        costs = [_costs(limits, around, i, own) for i, own in enumerate(stops)]
        losses = [curve[own] for curve, own in zip(lost, stops, strict=True)]
        low, high = 0.0, float(sum(c.max() for c in costs))
        solver = Cells(costs, losses, high)
        found: list[int] | None = None
        for _ in range(HALVINGS):
            capacity = (low + high) / 2
            picked = solver.best(capacity)
            widths = None if picked is None else _of(stops, picked)
            if widths is not None and not all(x.meets(widths) for x in limits):
                high = capacity
            else:
                low = capacity
                found = widths if widths is not None else found
        if found is None:
            break
        found = filled(candidates, limits, found)
        loss = float(sum(curve[w] for curve, w in zip(lost, found, strict=True)))
        if loss < least_loss:
            best, least_loss = found, loss
        around = found
    return best


def stops_of(least: int, full: int) -> Ints:
    """Return the widths worth trying: all, or of many every second, fourth ..."""
    step = 1
    while full > step * STOPS:
        step *= 2
    inside = np.arange(step, full, step)
    return np.unique(np.concatenate([[least], inside[inside >= least], [full]])).astype(np.int64)


class Cells:
    """The dynamic program: per cell of cost the least loss, candidate after candidate."""

    def __init__(self, costs: Sequence[Floats], losses: Sequence[Floats], most: float) -> None:
        """Solve it for every capacity at once.

        Args:
            costs: Per candidate what each of its items costs, at least 0.
            losses: Per candidate what each of its items loses.
            most: The largest capacity that is asked for.
        """
        self.size = most / CELLS if most > 0 else 1.0
        # A cost is rounded up, but for what is no more than rounding itself.
        self.cells = [np.ceil(c / self.size - 1e-9).astype(np.int64) for c in costs]
        least = np.zeros(CELLS + 1)
        self.taken: list[Ints] = []
        for cells, loss in zip(self.cells, losses, strict=True):
            now = np.full(CELLS + 1, np.inf)
            taken = np.zeros(CELLS + 1, dtype=np.int64)
            for item, (cell, lost) in enumerate(zip(cells, loss, strict=True)):
                if cell > CELLS:
                    continue
                moved = least[: CELLS + 1 - cell] + lost
                better = moved < now[cell:]
                now[cell:][better] = moved[better]
                taken[cell:][better] = item
            least = now
            self.taken.append(taken)
        self.least = least

    def best(self, capacity: float) -> list[int] | None:
        """Return per candidate which item is taken, ``None`` if nothing fits."""
        cell = min(CELLS, int(capacity / self.size + 1e-9))
        if not np.isfinite(self.least[cell]):
            return None
        result = []
        for cells, taken in zip(reversed(self.cells), reversed(self.taken), strict=True):
            item = int(taken[cell])
            result.append(item)
            cell -= int(cells[item])
        return result[::-1]


def _costs(limits: Sequence[Limit], around: Widths, i: int, stops: Ints) -> Floats:
    """Return what each width of a candidate costs, of all limits together, from its least on."""
    result = np.zeros(len(stops))
    for at, width in enumerate(stops):
        widths = [*around]
        widths[i] = int(width)
        result[at] = sum(limit.cost(widths) / limit.most for limit in limits)
    # A narrower one never costs more: where a staircase falls, the wider one has its price.
    result = np.minimum.accumulate(result[::-1])[::-1]
    return result - result[0]


def _ends(candidates: Candidates) -> list[tuple[int, int]]:
    return list(zip(candidates.least, candidates.full, strict=True))


def _of(stops: Sequence[Ints], picked: Sequence[int]) -> list[int]:
    return [int(own[item]) for own, item in zip(stops, picked, strict=True)]


__all__ = ["Cells", "Knapsack", "packed", "stops_of"]
