"""`Bisection`: widths in proportion to what a layer's channels are worth, scaled to the budgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from narrows.passes.choosing.allocators.base import ByWidths
from narrows.passes.choosing.allocators.scalar import bisected, factor, filled
from narrows.passes.choosing.budgets.base import Limit
from narrows.passes.plans.candidates import Candidates


@dataclass(frozen=True)
class Bisection(ByWidths):
    """Each keeps a share of its channels in proportion to their mean score, up to all of them.

    The one factor of that proportion is bisected to the budgets. The paper's scores are the gains
    of batch norms: ``criterion="bn-scale"``. Where one channel more fits, those that are worth the
    most stay.
    """

    name: ClassVar[str] = "bisection"
    paper: ClassVar[str] = "Liu et al., AdaPruner: adaptive channel pruning, 2021"

    def widths(self, candidates: Candidates, limits: Sequence[Limit]) -> Sequence[int]:
        """Return the widths of the largest factor that is within all limits."""
        means = np.array([float(np.abs(c.scores).mean()) for c in candidates.members])
        largest = float(means.max())
        shares = means / largest if largest > 0 else np.ones_like(means)
        full, least = np.array(candidates.full), np.array(candidates.least)
        smallest = float(shares[shares > 0].min())

        def at(amount: float) -> list[int]:
            # From where the smallest share is all of its layer's channels down to nothing.
            wanted = np.minimum(1.0, factor(amount, smallest) * shares) * full
            return np.maximum(least, (wanted + 1e-9).astype(int)).tolist()

        return filled(candidates, limits, at(bisected(candidates, limits, at)))


__all__ = ["Bisection"]
