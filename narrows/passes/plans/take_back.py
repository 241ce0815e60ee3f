"""Taking channels back that a target has a place for anyway.

A target runs some widths faster than smaller ones, and reads some channels with zero weights faster
than it copies the others together. Where the masks are the user's, such places hold zeros. Where a
criterion of narrows chose them, they may as well hold the channels themselves: that costs nothing,
and the network keeps more of what it learnt.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from narrows.ir.costs import Costs
from narrows.ir.program import Note, Program
from narrows.ir.structure.layers import layers_of
from narrows.passes.plans.plan import ChannelPlan
from narrows.passes.plans.remains import present
from narrows.passes.pruning.form import emit
from narrows.passes.pruning.stages import fastest


def take_back(program: Program, plan: ChannelPlan, costs: Costs, batch: int = 1) -> ChannelPlan:
    """Return a plan that keeps the channels, too, for which the target's form has a place.

    Weights with explicit masks (`ChannelPlan.reasons` says ``given``) keep them as they are, and so
    do convolutions in groups of several channels.

    Args:
        program: The program that the plan is for.
        plan: The plan.
        costs: The target's cost table.
        batch: The number of examples to choose for.
    """
    made = emit(fastest(program, plan, costs, batch, fill=True))
    uses = layers_of(program)
    keeps = {"inputs": dict(plan.inputs), "outputs": dict(plan.outputs)}
    count = 0
    for side, masks in keeps.items():
        for name, keep in masks.items():
            given = "given" in plan.reasons.get(name, "given").split(", ")
            if given or name not in made.weights or len(uses[name]) > 1:
                continue
            there = present(uses[name][0], side, made.origins.get(name))
            if there is not None:
                masks[name] = tuple(np.union1d(keep, there).astype(int).tolist())
                count += len(masks[name]) - len(keep)
    if not count:
        return plan
    note = Note(
        program.name, "back", f"{count:,} masked channels are kept after all: their places are "
        "there anyway, for the target's sake", count,
    )  # fmt: skip
    fuller = replace(plan, **keeps).with_notes(note)
    before, after = (
        sum(s for _, s in costs.predict(p, batch))
        for p in (made, emit(fastest(program, fuller, costs, batch, fill=True)))
    )
    return fuller if after <= before * (1 + 1e-6) else plan
