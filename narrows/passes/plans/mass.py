"""Score mass: how much of what its layers read a plan keeps.

A layer's *mass* is the sum of the scores of its input channels, counted as 1. Layers that sum over
several channels have one; a depthwise convolution hands channels on and has none. So layers of any
width count alike, and plans of different makers can be compared.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from narrows.errors import PlanError, PlanUsageError, suggest
from narrows.ir.program import Program
from narrows.ir.structure.layers import Layer, layers_of
from narrows.passes.choosing.criteria.base import Criterion, Score, scores
from narrows.passes.choosing.criteria.catalog import find, measures
from narrows.passes.plans.plan import ChannelPlan


def summing(program: Program) -> dict[str, Layer]:
    """Return the layers that sum over several channels: per weight its first such use."""
    found = {}
    for name, uses in layers_of(program).items():
        first = next((u for u in uses if u.sums), None)
        if first is not None:
            found[name] = first
    return found


def shares(given: np.ndarray) -> np.ndarray:
    """Return scores over their sum, as float64; those below zero count as zero."""
    positive = np.maximum(given, 0.0)
    total = positive.sum()
    return positive / total if total > 0 else positive


def kept_mass(
    program: Program,
    plan: ChannelPlan,
    criterion: str | Criterion | Score = "l1",
    weights: Iterable[str] | None = None,
) -> float:
    """Return the share of the score mass that a plan keeps, 0 to 1: the mean over the layers.

    Of every layer it is the scores of the input channels that the plan keeps, over those of all. A
    layer whose inputs the plan does not name keeps 1.

    Args:
        program: The program that the plan is for.
        plan: The plan; masks made elsewhere become one by ``narrows.plan(keep_inputs=...)``.
        criterion: What scores channels, as for `narrows.plan`.
        weights: The layers to take the mean over; all that sum over several channels by default.

    Raises:
        PlanError: The criterion or a weight is unknown, or there is no layer to take the mean over.
    """
    chosen = find(criterion)
    if measures(chosen):
        raise PlanUsageError(
            f"{chosen.name} scores by data, and there is none",
            hint="criterion=narrows.passes.choosing.evidence.informed(program, criterion, data)",
        )
    layers = summing(program)
    names = list(layers) if weights is None else list(weights)
    unknown = [name for name in names if name not in layers]
    if unknown:
        why, hint = "only layers that sum over several channels have", suggest(unknown[0], layers)
        raise PlanUsageError(f"{unknown[0]!r} has no score mass", why=why, hint=hint)
    if not names:
        raise PlanError(f"{program.name} has no layer that sums over channels")
    kept = []
    for name in names:
        own = shares(scores(chosen, program, layers[name], "inputs"))
        keep = plan.inputs.get(name)
        kept.append(1.0 if keep is None or not own.any() else float(own[list(keep)].sum()))
    return float(np.mean(kept))


__all__ = ["kept_mass", "shares", "summing"]
