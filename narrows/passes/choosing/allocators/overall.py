"""`Global`: all channels are ranked together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from narrows.passes.choosing.allocators.scalar import Scalar
from narrows.passes.plans.candidates import Candidates


@dataclass(frozen=True)
class Global(Scalar):
    """All channels are ranked together, and those below one threshold go.

    Scores that do not compare as they are are divided by the mean of their layer or coupling.
    """

    name: ClassVar[str] = "global"
    paper: ClassVar[str] = "Liu et al., Learning efficient CNNs through network slimming, ICCV 2017"

    def at(self, candidates: Candidates, amount: float) -> Sequence[int]:
        """Return the widths where a share of all channels goes."""
        return at_ratio(candidates, amount)


def at_ratio(candidates: Candidates, ratio: float) -> list[int]:
    """Return the widths where a share of all channels goes, those that rank lowest overall."""
    asked = [replace(c, ratio=ratio, group=0) for c in candidates.members]
    gone = candidates.ranking.lowest_overall(asked)
    return [full - len(g) for full, g in zip(candidates.full, gone, strict=True)]


__all__ = ["Global", "at_ratio"]
