"""What an allocator is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from narrows.errors import PlanError, PlanUsageError
from narrows.ir.program import Note
from narrows.passes.choosing.allocators.corrected import corrected
from narrows.passes.choosing.allocators.rounds import in_rounds
from narrows.passes.choosing.budgets.base import Goal, Limit, counted, nothing_to_cut, unreachable
from narrows.passes.choosing.prepare import prepared
from narrows.passes.plans.candidates import Candidates
from narrows.passes.plans.plan import ChannelPlan
from narrows.passes.plans.setting import Setting


class Allocator(ABC):
    """Something that makes a plan within budgets; its fields are options.

    Attributes:
        name: What it is called.
        paper: Where it is from.
        groups: Whether it asks for the groups that are named, whatever the budgets.
        parallel: Whether it tries several plans at once, where the setting's executor runs jobs.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    groups: ClassVar[bool] = False
    parallel: ClassVar[bool] = False

    @abstractmethod
    def plan(self, setting: Setting, goals: Sequence[Goal]) -> ChannelPlan:
        """Return a plan that meets every goal.

        Raises:
            PlanError: A goal cannot be met; the message says the closest that can, and what binds.
            PlanUsageError: It does not go with such a budget, or lacks data.
        """

    def family(self, setting: Setting, steps: Sequence[Sequence[Goal]]) -> list[ChannelPlan]:
        """Return plans for several budgets that cost little more than one.

        Args:
            setting: The setting, with data.
            steps: Per plan its goals, of the same budgets each time, the shares falling.

        Raises:
            PlanUsageError: It makes plans one by one.
        """
        raise PlanUsageError(
            f"the allocator {self.name!r} makes no family",
            why="what it finds for one budget says nothing of another",
            hint="leave it out, or allocator='cacp'; or a plan per budget",
        )

    def refuse(self, goal: Goal, why: str, hint: str) -> PlanUsageError:
        """Return the error for a budget that it cannot go by."""
        what = f"the allocator {self.name!r} does not go by {goal.budget.name}"
        return PlanUsageError(what, why=why, hint=hint)


class ByWidths(Allocator):
    """An allocator that gives every candidate a number of channels.

    With data and no criterion, it is asked in rounds: what a channel costs in nats is measured,
    a step toward the budget is taken, and what is left is repaired.
    """

    @abstractmethod
    def widths(self, candidates: Candidates, limits: Sequence[Limit]) -> Sequence[int]:
        """Return per candidate how many channels stay.

        Args:
            candidates: What may go, in its order, and what it is worth.
            limits: What the widths may cost. If no widths are within them, the least are returned.
        """

    def plan(self, setting: Setting, goals: Sequence[Goal]) -> ChannelPlan:
        """Return the plan of the widths."""
        if setting.choosing.by_losses:
            return in_rounds(setting, goals, self.once)
        return self.once(setting, goals)

    def once(self, setting: Setting, goals: Sequence[Goal]) -> ChannelPlan:
        """Return the plan by the scores of the setting's criterion."""
        candidates = Candidates.of(setting, prepared(setting.program))
        limits = limits_of(candidates, goals)
        label = ", ".join(g.label for g in goals)
        widths, lefts = corrected(candidates, limits, self._checked)
        made = candidates.plan(widths, f"{setting.options.criterion.name} {label}")
        return made.with_notes(told(candidates, limits, lefts))

    def _checked(self, candidates: Candidates, limits: Sequence[Limit]) -> list[int]:
        """Return the widths; `PlanError` unless there is one for each, and none is too small or
        large, or they are not within the limits though some are."""
        found = self.widths(candidates, limits)
        ends = list(zip(candidates.least, candidates.full, strict=True))
        whole = isinstance(found, Sequence | np.ndarray) and len(found) == len(ends)
        if not whole or not all(
            isinstance(w, int | np.integer) and le <= w <= full
            for w, (le, full) in zip(found, ends, strict=True)
        ):
            raise PlanError(
                f"the allocator {self.name!r} gives {found!r:.60} for {len(ends)} candidates",
                why="each layer or coupling keeps a whole number of channels: "
                + ", ".join(f"{le} to {full}" for le, full in ends[:5])
                + (" ..." if len(ends) > 5 else ""),
            )
        widths = [int(w) for w in found]
        over = next((x for x in limits if not x.goal.budget.slack and not x.meets(widths)), None)
        if over is not None:
            raise PlanError(
                f"the allocator {self.name!r} leaves {over.left(widths):.3f} of the "
                f"{over.goal.budget.unit}, and {over.goal.share:g} was asked for",
                why="there are widths within it",
            )
        return widths


def limits_of(candidates: Candidates, goals: Sequence[Goal]) -> list[Limit]:
    """Return goals in the units of their budgets; `PlanError` for one that cannot be met."""
    found = []
    for goal in goals:
        whole = counted(goal.budget, goal.budget.whole(candidates))
        if not whole:
            raise nothing_to_cut(goal.budget.name)
        limit = Limit(goal, whole * goal.share, whole, goal.budget.quick(candidates))
        counted(goal.budget, limit.cost(candidates.least))
        if not goal.budget.slack and not limit.meets(candidates.least):
            least = limit.cost(candidates.least) / whole
            raise unreachable(
                goal.budget.name, goal.wanted, least, candidates.setting.choosing.constrained
            )
        found.append(limit)
    return found


def told(candidates: Candidates, limits: Sequence[Limit], lefts: Sequence[float]) -> Note:
    """Return what is to be said of a plan: what is left of every budget."""
    left = ", ".join(
        f"{left:.3f} of the {limit.goal.budget.unit} ({limit.goal.label})"
        for limit, left in zip(limits, lefts, strict=True)
    )
    return Note(candidates.setting.program.name, "budget", f"left: {left}")


__all__ = ["Allocator", "ByWidths", "limits_of", "told"]
