"""`apart`: how far the outputs of masked programs are from the unpruned one's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from narrows.errors import PlanUsageError
from narrows.executors.here import Here
from narrows.ir.program import Program
from narrows.passes.choosing.judged import Judged
from narrows.passes.choosing.statistics import Batch, first
from narrows.passes.plans.candidates import Candidates, Widths
from narrows.passes.plans.plan import ChannelPlan

EXAMPLES = 64  # are enough to tell plans apart

Apart = Callable[[Sequence[Widths]], list[float]]


@dataclass(frozen=True)
class Trial:
    """What is done with a plan: the program is masked, run, and compared with itself.

    Attributes:
        program: The program.
        batches: Flat inputs, batch by batch.
        outputs: How outputs are compared: ``logits``, ``values`` or ``auto``.
        threads: How many threads a trial may use; ``None`` for as many as torch has.
    """

    program: Program
    batches: Sequence[Batch]
    outputs: str
    threads: int | None
    _judged: list[Judged] = field(default_factory=list)  # made where it runs

    def __call__(self, plan: ChannelPlan) -> float:
        """Return the divergence of the masked program, in nats an example."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        if not self._judged:
            self._judged.append(Judged.of(self.program, self.batches, self.outputs))
        return self._judged[0].far(plan.masked(self.program))


def apart(candidates: Candidates, name: str) -> Apart:
    """Return a function that gives each of several widths the divergence of the masked program.

    They are tried where the setting's executor runs jobs.

    Args:
        candidates: What may go, in a setting with data.
        name: Who asks, for the error.

    Raises:
        PlanUsageError: There is no data.
    """
    setting = candidates.setting
    executor = setting.executor or Here()
    # What is sent to another process is not to be a view of a larger batch.
    batches = [[v.detach().clone() if isinstance(v, torch.Tensor) else v for v in batch]
               for batch in some_of(candidates, name)]  # fmt: skip
    threads = None if executor.alone else 1
    trial = Trial(setting.program, batches, setting.choosing.outputs, threads)

    def far(several: Sequence[Widths]) -> list[float]:
        found = dict(executor.run(trial, [candidates.plan(widths, name) for widths in several]))
        return [found[i] for i in range(len(several))]

    return far


def some_of(candidates: Candidates, name: str) -> list[Batch]:
    """Return as much data as tells plans apart; the arguments and errors are those of `apart`."""
    setting = candidates.setting
    if setting.parts is None:
        raise PlanUsageError(
            f"the allocator {name!r} tries plans on data",
            why="there is none" if setting.choosing.data is None else "there is a criterion",
            hint="data=[images] and no criterion",
        )
    return first(setting.program, setting.parts, EXAMPLES)


__all__ = ["apart", "some_of"]
