"""`Blocks`: each block of the pruned network learns what the unpruned one's makes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from narrows.ir.program import Note, Program
from narrows.passes.choosing.compensations.base import Task
from narrows.passes.choosing.descending import (
    Course,
    Halves,
    Taken,
    Weights,
    descend,
    masks_of,
    trained,
)
from narrows.passes.choosing.gradients import leaf
from narrows.passes.choosing.judged import Judged
from narrows.passes.choosing.repair import repaired
from narrows.passes.choosing.segments import Segment, Values, segments_of


@dataclass(frozen=True)
class Blocks:
    """Take steps, block by block, that bring a block's result closer to the unpruned one's.

    It begins with `least-squares` on three quarters of the data. Then, in execution order, each
    block (a residual block, or a layer where nothing goes around it) is fed what the pruned network
    makes by then, and takes steps of Adam on the squared error to what the unpruned network's makes
    (in the paper of quantized blocks). What was best on the other quarter is kept, block by block;
    and all of it only where the outputs are closer to the unpruned ones on that quarter, else it is
    least squares on all data.

    Attributes:
        steps: How many steps a block takes.
        rate: The largest step in a weight, relative to the root mean square of its tensor.
        seed: Of the order of batches.
    """

    name: ClassVar[str] = "blocks"
    paper: ClassVar[str] = (
        "Li et al., BRECQ: Pushing the Limit of Post-Training Quantization by Block "
        "Reconstruction, ICLR 2021"
    )
    needs_data: ClassVar[bool] = True
    steps: int = 100
    rate: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        self._course()

    def _course(self) -> Course:
        return Course(self.steps, math.inf, self.rate, self.seed)

    def made(self, task: Task) -> tuple[Program, list[Note]]:
        """Return the network with the blocks' best weights on a quarter of the data."""
        halves = Halves.of(task.base, task.batches)
        args = (task.base, task.begun, task.reads, task.left)
        start = repaired(*args, halves.taught, progress=task.progress)
        weights, told = self._taught(task, halves, start)
        judged = Judged.of(task.base, halves.held, task.outputs)
        made = task.base.with_weights(weights)
        before, after = (judged.far(task.plan.masked(p)) for p in (start, made))
        told += f"divergence on a quarter of the data {before:.4g} -> {after:.4g}"
        if not after < before:
            told += ": not kept, least squares on all data in their place"
            made = repaired(*args, task.batches, progress=task.progress)
        return made, [Note(task.base.name, "steps", f"blocks: {told}")]

    def _taught(self, task: Task, halves: Halves, start: Program) -> tuple[Weights, str]:
        """Return the weights that all blocks learned, and how many did."""
        base, products = task.base, task.reads.products
        weights = {n: leaf(w) for n, w in start.weights.items()}
        masks, names = masks_of(task), set(trained(task))
        segments = segments_of(base, [p.layer.node for p in products])
        pieces = [*halves.taught, *halves.held]
        plain: list[Values] = [
            {n: leaf(v) if isinstance(v, Tensor) else v for n, v in given}
            for given in (zip(base.placeholders, piece, strict=True) for piece in pieces)
        ]
        pruned = list(plain)
        better, stopped = 0, ""
        for number, segment in enumerate(segments):
            own = {
                n for p in products if p.layer.node in segment.nodes
                for n in (p.layer.weight, p.bias) if n in names
            }  # fmt: skip
            with torch.no_grad():
                plain = [segment.run(v, base.weights) for v in plain]
            if own and not stopped:
                tell = partial(_tell, task, number, len(segments))
                taken = self._block(
                    segment, weights, own, masks, (pruned, plain), len(halves.taught), tell,
                    task.cuttable,
                )  # fmt: skip
                better += taken.better
                weights, stopped = {**weights, **taken.weights}, taken.stopped
            with torch.no_grad():
                pruned = [segment.run(v, weights) for v in pruned]
        told = f"{better} of {len(segments)} blocks are better by steps, "
        return weights, told + (f"{stopped}, " if stopped else "")

    def _block(
        self,
        segment: Segment,
        weights: Weights,
        own: set[str],
        masks: Weights,
        sides: tuple[Sequence[Values], Sequence[Values]],
        taught: int,
        tell: partial[None],
        cuttable: bool,
    ) -> Taken:
        fed, wanted = sides
        power = sum(_power(segment, v) for v in wanted[:taught]) / taught
        fixed = {n: w for n, w in weights.items() if n not in own}

        def error(at: int, given: Weights) -> Tensor:
            made = segment.run(fed[at], {**fixed, **given})
            return sum(
                (made[n] - wanted[at][n]).square().mean() for n in segment.ends if _floats(made[n])
            ) / max(power, 1e-30)  # type: ignore[return-value]

        def judge(given: Weights) -> float:
            with torch.no_grad():
                return sum(float(error(at, given)) for at in range(taught, len(fed)))

        losses = [partial(error, at) for at in range(taught)]
        begun = {n: weights[n] for n in sorted(own)}
        return descend(begun, masks, losses, judge, self._course(), tell, cuttable)


def _tell(task: Task, number: int, blocks: int, done: int, total: int) -> None:
    task.tell(f"block {number + 1} of {blocks}", done, total)


def _power(segment: Segment, values: Values) -> float:
    return sum(float(values[n].var(correction=0)) for n in segment.ends if _floats(values[n]))


def _floats(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


__all__ = ["Blocks"]
