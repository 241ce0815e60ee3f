"""Taking channels back that a target has a place for anyway.

A target runs some widths faster than smaller ones, and reads some channels with zero weights faster
than it copies the others together. Where the masks are the user's, such places hold zeros. Where a
criterion of narrows chose them, they may as well hold the channels themselves: that costs nothing,
and the network keeps more of what it learnt.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from narrows.ir.cost import CostTable
from narrows.ir.program import Note, Origin, Program
from narrows.passes.legalize_reads import AlignChannels, LegalizeReads
from narrows.passes.plans.plan import ChannelPlan
from narrows.passes.plans.uses import Use, uses_of
from narrows.passes.prune_channels import PruneChannels


def take_back(program: Program, plan: ChannelPlan, costs: CostTable, batch: int = 1) -> ChannelPlan:
    """Return a plan that keeps the channels, too, for which the target's form has a place.

    Weights with explicit masks (`ChannelPlan.reasons` says ``given``) keep them as they are, and so
    do convolutions in groups of several channels.

    Args:
        program: The program that the plan is for.
        plan: The plan.
        costs: The target's cost table.
        batch: The number of examples to choose for.
    """
    made = _formed(program, plan, costs, batch)
    uses = uses_of(program)
    keeps = {"inputs": dict(plan.inputs), "outputs": dict(plan.outputs)}
    count = 0
    for side, masks in keeps.items():
        for name, keep in masks.items():
            given = "given" in plan.reasons.get(name, "given").split(", ")
            if given or name not in made.weights or len(uses[name]) > 1:
                continue
            there = _present(uses[name][0], side, made.origins.get(name))
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
        for p in (made, _formed(program, fuller, costs, batch))
    )
    return fuller if after <= before * (1 + 1e-6) else plan


def _formed(program: Program, plan: ChannelPlan, costs: CostTable, batch: int) -> Program:
    for pass_ in (PruneChannels(plan), LegalizeReads(costs, batch, fill=True), AlignChannels()):
        program = pass_.run(program).program
    return program


def _present(use: Use, side: str, origin: Origin | None) -> np.ndarray | None:
    """Return which channels of a side are in a rewritten weight; ``None`` if that is not plain."""
    width = use.width(side)
    if origin is None:
        return np.arange(width)
    axis = use.in_axis if side == "inputs" else use.out_axis
    if use.groups > 1:
        if use.groups != use.inputs:
            return None
        rows = _index(origin, use.out_axis)
        if rows is None:
            return np.arange(width)
        return rows if side == "outputs" else np.unique(rows // (use.outputs // use.inputs))
    found = _index(origin, axis)
    return np.arange(width) if found is None else found


def _index(origin: Origin, axis: int) -> np.ndarray | None:
    index = origin.index[axis]
    if index is None:
        return None
    found = np.unique(np.array(index))
    return found[found >= 0]  # what is not there is a channel of zeros that was added
