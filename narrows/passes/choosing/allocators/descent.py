"""`Descent`: what costs the outputs least for what it saves goes first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from narrows.errors import PlanUsageError
from narrows.ir.couplings import Coupling
from narrows.ir.program import Note
from narrows.ir.structure import structure_of
from narrows.ir.structure.layers import layers_of
from narrows.passes.choosing.allocators.base import Allocator
from narrows.passes.choosing.budgets.base import Goal, Summed
from narrows.passes.choosing.prepare import prepared
from narrows.passes.choosing.search import Chosen, Search
from narrows.passes.plans.plan import ChannelPlan
from narrows.passes.plans.rank import Ranking
from narrows.passes.plans.setting import Setting


@dataclass(frozen=True)
class Descent(Allocator):
    """Channels go one by one over the whole network, measured and repaired in rounds.

    See `narrows.passes.choosing.search`.
    """

    name: ClassVar[str] = "descent"
    paper: ClassVar[str] = (
        "Hassibi and Stork, optimal brain surgeon, 1993; Frantar and Alistarh, OBC, 2022"
    )

    def plan(self, setting: Setting, goals: Sequence[Goal]) -> ChannelPlan:
        """Return the plan of a search by what the outputs lose."""
        return self.family(setting, [goals])[0]

    def family(self, setting: Setting, steps: Sequence[Sequence[Goal]]) -> list[ChannelPlan]:
        """Return the plans that one search passes on its way down, each within the one before."""
        going = search(setting, self.summed(setting, steps[0]))
        plans = []
        for goals in steps:
            found = going.to(*(goal.share for goal in goals))
            label = ", ".join(goal.label for goal in goals)
            plans.append(plan_of(setting, label, goals[0].budget.unit, found))
        return plans

    def summed(self, setting: Setting, goals: Sequence[Goal]) -> list[Summed]:
        """Return the budgets; an error for one that is no sum over layers."""
        found = []
        for goal in goals:
            if not isinstance(goal.budget, Summed):
                why = "it asks what each channel saves, and only sums over layers can tell"
                raise self.refuse(goal, why, "allocator='bisection', or leave it out")
            found.append(goal.budget)
        if not setting.choosing.by_losses:
            raise PlanUsageError(
                "the descent goes by what the outputs lose on data",
                why="there is no data" if setting.choosing.data is None else "there is a criterion",
                hint="data=[images] and no criterion, or allocator='bisection'",
            )
        return found


def search(setting: Setting, budgets: Sequence[Summed]) -> Search:
    """Return a search by sums over layers, with everything still there."""
    choosing = setting.choosing
    base = prepared(setting.program)
    ties = structure_of(base).ties
    chooser = Ranking(base, layers_of(base), setting.given, setting.plan, setting.options)
    candidates = chooser.coupled(ties) if choosing.constrained else chooser.single(("inputs",))
    chooser.refuse_none(candidates)
    open_ties = {id(c.coupling) for c in candidates}
    open_weights = {part.use.weight for c in candidates for part in c.parts}

    def free(weight: str, tie: Coupling) -> bool:
        return id(tie) in open_ties if choosing.constrained else weight in open_weights

    return Search(
        setting.program, setting.batches(), {b.name: b.each for b in budgets},
        constrained=choosing.constrained, free=free, plan=setting.plan, least=choosing.min_width,
        outputs=choosing.outputs, progress=setting.progress,
    )  # fmt: skip


def plan_of(setting: Setting, label: str, unit: str, found: Chosen) -> ChannelPlan:
    """Return the plan of what a search has come to, with how it got there.

    Args:
        setting: The setting.
        label: What the plan's reasons say.
        unit: What is counted of what falls.
        found: What the search has come to.
    """
    made = ChannelPlan.given(setting.program, found.keep_inputs(), None, label)
    curve = ", ".join(f"{left:.3f}: {far:.3g}" for left, far in found.curve)
    told = f"share of the {unit} left: divergence from the unpruned outputs, repaired: {curve}"
    note = Note(setting.program.name, "curve", told)
    return (setting.plan | made).with_notes(note, *found.reads.notes)


__all__ = ["Descent", "plan_of", "search"]
