"""`Bisection`: one ratio of all channels together, as small as the budgets allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from narrows.passes.choosing.allocators.base import ByWidths
from narrows.passes.choosing.budgets.base import Limit
from narrows.passes.plans.candidates import Candidates

TURNS = 12  # halvings of the ratio
NEAR = 0.002  # of the share: close enough


@dataclass(frozen=True)
class Bisection(ByWidths):
    """Ranks all channels together, and bisects the ratio of them that goes to the budgets."""

    name: ClassVar[str] = "bisection"
    paper: ClassVar[str] = "Liu et al., AdaPruner, 2021: one scalar is bisected to the budget"

    def widths(self, candidates: Candidates, limits: Sequence[Limit]) -> Sequence[int]:
        """Return the widths of the smallest ratio that is within all limits."""
        low, high, best = 0.0, 1.0, candidates.least
        for turn in range(TURNS):
            ratio = (low + high) / 2
            widths = at_ratio(candidates, ratio)
            lefts = [limit.left(widths) for limit in limits]
            if all(limit.meets(widths) for limit in limits):
                high, best = ratio, widths
            else:
                low = ratio
            told = ", ".join(
                f"{left:.3f} of the {limit.goal.budget.unit}"
                for left, limit in zip(lefts, limits, strict=True)
            )
            candidates.setting.tell(f"ratio {ratio:.4f}: {told}", turn + 1, TURNS)
            free = [limit.goal.share - left for left, limit in zip(lefts, limits, strict=True)]
            if 0 <= min(free) < NEAR:
                break
        return best


def at_ratio(candidates: Candidates, ratio: float) -> list[int]:
    """Return the widths where a share of all channels goes, those that rank lowest overall."""
    asked = [replace(c, ratio=ratio, group=0) for c in candidates.members]
    gone = candidates.ranking.lowest_overall(asked)
    return [full - len(g) for full, g in zip(candidates.full, gone, strict=True)]


__all__ = ["Bisection", "at_ratio"]
