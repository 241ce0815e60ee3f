"""Steps of gradient descent on the weights that are left, kept as far as held-out data say so.

A few hundred examples are learned by heart within a few hundred steps. So what is kept is decided
by examples that no step saw: the weights that were best on them, which may be those at the start.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from narrows.errors import PlanError, PlanUsageError
from narrows.ir.program import Program
from narrows.passes.choosing.compensations.base import Task
from narrows.passes.choosing.gradients import leaf
from narrows.passes.choosing.judged import apart
from narrows.passes.choosing.repair import held_by
from narrows.passes.choosing.statistics import Batch
from narrows.passes.plans.within import refuse_no_whole

Weights = dict[str, Tensor]

WARM = 0.1  # of a course, in which the rate rises
LOOKS = 20  # how often held-out data are looked at within the steps, at least


@dataclass(frozen=True)
class Halves:
    """Data to take steps by, and data to judge them by."""

    taught: list[Batch]
    held: list[Batch]

    @staticmethod
    def of(program: Program, batches: Sequence[Batch]) -> Halves:
        """Return three quarters of the data, and the other one; the errors are those of `apart`."""
        return Halves(*apart(program, batches))


@dataclass(frozen=True)
class Course:
    """How many steps are taken.

    Attributes:
        steps: At most how many.
        seconds: At most how long, by the clock; ``inf`` for as long as the steps take.
        rate: The largest step in a weight, relative to the root mean square of its tensor; it is
            reached in the first tenth, and falls to zero along a cosine.
        seed: Of the order of batches.
    """

    steps: int
    seconds: float
    rate: float
    seed: int

    def __post_init__(self) -> None:
        refuse_no_whole("steps", self.steps, 1)
        refuse_no_whole("seed", self.seed)
        if not (self.seconds > 0 and self.rate > 0):
            raise PlanUsageError(
                f"{self.steps!r} steps within {self.seconds!r} seconds at the rate {self.rate!r}",
                why="each of them is above zero",
                hint="distill{seconds=60}, blocks{steps=100, rate=0.003}",
            )

    def rate_at(self, gone: float) -> float:
        """Return the rate when a share of the course is gone."""
        rising = min(gone / WARM, 1.0)  # the first steps of Adam are of full size in every weight
        return self.rate * rising * (0.5 + 0.5 * math.cos(math.pi * min(gone, 1.0)))


@dataclass(frozen=True)
class Taken:
    """What steps led to.

    Attributes:
        weights: The best weights.
        before: What held-out data said of those at the start.
        after: What they say of the best.
        steps: How many steps were taken.
        stopped: Why it ended before its time; or an empty string.
    """

    weights: Weights
    before: float
    after: float
    steps: int
    stopped: str

    @property
    def better(self) -> bool:
        """Whether any step was."""
        return self.after < self.before


def descend(
    begun: Weights,
    masks: Weights,
    losses: Sequence[Callable[[Weights], Tensor]],
    judge: Callable[[Weights], float],
    course: Course,
    tell: Callable[[int, int], None],
    cuttable: bool = True,
) -> Taken:
    """Take steps of Adam and return the best weights by a judge.

    An interruption (ctrl-C) of what is cuttable ends them, and what was best so far is what there
    is.

    Args:
        begun: The weights to begin with, by name.
        masks: Per weight ones where it is there, zeros where it is not.
        losses: Per batch the loss of weights, differentiable. All batches are gone through in an
            order that is drawn, then again.
        judge: What weights are worth; less is better.
        course: How many steps.
        tell: Told how many steps are done, and of how many.
        cuttable: Whether an interruption ends the steps, or else all that is going on.
    """
    before = judge(begun)
    if not math.isfinite(before):
        raise PlanError(
            "what the pruned network makes of the data is not finite",
            why="steps are judged by how far it is from the unpruned one",
            hint="look for it: x.isfinite().all()",
        )
    best, after = dict(begun), before
    generator = torch.Generator().manual_seed(course.seed)
    order: list[int] = []
    done, stopped, start = 0, "", time.monotonic()
    with torch.enable_grad():
        own = {n: leaf(w).clone().requires_grad_() for n, w in begun.items()}
        scales = [float(w.detach().square().mean().sqrt().clamp(min=1e-8)) for w in own.values()]
        optimizer = torch.optim.Adam([{"params": [w], "lr": 0.0} for w in own.values()])
        try:
            while done < course.steps and (at := time.monotonic() - start) < course.seconds:
                rate = course.rate_at(max((done + 1) / course.steps, at / course.seconds))
                for group, scale in zip(optimizer.param_groups, scales, strict=True):
                    group["lr"] = rate * scale
                order = order or torch.randperm(len(losses), generator=generator).tolist()
                optimizer.zero_grad()
                loss = losses[order.pop()]({n: w * masks[n] for n, w in own.items()})
                loss.backward()
                optimizer.step()
                done += 1
                tell(done, course.steps)
                left = course.steps - done
                if left % max(1, course.steps // LOOKS) and left:
                    continue
                now = {n: w.detach() * masks[n] for n, w in own.items()}
                found = judge(now)
                if not math.isfinite(found):
                    stopped = "the steps led to numbers that are not finite"
                    break
                if found < after:
                    best, after = {n: w.clone() for n, w in now.items()}, found
        except KeyboardInterrupt:
            if not cuttable:
                raise
            stopped = "interrupted"
    return Taken(best, before, after, done, stopped)


# ------------------------------------------------------------------ of a task


def trained(task: Task) -> tuple[str, ...]:
    """Return the names of the weights that steps change: those of layers that are used once."""
    names: dict[str, None] = {}
    for product in task.reads.products:
        if not held_by(task.base, product):
            names.update(dict.fromkeys(n for n in (product.layer.weight, product.bias) if n))
    return tuple(names)


def masks_of(task: Task) -> Weights:
    """Return per layer's weight and bias ones where it is there, zeros where it is not."""
    ones = {n: torch.ones_like(w) for n, w in task.base.weights.items() if w.is_floating_point()}
    return task.left.masked(task.reads.products, ones)


__all__ = ["Course", "Halves", "Taken", "descend", "masks_of", "trained"]
