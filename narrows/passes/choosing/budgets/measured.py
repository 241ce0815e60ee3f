"""`Measured`: the time that a pruned program really takes on the target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from narrows.errors import PlanUsageError
from narrows.ir.program import Program
from narrows.passes.choosing.budgets.base import Budget
from narrows.passes.choosing.budgets.latency import aim, modelled
from narrows.passes.plans.candidates import Candidates, Widths
from narrows.passes.plans.setting import Setting
from narrows.passes.pruning.form import emit
from narrows.passes.pruning.stages import prune


@dataclass(frozen=True)
class Measured(Budget):
    """The time measured on the target, one thread, in turns with the unpruned program.

    What the cost table predicts says where to look; a target without one is looked at by
    multiply-accumulates. What was found is lowered and timed, and the request corrected, until the
    time is within a twentieth below what is asked for.

    Attributes:
        bits: In how many bits the program is held, as `narrows.quantize` does it; floating-point
            unless given.
    """

    name: ClassVar[str] = "measured"
    unit: ClassVar[str] = "unpruned time, measured"
    coupled: ClassVar[bool] = True
    timed: ClassVar[bool] = True
    slack: ClassVar[float] = 0.05

    bits: int | None = None

    def of(self, candidates: Candidates, widths: Widths) -> float:
        """Return the time over the unpruned program's."""
        setting = candidates.setting
        plan = candidates.plan(widths, self.name)
        if setting.costs is None:
            return self.clock(setting)(emit(prune(setting.program, plan, ordered=True).pruning))
        return self.clock(setting)(aim(setting).formed(setting.program, plan))

    def whole(self, candidates: Candidates) -> float:
        """Return 1."""
        return 1.0

    def quick(self, candidates: Candidates) -> Callable[[Widths], float]:
        """Return the share that is predicted."""
        if candidates.setting.costs is None:
            reads = candidates.reads
            full = reads.whole(reads.macs)
            return lambda widths: reads.cost(candidates.there(widths), reads.macs) / full
        seconds = modelled(candidates)
        full = seconds(candidates.full)
        return lambda widths: seconds(widths) / full

    def clock(self, setting: Setting) -> Callable[[Program], float]:
        """Return what times a program; `PlanUsageError` where no target is named."""
        clock = setting.clock
        if clock is None:
            raise PlanUsageError(
                "a measured latency is one of a target, and none is named",
                hint='narrows.plan(program, limits={"measured": 0.8}, target="onnx")',
            )
        return lambda program: clock(program, self.bits)


__all__ = ["Measured"]
