"""`repaired`: the weights that are left, found anew from what the unpruned network computes.

Layer by layer in execution order: from what the pruned network feeds a layer to what the unpruned
one makes of the same example. Where a layer's result is added to another tensor, the layer makes up
for what that one has lost by then. Both networks run side by side, node by node, so that all of it
costs two forward passes and the products.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from narrows.ir.meta import shape_of
from narrows.ir.ops import dialect
from narrows.ir.program import Program
from narrows.ir.structure.layers import root_of
from narrows.passes.choosing.compensations.base import LayerWise, Progress, Sums
from narrows.passes.choosing.compensations.least_squares import LEAST_SQUARES
from narrows.passes.choosing.left import Left
from narrows.passes.choosing.products import Product, gram, refuse_infinite
from narrows.passes.choosing.reads import Reads
from narrows.passes.choosing.statistics import Batch, counted

LEAST_GATE = 0.1  # what a gate lets through at least when an error is divided by it


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


class _Side:
    """One network on all batches, node by node."""

    def __init__(self, program: Program, batches: Sequence[Batch], weights: dict[str, Tensor]):
        self.weights = weights
        holders = program.placeholders
        self.values: list[dict[fx.Node, Any]] = [
            dict(zip(holders, batch, strict=True)) for batch in batches
        ]

    def value(self, node: fx.Node, at: int) -> Any:
        """Return a node's value in one batch; what it needs is computed where it is not there."""
        values = self.values[at]
        if node.op == "get_attr":
            return self.weights[str(node.target)]
        if node not in values:
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: self.value(n, at))
            target: Any = node.target
            values[node] = target(*args, **kwargs)
        return values[node]


class _Repair:
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
        self.nodes = [n for n in original.graph.nodes if n.op == "call_function"]
        self.number = {p.layer.node: j for j, p in enumerate(reads.products)}
        self.examples = counted(original, batches)
        self.plain = _Side(original, batches, dict(original.weights))
        self.pruned = _Side(original, batches, left.masked(reads.products, current.weights))
        self.progress, self.rows = progress, rows
        self.after = _needed_after(original.graph)

    def run(self) -> Program:
        """Go through the network."""
        count = len(self.plain.values)
        with torch.no_grad():
            for place, node in enumerate(self.nodes):
                j = self.number.get(node)
                for at in range(count):
                    self.plain.value(node, at)
                if j is not None and not held_by(self.original, self.reads.products[j]):
                    self._solve(j)
                for at in range(count):
                    self.pruned.value(node, at)
                self._drop(node)
                if self.progress is not None:
                    self.progress("repair", place + 1, len(self.nodes))
        return self.original.with_weights(self.pruned.weights)

    def _drop(self, node: fx.Node) -> None:
        """Forget what nothing needs any more after a node."""
        for gone in self.after.get(node, ()):
            for values in (*self.plain.values, *self.pruned.values):
                values.pop(gone, None)

    def _solve(self, j: int) -> None:
        product = self.reads.products[j]
        name, bias = product.layer.weight, product.bias
        total = _sum_after(product.layer.node)
        if total is not None and not self._is_ready(total.other):
            total = None
        square: Any = 0.0
        cross: Any = 0.0
        power: Any = 0.0
        count = 0
        feeding = self.pruned if self.method.reads_pruned else self.plain
        for at in range(len(self.plain.values)):
            x = feeding.value(product.contraction.x, at)
            y = self.plain.value(product.layer.node, at)
            target = y if total is None else y + self._lost(total, at)
            places = product.places(y, self.examples, at, self.rows)
            lines, wanted = product.rows(x, target, places)
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
        solved = self.method.solve(sums) * self.left.rows[j][:, :, None]
        self.pruned.weights[name], constant = product.weights(solved, weight)
        if bias:
            self.pruned.weights[bias] = constant
        for step in root_of(product.contraction.weight)[1]:  # made of the weight as it was
            for values in self.pruned.values:
                values.pop(step, None)

    def _lost(self, total: _Sum, at: int) -> Tensor:
        """Return what the other operand of a sum has lost, as the layer can make up for it."""
        lost = self.plain.value(total.other, at) - self.pruned.value(total.other, at)
        if total.gate is None:
            return lost
        gate = self.plain.value(total.gate, at)
        return lost / torch.where(gate < 0, gate.clamp(max=-LEAST_GATE), gate.clamp(min=LEAST_GATE))

    def _is_ready(self, node: fx.Node) -> bool:
        """Whether a tensor is there, or is computed without a layer that is not solved yet."""
        todo = [node]
        while todo:
            n = todo.pop()
            if n.op == "get_attr" or (n in self.pruned.values[0] and n in self.plain.values[0]):
                continue
            if n in self.number or n.op == "placeholder":
                return False
            todo += n.all_input_nodes
        return True


# ------------------------------------------------------------------ sums


@dataclass(frozen=True)
class _Sum:
    """A sum that a layer's result goes into.

    Attributes:
        other: The other operand.
        gate: What the result is multiplied with before, or ``None``.
    """

    other: fx.Node
    gate: fx.Node | None


def _sum_after(node: fx.Node) -> _Sum | None:
    """Return the sum that a layer's result goes into, at once or behind a gate."""
    gate, shape = None, shape_of(node)
    while True:
        users = [u for u in node.users if shape_of(u) == shape and _other(u, node) is not None]
        # A squeeze-and-excitation block also reads the result that it gates.
        users = users if len(node.users) == 1 or gate is None else []
        users = (
            users if len(node.users) == 1 else [u for u in users if u.target is dialect.MULTIPLY]
        )
        if len(users) != 1:
            return None
        user, other = users[0], _other(users[0], node)
        assert other is not None
        plain = user.kwargs.get("alpha", 1) == 1
        if user.target is dialect.ADD and plain and shape_of(other) == shape:
            return _Sum(other, gate)
        if user.target is not dialect.MULTIPLY or gate is not None:
            return None
        gate, node = other, user


def _other(user: fx.Node, node: fx.Node) -> fx.Node | None:
    """Return the other one of two operands."""
    others = [n for n in user.all_input_nodes if n is not node]
    return others[0] if len(others) == 1 else None


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
