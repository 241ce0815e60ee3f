"""`Distill`: the pruned network learns the outputs of the unpruned one, without labels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from narrows.ir.program import Note, Program
from narrows.passes.choosing.compensations.base import Task
from narrows.passes.choosing.descending import (
    Course,
    Halves,
    Weights,
    descend,
    masks_of,
    trained,
)
from narrows.passes.choosing.divergence import Divergence
from narrows.passes.choosing.gradients import leaf
from narrows.passes.choosing.judged import Judged
from narrows.passes.choosing.repair import repaired
from narrows.passes.choosing.statistics import Batch

STEPS = 300


@dataclass(frozen=True)
class Distill:
    """Take steps that bring the outputs closer to the unpruned network's; no labels.

    It begins with `least-squares` on three quarters of the data, takes steps of Adam on the
    divergence of the outputs (a student and its teacher; the temperature is 1), and is judged by
    the divergence on the other quarter: the best weights are kept, and where no step was better, it
    is least squares on all data. So on that quarter it is never worse.

    Attributes:
        steps: At most how many steps; 300 unless seconds are given.
        seconds: At most how long they take, by the clock.
        rate: The largest step in a weight, relative to the root mean square of its tensor.
        seed: Of the order of batches.
    """

    name: ClassVar[str] = "distill"
    paper: ClassVar[str] = (
        "Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015"
    )
    needs_data: ClassVar[bool] = True
    steps: int | None = None
    seconds: float | None = None
    rate: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        self._course()

    @property
    def clocked(self) -> bool:
        """Whether it ends by the clock."""
        return self.seconds is not None

    def _course(self) -> Course:
        steps = self.steps
        if steps is None:
            steps = STEPS if self.seconds is None else 1 << 30
        seconds = math.inf if self.seconds is None else self.seconds
        return Course(steps, seconds, self.rate, self.seed)

    def made(self, task: Task) -> tuple[Program, list[Note]]:
        """Return the network with the best weights on a quarter of the data."""
        halves = Halves.of(task.base, task.batches)
        args = (task.base, task.begun, task.reads, task.left)
        start = repaired(*args, halves.taught, progress=task.progress)
        student = task.plan.masked(start)
        judged = Judged.of(task.base, halves.held, task.outputs)
        teacher = Judged.of(task.base, halves.taught, task.outputs)
        losses = [
            partial(_loss, student, batch, own, judged.divergence)
            for batch, own in zip(teacher.batches, teacher.own, strict=True)
        ]
        names = trained(task)
        begun = {name: student.weights[name] for name in names}
        taken = descend(
            begun, masks_of(task), losses, partial(judged.far, student), self._course(),
            lambda done, total: task.tell("distill", done, total), task.cuttable,
        )  # fmt: skip
        text = f"distill: {taken.steps} steps, divergence on a quarter of the data "
        text += f"{taken.before:.4g} -> {taken.after:.4g}"
        if taken.stopped:
            text += f"; {taken.stopped}"
        if taken.better:
            weights = {**start.weights, **taken.weights}
            return task.base.with_weights(weights), [Note(task.base.name, "steps", text)]
        text += ": not kept, least squares on all data in their place"
        again = repaired(*args, task.batches, progress=task.progress)
        return again, [Note(task.base.name, "steps", text)]


def _loss(
    student: Program, batch: Batch, own: list[Any], divergence: Divergence, weights: Weights
) -> Tensor:
    given = [leaf(v) if isinstance(v, Tensor) else v for v in batch]
    fixed = {n: leaf(w) for n, w in student.weights.items() if n not in weights}
    return divergence.distance(own, student.run_flat(given, {**fixed, **weights}))


__all__ = ["Distill"]
