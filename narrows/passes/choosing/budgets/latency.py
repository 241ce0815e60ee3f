"""`Latency`: the seconds that a target's cost table predicts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from narrows.errors import PlanUsageError
from narrows.ir.program import Program
from narrows.ir.structure import structure_of
from narrows.passes.choosing.budgets.base import Budget
from narrows.passes.plans.candidates import Candidates, Widths
from narrows.passes.plans.latency import SLACK, Aim
from narrows.passes.plans.latency_model import LatencyModel
from narrows.passes.plans.plan import ChannelPlan
from narrows.passes.plans.setting import Setting
from narrows.passes.pruning.form import emit
from narrows.passes.pruning.stages import prune


@dataclass(frozen=True)
class Latency(Budget):
    """The seconds that the target's cost table predicts for what the passes make."""

    name: ClassVar[str] = "latency"
    unit: ClassVar[str] = "seconds, predicted"
    paper: ClassVar[str] = "staircases of time: Shen et al., SMCP, NeurIPS 2022"
    coupled: ClassVar[bool] = True
    timed: ClassVar[bool] = True
    slack: ClassVar[float] = SLACK

    def of(self, candidates: Candidates, widths: Widths) -> float:
        """Return the seconds predicted for the pruned program."""
        setting = candidates.setting
        return aim(setting).seconds(formed(setting, candidates.plan(widths, self.name)))

    def whole(self, candidates: Candidates) -> float:
        """Return the seconds predicted for the unpruned program."""
        return aim(candidates.setting).seconds(candidates.setting.program)

    def left(self, setting: Setting, program: Program) -> float:
        """Return the share of the seconds predicted that a program takes."""
        aims = aim(setting)
        return aims.seconds(program) / aims.seconds(setting.program)

    def lacking(self, setting: Setting) -> PlanUsageError | None:
        """Return the error where there are no costs."""
        return targetless(self.name, "latency=0.8") if setting.costs is None else None

    def quick(self, candidates: Candidates) -> Callable[[Widths], float]:
        """Return the seconds of a model that keeps every operator as it is computed now."""
        return modelled(candidates)


def aim(setting: Setting, share: float = 1.0) -> Aim:
    """Return a share of the latency by the setting's costs, which are there (`lacking`)."""
    assert setting.costs is not None
    return Aim(float(share), setting.costs, setting.examples)


def formed(setting: Setting, plan: ChannelPlan) -> Program:
    """Return the pruned program, in the form that is fastest by the costs where there are any."""
    if setting.costs is None:
        return emit(prune(setting.program, plan, ordered=True).pruning)
    return aim(setting).formed(setting.program, plan)


def targetless(name: str, asked: str) -> PlanUsageError:
    """Return the error for a budget of a target where none is named."""
    return PlanUsageError(
        f"a budget of {name} is one of a target, and none is named",
        hint=f'narrows.plan(program, {asked}, target="onnx")',
    )


def modelled(candidates: Candidates) -> Callable[[Widths], float]:
    """Return a function that gives widths seconds, by a `LatencyModel`."""
    setting = candidates.setting
    structure = structure_of(setting.program)
    aims = aim(setting)
    model = LatencyModel(setting.program, structure, aims.costs, aims.batch)
    number = {id(tie): i for i, tie in enumerate(structure.ties)}
    ties = [number[id(c.coupling)] for c in candidates.members]

    now = model.full()

    def seconds(widths: Widths) -> float:
        for tie, width in zip(ties, widths, strict=True):
            if now.widths[tie] != width:  # most of them are as they were when it was asked last
                model.go(now, tie, width)
        return now.total

    return seconds


__all__ = ["Latency", "aim", "formed", "modelled", "targetless"]
