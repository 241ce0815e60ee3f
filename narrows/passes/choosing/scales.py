"""How much more, or less, the network minds a layer's errors than the layer's own sum says.

What a channel costs is summed over positions as if the errors at different ones had nothing to do
with each other. Before an average they add up, elsewhere they cancel, and so the sum is wrong by a
factor that differs from layer to layer. It is measured: a share of one layer's channels is
removed, the rest of the network runs, and the divergence is divided by the sum.

What is removed is repaired afterwards, layer by layer, and every layer behind an error makes up for
some of it, too. So an error far from the outputs ends up as less than what is measured, where
nothing behind it is repaired.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import fx

from narrows.ir.graph import Run
from narrows.ir.labels import Bools
from narrows.ir.program import Program
from narrows.passes.choosing.divergence import Divergence
from narrows.passes.choosing.reads import Floats, Reads
from narrows.passes.choosing.statistics import (
    Batch,
    Statistics,
    counted,
    examples_of,
    first,
)
from narrows.passes.choosing.surgeon import surgeons_of

SHARE = 0.7  # of a layer's channels; what a tenth costs says little about what the choice will cost
TURNS = 8  # in which they are removed
FORWARDS = 7  # so many forward passes over the data, at most, does it take
MACS = 64e9  # or so many multiply-accumulates, but
EXAMPLES = 12  # so many examples at least
LEAST = 0.1  # of the median: no layer is free
MENDED = 1 / 30  # of an error's divergence, by each layer behind it when that is repaired


def scales(
    program: Program,
    reads: Reads,
    folds: Sequence[tuple[Statistics, Sequence[Batch]]],
    divergence: Divergence,
    there: Bools,
) -> Floats:
    """Return per layer the divergence that is measured over the one that is summed.

    Args:
        program: The program.
        reads: Its reads.
        folds: Statistics, each with data that they were *not* measured on. A layer with more
            columns than its data has independent directions makes up for hundreds of channels
            on that data alone.
        divergence: How outputs are compared.
        there: Per read whether it is there.
    """
    summed, true = compared(program, reads, folds, divergence, there, SHARE)
    result = np.ones(len(reads.products))
    known = summed > 0
    if known.any():
        ratio = true[known] / summed[known]
        result[known] = np.maximum(ratio, max(LEAST * float(np.median(ratio)), 1e-12))
    return result


def compared(
    program: Program,
    reads: Reads,
    folds: Sequence[tuple[Statistics, Sequence[Batch]]],
    divergence: Divergence,
    there: Bools,
    share: float,
) -> tuple[Floats, Floats]:
    """Return per layer the divergence that is summed, and the one that is left of what is measured.

    Args:
        program, reads, folds, divergence, there: As for `scales`.
        share: How many of a layer's channels are removed, those that cost least.
    """
    summed, true = np.zeros(len(reads.products)), np.zeros(len(reads.products))
    for found, batches in folds:
        costs, changed = _reduced(program, reads, found, there, share)
        summed += costs / len(folds)
        true += _measured(program, reads, changed, batches, divergence) / len(folds)
    return summed, true * np.exp(-MENDED * behind(reads))


def behind(reads: Reads) -> Floats:
    """Return per layer how many layers there are behind it, along the longest way to an output."""
    layers = {p.layer.node for p in reads.products}
    nodes = next(iter(layers)).graph.nodes
    found: dict[fx.Node, int] = {}
    for node in reversed(nodes):
        found[node] = max((found[user] + (user in layers) for user in node.users), default=0)
    return np.array([found[p.layer.node] for p in reads.products], dtype=float)


def _reduced(
    program: Program, reads: Reads, found: Statistics, there: Bools, share: float
) -> tuple[Floats, dict[int, torch.Tensor]]:
    """Return per layer what a share of its channels costs, and its matrix without them."""
    costs, changed = np.zeros(len(reads.products)), {}
    for j, surgeon in enumerate(surgeons_of(program, reads, found, there)):
        left = int(there[reads.of_layer[j]].sum())
        goal = max(1, round(share * left))
        if surgeon is None or not left or (goal == left and share < 1):
            continue
        for turn in range(TURNS):
            count = goal * (turn + 1) // TURNS - goal * turn // TURNS
            if count:
                best = np.argsort(surgeon.scores(), kind="stable")[:count]
                costs[j] += surgeon.remove(best.tolist())
        changed[j] = surgeon.matrix
    return costs, changed


def _measured(
    program: Program,
    reads: Reads,
    changed: dict[int, torch.Tensor],
    batches: Sequence[Batch],
    divergence: Divergence,
) -> Floats:
    """Return per layer the divergence of the network with another matrix in that layer."""
    result = np.zeros(len(reads.products))
    examples = counted(program, batches)
    with torch.no_grad():
        for batch in batches:
            own = program.run_flat(list(batch))
            run = Run(program.graph, batch, program.weights)
            for j, matrix in changed.items():
                product = reads.products[j]
                run.before(product.layer.node)
                name = product.layer.weight
                weight, bias = product.weights(matrix, program.weights[name])
                weights = {**program.weights, name: weight}
                if product.bias:
                    weights[product.bias] = bias
                other = run.reweighted(weights).finish()
                result[j] += divergence.between(own, other) * examples_of(program, batch) / examples
    return result


def few(program: Program, batches: Sequence[Batch], reads: Reads) -> list[Batch]:
    """Return as much data as the factors of a network are measured on in a while.

    For every layer the network runs from there to the end, which is half of it in the mean.
    """
    examples = counted(program, batches)
    runs = max(len(reads.products) / 2, 1)
    most = examples * FORWARDS / runs
    goal = max(EXAMPLES, int(min(most, MACS / max(runs * reads.whole(reads.macs), 1))))
    return first(program, batches, goal)


__all__ = ["compared", "few", "scales"]
