"""`repaired`: the weights that are left, found anew from what the unpruned network computes.

Layer by layer in execution order: from what the pruned network feeds a layer to what the unpruned
one makes of the same example. Where a layer's result is added to another tensor, the layer makes up
for what that one has lost by then, and where a clip such as a ReLU follows, an error that it hides
is none. Both networks run side by side, node by node, so that all of it
costs two forward passes and the products; more only where what is alive within a segment, of all
examples, would not fit in `HELD` bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from narrows.ir.program import Program
from narrows.ir.structure.layers import root_of
from narrows.passes.choosing.behind import ANYWHERE, Sum, clip_after, divided, room, sum_after
from narrows.passes.choosing.compensations.base import LayerWise, Progress, Sums, solved
from narrows.passes.choosing.compensations.least_squares import LEAST_SQUARES
from narrows.passes.choosing.left import Left
from narrows.passes.choosing.products import Product, gram, refuse_infinite
from narrows.passes.choosing.reads import Reads
from narrows.passes.choosing.segments import Segment, Values, bytes_of, segments_of
from narrows.passes.choosing.statistics import Batch, counted, examples_of

HELD = 1 << 29  # bytes of values that are kept between the layers of a segment

Both = tuple[Values, Values]  # of a batch: in the unpruned network, and in the pruned one
# Of a batch: what a layer sees, what it should make of that, and, where a clip is behind it, how
# far that may be off, downwards and upwards.
Rows = tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]


def repaired(
    original: Program,
    current: Program,
    reads: Reads,
    left: Left,
    batches: Sequence[Batch],
    method: LayerWise = LEAST_SQUARES,
    progress: Progress | None = None,
    rows: float = 1.0,
) -> Program:
    """Return the program with the weights that are left found anew, the others zero.

    Args:
        original: The unpruned program, prepared.
        current: The same program with the weights that it has by now.
        reads: Its reads.
        left: What is left of every layer.
        batches: Flat inputs, batch by batch.
        method: How a layer makes up for what is gone.
        progress: Told what is done, how far it is and of how much.
        rows: The share of the positions that a layer is solved by usually (`Product.places`).

    Raises:
        PlanError: What a layer sees, or has to make, is not finite.
    """
    return _Repair(original, current, reads, left, batches, method, progress, rows).run()


def held_by(program: Program, product: Product) -> str:
    """Return which weight keeps a layer as it is: one that is used elsewhere, too; or nothing."""
    names = (product.layer.weight, product.bias)
    return next((n for n in names if n and len(program.users_of(n)) > 1), "")


def held_at_once(program: Program, segment: Segment, examples: int) -> float:
    """Return the bytes of values of a segment that both networks hold at one time, at most."""
    given = {n for node in segment.nodes for n in node.all_input_nodes} - {*segment.nodes}
    sizes = {n: bytes_of(n) for n in (*given, *segment.nodes)}
    after = _needed_after(program.graph)
    now = most = sum(sizes[n] for n in given)
    for node in segment.nodes:
        now += sizes[node]
        most = max(most, now)
        now -= sum(sizes.get(gone, 0) for gone in after.get(node, ()))
    return 2.0 * most * examples / examples_of(program, program.examples)


class _Side:
    """One network: its weights, and its values of one batch after another."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights

    def value(self, node: fx.Node, values: Values) -> Any:
        """Return a node's value; what it needs is computed where it is not there."""
        if node.op == "get_attr":
            return self.weights[str(node.target)]
        if node not in values:
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: self.value(n, values))
            target: Any = node.target
            values[node] = target(*args, **kwargs)
        return values[node]


class _Repair:
    """Goes through a network segment by segment, and keeps what is read behind where it is.

    Between the layers of a segment all values of all examples are kept, too, if they fit; if not,
    the segment runs again up to each of its layers, one batch at a time.
    """

    def __init__(
        self,
        original: Program,
        current: Program,
        reads: Reads,
        left: Left,
        batches: Sequence[Batch],
        method: LayerWise,
        progress: Progress | None,
        rows: float,
    ) -> None:
        self.original, self.reads, self.left, self.method = original, reads, left, method
        self.number = {p.layer.node: j for j, p in enumerate(reads.products)}
        self.examples = counted(original, batches)
        self.plain = _Side(dict(original.weights))
        self.pruned = _Side(left.masked(reads.products, current.weights))
        holders = original.placeholders
        self.kept = [
            (dict(zip(holders, batch, strict=True)), dict(zip(holders, batch, strict=True)))
            for batch in batches
        ]
        self.progress, self.rows = progress, rows
        self.turns: int = getattr(method, "turns", 0)
        self.after = _needed_after(original.graph)
        self.passed: set[fx.Node] = set()  # the layers that are solved, or stay

    def run(self) -> Program:
        """Go through the network."""
        with torch.no_grad():
            for segment in segments_of(self.original, list(self.number)):
                self._repair(segment)
        return self.original.with_weights(self.pruned.weights)

    def _repair(self, segment: Segment) -> None:
        fits = held_at_once(self.original, segment, self.examples) <= HELD
        pending: list[fx.Node] = []  # what follows where all examples are kept
        for node in segment.nodes:
            j = self.number.get(node)
            if j is not None:
                if fits:
                    self.kept = [self._through(pending, values) for values in self.kept]
                    pending = []
                if not held_by(self.original, self.reads.products[j]):
                    self._solve(j, pending)
                self.passed.add(node)
                if self.progress is not None:
                    self.progress("repair", len(self.passed), len(self.number))
            pending.append(node)
        self.kept = [self._through(pending, values) for values in self.kept]

    def _through(self, nodes: Sequence[fx.Node], values: Both) -> Both:
        """Run nodes on a batch in both networks, and forget what nothing needs any more."""
        plain, pruned = dict(values[0]), dict(values[1])
        for node in nodes:
            if node.op != "get_attr":
                self.plain.value(node, plain)
                self.pruned.value(node, pruned)
            for gone in self.after.get(node, ()):
                plain.pop(gone, None)
                pruned.pop(gone, None)
        return plain, pruned

    def _solve(self, j: int, pending: Sequence[fx.Node]) -> None:
        product = self.reads.products[j]
        name, bias = product.layer.weight, product.bias
        seen = _Seen(lambda: self._seen(product, pending))
        square: Any = 0.0
        cross: Any = 0.0
        power: Any = 0.0
        count = 0
        for lines, wanted, _ in seen:
            square = square + gram(lines)
            cross = cross + (wanted @ lines.mT).double()
            power = power + wanted.double().square().sum(2)
            count += lines.shape[2]
        refuse_infinite(product, square, cross, power)
        weight = self.pruned.weights[name]
        now = product.matrix(weight, self.pruned.weights[bias] if bias else None)
        kept = self.left.columns[j].clone()
        if not bias:  # nothing can hold a constant
            kept[:, -1] = False
        sums = Sums(now, kept, square / count, cross / count, power / count)
        matrix = solved(self.method, sums) * self.left.rows[j][:, :, None]
        for _ in range(self.turns if seen.clipped else 0):
            # What a clip hides of the errors by now is wanted as it is; all else is as before.
            cross = 0.0
            for lines, wanted, hidden in seen:
                aim = wanted
                if hidden is not None:
                    aim = wanted + (matrix.to(lines.dtype) @ lines - wanted).clamp(*hidden)
                cross = cross + (aim @ lines.mT).double()
            sums = replace(sums, cross=cross / count)
            matrix = solved(self.method, sums) * self.left.rows[j][:, :, None]
        self.pruned.weights[name], constant = product.weights(matrix, weight)
        if bias:
            self.pruned.weights[bias] = constant
        for step in root_of(product.contraction.weight)[1]:  # made of the weight as it was
            for _, pruned in self.kept:
                pruned.pop(step, None)

    def _seen(self, product: Product, pending: Sequence[fx.Node]) -> Iterator[Rows]:
        """Yield what a layer sees, what it should make of it, and by how much it may be off."""
        total = sum_after(product.layer.node)
        for at, values in enumerate(self.kept):
            plain, pruned = self._through(pending, values) if pending else values
            if total is not None and not self._is_ready(total.other, plain, pruned):
                total = None
            feeding, fed = (self.plain, plain)
            if self.method.reads_pruned:
                feeding, fed = (self.pruned, pruned)
            x = feeding.value(product.contraction.x, fed)
            y = self.plain.value(product.layer.node, plain)
            target = y if total is None else y + self._lost(total, plain, pruned)
            places = product.places(y, self.examples, at, self.rows)
            lines, wanted = product.rows(x, target, places)
            clip = clip_after(product.layer.node if total is None else total.node)
            hidden = None
            if self.turns and clip != ANYWHERE:
                free = room(y, total, clip, lambda n, own=plain: self.plain.value(n, own))
                down, up = (product.rows(x, part, places)[1] for part in free)
                hidden = (down, up)
            yield lines, wanted, hidden

    def _lost(self, total: Sum, plain: Values, pruned: Values) -> Tensor:
        """Return what the other operand of a sum has lost, as the layer can make up for it."""
        lost = self.plain.value(total.other, plain) - self.pruned.value(total.other, pruned)
        return divided(lost, None if total.gate is None else self.plain.value(total.gate, plain))

    def _is_ready(self, node: fx.Node, plain: Values, pruned: Values) -> bool:
        """Whether a tensor is there, or is computed without a layer that is not solved yet."""
        todo = [node]
        while todo:
            n = todo.pop()
            if n.op == "get_attr" or (n in plain and n in pruned):
                continue
            if n.op == "placeholder" or (n in self.number and n not in self.passed):
                return False
            todo += n.all_input_nodes
        return True


class _Seen:
    """What a layer sees, batch by batch; gone through again and again.

    Attributes:
        clipped: Whether a clip hides some of what it makes; known after the first time.
    """

    def __init__(self, found: Callable[[], Iterator[Rows]]) -> None:
        """Begin.

        Args:
            found: Finds it, each time anew.
        """
        self.found, self.clipped = found, False
        self.kept: list[Rows] | None = None

    def __iter__(self) -> Iterator[Rows]:
        """Yield it; what is found the first time is kept while it fits in `HELD` bytes."""
        if self.kept is not None:
            yield from self.kept
            return
        kept: list[Rows] = []
        size = 0
        for lines, wanted, hidden in self.found():
            self.clipped = self.clipped or hidden is not None
            size += sum(t.nbytes for t in (lines, wanted, *(hidden or ())))
            kept = [*kept, (lines, wanted, hidden)] if hidden is not None and size <= HELD else []
            yield lines, wanted, hidden
        self.kept = kept if self.clipped and size <= HELD else None


def _needed_after(graph: fx.Graph) -> Mapping[fx.Node, list[fx.Node]]:
    """Return per node what it is the last to read."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        for arg in node.all_input_nodes:
            last[arg] = node
    result: dict[fx.Node, list[fx.Node]] = {}
    for arg, node in last.items():
        result.setdefault(node, []).append(arg)
    return result


__all__ = ["Progress", "held_by", "repaired"]
