"""`Ladder`: as much score mass as a number of seconds can hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from narrows.passes.choosing.allocators.base import Allocator
from narrows.passes.choosing.allocators.rounds import in_rounds
from narrows.passes.choosing.budgets.base import Goal
from narrows.passes.choosing.budgets.latency import Latency, aim
from narrows.passes.choosing.budgets.measured import Measured
from narrows.passes.plans.latency import aimed
from narrows.passes.plans.plan import ChannelPlan
from narrows.passes.plans.setting import Setting


@dataclass(frozen=True)
class Ladder(Allocator):
    """Couplings go down the target's steps, then up, for the most mass a second; then corrected.

    What a coupling keeps is worth the logarithm of its share of the score mass, so that none is
    squeezed to next to nothing (`narrows.passes.plans.latency_search`).
    """

    name: ClassVar[str] = "ladder"

    def plan(self, setting: Setting, goals: Sequence[Goal]) -> ChannelPlan:
        """Return a plan that reaches a latency; with data it is gone down to in rounds."""
        goal = goals[-1]
        if len(goals) > 1 or not isinstance(goal.budget, Latency | Measured):
            why = "it goes by the seconds of one target, and nothing else"
            raise self.refuse(goal, why, "allocator='global'")
        if isinstance(goal.budget, Measured) and setting.costs is None:
            why = "its steps are those of a cost table, and the target has none"
            raise self.refuse(goal, why, "allocator='global'")
        if isinstance(goal.budget, Measured) and goal.budget.samples:
            why = "its steps are those of a cost table, and a network is to be fitted in its place"
            raise self.refuse(goal, why, "allocator='global', or no samples")
        if setting.choosing.by_losses:
            return in_rounds(setting, goals, self.once)
        return self.once(setting, goals)

    def once(self, setting: Setting, goals: Sequence[Goal]) -> ChannelPlan:
        """Return the plan by the scores of the setting's criterion."""
        (goal,) = goals
        aims = aim(setting, goal.share)
        if isinstance(goal.budget, Measured):
            aims = replace(aims, clock=goal.budget.clock(setting), slack=goal.budget.slack)
        given, plan, coupled = setting.given, setting.plan, setting.choosing.constrained
        return aimed(setting.program, given, plan, setting.options, aims, coupled=coupled)


__all__ = ["Ladder"]
