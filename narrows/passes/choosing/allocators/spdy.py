"""`Spdy`: a knapsack over error curves whose weights are searched for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from narrows.passes.choosing.allocators.base import ByWidths
from narrows.passes.choosing.allocators.knapsack import packed
from narrows.passes.choosing.allocators.trials import apart
from narrows.passes.choosing.budgets.base import Limit
from narrows.passes.plans.candidates import Candidates
from narrows.passes.plans.within import refuse_no_whole


@dataclass(frozen=True)
class Spdy(ByWidths):
    """The knapsack of each layer's error curve times a factor; the factors are searched for.

    A layer's own errors say little about the network's. So factors are drawn, the best plan for
    each is masked and run, and around those whose outputs are nearest to the network's own others
    are drawn, ever fewer of them changed (a shrinking neighbourhood). Needs data.

    Attributes:
        tries: How many factors are drawn.
        seed: Of the draws.
    """

    name: ClassVar[str] = "spdy"
    paper: ClassVar[str] = "Frantar and Alistarh, SPDY, ICML 2022; Kurtic et al., ZipLM, 2023"

    tries: int = 24
    seed: int = 0

    def __post_init__(self) -> None:
        refuse_no_whole("tries", self.tries)
        refuse_no_whole("seed", self.seed)

    def widths(self, candidates: Candidates, limits: Sequence[Limit]) -> Sequence[int]:
        """Return the widths whose masked program was nearest to the unpruned one."""
        far = apart(candidates, self.name)
        curves, generator = candidates.lost, np.random.default_rng(self.seed)
        factors = np.zeros(len(curves))  # of two, as powers
        best = [*packed(candidates, limits, curves)]
        (least,), tried = far([best]), {tuple(best)}
        for turn in range(self.tries):
            changed = generator.random(len(curves)) < max(0.1, 1 - turn / self.tries)
            drawn = np.where(changed, factors + generator.normal(0, 1, len(curves)), factors)
            weighed = [2.0**f * curve for f, curve in zip(drawn, curves, strict=True)]
            found = [*packed(candidates, limits, weighed)]
            candidates.setting.tell(f"factors {turn + 1}: {least:.4g}", turn + 1, self.tries)
            if tuple(found) in tried:
                continue
            tried.add(tuple(found))
            (distance,) = far([found])
            if distance < least:
                best, least, factors = found, distance, drawn
        return best


__all__ = ["Spdy"]
