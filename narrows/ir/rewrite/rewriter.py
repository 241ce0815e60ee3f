"""The half of the rewriter that follows labels: what each operand holds and what each node
emits."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from narrows.ir.channels import Facts
from narrows.ir.choices import Choices
from narrows.ir.held import Held, RaggedError, Side, line, proven
from narrows.ir.labels import Bools, Ints, Value, count_to, match, some
from narrows.ir.liveness import Demand
from narrows.ir.meta import Meta, shape_of
from narrows.ir.ops import dialect, table
from narrows.ir.ops.args import arguments, changed
from narrows.ir.program import Note, Program
from narrows.ir.rewrite.aligned import aligned, in_step
from narrows.ir.rewrite.chains import collapse, replay
from narrows.ir.rewrite.emitter import Emitter
from narrows.ir.rewrite.handing import narrowed, returned, taken


class Rewriter(Emitter):
    """Builds the new program; the op table's rows call it.

    Attributes:
        demand: The liveness of the old program.
        choices: Which of the exact forms is wanted.
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

    @property
    def order(self) -> Mapping[str, Ints]:
        """Per name of a node that makes channels, the rank of each of its labels."""
        return self.choices.order

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
        if not isinstance(self.facts.flows[node].value, Value):
            return
        value = self.facts.value(node)
        self._held[node] = Held(new, value.places, value.shape)
        try:
            if any(s.name == node.name for s in self.program.states):
                self._held[node] = taken(self, node, new)
        except RaggedError as failure:
            self.failures.append(failure)

    def _output(self, node: fx.Node) -> None:
        def final(n: Any) -> Any:
            if not isinstance(n, fx.Node):
                return n
            if isinstance(self.facts.flows[n].value, Value) and not self.facts.is_free(n):
                return self.entire(node, n).node
            return self.plain(n)

        states = {s.output: self.program.node(s.name) for s in self.program.states}
        results: Any = node.args[0]
        try:
            new = self.graph.output(
                tuple(
                    returned(self, states[i], n) if i in states else final(n)
                    for i, n in enumerate(results)
                )
            )
            new.meta = dict(node.meta)
        except RaggedError as failure:
            self.failures.append(failure)

    def finish(self, notes: tuple[Note, ...]) -> Program:
        """Return the new program; its states and their examples are what is left of the old."""
        names = {s.name for s in self.program.states}
        return narrowed(
            super().finish(notes), {n.name: h for n, h in self._held.items() if n.name in names}
        )

    def _fail(self, node: fx.Node, failure: RaggedError) -> None:
        """Record what must be kept and go on as if nothing had gone, to find all failures in one
        round."""
        behind = [r.operand for r in self.facts.flows[node].reads if r.operand in self.virtual]
        self.failures += [self.virtual[n] for n in behind] or [failure]
        value = self.facts.flows[node].value
        if isinstance(value, Value):
            stub = self.graph.create_node("get_attr", "stub")
            stub.meta = dict(node.meta)
            self._held[node] = Held(stub, value.places, value.shape)

    def _node(self, node: fx.Node) -> None:
        row = table.find(node) or table.BARRIER
        if self.facts.flows[node].barrier:
            row = table.BARRIER
        moves = row.rearranges
        attempts: list[Callable[[], Held]] = [lambda: row.rewrite(self, node)]
        if moves:
            needed = self.demand.needed(node)
            attempts += [lambda: replay(self, node, needed), lambda: collapse(self, node, needed)]
        if self._whole_operands(node):
            attempts.append(lambda: self.whole(node))
        first: RaggedError | None = None
        for attempt in attempts:
            try:
                self._held[node] = self._proven(node, attempt())
                return
            except RaggedError as failure:
                first = failure if first is None or failure.mask is not None else first
        assert first is not None
        if moves:
            self.virtual[node] = first
        else:
            self._fail(node, first)

    def _whole_operands(self, node: fx.Node) -> bool:
        """Whether nothing goes of what a node reads, so that it can be written as it was."""
        reads = self.facts.flows[node].reads
        return all(not some(~self.demand.needed(r.operand)) for r in reads)

    def _proven(self, node: fx.Node, held: Held) -> Held:
        value = self.facts.flows[node].value
        return proven(node, value, self.need(node), held) if isinstance(value, Value) else held

    # ------------------------------------------------------------------ what rows ask

    def need(self, node: fx.Node) -> Bools:
        """Return the labels that ``node`` is to hold."""
        given = self.given.get(node)
        return self.demand.needed(node) if given is None else given[1]

    def made(self, node: fx.Node) -> Ints:
        """Return the labels that ``node`` is to make, in the order in which it makes them."""
        labels = np.flatnonzero(self.need(node))
        rank = self.order.get(node.name)
        return labels if rank is None else labels[np.argsort(rank[labels], kind="stable")]

    def wanted(self, node: fx.Node, axis: int) -> Ints:
        """Return the original indices of an axis at which ``node`` has a needed label."""
        kept = self.need(node)[self.facts.value(node).tensor.numpy()]
        return np.flatnonzero(kept.any(tuple(a for a in range(kept.ndim) if a != axis)))

    def block(self, node: fx.Node) -> Bools:
        """Return the labels in the smallest block that has all needed ones: an index per axis."""
        value = self.facts.value(node)
        kept = torch.from_numpy(self.need(node))[value.tensor]
        whole = torch.ones_like(kept)
        for axis in value.axes:
            others = [a for a in range(kept.dim()) if a != axis]
            whole = whole & (kept.any(others, keepdim=True) if others else kept)
        mask = np.zeros(value.count, dtype=bool)
        mask[value.tensor[whole].numpy()] = True
        return mask

    def sides(
        self,
        node: fx.Node,
        parts: Sequence[tuple[fx.Node, Held, Sequence[int]]],
        rank: int,
        axes: Sequence[int],
        step: Sequence[int] | None = None,
    ) -> list[Side]:
        """Return operands of ``node`` in step along some axes.

        Args:
            node: The node.
            parts: Per operand its old node, what the new program holds of it, and the axis of the
                result that each of its own lies along.
            rank: The number of axes that ``parts`` speak of.
            axes: The axes along which their indices are asked for.
            step: Those along which they are to be in step; all of ``axes`` if omitted.
        """
        sides = [Side(self.facts.value(n), h, rank, stands, axes) for n, h, stands in parts]
        in_step(self, node, sides, axes if step is None else step)
        return sides

    def line(self, node: fx.Node, index: Tensor, axis: int) -> Ints:
        """Return the original index at each position of an axis, the same in every row."""
        along = line(index, axis)
        if along is None:
            raise RaggedError(node, None)
        return along

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
        kept = mask[self.facts.value(node).at(held.places).numpy()]
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
        if not self.narrowed(node, held.places):
            return held
        for axis, along in (self.positions(node, held.places) or {}).items():
            if not np.array_equal(np.sort(along), count_to(value.shape[axis])):
                break
            held = self.gather(held, axis, np.argsort(along))
        if self.narrowed(node, held.places):
            raise RaggedError(node, None)
        return held

    def whole(self, node: fx.Node) -> Held:
        """Emit a barrier: the operator as it was, on whole operands."""
        target = node.args[0] if node.target is operator.getitem else node
        assert isinstance(target, fx.Node)

        def operand(n: fx.Node) -> fx.Node:
            if n.graph is self.graph:
                return n
            if isinstance(self.facts.flows[n].value, Value) and not self.facts.is_free(n):
                return self.entire(node, n).node
            return self.plain(n)

        if target not in self._plain or target is node:
            args, kwargs = map_arg(changed(target, self.masked_weight(target)), operand)
            self._plain[target] = self._create(target, args, kwargs)
        new = self._plain[target]
        if target is not node:
            new = self._create(node, (new, node.args[1]), {})
        value = self.facts.flows[node].value
        if not isinstance(value, Value):
            return Held(new, torch.zeros(()), ())
        return self._tagged(node, new, value.places, value.shape)

    def emit(
        self, node: fx.Node, changes: dict[str, Any], places: Tensor, shape: tuple[int, ...]
    ) -> Held:
        """Emit ``node`` with some arguments replaced by new nodes; the rest is copied."""
        args, kwargs = changed(node, changes)
        args, kwargs = map_arg((args, kwargs), self._copied)
        return self._tagged(node, self._create(node, args, kwargs), places, shape)

    def emit_mapped(
        self,
        node: fx.Node,
        replaced: dict[fx.Node, fx.Node],
        places: Tensor,
        shape: tuple[int, ...],
    ) -> Held:
        """Emit ``node`` with operands replaced one by one, wherever they stand among the
        arguments."""
        args, kwargs = map_arg(
            (node.args, node.kwargs), lambda n: replaced[n] if n in replaced else self._copied(n)
        )
        return self._tagged(node, self._create(node, args, kwargs), places, shape)

    def item(
        self, node: fx.Node, parent: fx.Node, x: Held, places: Tensor, shape: tuple[int, ...]
    ) -> Held:
        """Emit ``parent`` on ``x`` once and ``node`` as one of its results."""
        key = (parent, x.node)
        if key not in self._calls:
            args, kwargs = changed(parent, {next(iter(arguments(parent))): x.node})
            args, kwargs = map_arg((args, kwargs), self._copied)
            self._calls[key] = self._create(parent, args, kwargs)
        return self._tagged(
            node, self._create(node, (self._calls[key], node.args[1]), {}), places, shape
        )

    def retag(self, node: fx.Node, new: fx.Node, places: Tensor, shape: tuple[int, ...]) -> Held:
        """Return a new node as what ``node`` holds, which needs no operator of its own."""
        return Held(new, places, shape)

    def squeezed(self, node: fx.Node, held: Held, places: Tensor, axis: int) -> Held:
        """Emit the removal of an axis of size 1; ``places`` still has it."""
        new = self.graph.create_node(
            "call_function", dialect.SQUEEZE, (held.node, axis), {}, name=node.name
        )
        shape = (*held.shape[:axis], *held.shape[axis + 1 :])
        return self._tagged(node, new, places.squeeze(axis), shape)

    def carried(self, node: fx.Node, held: Held, moved: Tensor) -> Tensor:
        """Return the places of ``node`` after it moved the places of its operand to ``moved``.

        Several places of the result may come from one of the operand. What moves an operand that
        has lost channels moves what is left in the same order, so the k-th is the k-th.
        """
        value, came = self.facts.value(node), self.facts.came(node)
        for axis, size in enumerate(came.shape):
            moved = moved.narrow(axis, 0, 1) if size == 1 else moved
        found = match(came.reshape(-1).numpy(), moved.reshape(-1).numpy())
        if found is None:
            raise RaggedError(node, None)
        places = torch.from_numpy(found).view(moved.shape)
        return places if came.shape == value.tensor.shape else self._intact(node, places)

    def _intact(self, node: fx.Node, found: Tensor) -> Tensor:
        """Return places from positions in `Facts.came`; along axes without labels all must be there
        in order."""
        value, sizes = self.facts.value(node), tuple(self.facts.came(node).shape)
        grids = dict(enumerate(np.unravel_index(found.numpy(), sizes)))
        index = {a: torch.from_numpy(grids[a]) for a in value.axes}
        for axis, size in enumerate(sizes):
            if axis in index or size == 1:
                continue
            ruler = np.arange(size).reshape([-1 if a == axis else 1 for a in range(len(sizes))])
            same = [bool((i == i.narrow(axis, 0, 1)).all()) for i in index.values()]
            if found.shape[axis] != size or (grids[axis] != ruler).any() or not all(same):
                raise RaggedError(node, None)
            index = {a: i.narrow(axis, 0, 1) for a, i in index.items()}
        return value.placed(index)

    def preview(
        self, node: fx.Node, changes: dict[str, Any], free: dict[fx.Node, Tensor] | None = None
    ) -> Any:
        """Run the node's operator on labels given in place of arguments."""
        args, kwargs = changed(node, changes)
        free = free or {}
        args, kwargs = map_arg((args, kwargs), lambda n: free[n] if n in free else Meta(n).size)
        run: Any = node.target
        return run(*args, **kwargs)

    def trim(self, labels: Tensor, value: Value) -> Tensor:
        """Cut the axes along which ``value`` never changes to size 1."""
        for axis in range(labels.dim()):
            if value.tensor.shape[axis] == 1 and labels.shape[axis] > 1:
                labels = labels.narrow(axis, 0, 1)
        return labels

    def ragged(self, node: fx.Node, mask: Bools | None = None) -> RaggedError:
        """Return the error that says the needed channels of ``node`` do not fill a tensor."""
        return RaggedError(node, mask)

    def narrowed(self, node: fx.Node, places: Tensor) -> bool:
        """Whether ``places`` differ from what the node held originally."""
        whole = self.facts.value(node).places
        return places is not whole and not torch.equal(places, whole)

    def positions(self, node: fx.Node, places: Tensor) -> dict[int, Ints] | None:
        """Return per labelled axis the original index at each new one, or ``None`` if they are
        entangled."""
        value = self.facts.value(node)
        if len(value.axes) < 2:
            return {axis: places.reshape(-1).numpy() for axis in value.axes}
        key = (id(value), id(places))
        if key not in self._positions:  # with the places, so that no others get their identity
            lines = {axis: line(i, axis) for axis, i in value.index(places).items()}
            whole = {axis: one for axis, one in lines.items() if one is not None}
            self._positions[key] = (places, whole if len(whole) == len(lines) else None)
        return self._positions[key][1]

    def aligned(
        self, node: fx.Node, skip_axis: int | None = None
    ) -> tuple[list[fx.Node], Tensor, tuple[int, ...]]:
        """Return the operands of an element-wise node with their channels in step.

        Returns:
            The new operand per read, the result's places and its shape (with ``skip_axis`` set to
            1).
        """
        return aligned(self, node, skip_axis)

    # ------------------------------------------------------------------ weights

    def sliced_free(self, node: fx.Node, operand: fx.Node, places: Tensor) -> fx.Node:
        """Return an element-wise operand made of weights, restricted like the result."""
        rank, own = self.facts.value(node).tensor.dim(), len(shape_of(operand))
        wide = {
            a
            for a in self.facts.value(node).axes
            if a >= rank - own and shape_of(operand)[a - rank + own] > 1
        }
        if not wide or not self.narrowed(node, places):
            return self.plain(operand)
        where = self.positions(node, places)
        if where is None:
            raise RaggedError(node, None)
        return self.free(operand, {a - rank + own: where[a] for a in wide})

    def _shape_source(self, node: fx.Node) -> fx.Node:
        value = self.facts.flows[node].value
        if node.op != "placeholder" and isinstance(value, Value) and not value.free:
            return self.held(node).node
        return self.plain(node)
