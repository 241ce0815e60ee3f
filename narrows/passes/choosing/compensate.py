"""`compensated`: a program whose weights make up for what a plan drops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from narrows.ir.program import Note, Program
from narrows.passes.choosing.compensations.base import Compensation, LayerWise, Task
from narrows.passes.choosing.divergence import Divergence
from narrows.passes.choosing.left import Left
from narrows.passes.choosing.prepare import prepared
from narrows.passes.choosing.reads import reads_of
from narrows.passes.choosing.repair import Progress, held_by, repaired
from narrows.passes.choosing.statistics import Batch, examples_of, pieces
from narrows.passes.plans.plan import ChannelPlan

CHANCE = 2.0  # times the agreement of guessing: below that the network knows nothing any more


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
    if batches:
        notes = [*notes, *_compared(base, plain, plan.masked(result), batches, method, outputs)]
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
    far, agree, count, divergence = [0.0, 0.0], [0.0, 0.0], 0, None
    classes = 0
    with torch.no_grad():
        for batch in batches:
            own = base.run_flat(list(batch))
            divergence = divergence or Divergence.of(own, outputs)
            examples = examples_of(base, batch)
            count += examples
            for i, other in enumerate((plain, made)):
                found: list[Any] = other.run_flat(list(batch))
                far[i] += divergence.between(own, found) * examples
                agree[i] += (divergence.agreement(own, found) or 0.0) * examples
            if any(divergence.logits):
                told = zip(own, divergence.outputs, strict=True)
                classes = min(z.shape[how.axis] for z, how in told if how.classes)
    far = [value / count for value in far]
    agree = [value / count for value in agree]
    text = f"{method.name}: divergence from the unpruned outputs {far[0]:.4g} -> {far[1]:.4g}"
    if classes:
        text += f", same class for {agree[0]:.1%} -> {agree[1]:.1%} of {count} examples"
    notes = [Note(base.name, "compensated", text)]
    if classes and agree[1] < CHANCE / classes:
        notes.append(Note(base.name, "chance", "the pruned network is at chance: it knows nothing"))
    return notes


__all__ = ["compensated"]
