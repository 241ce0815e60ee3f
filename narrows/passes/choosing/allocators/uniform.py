"""`Uniform`: the same share of every layer or coupling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from narrows.passes.choosing.allocators.base import ByWidths
from narrows.passes.choosing.allocators.scalar import bisected, filled
from narrows.passes.choosing.budgets.base import Limit
from narrows.passes.plans.candidates import Candidates


@dataclass(frozen=True)
class Uniform(ByWidths):
    """The same share of the channels of each layer or coupling goes, as small as the budgets allow.

    Where one channel more fits, those that are worth the most stay.
    """

    name: ClassVar[str] = "uniform"
    paper: ClassVar[str] = "Li et al., Pruning filters for efficient ConvNets, ICLR 2017"

    def widths(self, candidates: Candidates, limits: Sequence[Limit]) -> Sequence[int]:
        """Return the widths of the smallest share that is within all limits."""

        def at(share: float) -> list[int]:
            pairs = zip(candidates.full, candidates.least, strict=True)
            return [max(least, int(full * (1 - share) + 1e-9)) for full, least in pairs]

        return filled(candidates, limits, at(bisected(candidates, limits, at)))


__all__ = ["Uniform"]
