"""What a budget is, and how much of it a plan may use."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import numpy as np

from narrows.errors import PlanError, PlanUsageError, UnreachableError
from narrows.ir.program import Program
from narrows.passes.choosing.prepare import prepared
from narrows.passes.choosing.reads import Floats, Reads, reads_of
from narrows.passes.choosing.statistics import Batch
from narrows.passes.plans.candidates import Candidates, Widths
from narrows.passes.plans.homing import ROUNDING
from narrows.passes.plans.setting import Setting

SLACK = ROUNDING  # of a limit


class Budget(ABC):
    """A number that widths cost; its fields are options, spelled ``measured{bits=8}``.

    Attributes:
        name: What it is called.
        unit: What its number counts.
        paper: Where it is from.
        coupled: Whether it is one of programs that lose whole couplings.
        timed: Whether it needs a target.
        slack: How much less than asked for is near enough where `quick` is not what `of` says; 0
            where the two are the same.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    paper: ClassVar[str] = ""
    coupled: ClassVar[bool] = False
    timed: ClassVar[bool] = False
    slack: ClassVar[float] = 0.0

    @abstractmethod
    def of(self, candidates: Candidates, widths: Widths) -> float:
        """Return what a program costs whose candidates keep so many channels.

        Args:
            candidates: What may go, in its order, and what the plan is made for.
            widths: Per candidate how many of its channels stay.
        """

    @abstractmethod
    def whole(self, candidates: Candidates) -> float:
        """Return what the unpruned program costs."""

    def quick(self, candidates: Candidates) -> Callable[[Widths], float]:
        """Return a function that gives widths about the number of `of`, and thousands a second."""
        return lambda widths: self.of(candidates, widths)

    def left(self, setting: Setting, program: Program) -> float | None:
        """Return the share that a program costs which passes made of the setting's; ``None`` where
        it is only known for widths."""
        return None

    def lacking(self, setting: Setting) -> PlanUsageError | None:
        """Return the error where the setting lacks what it needs; asked before anything is done."""
        return None


class Lost(Budget):
    """What the outputs lose, in a unit of its own: what may be lost says how much may go.

    It is looked at once the weights that are left make up for what is gone, where there is data to
    find them by (`narrows.passes.choosing.tolerance`).

    Attributes:
        most: The most that there is to lose.
    """

    most: ClassVar[float] = math.inf

    @abstractmethod
    def held_out(self, setting: Setting) -> bool:
        """Whether it is told by a part of the data, which has to be kept out of the search then."""

    @abstractmethod
    def judge(self, setting: Setting, held: Sequence[Batch]) -> Callable[[Program], float]:
        """Return a function that says what a program has lost.

        Args:
            setting: The setting.
            held: Flat inputs, batch by batch, that nothing was chosen or solved for by.
        """

    def of(self, candidates: Candidates, widths: Widths) -> float:
        """Return what the masked program has lost, on all of the data."""
        setting = candidates.setting
        held = setting.batches() if self.held_out(setting) else []
        return self.judge(setting, held)(candidates.plan(widths, self.name).masked(setting.program))

    def whole(self, candidates: Candidates) -> float:
        """Return 0."""
        return 0.0


class Summed(Budget):
    """A sum over layers: what one channel read costs for one made, times how many there are.

    Such a budget can be one of some layers alone, and the descent knows exactly what the removal
    of one channel saves.
    """

    @abstractmethod
    def each(self, reads: Reads) -> Floats:
        """Return per layer the cost of one input channel for one output channel."""

    def of(self, candidates: Candidates, widths: Widths) -> float:
        """Return what the layers cost."""
        return candidates.reads.cost(candidates.there(widths), self.each(candidates.reads))

    def whole(self, candidates: Candidates) -> float:
        """Return what the layers cost as they are, what nobody reads included."""
        return candidates.reads.whole(self.each(candidates.reads))

    def left(self, setting: Setting, program: Program) -> float:
        """Return the share that a program's layers cost."""
        small, whole = (reads_of(prepared(p)) for p in (program, setting.program))
        return small.whole(self.each(small)) / whole.whole(self.each(whole))


@dataclass(frozen=True)
class Part(Summed):
    """A budget of some layers alone.

    Attributes:
        budget: The budget.
        group: What the layers are called.
        globs: Which they are, by their weights.
    """

    budget: Summed
    group: str
    globs: tuple[str, ...]

    @property
    def name(self) -> str:  # type: ignore[override]
        """The budget's name, and the group's."""
        return f"{self.budget.name} of {self.group}"

    @property
    def unit(self) -> str:  # type: ignore[override]
        """What the budget counts."""
        return self.budget.unit

    def each(self, reads: Reads) -> Floats:
        """Return the cost per layer, 0 for those of no concern."""
        own = [any(fnmatchcase(p.layer.weight, g) for g in self.globs) for p in reads.products]
        return np.where(own, self.budget.each(reads), 0.0)


@dataclass(frozen=True)
class Goal:
    """A budget, and how much of it may be left.

    Attributes:
        budget: The budget.
        share: The share of what the unpruned program costs, above 0 and up to 1; of what is `Lost`
            how much, in its unit.
        asked: What was asked for, where the share is a step on the way to it.
    """

    budget: Budget
    share: float
    asked: float | None = None

    @property
    def label(self) -> str:
        """What a plan's reasons say: ``macs 0.7``."""
        return f"{self.budget.name} {self.share:g}"

    @property
    def wanted(self) -> float:
        """What was asked for, of which this may be a step on the way."""
        return self.share if self.asked is None else self.asked

    def told(self, setting: Setting, program: Program) -> str:
        """Return how much of it a program uses which passes made of the setting's, in words."""
        left = self.budget.left(setting, program)
        if left is None:
            return self.label
        over = ", more than was asked for" if left > self.share * (1 + SLACK) else ""
        return f"{left:.3f} of the {self.budget.unit} ({self.label}{over})"


@dataclass(frozen=True)
class Limit:
    """A goal in the budget's own unit, for some candidates.

    Attributes:
        goal: The goal.
        most: What may be left.
        whole: What the unpruned program costs.
        cost: What widths cost, found quickly.
    """

    goal: Goal
    most: float
    whole: float
    cost: Callable[[Widths], float]

    def left(self, widths: Widths) -> float:
        """Return the share that widths cost."""
        return self.cost(widths) / self.whole

    def meets(self, widths: Widths) -> bool:
        """Whether widths are within it."""
        return self.cost(widths) <= self.most * (1 + SLACK)


def unreachable(
    name: str, share: float, least: float, constrained: bool, why: str = ""
) -> UnreachableError:
    """Return the error for a goal that cannot be met.

    Args:
        name: The budget's name.
        share: What was asked for.
        least: The least share that can be met.
        constrained: Whether whole couplings go.
        why: What binds, if more is known than that every layer keeps a channel.
    """
    return UnreachableError(
        f"a budget of {name} of {share:g} cannot be met: {least:.3f} is the least",
        why=why or "every layer keeps a channel, and what inputs and outputs need stays",
        hint="a larger budget" + (", or constrained=False" if constrained else ""),
    )


def counted(budget: Budget, number: Any) -> float:
    """Return what a budget counted; `PlanError` unless it is a finite number of at least 0."""
    if not isinstance(number, int | float | np.number) or not 0 <= number < math.inf:
        raise PlanError(
            f"the budget {budget.name!r} counts {number!r:.40}",
            why="what a program costs is a finite number of at least 0",
        )
    return float(number)


def nothing_to_cut(name: str) -> PlanUsageError:
    """Return the error for a budget of what costs nothing."""
    return PlanUsageError(
        f"a budget of {name} has nothing to cut",
        why="the layers that it names multiply nothing, as tables that are looked up in",
        hint="narrows couplings lists the layers and their weights",
    )


__all__ = [
    "Budget", "Goal", "Limit", "Lost", "Part", "Summed", "counted", "nothing_to_cut", "unreachable",
]  # fmt: skip
