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
    far, count, divergence = [0.0, 0.0], 0, None
    agree: list[dict[int, float]] = [{}, {}]  # per output with classes
    classes: dict[int, Any] = {}
    with torch.no_grad():
        for batch in batches:
            own = base.run_flat(list(batch))
            divergence = divergence or Divergence.of(own, outputs)
            examples = examples_of(base, batch)
            count += examples
            for i, other in enumerate((plain, made)):
                found: list[Any] = other.run_flat(list(batch))
                far[i] += divergence.between(own, found) * examples
                for n, (same, shares) in enumerate(divergence.agreements(own, found)):
                    agree[i][n] = agree[i].get(n, 0.0) + same * examples
                    if not i:
                        classes[n] = classes.get(n, 0.0) + shares * examples
    far = [value / count for value in far]
    text = f"{method.name}: divergence from the unpruned outputs {far[0]:.4g} -> {far[1]:.4g}"
    if classes:
        least = [min(shares.values()) / count for shares in agree]
        text += f", same class for {least[0]:.1%} -> {least[1]:.1%} of {count} examples"
    notes = [Note(base.name, "compensated", text)]
    # Always to name the class that is most frequent takes no network.
    if any(share <= float(classes[n].max()) * (1 + 1e-9) for n, share in agree[1].items()):
        notes.append(Note(base.name, "chance", "the pruned network is at chance: it knows nothing"))
    return notes


__all__ = ["compensated"]
