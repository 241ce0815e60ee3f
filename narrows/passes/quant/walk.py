"""`walk`: a network block by block, in floating-point and quantized side by side, on kept data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from narrows.ir.meta import Meta
from narrows.ir.program import Program
from narrows.passes.quant.batches import as_inputs
from narrows.passes.quant.blocks import cut
from narrows.passes.quant.reconstruct import Block, Values, on
from narrows.passes.quant.survey import Survey
from narrows.passes.quant.trial import Span, Trial


def walk(
    trial: Trial, spans: Sequence[Span], inputs: Sequence[list[Any]], exact: Trial | None = None
) -> Iterator[Block]:
    """Yield every block with what goes into it and what should come out.

    What goes into a block in the quantized network is computed after the one before it was done
    with, on the grids that it has then.

    Args:
        trial: The network.
        spans: Its blocks, in order (`spans_of`).
        inputs: Its inputs, item by item (`split`).
        exact: What computes in floating-point, where the weights of ``trial`` are rounded for good:
            the same network with a plan that has neither codes nor offsets.
    """
    exact = trial if exact is None else exact
    plain, rounded = given(exact, inputs), given(trial, inputs)
    last = {n: i for i, span in enumerate(spans) for n in span.reads}
    for index, span in enumerate(spans):
        alike = _alike(exact, span)
        targets = _run(exact, alike, plain, "float")
        yield Block(
            span,
            [{n: v[n] for n in alike.reads} for v in plain],
            [{n: v[n] for n in span.reads} for v in rounded],
            targets,
        )
        made = _run(trial, span, rounded, "hard")
        for where, all_, results in ((alike, plain, targets), (span, rounded, made)):
            for values, value in zip(all_, results, strict=True):
                values[where.exit] = value
            for node, same in zip(span.reads, where.reads, strict=True):
                if last[node] == index and node.op != "placeholder":
                    for values in all_:
                        values.pop(same, None)


def given(trial: Trial, inputs: Sequence[list[Any]]) -> list[Values]:
    """Return the inputs of a network by its nodes, item by item."""
    names = [trial.named[n.name] for n in trial.prepared.placeholders]
    return [dict(zip(names, item, strict=True)) for item in inputs]


def _alike(trial: Trial, span: Span) -> Span:
    """Return the same part of the network in another trial."""
    if trial.named[span.exit.name] is span.exit:
        return span
    reads = [trial.named[n.name] for n in span.reads]
    return dataclasses.replace(trial.span(trial.named[span.exit.name], reads), reads=reads)


def _run(trial: Trial, span: Span, items: Sequence[Values], how: str) -> list[Tensor]:
    with torch.no_grad():
        return [trial.run(span, on({n: v[n] for n in span.reads}, trial), how).cpu() for v in items]


def spans_of(trial: Trial, found: Survey) -> list[Span]:
    """Return the blocks of a network, in order."""
    exits = [trial.named[n.name] for n in cut(trial.prepared, found)]
    return [trial.span(exit, exits[:i]) for i, exit in enumerate(exits)]


def split(program: Program, items: Sequence[Any], batch: int) -> list[list[Any]]:
    """Return the flat inputs of every item; items of a free batch are split into small ones."""
    result: list[list[Any]] = []
    for item in items:
        flat = program.flat_inputs(*as_inputs(item))
        free = [
            i for i, (node, v) in enumerate(zip(program.placeholders, flat, strict=True))
            if isinstance(v, Tensor) and 0 in Meta(node).dynamic
        ]  # fmt: skip
        counts = {flat[i].shape[0] for i in free}
        if len(counts) != 1:
            result.append(flat)
            continue
        for start in range(0, counts.pop(), batch):
            result.append(
                [v[start : start + batch] if i in free else v for i, v in enumerate(flat)]
            )
    return result


def holding(inputs: Sequence[list[Any]], samples: int) -> int:
    """Return how many items hold so many samples."""
    seen = 0
    for count, item in enumerate(inputs, 1):
        seen += max((v.shape[0] for v in item if isinstance(v, Tensor) and v.dim()), default=1)
        if seen >= samples:
            return count
    return len(inputs)


__all__ = ["given", "holding", "spans_of", "split", "walk"]
