"""`Losses`: a criterion in nats: what the outputs lose with a channel, measured on data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from narrows.ir.program import Program
from narrows.ir.structure.layers import Layer
from narrows.passes.choosing.criteria.base import NoScoreError
from narrows.passes.choosing.divergence import Divergence, refuse_nan_outputs
from narrows.passes.choosing.prepare import prepared
from narrows.passes.choosing.reads import Floats, reads_of
from narrows.passes.choosing.scales import compared, few
from narrows.passes.choosing.statistics import Batch, Statistics, measured, pieces, split
from narrows.passes.choosing.surgeon import Surgeon, surgeons_of

POINTS = (0.5, 1.0)  # of a layer's channels: there its losses are measured
STEPS = 64  # in which a layer loses all its channels, to see what each adds


@dataclass(frozen=True, eq=False)
class Losses:
    """What each layer's input channels cost when they go one after the other, the cheapest first.

    The costs of a layer's channels add up, as those of a criterion such as L1 do not: a channel
    that another one can stand in for costs little while the other is there. Outputs have no score:
    whoever reads them says what they are worth, and channels that no layer reads stay.

    Attributes:
        name: What a plan's reasons say.
        found: Per weight the cost of each input channel, in nats.
    """

    comparable: ClassVar[bool] = True
    additive: ClassVar[bool] = True

    name: str
    found: Mapping[str, Floats]

    @staticmethod
    def of(program: Program, batches: Sequence[Batch], outputs: str = "auto") -> Losses:
        """Measure a program's channels.

        Args:
            program: The program as captured.
            batches: Flat inputs, batch by batch; no labels.
            outputs: How outputs are compared: ``logits``, ``values`` or ``auto``.
        """
        base = prepared(program)
        reads = reads_of(base)
        halves = split(base, pieces(base, batches))
        with torch.no_grad():
            own = base.run_flat(list(halves[0][0]))
        refuse_nan_outputs(base, own)
        divergence = Divergence.of(own, outputs)
        parts = [measured(base, reads, half, divergence, i) for i, half in enumerate(halves)]
        folds = [(parts[i], few(base, halves[1 - i], reads)) for i in (0, 1)]
        there = reads.all()
        points = [compared(base, reads, folds, divergence, there, share) for share in POINTS]
        found: dict[str, Floats] = {}
        surgeons = surgeons_of(base, reads, Statistics.mean(parts), reads.all())
        for j, (product, surgeon) in enumerate(zip(reads.products, surgeons, strict=True)):
            own = reads.of_layer[j]
            costs = np.zeros(product.layer.inputs)
            if surgeon is not None:
                summed = [float(a[j]) for a, _ in points]
                measured_ = [float(b[j]) for _, b in points]
                each = held_to(in_order(surgeon, len(own)), summed, measured_)
                for read, cost in zip(own, each, strict=True):
                    columns = reads.columns[read]
                    costs[columns] = cost / len(columns)
            found[product.layer.weight] = costs
        return Losses("losses", found)

    def score(self, program: Program, use: Layer, side: str) -> Floats:
        """Return what the channels of a layer cost; `NoScoreError` for what reads none."""
        costs = self.found.get(use.weight)
        if side == "outputs" or costs is None or len(costs) != use.inputs:
            raise NoScoreError(
                f"{self.name} has no score for it", why="it is no layer that reads these channels"
            )
        return costs


def held_to(costs: Floats, summed: Sequence[float], true: Sequence[float]) -> Floats:
    """Return costs that come to what was measured at some points on their way.

    Args:
        costs: What each channel adds, in nats as they are summed.
        summed: What is summed at the points, ascending.
        true: What is measured there.
    """
    order = np.argsort(costs, kind="stable")
    way = np.maximum.accumulate([0.0, *summed])
    goal = np.maximum.accumulate([0.0, *true])
    last = way[-1] if way[-1] > 0 else 1.0
    total = np.concatenate([[0.0], np.cumsum(costs[order])])
    found = np.interp(total * (last / max(total[-1], 1e-300)), way, goal)
    result = np.empty_like(costs)
    result[order] = np.diff(found)
    return result


def in_order(surgeon: Surgeon, count: int) -> Floats:
    """Return what each of a layer's reads adds to the cost when all go, the cheapest first."""
    result = np.zeros(count)
    step = max(1, count // STEPS)
    least = 0.0
    while len(surgeon.gone) < count:
        scores = surgeon.scores()
        chosen = np.argsort(scores, kind="stable")[: min(step, count - len(surgeon.gone))]
        cost = surgeon.remove(chosen.tolist()) / len(chosen)
        least = max(least, cost)  # damping may make a later one look cheaper
        result[chosen] = least
    return result


__all__ = ["Losses", "in_order"]
