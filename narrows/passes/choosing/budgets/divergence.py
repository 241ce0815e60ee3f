"""`FarOutputs`: how far the outputs are from the unpruned network's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from narrows.errors import PlanUsageError
from narrows.ir.program import Program
from narrows.passes.choosing.budgets.base import Lost
from narrows.passes.choosing.judged import Judged
from narrows.passes.choosing.prepare import prepared
from narrows.passes.choosing.statistics import Batch
from narrows.passes.plans.setting import Setting


@dataclass(frozen=True)
class FarOutputs(Lost):
    """How far the outputs are from the unpruned network's own, on a quarter of the data.

    Of logits it is the Kullback-Leibler divergence of the class probabilities, of values half the
    squared error over their variance, in the mean over examples
    (`narrows.passes.choosing.divergence`).
    """

    name: ClassVar[str] = "divergence"
    unit: ClassVar[str] = "nats an example"

    def held_out(self, setting: Setting) -> bool:
        """Return true: there is nothing else to tell it by."""
        return True

    def lacking(self, setting: Setting) -> PlanUsageError | None:
        """Return the error where there is no data."""
        if setting.choosing.data is None:
            return PlanUsageError(
                "a divergence is measured on data, and there is none", hint="data=[images]"
            )
        return None

    def judge(self, setting: Setting, held: Sequence[Batch]) -> Callable[[Program], float]:
        """Return a function that says how far a program's outputs are."""
        return Judged.of(prepared(setting.program), held, setting.choosing.outputs).far


__all__ = ["FarOutputs"]
