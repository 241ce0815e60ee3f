"""`corrected`: widths within limits that are only known after the program was really pruned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from narrows.passes.choosing.budgets.base import SLACK, Limit, unreachable
from narrows.passes.plans.candidates import Candidates, Widths

TURNS = 6  # trials, at most; every one really prunes
MARGIN = 0.001  # aimed below what is asked for, so that it seldom has to be corrected


@dataclass(frozen=True)
class _Trial:
    """Widths that were tried; per limit that had to be found out, what of it they use."""

    widths: tuple[int, ...]
    used: tuple[float, ...]

    @property
    def most(self) -> float:
        """The largest share of a limit."""
        return max(self.used)


def corrected(
    candidates: Candidates,
    limits: Sequence[Limit],
    allocate: Callable[[Candidates, Sequence[Limit]], Sequence[int]],
) -> tuple[list[int], list[float]]:
    """Return widths that are really within their limits, and the share of each that is left.

    What a quick model says is corrected by a factor that is the same for all limits that need one.

    Args:
        candidates: What may go.
        limits: The limits.
        allocate: Returns widths within limits by their quick models.

    Raises:
        PlanError: The least widths are not within a limit.
    """
    unsure = [limit for limit in limits if limit.goal.budget.slack]
    if not unsure:
        widths = [*allocate(candidates, limits)]
        return widths, [limit.left(widths) for limit in limits]
    tried: dict[tuple[int, ...], _Trial] = {}

    def trial(widths: Widths) -> _Trial:
        key = tuple(widths)
        if key not in tried:
            used = (limit.goal.budget.of(candidates, key) / limit.most for limit in unsure)
            tried[key] = _Trial(key, tuple(used))
        return tried[key]

    near = 1 - min(limit.goal.budget.slack for limit in unsure)
    low, high, factor = 0.0, 2.0, 1 - MARGIN
    seen: tuple[float, float] | None = None
    for _ in range(TURNS):
        known = len(tried)
        asked = [replace(x, most=x.most * factor) if x in unsure else x for x in limits]
        found = trial(allocate(candidates, asked))
        if found.most <= 1 + SLACK:
            low = factor
            if found.most >= near:
                break
        else:
            high = factor
        ahead = _ahead(seen, factor, found.most)
        seen = factor, found.most
        stuck = len(tried) == known or not low < ahead < high
        factor = (low + high) / 2 if stuck else ahead
    fitting = [t for t in tried.values() if t.most <= 1 + SLACK]
    best = max(fitting, key=lambda t: t.most, default=None)
    if best is None:
        best = trial(candidates.least)
        if best.most > 1 + SLACK:
            worst = unsure[best.used.index(best.most)]
            raise unreachable(
                worst.goal.budget.name, worst.goal.share, best.most * worst.goal.share,
                candidates.setting.choosing.constrained,
            )  # fmt: skip
    true = dict(zip(map(id, unsure), best.used, strict=True))
    lefts = [x.goal.share * true[id(x)] if id(x) in true else x.left(best.widths) for x in limits]
    return [*best.widths], lefts


def _ahead(seen: tuple[float, float] | None, factor: float, most: float) -> float:
    """Return the factor that is expected to use what is asked for.

    Args:
        seen: The factor before, and what was used with it.
        factor: The factor of now.
        most: What is used with it.
    """
    wanted = 1 - MARGIN
    if seen is None or (seen[0] - factor) * (seen[1] - most) <= 0:
        return factor * wanted / most
    return factor + (wanted - most) * (seen[0] - factor) / (seen[1] - most)


__all__ = ["corrected"]
