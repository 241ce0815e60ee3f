"""The half of the rewriter that follows labels: what each operand holds and what each node
emits."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from narrows.ir.channels import Facts
from narrows.ir.graph import add_node
from narrows.ir.labels import Bools, Ints, Value, is_count, match, runs, some
from narrows.ir.liveness import Demand
from narrows.ir.ops import table
from narrows.ir.ops.args import arguments, changed, invoke
from narrows.ir.ops.layout import Layout
from narrows.ir.ops.selection import Item, Selection
from narrows.ir.program import Meta, shape_of
from narrows.ir.rewrite.aligned import aligned
from narrows.ir.rewrite.chains import collapse, replay
from narrows.ir.rewrite.choices import Choices
from narrows.ir.rewrite.emitter import Emitter
from narrows.ir.rewrite.held import Held, RaggedError

aten = torch.ops.aten


class Rewriter(Emitter):
    """Builds the new program; the op table's rows call it.

    Attributes:
        demand: The liveness of the old program.
        order: Per name of a node that makes channels, the rank of each of its labels.
        failures: What could not be emitted and must be kept more of.
        virtual: Layout nodes that have no tensor of their own, each with the reason.
        given: While a chain is emitted anew, what its nodes are to work on.
    """

    def __init__(self, facts: Facts, demand: Demand, choices: Choices | None = None) -> None:
        super().__init__(facts)
        self.demand = demand
        self.choices = choices or Choices()
        self.failures: list[RaggedError] = []
        self.virtual: dict[fx.Node, RaggedError] = {}
        self.given: dict[fx.Node, tuple[Held, Bools]] = {}
        self._held: dict[fx.Node, Held] = {}
        self._delivered: dict[tuple[Any, ...], Held] = {}
        self._calls: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
        self._positions: dict[tuple[int, int], tuple[Tensor, dict[int, Ints] | None]] = {}

    # ------------------------------------------------------------------ the walk

    def run(self) -> None:
        """Emit every needed node; what fails is in ``failures`` afterwards."""
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node)
            elif node.op == "output":
                self._output(node)
            elif (
                node.op == "call_function"
                and self.demand.alive(node)
                and not self.facts.is_free(node)
            ):
                self._node(node)

    def _placeholder(self, node: fx.Node) -> None:
        new = self.graph.placeholder(node.name)
        new.meta = dict(node.meta)
        self._plain[node] = new
        if isinstance(self.facts.flows[node].value, Value):
            value = self.facts.value(node)
            self._held[node] = Held(new, value.tensor, value.shape)

    def _output(self, node: fx.Node) -> None:
        def final(n: fx.Node) -> fx.Node:
            if isinstance(self.facts.flows[n].value, Value) and not self.facts.is_free(n):
                return self.entire(node, n).node
            return self.plain(n)

        try:
            new = self.graph.output(map_arg(node.args[0], final))
            new.meta = dict(node.meta)
        except RaggedError as failure:
            self.failures.append(failure)

    def _fail(self, node: fx.Node, failure: RaggedError) -> None:
        """Record what must be kept and go on as if nothing had gone, to find all failures in one
        round."""
        behind = [r.operand for r in self.facts.flows[node].reads if r.operand in self.virtual]
        self.failures += [self.virtual[n] for n in behind] or [failure]
        value = self.facts.flows[node].value
        if isinstance(value, Value):
            stub = self.graph.create_node("get_attr", "stub")
            stub.meta = dict(node.meta)
            self._held[node] = Held(stub, value.tensor, value.shape)

    def _node(self, node: fx.Node) -> None:
        row = table.find(node) or table.BARRIER
        if self.facts.flows[node].barrier:
            row = table.BARRIER
        try:
            self._held[node] = row.rewrite(self, node)
            return
        except RaggedError as failure:
            first = failure
        if not isinstance(row, Layout | Selection | Item):
            self._fail(node, first)
            return
        for attempt in (replay, collapse):
            try:
                self._held[node] = attempt(self, node, self.demand.needed(node))
                return
            except RaggedError as failure:
                first = failure if failure.mask is not None else first
        self.virtual[node] = first

    # ------------------------------------------------------------------ what rows ask

    def need(self, node: fx.Node) -> Bools:
        """Return the labels that ``node`` is to hold."""
        given = self.given.get(node)
        return self.demand.needed(node) if given is None else given[1]

    def made(self, node: fx.Node) -> Ints:
        """Return the labels that ``node`` is to make, in the order in which it makes them."""
        labels = np.flatnonzero(self.need(node))
        rank = self.choices.order.get(node.name)
        return labels if rank is None else labels[np.argsort(rank[labels], kind="stable")]

    def required(self, node: fx.Node, slot: int) -> Bools:
        """Return the labels that ``node`` reads of an operand."""
        return self.demand.required(node, slot)

    def operand(self, node: fx.Node, slot: int, exact: bool = False) -> Held:
        """Return an operand that holds the labels that ``node`` reads.

        It may hold more where that spares a copy: channels that stay for another reason and that
        nobody reads. With ``exact`` it holds no others, as operators need that mix channels, nor
        where the node's columns were chosen.
        """
        given = self.given.get(node)
        if given is not None and slot == 0:
            return given[0]
        operand = self.facts.flows[node].reads[slot].operand
        held, mask = self.held(operand), self.required(node, slot)
        # What an input holds was not asked for; what anything else holds beyond need stays for a
        # reason.
        exact = exact or node.name in self.choices.columns
        if not exact and operand.op != "placeholder" and self.demand.only_reader(node, slot):
            return held
        return self.deliver(operand, mask, exact=False)

    def held(self, node: fx.Node) -> Held:
        """Return what the new program holds of an old node."""
        if node in self.virtual:
            raise self.virtual[node]
        if node not in self._held:
            raise RaggedError(node, None)
        return self._held[node]

    def deliver(self, node: fx.Node, mask: Bools, exact: bool = True) -> Held:
        """Return ``node`` restricted to the labels ``mask``, by a slice or a gather if it holds
        more.

        Channels on several axes can only be cut to a block; without ``exact`` the block may hold
        more.
        """
        held = self.held(node)
        kept = mask[held.labels.numpy()]
        if not some(~kept):
            return held
        key = (node, mask.tobytes())
        if key in self._delivered:
            return self._delivered[key]
        result = held
        for axis in self.facts.value(node).axes:
            line = kept.reshape(-1)
            if kept.size != kept.shape[axis]:
                line = kept.any(tuple(a for a in range(kept.ndim) if a != axis))
            index = np.flatnonzero(line)
            kept = kept.take(index, axis)
            result = self.gather(result, axis, index)
        if kept.size == 0 or (exact and some(~kept)):
            raise RaggedError(node, mask)
        self._delivered[key] = result
        return result

    def entire(self, user: fx.Node, node: fx.Node) -> Held:
        """Return ``node`` with every channel in its original place, as barriers and outputs need
        it."""
        held, value = self.held(node), self.facts.value(node)
        if torch.equal(held.labels, value.tensor):
            return held
        if len(value.axes) == 1:
            (axis,) = value.axes
            index = match(held.labels.flatten().numpy(), value.tensor.flatten().numpy())
            if index is not None:
                return self.gather(held, axis, index)
        raise RaggedError(node, None)

    def whole(self, node: fx.Node) -> Held:
        """Emit a barrier: the operator as it was, on whole operands."""
        target = node.args[0] if node.target is operator.getitem else node
        assert isinstance(target, fx.Node)

        def operand(n: fx.Node) -> fx.Node:
            if isinstance(self.facts.flows[n].value, Value) and not self.facts.is_free(n):
                return self.entire(node, n).node
            return self.plain(n)

        if target not in self._plain or target is node:
            args, kwargs = map_arg((target.args, target.kwargs), operand)
            self._plain[target] = self._create(target, args, kwargs)
        new = self._plain[target]
        if target is not node:
            new = self._create(node, (new, node.args[1]), {})
        value = self.facts.flows[node].value
        if not isinstance(value, Value):
            return Held(new, torch.zeros(()), ())
        return self._tagged(node, new, value.tensor, value.shape)

    def emit(
        self, node: fx.Node, changes: dict[str, Any], labels: Tensor, shape: tuple[int, ...]
    ) -> Held:
        """Emit ``node`` with some arguments replaced by new nodes; the rest is copied."""
        args, kwargs = changed(node, changes)
        args, kwargs = map_arg((args, kwargs), self._copied)
        return self._tagged(node, self._create(node, args, kwargs), labels, shape)

    def emit_mapped(
        self,
        node: fx.Node,
        replaced: dict[fx.Node, fx.Node],
        labels: Tensor,
        shape: tuple[int, ...],
    ) -> Held:
        """Emit ``node`` with operands replaced one by one, wherever they stand among the
        arguments."""
        args, kwargs = map_arg(
            (node.args, node.kwargs), lambda n: replaced[n] if n in replaced else self._copied(n)
        )
        return self._tagged(node, self._create(node, args, kwargs), labels, shape)

    def item(
        self, node: fx.Node, parent: fx.Node, x: Held, labels: Tensor, shape: tuple[int, ...]
    ) -> Held:
        """Emit ``parent`` on ``x`` once and ``node`` as one of its results."""
        key = (parent, x.node)
        if key not in self._calls:
            args, kwargs = changed(parent, {next(iter(arguments(parent))): x.node})
            args, kwargs = map_arg((args, kwargs), self._copied)
            self._calls[key] = self._create(parent, args, kwargs)
        return self._tagged(
            node, self._create(node, (self._calls[key], node.args[1]), {}), labels, shape
        )

    def retag(self, node: fx.Node, held: Held, labels: Tensor) -> Held:
        """Return ``held`` under the labels of ``node``, which needs no operator of its own."""
        return Held(held.node, labels, held.shape)

    def retag_node(self, new: fx.Node, labels: Tensor, shape: tuple[int, ...]) -> Held:
        """Return a new node under other labels."""
        return Held(new, labels, shape)

    def squeezed(self, node: fx.Node, held: Held, labels: Tensor, axis: int) -> Held:
        """Emit the removal of an axis of size 1."""
        new = self.graph.create_node(
            "call_function", aten.squeeze.dim, (held.node, axis), {}, name=node.name
        )
        shape = (*held.shape[:axis], *held.shape[axis + 1 :])
        return self._tagged(node, new, labels.squeeze(axis), shape)

    def gather(self, held: Held, axis: int, index: Ints) -> Held:
        """Emit the channels at ``index`` of ``axis``: nothing, a slice, or an index_select."""
        if len(index) == held.shape[axis] and is_count(index):
            return held
        key = (held.node, axis, index.tobytes())
        if key in self._delivered:
            return self._delivered[key]
        name = f"{held.node.name}_take"
        span = runs(index) if len(index) else None
        if span is not None:
            start, stop, step = span
            args: tuple[Any, ...] = (held.node, axis, start, stop, step)[: 5 if step > 1 else 4]
            new = add_node(self.graph, "call_function", aten.slice.Tensor, args, name=name)
        else:
            place = self.constant(f"{name}_index", torch.from_numpy(index.copy()))
            args = (held.node, axis, place)
            new = add_node(self.graph, "call_function", aten.index_select.default, args, name=name)
        new.meta = dict(held.node.meta)
        labels = held.labels
        if labels.shape[axis] > 1:
            labels = labels.index_select(axis, torch.from_numpy(index))
        shape = tuple(len(index) if a == axis else s for a, s in enumerate(held.shape))
        Meta(new).shape = shape
        result = self._delivered[key] = Held(new, labels, shape)
        return result

    def places(self, node: fx.Node, held: Held, axis: int) -> Ints:
        """Return per original index of ``axis`` the index it has now, -1 where it is gone."""
        source = self.facts.value(node)
        old = source.tensor.movedim(axis, -1).reshape(-1, source.tensor.shape[axis])[0]
        new = held.labels.movedim(axis, -1).reshape(-1, held.labels.shape[axis])[0]
        found = match(old.numpy(), new.numpy())
        if found is None:
            raise RaggedError(node, None)
        result = np.full(source.shape[axis], -1)
        result[found] = np.arange(len(found))
        return result

    def inward(self, node: fx.Node, held: Held) -> Tensor:
        """Return the labels of a layout node's operand as labels of the node itself."""
        read = self.facts.flows[node].reads[0]
        assert read.source is not None
        back = np.full(self.facts.value(read.operand).count, -1)
        back[read.source] = np.arange(len(read.source))
        return torch.from_numpy(back)[held.labels]

    def preview(
        self, node: fx.Node, changes: dict[str, Any], free: dict[fx.Node, Tensor] | None = None
    ) -> Any:
        """Run the node's operator on labels given in place of arguments."""
        args, kwargs = changed(node, changes)
        free = free or {}
        args, kwargs = map_arg((args, kwargs), lambda n: free[n] if n in free else Meta(n).size)
        return invoke(node.target, args, kwargs)

    def trim(self, labels: Tensor, value: Value) -> Tensor:
        """Cut the axes along which ``value`` never changes to size 1."""
        for axis in range(labels.dim()):
            if value.tensor.shape[axis] == 1 and labels.shape[axis] > 1:
                labels = labels.narrow(axis, 0, 1)
        return labels

    def ragged(self, node: fx.Node, mask: Bools | None = None) -> RaggedError:
        """Return the error that says the needed channels of ``node`` do not fill a tensor."""
        return RaggedError(node, mask)

    def narrowed(self, node: fx.Node, labels: Tensor) -> bool:
        """Whether ``labels`` differ from what the node held originally."""
        return not torch.equal(labels, self.facts.value(node).tensor)

    def positions(self, node: fx.Node, labels: Tensor) -> dict[int, Ints] | None:
        """Return per varying axis the original index at each new one, or ``None`` if they are
        entangled."""
        value = self.facts.value(node)
        key = (id(value.tensor), id(labels))
        if key not in self._positions:  # with the labels, so that no others get their identity
            self._positions[key] = (labels, self._placed(value, labels))
        return self._positions[key][1]

    @staticmethod
    def _placed(value: Value, labels: Tensor) -> dict[int, Ints] | None:
        old = value.tensor
        if not value.axes:
            return {}
        axis = value.axes[0]
        if len(value.axes) == 1 and value.natural and labels.shape[axis] == labels.numel():
            return {axis: labels.reshape(-1).numpy()}
        if torch.equal(old, labels):
            return {a: np.arange(old.shape[a]) for a in value.axes}
        found = match(old.flatten().numpy(), labels.flatten().numpy())
        if found is None:
            return None
        grids = np.unravel_index(found, tuple(old.shape))
        result = {}
        for axis in value.axes:
            grid = np.moveaxis(grids[axis].reshape(tuple(labels.shape)), axis, 0)
            line = grid.reshape(grid.shape[0], -1)
            if (line != line[:, :1]).any():
                return None
            result[axis] = line[:, 0]
        return result

    def aligned(
        self, node: fx.Node, skip_axis: int | None = None
    ) -> tuple[list[fx.Node], Tensor, tuple[int, ...]]:
        """Return the operands of an element-wise node with their channels in step.

        Returns:
            The new operand per read, the result's labels and its shape (with ``skip_axis`` set to
            1).
        """
        return aligned(self, node, skip_axis)

    # ------------------------------------------------------------------ weights

    def sliced_free(self, node: fx.Node, operand: fx.Node, labels: Tensor) -> fx.Node:
        """Return an element-wise operand made of weights, restricted like the result."""
        rank, own = self.facts.value(node).tensor.dim(), len(shape_of(operand))
        wide = {
            a
            for a in self.facts.value(node).axes
            if a >= rank - own and shape_of(operand)[a - rank + own] > 1
        }
        if not wide or not self.narrowed(node, labels):
            return self.plain(operand)
        where = self.positions(node, labels)
        if where is None:
            raise RaggedError(node, None)
        return self.free(operand, {a - rank + own: where[a] for a in wide})

    def _shape_source(self, node: fx.Node) -> fx.Node:
        value = self.facts.flows[node].value
        if node.op != "placeholder" and isinstance(value, Value) and not value.free:
            return self.held(node).node
        return self.plain(node)
