"""`AccuracyDrop`: the points that are lost, of a person's function or of agreement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from narrows.errors import PlanUsageError
from narrows.ir.program import Program
from narrows.passes.choosing.budgets.base import Lost
from narrows.passes.choosing.judged import Judged, worth
from narrows.passes.choosing.prepare import prepared
from narrows.passes.choosing.statistics import Batch
from narrows.passes.plans.setting import Setting
from narrows.passes.plans.within import LOSSES


@dataclass(frozen=True)
class AccuracyDrop(Lost):
    """How much less a program is worth, by a function, or by the share of data of the same class.

    Without a function it is how many percent of a quarter of the data, which is kept out of all
    else, are given another class than the unpruned network gives them.
    """

    name: ClassVar[str] = "accuracy_drop"
    unit: ClassVar[str] = "points"
    most: ClassVar[float] = LOSSES["accuracy_drop"]

    def held_out(self, setting: Setting) -> bool:
        """Whether there is no function."""
        return setting.choosing.evaluate is None

    def lacking(self, setting: Setting) -> PlanUsageError | None:
        """Return the error where there is neither a function nor data."""
        if self.held_out(setting) and setting.choosing.data is None:
            return PlanUsageError(
                "a drop of accuracy needs something to be measured by",
                why="there is no function that says what a program is worth, and there is no data",
                hint="evaluate=function, or data=[images]",
            )
        return None

    def judge(self, setting: Setting, held: Sequence[Batch]) -> Callable[[Program], float]:
        """Return a function that says how many points a program has lost.

        Raises:
            UsageError: The function gives no number.
            PlanUsageError: There is none, and the outputs are no logits.
        """
        evaluate = setting.choosing.evaluate
        if evaluate is not None:
            whole = worth(evaluate, setting.program)
            return lambda program: whole - worth(evaluate, program)
        judged = Judged.of(prepared(setting.program), held, setting.choosing.outputs)
        if not any(judged.divergence.logits):
            raise PlanUsageError(
                "a drop of accuracy needs something to be measured by",
                why="the outputs are no logits, whose largest could be compared",
                hint="evaluate=function, divergence=0.1, or outputs='logits'",
            )
        return lambda program: 100 * (1 - (judged.compared(program)[1] or 0.0))


__all__ = ["AccuracyDrop"]
