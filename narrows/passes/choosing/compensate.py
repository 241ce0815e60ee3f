"""`compensated`: a program whose weights make up for what a plan drops."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from narrows.ir.program import Note, Program
from narrows.ir.rewrite.factors import factor_notes
from narrows.ir.structure.computed import settled
from narrows.passes.choosing.closeness import closeness
from narrows.passes.choosing.compensations.base import (
    Compensation,
    LayerWise,
    Task,
    refuse_infinite,
)
from narrows.passes.choosing.left import Left
from narrows.passes.choosing.prepare import prepared
from narrows.passes.choosing.reads import reads_of
from narrows.passes.choosing.repair import Progress, held_by, repaired
from narrows.passes.choosing.statistics import Batch, pieces
from narrows.passes.plans.plan import ChannelPlan


def compensated(
    program: Program,
    plan: ChannelPlan,
    batches: Sequence[Batch],
    method: Compensation,
    outputs: str = "auto",
    progress: Progress | None = None,
) -> Program:
    """Return the program, its norms folded, with weights that make up for what a plan drops.

    The plan is one of the result as well: ``plan.masked(result)`` is what a rewrite has to equal.

    Args:
        program: The program that the plan is of.
        plan: The plan.
        batches: Flat inputs, batch by batch; no labels. None where the method needs none: how far
            the outputs are is not said then.
        method: How the weights make up for what is gone.
        outputs: How outputs are compared: ``logits``, ``values`` or ``auto``.
        progress: Told what is done, how far it is and of how much.
    """
    program = settled(program)
    base = prepared(program)
    batches = pieces(base, batches)
    reads = reads_of(base)
    plain = plan.masked(base)  # refuses a plan of another model
    begun = base
    if len(plain.graph.nodes) == len(base.graph.nodes):  # only weights tell it from the whole one
        begun = base.with_weights({**base.weights, **plain.weights})
    left, there = Left.by(reads, plan), reads.left_by(plan)
    if isinstance(method, LayerWise):
        result, notes = repaired(base, begun, reads, left, batches, method, progress), []
    else:
        args = (program, base, begun, plan, reads, left, there, batches, outputs, progress)
        with torch.inference_mode(False):  # steps take gradients
            result, notes = method.made(Task(*args))
        for name, weight in result.weights.items():
            if weight.is_floating_point() and weight is not base.weights.get(name):
                refuse_infinite(method.name, weight)
    if batches:
        notes = [*notes, *_compared(base, plain, plan.masked(result), batches, method, outputs)]
    changed = {n for n, t in result.weights.items() if t is not base.weights.get(n)}
    notes += [note for note in factor_notes(result) if note.where in changed]
    for product in reads.products:
        if name := held_by(base, product):
            text = f"{name!r} is used in several places: {product.layer.weight!r} stays as it is"
            notes.append(Note(product.layer.node.name, "shared weight", text))
    return result.replace(notes=(*program.notes, *notes))


def _compared(
    base: Program,
    plain: Program,
    made: Program,
    batches: Sequence[Batch],
    method: Compensation,
    outputs: str,
) -> list[Note]:
    """Return what the masked network's outputs were and are like, on the data."""
    (before, after), count = closeness(base, [plain, made], batches, outputs)
    text = (
        f"{method.name}: divergence from the unpruned outputs {before.far:.4g} -> {after.far:.4g}"
    )
    if before.same is not None and after.same is not None:
        text += f", same class for {before.same:.1%} -> {after.same:.1%} of {count} examples"
    return [Note(base.name, "compensated", text), *after.notes(base, "pruned")]


__all__ = ["compensated"]
