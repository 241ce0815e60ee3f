"""The row of every operator that has none: nothing can be removed through it, and the report says
so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from narrows.ir.held import Held
from narrows.ir.labels import Value, opaque
from narrows.ir.meta import op_name, shape_of
from narrows.ir.ops.flow import Flow, Read
from narrows.ir.ops.protocols import Builder, Channels
from narrows.ir.ops.row import Row


@dataclass(frozen=True, kw_only=True)
class Barrier(Row):
    """An operator that needs its operands whole.

    Attributes:
        reason: Why, for rows that are barriers on purpose.
    """

    kind = "barrier"
    work_kind: str = "copy"
    reason: str = ""

    def flow(self, facts: Channels, node: fx.Node) -> Flow:
        reads = tuple(
            Read(n, couples=False)
            for n in node.all_input_nodes
            if isinstance(facts.flows[n].value, Value) and not facts.flows[n].value.free
        )
        shape = shape_of(node)
        value: Any = None if shape is None else opaque(shape)
        why = self.reason or f"{op_name(node)} has no row in the op table"
        return Flow(value, reads, why)

    def rewrite(self, rewriter: Builder, node: fx.Node) -> Held:
        return rewriter.whole(node)


BARRIER = Barrier(target=None, summary="needs its operands whole")


def barrier_flow(facts: Channels, node: fx.Node, why: str) -> Flow:
    """Return the flow of a node through which nothing can be removed."""
    flow = BARRIER.flow(facts, node)
    return Flow(flow.value, flow.reads, why)
