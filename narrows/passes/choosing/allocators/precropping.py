"""`PreCropping`: widths by the density that each layer is to have, before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from narrows.errors import PlanUsageError
from narrows.passes.choosing.allocators.base import ByWidths
from narrows.passes.choosing.allocators.scalar import bisected, factor, filled
from narrows.passes.choosing.budgets.base import Limit
from narrows.passes.plans.candidates import Candidates
from narrows.passes.plans.rank import Part

RULES = ("size", "score")


@dataclass(frozen=True)
class PreCropping(ByWidths):
    """Each layer's density is its weights' share that a rule leaves; widths are its square roots.

    So that a layer's inputs times its outputs are the density, each side keeps the root of it. A
    coupling, which lies between several layers, keeps the geometric mean of what they ask for. One
    factor of all densities is bisected to the budgets. It goes by no data and needs no training.

    Attributes:
        rule: ``size``: the sum of a kernel's sizes and widths over their product, the density of a
            random graph (ERK), by which small layers stay whole; ``score``: the mean of the
            criterion's scores, as of pruning at initialisation.
    """

    name: ClassVar[str] = "precropping"
    paper: ClassVar[str] = (
        "Pre-cropping by densities at initialisation; Evci et al., RigL (ERK), ICML 2020"
    )

    rule: str = "size"

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise PlanUsageError(f"rule is one of {', '.join(RULES)}, got {self.rule!r}")

    def widths(self, candidates: Candidates, limits: Sequence[Limit]) -> Sequence[int]:
        """Return the widths of the largest factor that is within all limits."""
        rows = [self._densities(candidates, i) for i in range(len(candidates.members))]
        largest = max(max(row) for row in rows)
        rows = [[d / largest if largest > 0 else 1.0 for d in row] for row in rows]
        smallest = min((d for row in rows for d in row if d > 0), default=1.0)
        both = candidates.setting.choosing.constrained

        def at(amount: float) -> list[int]:
            # From where the sparsest layer is dense down to nothing.
            scale = factor(amount, smallest)
            result = []
            for row, least, full in zip(rows, candidates.least, candidates.full, strict=True):
                kept = np.minimum(1.0, scale * np.array(row))
                share = float(np.exp(np.log(np.maximum(kept, 1e-12)).mean()))
                wanted = full * (math.sqrt(share) if both else share)
                result.append(max(least, int(wanted + 1e-9)))
            return result

        return filled(candidates, limits, at(bisected(candidates, limits, at)))

    def _densities(self, candidates: Candidates, i: int) -> list[float]:
        """Return the densities of the layers of a candidate, up to a factor."""
        member = candidates.members[i]
        if self.rule == "score":
            return [float(np.abs(member.scores).mean())]
        return [_size(candidates, part) for part in member.parts if part.use.contraction]


def _size(candidates: Candidates, part: Part) -> float:
    """Return the sum of a weight's sizes over their product."""
    sizes = candidates.setting.program.weights[part.use.weight].shape
    return sum(sizes) / math.prod(sizes)


__all__ = ["PreCropping"]
