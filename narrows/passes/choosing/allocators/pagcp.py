"""`Pagcp`: layer by layer, as few channels as every task's own loss bears."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from narrows.errors import PlanUsageError
from narrows.ir.program import Program
from narrows.passes.choosing.allocators.base import ByWidths
from narrows.passes.choosing.allocators.scalar import bisected, filled
from narrows.passes.choosing.allocators.trials import some_of
from narrows.passes.choosing.budgets.base import Limit
from narrows.passes.choosing.divergence import Divergence
from narrows.passes.choosing.reads import Floats
from narrows.passes.choosing.statistics import Batch, examples_of
from narrows.passes.plans.candidates import Candidates, Widths

MOST = 12.0  # the logarithm of how many times its own a task's loss is at most: it knows nothing


@dataclass(frozen=True)
class Pagcp(ByWidths):
    """Layer by layer, what goes raises no task's loss by more than the layer's threshold.

    A task is an output. Its loss is the cross-entropy to what the unpruned network says there, of
    values the squared error added to their variance, so that a rise is relative to what is not
    zero. The thresholds grow with depth by a factor a layer, and their product is the rise of the
    whole network, which is bisected to the budgets. Every width is masked and run, after those
    before it: it takes long, and needs data.

    Attributes:
        growth: By what factor the logarithm of a threshold is larger than that of the layer before.
    """

    name: ClassVar[str] = "pagcp"
    paper: ClassVar[str] = (
        "Ye et al., Performance-aware global channel pruning for multitask CNNs, TPAMI 2023"
    )

    growth: float = 1.1

    def __post_init__(self) -> None:
        if not math.isfinite(self.growth) or self.growth <= 0:
            raise PlanUsageError(f"growth is a factor above 0, got {self.growth!r}")

    def widths(self, candidates: Candidates, limits: Sequence[Limit]) -> Sequence[int]:
        """Return the widths of the smallest rise that is within all limits."""
        tasks = Tasks.of(candidates, self.name)
        order = in_depth(candidates)

        def at(amount: float) -> list[int]:
            rises = thresholds(amount * MOST, len(order), self.growth)
            return greedy(candidates.full, candidates.least, order, tasks.losses, rises)

        return filled(candidates, limits, at(bisected(candidates, limits, at)))


def thresholds(whole: float, count: int, growth: float) -> Floats:
    """Return the relative rise that each layer may cause, the first one's first.

    Args:
        whole: The logarithm of how many times its own a task's loss may be in the end.
        count: How many layers there are.
        growth: By what factor a layer's logarithm is larger than the one's before it.
    """
    parts = growth ** np.arange(count, dtype=np.float64)
    return np.expm1(whole * parts / parts.sum())


def greedy(
    full: Widths,
    least: Widths,
    order: Sequence[int],
    losses: Callable[[Widths], Floats],
    rises: Sequence[float] | Floats,
) -> list[int]:
    """Return widths: in turn each the smallest at which no task's loss rises by more than it may.

    Args:
        full: How many channels there are.
        least: How many stay at least; with no less than these, every one may go.
        order: Which one's turn it is.
        losses: Returns the loss of every task at some widths.
        rises: Per turn how much a loss may rise, relative to what it was before.
    """
    widths = [*full]
    before = losses(widths)
    for i, rise in zip(order, rises, strict=True):
        low, high = least[i], widths[i]  # at `high` it is borne
        bound, now = before * (1 + rise), before
        while low < high:
            middle = (low + high) // 2
            found = losses([*widths[:i], middle, *widths[i + 1 :]])
            if (found <= bound).all():
                high, now = middle, found
            else:
                low = middle + 1
        widths[i], before = high, now
    return widths


def in_depth(candidates: Candidates) -> list[int]:
    """Return the candidates' numbers as the first layers that lose them are executed."""
    place = {node: i for i, node in enumerate(candidates.setting.program.graph.nodes)}
    first = [min(place[part.use.node] for part in c.parts) for c in candidates.members]
    return [int(i) for i in np.argsort(first, kind="stable")]


class Tasks:
    """The losses of a network's outputs, each by itself, against what it said of some data."""

    def __init__(
        self, candidates: Candidates, name: str, batches: Sequence[Batch], outputs: str
    ) -> None:
        """Run the unpruned network.

        Args:
            candidates: What may go.
            name: What the plans that are tried are called.
            batches: Flat inputs, batch by batch.
            outputs: How outputs are compared: ``logits``, ``values`` or ``auto``.
        """
        program = candidates.setting.program
        self.candidates, self.name, self.batches = candidates, name, batches
        self.own = self._run(program)
        compared = Divergence.of(self.own[0], outputs).outputs
        self.each = {
            n: Divergence((how,)) for n, how in enumerate(compared) if how.kind != "nothing"
        }
        self.shares = np.array([float(examples_of(program, b)) for b in batches])
        self.shares /= self.shares.sum()
        self.floor = self._mean(
            [[_floor(d, own[n]) for n, d in self.each.items()] for own in self.own]
        )
        self.known: dict[tuple[int, ...], Floats] = {}

    @staticmethod
    def of(candidates: Candidates, name: str) -> Tasks:
        """Return those of the setting's data; `PlanUsageError` where there is none."""
        batches = some_of(candidates, name)
        return Tasks(candidates, name, batches, candidates.setting.choosing.outputs)

    def losses(self, widths: Widths) -> Floats:
        """Return the loss of every task where the candidates keep so many channels."""
        key = tuple(widths)
        if key not in self.known:
            masked = self.candidates.plan(widths, self.name).masked(self.candidates.setting.program)
            far = [
                [d.between([own[n]], [made[n]]) for n, d in self.each.items()]
                for own, made in zip(self.own, self._run(masked), strict=True)
            ]
            self.known[key] = self.floor + self._mean(far)
        return self.known[key]

    def _run(self, program: Program) -> list[list[Tensor]]:
        with torch.no_grad():
            return [program.run_flat(list(batch)) for batch in self.batches]

    def _mean(self, rows: Sequence[Sequence[float]]) -> Floats:
        return self.shares @ np.array(rows, dtype=np.float64)


def _floor(divergence: Divergence, own: Tensor) -> float:
    """Return what an output's loss is where nothing is lost: its entropy, or its variance.

    Both are what lies between it and a network that knows nothing.
    """
    (how,) = divergence.outputs
    if not how.classes:
        return divergence.between([own], [own.mean(0, keepdim=True).expand_as(own)])
    count = own.shape[how.axis]
    places = own.numel() / count / (len(own) if own.dim() > 1 else 1)
    equal = torch.full_like(own, 1 / count if how.kind == "probabilities" else 0.0)
    return places * math.log(count) - divergence.between([own], [equal])


__all__ = ["Pagcp", "Tasks", "greedy", "in_depth", "thresholds"]
