"""`corrected`: widths within limits that are only known after the program was really pruned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from narrows.passes.choosing.budgets.base import Limit, counted, unreachable
from narrows.passes.plans.candidates import Candidates, Widths
from narrows.passes.plans.homing import ROUNDING, homed


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
            pairs = [(limit.goal.budget, limit.most) for limit in unsure]
            used = (counted(budget, budget.of(candidates, key)) / most for budget, most in pairs)
            tried[key] = _Trial(key, tuple(used))
        return tried[key]

    def attempt(factor: float) -> _Trial:
        asked = [replace(x, most=x.most * factor) if x in unsure else x for x in limits]
        return trial(allocate(candidates, asked))

    near = 1 - min(limit.goal.budget.slack for limit in unsure)
    found = homed(attempt, lambda t: t.most, near)
    fitting = [t for t in found if t.most <= 1 + ROUNDING]
    best = max(fitting, key=lambda t: t.most, default=None)
    if best is None:
        best = trial(candidates.least)
        if best.most > 1 + ROUNDING:
            worst = unsure[best.used.index(best.most)]
            raise unreachable(
                worst.goal.budget.name, worst.goal.wanted, best.most * worst.goal.share,
                candidates.setting.choosing.constrained,
            )  # fmt: skip
    true = dict(zip(map(id, unsure), best.used, strict=True))
    lefts = [x.goal.share * true[id(x)] if id(x) in true else x.left(best.widths) for x in limits]
    return [*best.widths], lefts


__all__ = ["corrected"]
