"""`tolerated`: plans that lose no more than a person accepts.

What is lost is a budget like another (`narrows.passes.choosing.budgets.base.Lost`), but no
allocator can go by it: it is known once a plan is there, and the weights that are left make up for
what is gone. Where other budgets say how small the program has to be, their plan is made and looked
at. Where none does, plans go down in steps as long as what is lost allows it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from narrows.errors import UnreachableError
from narrows.ir.program import Note, Program
from narrows.passes.choosing.allocators.base import Allocator
from narrows.passes.choosing.allocators.descent import Descent, plan_of, search
from narrows.passes.choosing.budgets.base import Budget, Goal, Lost
from narrows.passes.choosing.budgets.latency import formed
from narrows.passes.choosing.compensate import compensated
from narrows.passes.choosing.compensations.least_squares import LEAST_SQUARES
from narrows.passes.choosing.judged import apart
from narrows.passes.choosing.prepare import prepared
from narrows.passes.choosing.search import Chosen
from narrows.passes.choosing.statistics import Batch
from narrows.passes.plans.plan import ChannelPlan
from narrows.passes.plans.setting import Setting

STEP = 0.1  # of the cost that is to fall, per round
HALVINGS = 2  # of the last step, which was too much


@dataclass(frozen=True)
class Tried:
    """A plan that was tried.

    Attributes:
        left: The share that is left of what is to fall.
        program: The unpruned program with what the plan leaves, its weights found anew.
        plan: Returns the plan.
    """

    left: float
    program: Program
    plan: Callable[[], ChannelPlan]


Way = Callable[[float], Tried]  # to a share; it may be larger than that of the time before


@dataclass(frozen=True)
class Judges:
    """What says how much is lost.

    Attributes:
        goals: What may be lost at most.
        each: Per goal what says how much a program has lost.
    """

    goals: Sequence[Goal]
    each: Sequence[Callable[[Program], float]]

    def lost(self, program: Program) -> list[float]:
        """Return what a program has lost, of each."""
        return [judge(program) for judge in self.each]

    def accept(self, lost: Sequence[float]) -> bool:
        """Whether none of it is too much; what is NaN is."""
        return all(now <= goal.share for now, goal in zip(lost, self.goals, strict=True))

    def told(self, lost: Sequence[float]) -> str:
        """Return what was lost, in words."""
        pairs = zip(lost, self.goals, strict=True)
        return " and ".join(f"{now:.4g} {goal.budget.unit}" for now, goal in pairs)

    def refusal(self, lost: Sequence[float], where: str) -> UnreachableError:
        """Return the error for a plan that loses too much.

        Args:
            lost: What it loses.
            where: Which one it is.
        """
        asked = " and ".join(f"a budget of {g.budget.name} of {g.share:g}" for g in self.goals)
        return UnreachableError(
            f"{asked} cannot be met: {self.told(lost)} are lost {where}",
            hint="a larger budget, more data, or constrained=False",
        )


def tolerated(
    setting: Setting, allocator: Allocator, goals: Sequence[Goal], driver: Budget
) -> ChannelPlan:
    """Return a plan that meets goals, some of which are of what is lost.

    Args:
        setting: The setting.
        allocator: What makes plans.
        goals: The goals.
        driver: What is to fall where all of the goals are of what is lost.

    Raises:
        PlanError: A goal cannot be met; the message says what is lost.
        UsageError: A person's function gives no number, or the outputs are no logits.
    """
    losses = [goal for goal in goals if isinstance(goal.budget, Lost)]
    costs = [goal for goal in goals if not isinstance(goal.budget, Lost)]
    setting, held = _kept_out(setting, losses)
    budgets = [g.budget for g in losses]
    judges = Judges(losses, [b.judge(setting, held) for b in budgets if isinstance(b, Lost)])
    if not costs:
        return _down(setting, allocator, judges, driver)
    plan = allocator.plan(setting, costs)
    lost = judges.lost(made_up(setting, plan))
    small = formed(setting, plan)
    label = ", ".join(goal.told(setting, small) for goal in costs)
    if not judges.accept(lost):
        raise judges.refusal(lost, f"at {label}")
    return plan.with_notes(Note(setting.program.name, "lost", f"{judges.told(lost)} at {label}"))


def made_up(setting: Setting, plan: ChannelPlan) -> Program:
    """Return what a plan leaves of the unpruned program; with data, the weights are found anew."""
    program = setting.program
    if setting.choosing.data is not None:
        parts, outputs = setting.batches(), setting.choosing.outputs
        program = compensated(program, plan, parts, LEAST_SQUARES, outputs)
    return plan.masked(program)


def _kept_out(setting: Setting, losses: Sequence[Goal]) -> tuple[Setting, list[Batch]]:
    """Return the setting with the data that it goes by, and what is kept out to judge by."""
    if setting.choosing.data is None:
        return setting, []
    given, held = setting.batches(), []
    if any(isinstance(g.budget, Lost) and g.budget.held_out(setting) for g in losses):
        given, held = apart(prepared(setting.program), given)
    return replace(setting, parts=tuple(given)), held


def _down(setting: Setting, allocator: Allocator, judges: Judges, driver: Budget) -> ChannelPlan:
    """Return the smallest plan, in steps, that loses no more than it may."""
    label = ", ".join(goal.label for goal in judges.goals)
    to = _searched if isinstance(allocator, Descent) else partial(_planned, allocator)
    way = to(setting, driver, label)
    best: Tried | None = None
    share, step, halvings = 1.0, STEP, 0
    told: list[tuple[float, list[float]]] = []
    while share - step > step / 2:
        try:
            found = way(share - step)
        except UnreachableError:
            if best is None:
                raise
            break
        lost = judges.lost(found.program)
        told.append((found.left, lost))
        setting.tell(f"{found.left:.3f} of the {driver.unit}: {judges.told(lost)} lost", 1, 1)
        if judges.accept(lost):
            stuck = found.left > share - step / 2  # no layer has more to give
            best, share = found, found.left
            if stuck:
                break
            continue
        if halvings == HALVINGS:
            break
        halvings, step = halvings + 1, step / 2
    if best is None:
        left, lost = told[-1]
        raise judges.refusal(lost, f"where {left:.3f} of the {driver.unit} are left")
    curve = ", ".join(f"{left:.3f}: {judges.told(lost)}" for left, lost in sorted(told)[::-1])
    text = f"share of the {driver.unit} left: what is lost: {curve}"
    return best.plan().with_notes(Note(setting.program.name, "lost", text))


def _searched(setting: Setting, driver: Budget, label: str) -> Way:
    """Return the way of a search, which goes on from where it has been."""
    going = search(setting, Descent().summed(setting, [Goal(driver, 1.0)]))
    states = [(1.0, going.state)]

    def to(share: float) -> Tried:
        _, going.state = min((s for s in states if s[0] > share), key=lambda s: s[0])
        found = going.down(share)
        left = found.curve[-1][0]
        states.append((left, found))
        return Tried(left, found.program, partial(_plan, found))

    def _plan(found: Chosen) -> ChannelPlan:
        return plan_of(setting, label, driver.unit, found)

    return to


def _planned(allocator: Allocator, setting: Setting, driver: Budget, label: str) -> Way:
    """Return the way of an allocator that makes each plan from the beginning."""

    def to(share: float) -> Tried:
        plan = allocator.plan(setting, [Goal(driver, share)])
        left = driver.left(setting, formed(setting, plan))
        return Tried(share if left is None else left, made_up(setting, plan), lambda: plan)

    return to


__all__ = ["made_up", "tolerated"]
