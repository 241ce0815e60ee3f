"""`Trial`: what is done with a job: the network is changed, run, and compared with itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from narrows.ir.program import Note, Program
from narrows.passes.choosing.compensate import compensated
from narrows.passes.choosing.compensations.base import Compensation, LayerWise, Task, Whole
from narrows.passes.choosing.judged import Judged, worth
from narrows.passes.choosing.statistics import Batch
from narrows.passes.sensing.jobs import Job, Masked, Rounded


@dataclass(frozen=True)
class Found:
    """What was measured.

    Attributes:
        divergence: How far the outputs are from the network's own; ``None`` if not finite.
        agreement: The share of the examples of the same class; ``None`` without classes.
        figure: What ``evaluate`` returned; ``None`` without it.
    """

    divergence: float | None
    agreement: float | None
    figure: float | None


@dataclass(eq=False)
class Trial:
    """Measures jobs of one network; it can be sent to another process.

    Attributes:
        program: The network.
        prepared: Per number of bits the network as it is rounded.
        measured: Flat inputs that outputs are compared on, batch by batch.
        solved: Those that weights are found anew on; none where they are not.
        method: How they are.
        outputs: What the outputs are; see `Divergence.of`.
        evaluate: A person's function, which is given a program.
        threads: How many threads a job may use; ``None`` for as many as torch has.
    """

    program: Program
    prepared: Mapping[int, Program]
    measured: Sequence[Batch]
    solved: Sequence[Batch]
    method: Compensation | None
    outputs: str
    evaluate: Callable[[Any], float] | None
    threads: int | None
    _judged: list[Judged] = field(default_factory=list)  # made where the job runs

    def __call__(self, job: Job) -> Found:
        """Return what is measured of a job."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        changed = self.changed(job)
        divergence, agreement = self.compared(changed)
        figure = None if self.evaluate is None else worth(self.evaluate, changed)
        return Found(divergence, agreement, figure)

    def changed(self, job: Job) -> Program:
        """Return the network that a job is about."""
        change = job.change
        if isinstance(change, Rounded):
            return change.of(self.prepared[change.bits])
        if not isinstance(change, Masked):
            return self.program
        plan = change.plan(self.program)
        if self.method is None:
            return plan.masked(self.program)
        made = compensated(self.program, plan, self.solved, _to_the_end(self.method), self.outputs)
        return plan.masked(made)

    def compared(self, changed: Program) -> tuple[float | None, float | None]:
        """Return divergence and agreement of a changed network, mean over the examples."""
        if not self._judged:
            self._judged.append(Judged.of(self.program, self.measured, self.outputs))
        far, same = self._judged[0].compared(changed)
        return (far if math.isfinite(far) else None), same


@dataclass(frozen=True)
class _ToTheEnd:
    """A compensation of one job among many: Ctrl-C is for the run, not for its steps."""

    method: Whole

    @property
    def name(self) -> str:
        return self.method.name

    @property
    def needs_data(self) -> bool:
        return self.method.needs_data

    def made(self, task: Task) -> tuple[Program, list[Note]]:
        return self.method.made(replace(task, cuttable=False))


def _to_the_end(method: Compensation) -> Any:
    return method if isinstance(method, LayerWise) else _ToTheEnd(method)


__all__ = ["Found", "Trial"]
