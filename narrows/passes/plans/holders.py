"""What holds channels that a plan masks: the operators because of which they stay.

`holders` follows channels from the layer that makes them along what liveness found to be read
(`narrows.ir.liveness`), up to the next layers, and returns where each way ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from torch import fx

from narrows.ir.channels import Facts
from narrows.ir.labels import Bools, some
from narrows.ir.liveness import Demand
from narrows.ir.meta import where
from narrows.ir.ops import table
from narrows.ir.ops.flow import Read


@dataclass(frozen=True)
class Holder:
    """An operator because of which channels stay.

    Attributes:
        node: The operator.
        operand: The tensor that it reads them of; the operator itself if it keeps its own results.
        met: The tensors that it computes on together with them, if those are why: its result is not
            constant where the channels are.
    """

    node: fx.Node
    operand: fx.Node
    met: tuple[fx.Node, ...] = ()

    @property
    def place(self) -> str:
        """The name that a note on what it holds stands under."""
        return self.operand.name if self.node.op == "output" else self.node.name


# Why an operator needs channels, by the reason of the note that stands there.
NEEDS: Mapping[str, str] = {
    "statistics": "{} needs them for its statistics",
    "groups": "the groups of {} need equal widths",
    "shape": "{} needs something to sum over",
    "padding": "{} adds another amount for them at the padded border",
    "ragged": "{} would not be rectangular without them",
    "shared": "another use of the weight of {} needs them",
}


def holders(demand: Demand, maker: fx.Node, labels: Bools) -> list[Holder]:
    """Return what holds some of the channels that a node makes, outputs of the model first.

    Args:
        demand: The liveness of the masked program.
        maker: The node.
        labels: The node's labels that stay.
    """
    found = dict.fromkeys(_ways(demand, maker, labels))
    return sorted(found, key=lambda h: h.node.op != "output")


def said(holder: Holder, facts: Facts, noted: Mapping[str, str]) -> str:
    """Return how a holder holds channels.

    Args:
        holder: The holder.
        facts: The analysis that it was found with.
        noted: By node name the reason of a note that channels stay there.
    """
    node = holder.node
    if node.op == "output":
        reads, slots = facts.flows[node].reads, facts.flows[node].facts
        states = [s.name for i, s in slots.items() if reads[i].operand is holder.operand]
        plain = [r for i, r in enumerate(reads) if i not in slots and r.operand is holder.operand]
        if states and not plain:
            return f"the next call reads them of the state {states[0]}"
        return "the model's output holds them"
    if barrier := facts.flows[node].barrier:
        return f"{where(node)} is a barrier: {barrier}"
    if holder.met:
        met = " and ".join(_named(facts, n) for n in holder.met)
        if table.concatenates(node):
            return f"{node.name} joins {met} to them"
        return f"they meet {met} in {node.name}"
    row = table.find(node)
    if node.name not in noted and row is not None and row.shared(facts, node) is not None:
        return f"{node.name} computes with all of them"
    return NEEDS.get(noted.get(node.name, ""), "{} computes with them").format(node.name)


def forced(facts: Facts, maker: fx.Node, noted: Mapping[str, str]) -> Holder | None:
    """Return what a rewrite could not do without: the first reader of what a node makes that a note
    says this of."""
    readers = _readers(facts)
    found, queue = {maker}, [maker]
    while queue:
        node = queue.pop(0)
        if noted.get(node.name) in ("shared", "ragged"):
            return Holder(node, node)
        if node is maker or table.contraction(facts, node) is None:
            new = [u for u, _, _ in readers.get(node, ()) if u not in found]
            found.update(new)
            queue += new
    return None


def source_of(facts: Facts, node: fx.Node, noted: Mapping[str, str]) -> Holder | None:
    """Return what holds channels before they come to a node: the last that a note says it of."""
    while node.name not in noted:
        reads = facts.flows[node].reads
        if len(reads) != 1 or reads[0].source is None:
            return None
        node = reads[0].operand
    return Holder(node, node)


# ------------------------------------------------------------------ the ways that channels go


def _ways(demand: Demand, maker: fx.Node, labels: Bools) -> Iterator[Holder]:
    facts, readers = demand.facts, _readers(demand.facts)
    carried = {maker: labels & demand.needed(maker)}
    awake = {maker: np.zeros(len(labels), dtype=bool)}  # not constant any more
    joined: dict[fx.Node, Holder] = {}  # what was put side by side with them last
    for node in facts.program.graph.nodes:
        mine = carried.get(node)
        if mine is None:
            continue
        asked = np.zeros(len(mine), dtype=bool)
        for user, slot, read in readers.get(node, ()):
            taken = mine & demand.required(user, slot)
            asked |= taken
            if user.op == "output" or facts.flows[user].barrier:
                yield from [Holder(user, node)] if some(taken) else []
                continue
            on = _onward(demand, user, read, taken)
            ends = taken if on is None else taken & ~read.reached(on, len(mine))
            if some(ends & ~awake[node]):
                sums = read.pairs is not None and node in joined
                yield joined[node] if sums else Holder(user, node)
            if on is None or not some(on):
                continue
            assert read.source is not None
            known = facts.value(node).known() & ~awake[node]
            woken = on & known[read.source] & ~facts.value(user).known()
            met = Holder(user, node, _met(facts, user, node))
            if some(woken):
                yield met
            if table.concatenates(user) and met.met:
                joined[user] = met
            elif node in joined:
                joined[user] = joined[node]
            woken |= on & awake[node][read.source]
            carried[user] = carried[user] | on if user in carried else on
            awake[user] = awake[user] | woken if user in awake else woken
        if some(mine & ~asked):
            yield Holder(node, node)


def _readers(facts: Facts) -> dict[fx.Node, list[tuple[fx.Node, int, Read]]]:
    found: dict[fx.Node, list[tuple[fx.Node, int, Read]]] = {}
    for user, flow in facts.flows.items():
        for slot, read in enumerate(flow.reads):
            found.setdefault(read.operand, []).append((user, slot, read))
    return found


def _onward(demand: Demand, user: fx.Node, read: Read, taken: Bools) -> Bools | None:
    """Return which needed labels of a reader are the channels; ``None`` where it sums over them."""
    if read.source is None:
        return None
    return demand.needed(user) & (read.source >= 0) & taken[read.source]


def _met(facts: Facts, user: fx.Node, node: fx.Node) -> tuple[fx.Node, ...]:
    return tuple(dict.fromkeys(r.operand for r in facts.flows[user].reads if r.operand is not node))


def _named(facts: Facts, node: fx.Node) -> str:
    """Return a name for a tensor: the model's input that it holds as it is, or what makes it."""
    source = node
    while table.keeps_all(source) and facts.flows[source].reads:
        source = facts.moved_operand(source)
    if source.op != "placeholder":
        return node.name
    states = {s.name for s in facts.program.states}
    kind = "state" if source.name in states else "model's input"
    return f"the {kind} {source.name}"


__all__ = ["Holder", "forced", "holders", "said", "source_of"]
