"""`descend_all`: one descent to several costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import fx

from narrows.ir.labels import Bools, Ints
from narrows.passes.choosing.descent import descend
from narrows.passes.choosing.reads import Floats, Reads
from narrows.passes.choosing.surgeon import Surgeon

PARTS = 2  # of what is still too much, this part goes before the costs are weighed anew


def descend_all(
    reads: Reads,
    surgeons: Sequence[Surgeon | None],
    factors: Floats,
    there: Bools,
    costs: Sequence[tuple[Floats, float, float]],
    group: Ints | None = None,
    least: int = 1,
    open_past: Callable[[list[fx.Node]], bool] | None = None,
) -> Bools:
    """Return which reads are there when every cost has come down to its goal.

    Channels go by what they save of all costs that are still too high, each weighed by how much of
    it is too much; one that has come down no longer counts. Of one cost it is `descend`.

    Args:
        reads, surgeons, factors, there, group, least, open_past: As for `descend`.
        costs: Per cost what it is per layer and pair of channels, what it is of everything, and
            what it is to come down to.
    """
    if len(costs) == 1:
        ((each, _, goal),) = costs
        return descend(reads, surgeons, factors, there, each, goal, group, least, open_past)
    while True:
        over = [max(0.0, reads.cost(there, each) - goal) / full for each, full, goal in costs]
        if not any(over):
            return there
        mixed = np.sum([o / full * each for o, (each, full, _) in zip(over, costs, strict=True)], 0)
        now = reads.cost(there, mixed)
        goal = now - sum(o * o for o in over) / PARTS
        then = descend(reads, surgeons, factors, there, mixed, goal, group, least, open_past)
        if then.sum() == there.sum():
            return there
        there = then


__all__ = ["descend_all"]
