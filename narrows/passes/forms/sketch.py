"""The account of a form without copies, without making it: the same operators at other widths.

Where every reader takes all that its tensor holds (`narrows.passes.forms.common`), a form's graph
is the unpruned one. Its works are known as soon as its widths are, and a target can say what it
costs (`narrows.ir.costs.Costs.account`) before any weight is cut.
"""

from __future__ import annotations

import numpy as np
from torch import fx

from narrows.ir.channels import Facts
from narrows.ir.choices import Choices
from narrows.ir.labels import Bools, Value, how_many
from narrows.ir.meta import Meta
from narrows.ir.ops import table as ops
from narrows.ir.program import Program
from narrows.ir.work import SUMMING, Work
from narrows.ir.workload import Works, work_of


def sketched(facts: Facts, choices: Choices) -> Program:
    """Return the unpruned program with the shapes and works of a form that copies no channels.

    It can be costed, not run: its weights are those of the unpruned program.

    Args:
        facts: The analysis.
        choices: Per tensor the labels that it holds, and per contraction the channels it reads.
    """
    draft = facts.program.copy()
    old = dict(zip(draft.graph.nodes, facts.program.graph.nodes, strict=True))
    for node, before in old.items():
        flow, held = facts.flows.get(before), choices.forced.get(before.name)
        if held is not None and flow is not None and isinstance(flow.value, Value):
            Meta(node).shape = _shape(flow.value, held)
    made = draft.seal()
    works = Works()
    for node, before in old.items():
        works[node] = _work(facts, choices, node, before)
    made.memo("works", lambda: works)
    return made


def _shape(value: Value, held: Bools) -> tuple[int, ...]:
    """Return a tensor's shape with the labels that it holds alone."""
    there = held[value.tensor.numpy()]
    axes = range(there.ndim)
    return tuple(
        int(there.any(axis=tuple(a for a in axes if a != axis)).sum())
        if axis in value.axes
        else size
        for axis, size in enumerate(value.shape)
    )


def _work(facts: Facts, choices: Choices, node: fx.Node, before: fx.Node) -> Work | None:
    work = work_of(before)
    if work is None or work.kind not in SUMMING:
        return work_of(node)
    held, columns = choices.forced.get(before.name), choices.columns.get(before.name)
    if work.kind in ("matmul", "attention") or held is None or not ops.contracts(before):
        return work
    if columns is None:  # a depthwise convolution hands its channels on
        return work.resized(outputs=how_many(held))
    return work.resized(inputs=_at_least(columns), outputs=_at_least(held))


def _at_least(mask: Bools) -> int:
    return max(1, int(np.count_nonzero(mask)))


__all__ = ["sketched"]
