"""`Scalar`: an allocator with one number, which is bisected to the budgets."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

import numpy as np

from narrows.passes.choosing.allocators.base import ByWidths
from narrows.passes.choosing.budgets.base import Limit
from narrows.passes.plans.candidates import Candidates, Widths

TURNS = 12  # halvings
NEAR = 0.002  # of the unpruned program: close enough


class Scalar(ByWidths):
    """An allocator that has one width per candidate for every number from 0 to 1."""

    @abstractmethod
    def at(self, candidates: Candidates, amount: float) -> Sequence[int]:
        """Return widths: all channels at 0, the least at 1, and never more at a larger amount."""

    def widths(self, candidates: Candidates, limits: Sequence[Limit]) -> Sequence[int]:
        """Return the widths of the smallest amount that is within all limits."""

        def at(amount: float) -> Sequence[int]:
            return self.at(candidates, amount)

        return at(bisected(candidates, limits, at))


def bisected(
    candidates: Candidates, limits: Sequence[Limit], at: Callable[[float], Sequence[int]]
) -> float:
    """Return the smallest amount whose widths are within all limits, 1 if there is none.

    Args:
        candidates: What may go.
        limits: The limits.
        at: Returns the widths of an amount from 0 to 1.
    """
    low, high = 0.0, 1.0
    for turn in range(TURNS):
        amount = (low + high) / 2
        widths = at(amount)
        if all(limit.meets(widths) for limit in limits):
            high = amount
        else:
            low = amount
        lefts = [limit.left(widths) for limit in limits]
        told = ", ".join(
            f"{left:.3f} of the {limit.goal.budget.unit}"
            for left, limit in zip(lefts, limits, strict=True)
        )
        candidates.setting.tell(f"amount {amount:.4f}: {told}", turn + 1, TURNS)
        # A limit that is corrected is less than its goal.
        free = [x.most / x.whole - left for left, x in zip(lefts, limits, strict=True)]
        if 0 <= min(free) < NEAR:
            break
    return high


def factor(amount: float, smallest: float) -> float:
    """Return what shares are multiplied with: all are 1 at 0 if the smallest is, none at 1."""
    return (1 - amount) / smallest ** (1 - amount)


def filled(candidates: Candidates, limits: Sequence[Limit], widths: Widths) -> list[int]:
    """Return widths with one channel more wherever the limits allow it, the most worth first."""
    found = [*widths]
    for i in np.argsort([-_next(candidates, i, w) for i, w in enumerate(widths)], kind="stable"):
        if found[i] == candidates.full[i]:
            continue
        found[i] += 1
        if not all(limit.meets(found) for limit in limits):
            found[i] -= 1
    return found


def _next(candidates: Candidates, i: int, width: int) -> float:
    """Return what the next channel of a candidate is worth."""
    gone = candidates.full[i] - width
    return float(candidates.worth[i][gone - 1]) if gone else 0.0


__all__ = ["Scalar", "bisected", "factor", "filled"]
