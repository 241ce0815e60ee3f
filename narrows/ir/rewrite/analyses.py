"""What is found out about a pruning: its channels, and which of them its choices need."""

from __future__ import annotations

import numpy as np

from narrows.ir.channels import Facts, analyse
from narrows.ir.choices import Choices
from narrows.ir.labels import Value
from narrows.ir.liveness import Demand
from narrows.ir.ops import table
from narrows.ir.program import Pruning


def facts_of(pruning: Pruning) -> Facts:
    """Return the analysis of the unpruned program, made at most once for all choices."""
    return pruning.memo("facts", lambda: analyse(pruning.program, pruning.ignored))


def demand_of(pruning: Pruning) -> Demand:
    """Return the liveness of what is chosen, made once for forms that only order differs."""
    known: list[tuple[Choices, Demand]] = pruning.memo("demands", list)
    for choices, demand in known:
        if choices.holds_like(pruning.choices):
            return demand
    nodes = {node.name: node for node in pruning.program.graph.nodes}
    forced = {nodes[n]: mask for n, mask in pruning.choices.forced.items()}
    columns = {nodes[n]: mask for n, mask in pruning.choices.columns.items()}
    known.append((pruning.choices, Demand(facts_of(pruning), forced, columns)))
    return known[-1][1]


def everything(facts: Facts) -> Choices:
    """Return the choice of a program as it is: channels that count as zero have zero weights."""
    held, columns = {}, {}
    for node, flow in facts.flows.items():
        if not isinstance(flow.value, Value) or flow.value.free:
            continue
        held[node.name] = np.ones(flow.value.count, dtype=bool)
        c = table.contraction(facts, node)
        if c is not None and isinstance(flow.facts, tuple):
            columns[node.name] = np.ones(c.inputs, dtype=bool)
    return Choices(held, columns)
