"""The rewriter: emit a program that computes only the needed channels.

It walks the original program forwards and runs, beside the new graph, the *labels* that each new
tensor holds: what an operator does to data it does to labels, so every consumer knows exactly which
original channel stands at which position. Where the needed channels would not fill a rectangular
tensor, the rewriter first tries to restrict the data earlier (`chains`) and else reports which
channels must be added; `rewrite` then asks liveness again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from narrows.errors import PassError
from narrows.ir.channels import Facts
from narrows.ir.graph import without_collection
from narrows.ir.held import Held, RaggedError, evened
from narrows.ir.labels import Bools, Value
from narrows.ir.liveness import Demand, staying
from narrows.ir.meta import Meta, where
from narrows.ir.ops import table
from narrows.ir.program import Note, Program, Pruning
from narrows.ir.rewrite.analyses import demand_of, everything, facts_of
from narrows.ir.rewrite.rewriter import Rewriter

_RAGGED = "the tensor would not be rectangular"

__all__ = [
    "Held",
    "RaggedError",
    "Rewriter",
    "demand_of",
    "everything",
    "facts_of",
    "rewrite",
]


def rewrite(pruning: Pruning, rounds: int = 32) -> tuple[Program, Demand]:
    """Return the program that computes only what is needed, and the liveness it was made from.

    Liveness and rewriting alternate until every tensor is rectangular: what a rewrite cannot do
    without is forced to stay and noted. Each round forces more, so this ends. The choices of the
    pruning ask for another form than the smallest.
    """
    with without_collection():
        return _settle(pruning, rounds)


def _settle(pruning: Pruning, rounds: int) -> tuple[Program, Demand]:
    facts, demand = facts_of(pruning), demand_of(pruning)
    forced, columns = map(dict, demand.given)
    extra: dict[tuple[str, str], Note] = {}
    for _ in range(rounds):
        if not _share(facts, demand, forced, columns, extra):
            rewriter = Rewriter(facts, demand, pruning.choices)
            rewriter.run()
            if not rewriter.failures:
                notes = (*demand.notes.values(), *extra.values(), *_barrier_notes(facts, demand))
                return rewriter.finish(notes), demand
            # One of them may be helped by what another asked for.
            grew = [_force(facts, demand, forced, f, extra) for f in rewriter.failures]
            if not any(grew):
                raise PassError(
                    "a node cannot be rewritten even with all its channels",
                    where=where(rewriter.failures[0].node),
                    hint="report this model, please",
                )
        demand = Demand(facts, forced, columns)
    raise PassError(
        "pruning did not settle",
        where=where(next(iter(forced))),
        hint="report this model, please",
    )


def _share(
    facts: Facts,
    demand: Demand,
    forced: dict[fx.Node, Bools],
    columns: dict[fx.Node, Bools],
    notes: dict[tuple[str, str], Note],
) -> bool:
    """Make all uses of a weight use the same part of it, so that it stays one; whether any must
    grow."""
    grew = False
    for uses in demand.uses.values():
        if len(uses) < 2:
            continue
        union: dict[int, Bools] = {}
        for _, parts in uses:
            for axis, mask in parts.items():
                union[axis] = union[axis] | mask if axis in union else mask
        for node, parts in uses:
            for axis, mask in parts.items():
                extra = union[axis] & ~mask
                if not extra.any():
                    continue
                grew = True
                makes = len(mask) == facts.value(node).count and axis == next(iter(parts))
                if makes:
                    _grow(forced, node, union[axis])
                else:
                    columns[node] = union[axis]
                _noted(
                    notes, node, "shared", int(extra.sum()), "another use of the weight needs them"
                )
    return grew


def _force(
    facts: Facts, demand: Demand, forced: dict[fx.Node, Bools], failure: RaggedError, notes: Any
) -> bool:
    """Keep more of a node that fills no rectangle; whether there was more to keep."""
    node = failure.node
    value = facts.value(node) if isinstance(facts.flows[node].value, Value) else None
    if value is not None and failure.mask is not None:
        wider = evened(value, failure.mask)
        if _grow(forced, node, wider):
            _noted(notes, node, "ragged", int((wider & ~demand.needed(node)).sum()), _RAGGED)
            return True
    grew = False
    targets = [node, *(r.operand for r in facts.flows[node].reads)]
    for target in targets:
        if isinstance(facts.flows[target].value, Value):
            everything = np.ones(facts.value(target).count, dtype=bool)
            missing = int((~demand.needed(target)).sum()) if demand.alive(target) else 0
            if _grow(forced, target, everything):
                # What only moves channels and its operand hold the same: they count once.
                same = target is not node and grew and table.keeps_all(node)
                grew = True
                _noted(notes, target, "ragged", 0 if same else missing, _RAGGED)
    return grew


def _grow(forced: dict[fx.Node, Bools], node: fx.Node, mask: Bools) -> bool:
    before = forced.get(node, np.zeros_like(mask))
    forced[node] = before | mask
    return bool((forced[node] & ~before).any())


def _noted(
    notes: dict[tuple[str, str], Note], node: fx.Node, reason: str, count: int, why: str
) -> None:
    if not count:
        return
    before = notes.get((node.name, reason))
    count += before.channels if before is not None else 0
    message = f"{staying(count)}: {why}"
    notes[node.name, reason] = Note(node.name, reason, message, count, Meta(node).source)


def _barrier_notes(facts: Facts, demand: Demand) -> list[Note]:
    return [
        Note(n.name, "barrier", f"everything before it stays: {why}", 0, Meta(n).source)
        for n, why in facts.barriers.items()
        if demand.alive(n)
    ]
