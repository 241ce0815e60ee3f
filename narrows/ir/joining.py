"""`Joined`: which channels of a program's tensors belong together, and why some of them stay.

It walks the graph once and joins what rows say is the same channel; `settle` then follows what that
entails. `narrows.ir.couplings` sorts the result into couplings.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import fx

from narrows.ir.channels import Facts
from narrows.ir.labels import Bools, Ints, Value
from narrows.ir.ops import table
from narrows.ir.ops.contract import Contract
from narrows.ir.ops.flow import Flow, Read
from narrows.ir.ops.row import Row, WeightAxis


class Joined:
    """Global channels, and which of them belong together.

    Every label of every tensor is given a *channel*: a fresh one where it is made, its operand's
    where it is passed on, so that only operators with several operands have anything to join.

    Attributes:
        channels: Per node the channel of each of its labels.
        component: Per channel the smallest channel of its component.
        axes: Every weight axis that follows channels, with the node that reads the weight.
    """

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.channels: dict[fx.Node, Ints] = {}
        self.axes: list[WeightAxis] = []
        self._count = 0
        self._edges: list[tuple[Ints, Ints]] = []
        self._barriers: list[tuple[Ints, str]] = []
        self._partial: list[tuple[Ints, Ints]] = []
        self._spread: list[tuple[Ints, Ints, str]] = []
        self._sets: list[tuple[Ints, Ints, str]] = []
        self._heads: list[list[tuple[Ints, Ints]]] = []
        self._grids: dict[fx.Node, Value] = {}
        for node in facts.program.graph.nodes:
            self._visit(node)
        self.component = np.arange(self._count)

    # ------------------------------------------------------------------ one walk

    def _visit(self, node: fx.Node) -> None:
        flow = self.facts.flows[node]
        value = flow.value
        if node.op in ("placeholder", "output") and self._states(node, flow):
            return
        if flow.barrier or node.op in ("placeholder", "output"):
            reason = f"{node.name}: {flow.barrier}" if flow.barrier else _END[node.op]
            for read in flow.reads:
                self._block(self.channels[read.operand], reason)
            if isinstance(value, Value) and not value.free:
                self.channels[node] = self._fresh(value.count)
                self._block(self.channels[node], reason)
            return
        if not isinstance(value, Value) or value.free:
            return
        row = table.find(node)
        assert row is not None
        own = self.channels[node] = self._passed(node, row, value, flow.reads)
        for read in flow.reads:
            if read.pairs is not None:
                self._partial.append(
                    (own[read.pairs[0]], self.channels[read.operand][read.pairs[1]])
                )
            elif self._broadcasts(row, value, read):
                inner = self.channels[read.operand][read.source]
                self._spread.append(
                    (own, inner, f"{node.name}: they are spread over other channels")
                )
        self._rules(node, row)
        if not row.rearranges:
            for n in (node, *(r.operand for r in flow.reads)):
                if n not in self._grids and len(self.facts.value(n).axes) > 1:
                    self._grids[n] = self.facts.value(n)

    def _states(self, node: fx.Node, flow: Flow) -> bool:
        """Join what is returned of a state to what the next call takes; whether that is all that an
        input or output is."""
        if node.op == "placeholder":
            if all(s.name != node.name for s in self.facts.program.states):
                return False
            value = self.facts.value(node)
            self.channels[node] = self._fresh(value.count)
            if len(value.axes) > 1:
                self._grids[node] = value
            return True
        for slot, read in enumerate(flow.reads):
            state, channels = flow.facts.get(slot), self.channels[read.operand]
            if state is None:
                self._block(channels, _END["output"])
                continue
            holder, inner, outer = self.facts.tied(state)
            self._join(self.channels[holder][inner], channels[outer])
        return True

    def _passed(self, node: fx.Node, row: Row, value: Value, reads: Sequence[Read]) -> Ints:
        """Return the channel of each label of a node."""
        own: Ints | None = None
        for read in reads:
            if read.source is None or not read.couples or self._broadcasts(row, value, read):
                continue
            base = self.channels[read.operand]
            if own is None and is_identity(read.source, len(base)):
                own = base
                continue
            own = self._merged(own, read.source, base)
        if own is None:
            return self._fresh(value.count)
        made = np.flatnonzero(own < 0)
        if len(made):
            own[made] = self._fresh(len(made))
        return own

    def _merged(self, own: Ints | None, source: Ints, base: Ints) -> Ints:
        """Return ``own`` with the channels of one more operand, joined where there are some
        already."""
        there = source >= 0
        if there.all():
            found = base[source]
            if own is None:
                return found
            if (own >= 0).all():
                self._join(own, found)
                return own
        own = np.full(len(source), -1) if own is None else own.copy()
        places = np.flatnonzero(there)
        found = base[source[places]]
        old = own[places]
        taken = old >= 0
        self._join(old[taken], found[taken])
        own[places[~taken]] = found[~taken]
        return own

    def _broadcasts(self, row: Row, value: Value, read: Read) -> bool:
        """Whether an element-wise operand is repeated along an axis on which the result has
        channels."""
        if not row.broadcasts or not read.couples:
            return False
        operand = self.facts.value(read.operand)
        if value.count <= operand.count:
            return False
        lead = value.tensor.dim() - operand.tensor.dim()
        return any(a < lead or operand.tensor.shape[a - lead] == 1 for a in value.axes)

    def _rules(self, node: fx.Node, row: Row) -> None:
        """Note what a row says beside its reads: joins, sets, weight axes."""
        for a, labels, b, others in row.joins(self.facts, node):
            self._join(self.channels[a][labels], self.channels[b][others])
        shared = row.shared(self.facts, node)
        if shared is not None:
            reason = f"{node.name}: {shared.reason}" if shared.reason else ""
            self._sets.append((self.channels[shared.holder][shared.labels], shared.sets, reason))
        heads = [
            (self.channels[n][labels], head) for n, labels, head in row.heads(self.facts, node)
        ]
        self._heads += [heads] if heads else []
        made = False
        for axis in row.weight_axes(self.facts, node):
            self.axes.append(axis)
            made |= axis.role == "out"
        if isinstance(row, Contract) and not made and row.contraction(self.facts, node) is not None:
            self._block(self.channels[node], f"{node.name}: its weight is computed from others")

    def _fresh(self, count: int) -> Ints:
        self._count += count
        return np.arange(self._count - count, self._count)

    def _join(self, a: Ints, b: Ints) -> None:
        if a is not b and len(a):
            self._edges.append((a, b))

    def _block(self, channels: Ints, reason: str) -> None:
        self._barriers.append((channels, reason))

    # ------------------------------------------------------------------ to a fixed point

    def settle(self) -> None:
        """Join until nothing more follows; then say which components stay and why."""
        self._share_weights()
        single = [s for s in self._sets if not self._join_sets(*s[:2])]
        self._union()
        while True:
            self._match_heads()
            self._union()
            for node, value in self._grids.items():
                self._straighten(node, value)
            self._union()
            for out, inner, *_ in (*self._partial, *self._spread):
                self._follow(out, inner)
            if not self._union():
                break
        for channels, _, reason in single:
            if reason and len(np.unique(self.component[channels])) > 1:
                self._block(channels, reason)
        for out, inner, reason in self._spread:
            self._block(inner[self.component[out] != self.component[inner]], reason)

    def _share_weights(self) -> None:
        """Join what one weight makes, or sums over, at several places."""
        first: dict[tuple[fx.Node, int], Ints] = {}
        for axis in self.axes:
            if axis.role == "with":
                continue
            channels = self.channels[axis.holder][axis.labels]
            known = first.setdefault((axis.weight, axis.axis), channels)
            self._join(known, channels)

    def _union(self) -> bool:
        """Merge the components that the new edges join; return whether there were any."""
        if not self._edges:
            return False
        a = self.component[np.concatenate([e[0] for e in self._edges])]
        b = self.component[np.concatenate([e[1] for e in self._edges])]
        self._edges.clear()
        parent, changed = self.component, False
        while True:
            apart = a != b
            if not apart.any():
                return changed
            changed = True
            a, b = a[apart], b[apart]
            np.minimum.at(parent, np.maximum(a, b), np.minimum(a, b))
            while not np.array_equal(up := parent[parent], parent):
                parent = up
            self.component = parent
            a, b = parent[a], parent[b]

    def _join_sets(self, channels: Ints, sets: Ints) -> bool:
        """Join each of several sets; return whether there are several."""
        if not len(channels):
            return False
        first = np.full(int(sets.max(initial=0)) + 1, -1)
        first[sets[::-1]] = channels[::-1]
        one = channels[sets == sets[0]]
        if len(one) == len(channels) or np.isin(channels, one).all():
            return False
        self._join(first[sets], channels)
        return True

    def _match_heads(self) -> None:
        """Where a weight can end one head of one factor of a product, it ends in all of them."""
        if not self._heads:
            return
        made = np.zeros(self._count, dtype=bool)
        for axis in self.axes:
            if axis.role == "out":
                made[self.component[self.channels[axis.holder][axis.labels]]] = True
        for tensors in self._heads:
            for channels, head in tensors:
                members = self.component[channels]
                low = np.full(int(head[-1]) + 1, self._count)
                high = np.full(int(head[-1]) + 1, -1)
                np.minimum.at(low, head, members)
                np.maximum.at(high, head, members)
                whole = (low == high) & made[np.minimum(low, self._count - 1)]
                for others, where in tensors if whole.any() else ():
                    self._join(low[where[whole[where]]], others[whole[where]])

    def _straighten(self, node: fx.Node, value: Value) -> None:
        """Keep a tensor with channels on several axes rectangular, whichever of them go."""
        grid = self.component[self.channels[node]][value.tensor.numpy()]
        for axis in value.axes:
            lines = np.moveaxis(grid, axis, 0).reshape(grid.shape[axis], -1)
            if (lines == lines[:, :1]).all():
                return
        lines = np.moveaxis(grid, value.axes[-1], 0).reshape(grid.shape[value.axes[-1]], -1)
        self._join(np.broadcast_to(lines[:, :1], lines.shape).flatten(), lines.flatten())

    def _follow(self, out: Ints, inner: Ints) -> None:
        """Join results with what they are made of, where each is made of one component and of all
        of it.

        The sum of two branches dies with them; the sum over all channels does not die with one of
        them.
        """
        out, inner = self.component[out], self.component[inner]
        both = self._alone(out, inner) & self._alone(inner, out)
        self._join(out[both], inner[both])

    def _alone(self, a: Ints, b: Ints) -> Bools:
        """Return which pairs have an ``a`` that is never paired with another ``b``."""
        partner, several = np.empty(self._count, dtype=np.int64), np.zeros(self._count, dtype=bool)
        partner[a] = b
        several[a[partner[a] != b]] = True
        return ~several[a]

    def reasons(self) -> list[str]:
        """Return per component, in the order of their first channels, why it stays whole, or ""."""
        number = np.full(self._count, -1)
        for i, (channels, _) in reversed(list(enumerate(self._barriers))):
            number[self.component[channels]] = i
        roots = np.flatnonzero(self.component == np.arange(self._count))
        return [self._barriers[i][1] if i >= 0 else "" for i in number[roots].tolist()]


_END = {"placeholder": "part of a model input", "output": "part of a model output"}


def is_identity(source: Ints, count: int) -> bool:
    """Whether ``source`` is all of ``count`` channels in their order."""
    return len(source) == count and np.array_equal(source, np.arange(count))
