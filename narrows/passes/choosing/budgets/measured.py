"""`Measured`: the time that a pruned program really takes on the target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from narrows.errors import PlanUsageError
from narrows.ir.program import Program
from narrows.passes.choosing.budgets.base import Budget, counted
from narrows.passes.choosing.budgets.latency import formed, modelled, targetless
from narrows.passes.choosing.budgets.predictor import LEAST, drawn, fitted
from narrows.passes.plans.candidates import Candidates, Widths
from narrows.passes.plans.setting import Setting
from narrows.passes.plans.within import refuse_no_whole


@dataclass(frozen=True)
class Measured(Budget):
    """The time measured on the target, one thread, in turns with the unpruned program.

    What the cost table predicts says where to look; a target without one is looked at by
    multiply-accumulates. What was found is lowered and timed, and the request corrected, until the
    time is within a twentieth below what is asked for.

    Attributes:
        bits: In how many bits the program is held, as `narrows.quantize` does it; floating-point
            unless given.
        samples: How many widths are drawn and measured beforehand; a small network that is fitted
            to them says where to look then (`narrows.passes.choosing.budgets.predictor`).
        seed: Of the draws.
    """

    name: ClassVar[str] = "measured"
    unit: ClassVar[str] = "unpruned time, measured"
    coupled: ClassVar[bool] = True
    timed: ClassVar[bool] = True
    slack: ClassVar[float] = 0.05

    bits: int | None = None
    samples: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        refuse_no_whole("seed", self.seed)
        refuse_no_whole("samples", self.samples)
        if 0 < self.samples < LEAST:
            raise PlanUsageError(
                f"samples is a number of at least {LEAST}, got {self.samples!r}",
                why="a network is fitted to so many measurements",
                hint="measured{samples=32}",
            )
        if self.seed and not self.samples:
            raise PlanUsageError("seed has no effect without samples", hint="measured{samples=32}")

    def of(self, candidates: Candidates, widths: Widths) -> float:
        """Return the time over the unpruned program's."""
        setting = candidates.setting
        return self.clock(setting)(formed(setting, candidates.plan(widths, self.name)))

    def whole(self, candidates: Candidates) -> float:
        """Return 1."""
        return 1.0

    def left(self, setting: Setting, program: Program) -> float:
        """Return a program's time over the unpruned program's."""
        return self.clock(setting)(program)

    def lacking(self, setting: Setting) -> PlanUsageError | None:
        """Return the error where no target is named."""
        hint = 'limits={"measured": 0.8}'
        return targetless(self.name, hint) if setting.clock is None else None

    def quick(self, candidates: Candidates) -> Callable[[Widths], float]:
        """Return the share that is predicted."""
        if self.samples:
            return self._learned(candidates)
        if candidates.setting.costs is None:
            reads = candidates.reads
            full = reads.whole(reads.macs)
            return lambda widths: reads.cost(candidates.there(widths), reads.macs) / full
        seconds = modelled(candidates)
        full = seconds(candidates.full)
        return lambda widths: seconds(widths) / full

    def _learned(self, candidates: Candidates) -> Callable[[Widths], float]:
        """Return the share that a network expects, fitted to widths that are measured."""
        setting = candidates.setting
        widths = drawn(candidates.full, candidates.least, self.samples, self.seed)
        times = []
        for turn, own in enumerate(widths, 1):
            times.append(counted(self, self.of(candidates, own)))
            setting.tell(f"measured: {times[-1]:.3f} of the time", turn, len(widths))
        return fitted(widths, times, self.seed)

    def clock(self, setting: Setting) -> Callable[[Program], float]:
        """Return what times a program on the target, which is named (`lacking`)."""
        clock = setting.clock
        assert clock is not None
        return lambda program: clock(program, self.bits)


__all__ = ["Measured"]
