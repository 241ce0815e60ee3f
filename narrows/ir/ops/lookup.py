"""Rows of a table by index: embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from narrows.ir.held import Held
from narrows.ir.labels import channels
from narrows.ir.meta import shape_of
from narrows.ir.ops.args import arguments
from narrows.ir.ops.barrier import barrier_flow
from narrows.ir.ops.flow import Flow, Read
from narrows.ir.ops.protocols import Builder, Channels, Needs
from narrows.ir.ops.row import Row, Shared, WeightAxis


@dataclass(frozen=True, kw_only=True)
class Lookup(Row):
    """``embedding``: rows of a table by index; the table's columns are the channels."""

    kind = "lookup"
    makes_channels = True
    work_kind: str = "copy"

    def flow(self, facts: Channels, node: fx.Node) -> Flow:
        args = arguments(node)
        if not facts.is_free(args["weight"]):
            return barrier_flow(facts, node, "its table is computed from the inputs")
        shape = shape_of(node)
        value = channels(shape, len(shape) - 1)
        data = facts.data(args["weight"])
        same = (data == data[:1]).all(0).numpy()
        value.const = np.where(same, data[0].double().numpy(), np.nan)
        reads = () if facts.is_free(args["indices"]) else (Read(args["indices"], couples=False),)
        return Flow(value, reads)

    def weight_axes(self, facts: Channels, node: fx.Node) -> Iterator[WeightAxis]:
        weight = arguments(node)["weight"]
        if weight.op == "get_attr" and not facts.flows[node].barrier:
            yield WeightAxis(weight, 1, "out", node, np.arange(facts.value(node).count))

    def shared(self, facts: Channels, node: fx.Node) -> Shared | None:
        for read in facts.flows[node].reads:
            labels = np.arange(facts.value(read.operand).count)
            return Shared(
                read.operand, labels, np.zeros_like(labels), "they are indices into a table"
            )
        return None

    def demand(self, demand: Needs, node: fx.Node) -> None:
        demand.use_weight(arguments(node)["weight"], node, {1: demand.needed(node)})
        for slot, read in enumerate(demand.facts.flows[node].reads):
            demand.require(node, slot, np.ones(demand.facts.value(read.operand).count, dtype=bool))

    def rewrite(self, rewriter: Builder, node: fx.Node) -> Held:
        args = arguments(node)
        columns = rewriter.made(node)
        changes: dict[str, Any] = {"weight": rewriter.weight(args["weight"], {1: columns})}
        reads = rewriter.facts.flows[node].reads
        changes["indices"] = (
            rewriter.operand(node, 0).node if reads else rewriter.plain(args["indices"])
        )
        shape = (*shape_of(node)[:-1], len(columns))
        places = torch.from_numpy(columns).view([*[1] * (len(shape) - 1), -1])
        return rewriter.emit(node, changes, places, shape)
