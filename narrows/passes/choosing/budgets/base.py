"""What a budget is, and how much of it a plan may use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

import numpy as np

from narrows.errors import PlanError, PlanUsageError
from narrows.passes.choosing.reads import Floats, Reads
from narrows.passes.plans.candidates import Candidates, Widths

SLACK = 1e-9  # of a limit: rounding


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
        share: The share of what the unpruned program costs, above 0 and up to 1.
    """

    budget: Budget
    share: float

    @property
    def label(self) -> str:
        """What a plan's reasons say: ``macs 0.7``."""
        return f"{self.budget.name} {self.share:g}"


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
) -> PlanError:
    """Return the error for a goal that cannot be met.

    Args:
        name: The budget's name.
        share: What was asked for.
        least: The least share that can be met.
        constrained: Whether whole couplings go.
        why: What binds, if more is known than that every layer keeps a channel.
    """
    named = "" if name in ("macs", "params") else f" of {name}"
    return PlanError(
        f"a budget{named} of {share:g} cannot be met: {least:.3f} is the least",
        why=why or "every layer keeps a channel, and what inputs and outputs need stays",
        hint="a larger budget" + (", or constrained=False" if constrained else ""),
    )


def nothing_to_cut(name: str) -> PlanUsageError:
    """Return the error for a budget of what costs nothing."""
    return PlanUsageError(
        f"a budget of {name} has nothing to cut",
        why="the layers that it names multiply nothing, as tables that are looked up in",
        hint="narrows couplings lists the layers and their weights",
    )


__all__ = ["Budget", "Goal", "Limit", "Part", "Summed", "nothing_to_cut", "unreachable"]
