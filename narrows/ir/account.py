"""The account of a whole program: what every node costs under a cost table, and why.

The nodes are gone through in order with what a runtime of this kind does to them: what depends on
no input is folded away, norms and activations go into the convolution before them, so does an
addition of two convolutions, and a tensor is brought into blocks, or out of them, once, where a
reader needs it so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import fx

from narrows.ir.grid import Grid, Layout
from narrows.ir.meta import Meta, shape_of
from narrows.ir.ops.args import arguments
from narrows.ir.program import Program
from narrows.ir.work import CONVOLUTIONS, Work
from narrows.ir.workload import Works, works_of

ADDS = ("add",)
IDENTITY = ("dropout", "feature_dropout", "alpha_dropout", "clone", "contiguous", "detach", "alias",
            "lift_fresh_copy", "to", "_to_copy", "positive")  # fmt: skip


class Prices(Protocol):
    """What an account asks of a cost table (`narrows.ir.cost.CostTable`)."""

    @property
    def layout(self) -> Layout:
        """How the runtime lays channels out."""
        ...

    @property
    def grids(self) -> Mapping[str, Grid]:
        """What was measured, per kind of work and form."""
        ...

    def form(self, work: Work) -> str:
        """Return how the runtime would compute a work."""
        ...

    def runs_blocked(self, work: Work) -> bool:
        """Whether it would compute a work on blocks of channels."""
        ...

    def seconds(self, work: Work, *, alone: bool = False) -> float:
        """Return the seconds of a work."""
        ...

    def reorder_seconds(self, work: Work, *, out: bool) -> float:
        """Return the seconds of a change into blocks, or out of them."""
        ...


@dataclass(frozen=True)
class OpCost:
    """What one node costs.

    Attributes:
        node: The node's name.
        work: What it does; ``None`` for the program's output.
        form: How it is computed: ``blocked``, ``direct`` (plain in, blocked out), ``plain``,
            ``fused`` (into the operator before it) or ``none``.
        seconds: The time of the operator itself.
        layout: The seconds to bring its operands into the layout it reads.
    """

    node: str
    work: Work | None
    form: str
    seconds: float
    layout: float = 0.0

    @property
    def total(self) -> float:
        """The seconds of the operator and of the changes of layout before it."""
        return self.seconds + self.layout


@dataclass
class Held:
    """A tensor on its way: how it lies, and who made it.

    Attributes:
        blocked: Whether it lies in blocks.
        maker: The convolution that could still take in what follows, by its node.
        room: What that convolution can still take in: an ``add`` and an ``activation``.
        both: Whether it was brought into the other layout already.
    """

    blocked: bool
    maker: fx.Node | None = None
    room: tuple[str, ...] = ()
    both: bool = False


@dataclass
class _Walk:
    table: Prices
    scale: float
    works: Works
    held: dict[fx.Node, Held] = field(default_factory=dict)

    # ------------------------------------------------------------------ layouts

    def operands(self, node: fx.Node) -> Iterator[fx.Node]:
        return (n for n in node.all_input_nodes if n in self.held)

    def bring(self, node: fx.Node, operand: fx.Node, blocked: bool) -> float:
        """Return the seconds to have an operand in one layout; nothing if it was needed before."""
        held = self.held[operand]
        if held.blocked == blocked or held.both or len(shape_of(operand) or ()) != 4:
            return 0.0
        held.both = True
        moved = self.sized(_moved(operand))
        return self.table.reorder_seconds(moved, out=held.blocked)

    def sized(self, work: Work) -> Work:
        return work if self.scale == 1 else _rescaled(work, self.scale)

    # ------------------------------------------------------------------ nodes

    def visit(self, node: fx.Node) -> OpCost:
        work = self.works[node]
        operands = list(self.operands(node))
        if work is None:  # a number, or one result of a split
            self.held[node] = Held(any(self.held[n].blocked for n in operands))
            return OpCost(node.name, None, "none", 0.0)
        work = self.sized(work)
        if work.op in IDENTITY:
            self.held[node] = self.held[operands[0]]
            return OpCost(node.name, work, "none", 0.0)
        fused = self.fused(node, work, operands)
        if fused is not None:
            return fused
        table = self.table
        blocked = self.goes_blocked(node, work, operands)
        form = table.form(work) if work.kind in CONVOLUTIONS else ""
        reads = form == "blocked" if form else blocked
        layout = sum(self.bring(node, n, reads) for n in operands)
        makes = blocked or form == "direct"
        room = ("add", "activation") if form and len(node.users) == 1 else ()
        if work.kind == "scale" and blocked:
            room = (
                "activation",
            )  # a norm on its own becomes a convolution by one weight a channel
        self.held[node] = Held(makes, node if room else None, room)
        seconds = table.seconds(work if blocked or form else unblocked(table, work), alone=True)
        return OpCost(node.name, work, form or ("blocked" if blocked else "plain"), seconds, layout)

    def goes_blocked(self, node: fx.Node, work: Work, operands: list[fx.Node]) -> bool:
        """Whether the runtime computes a node on blocks: some operand must lie so already."""
        table = self.table
        if table.layout.block == 1 or not table.runs_blocked(work):
            return False
        if work.kind in CONVOLUTIONS:
            return True
        blocked = [self.held[n].blocked for n in operands]
        if not blocked or not all(blocked):
            return False
        if work.kind == "concat":
            block = table.layout.block
            widths = [shape_of(n)[1] for n in operands if len(shape_of(n)) == 4]
            return arguments(node).get("dim", 0) in (1, -3) and not any(w % block for w in widths)
        if work.kind == "reduce":
            return set(arguments(node).get("dim") or ()) in ({2, 3}, {-1, -2})
        if work.kind == "pointwise" and len(operands) > 1:
            return len({shape_of(n) for n in operands}) == 1
        return True

    # ------------------------------------------------------------------ fusion

    def fused(self, node: fx.Node, work: Work, operands: list[fx.Node]) -> OpCost | None:
        """Return the cost of a node that goes into the convolution before it, or ``None``."""
        if not operands:
            return None
        one = self.held[operands[0]]
        if len(operands) == 1 and one.maker is not None and len(operands[0].users) == 1:
            if work.kind == "scale" and "add" in one.room and one.maker is operands[0]:
                self.held[node] = Held(one.blocked, node, one.room)
                return OpCost(node.name, work, "fused", 0.0)
            if work.op in self.table.layout.fused and "activation" in one.room:
                self.held[node] = Held(one.blocked)
                return OpCost(node.name, work, "fused", self._inside(work, one.blocked))
        if work.op in ADDS and len(operands) == 2:
            return self._added(node, work, operands)
        return None

    def _added(self, node: fx.Node, work: Work, operands: list[fx.Node]) -> OpCost | None:
        if len({shape_of(n) for n in operands}) != 1 or len(shape_of(node)) != 4:
            return None
        # The later of two convolutions takes in the sum.
        for taker, other in (operands[::-1], operands):
            held = self.held[taker]
            if held.maker is None or "add" not in held.room or len(taker.users) != 1:
                continue
            if self.held[other].maker is not None and self.held[other].maker is held.maker:
                continue
            layout = self.bring(node, other, held.blocked)
            room = tuple(r for r in held.room if r != "add") if len(node.users) == 1 else ()
            self.held[node] = Held(held.blocked, node if room else None, room)
            extra = self._inside(dataclasses.replace(work, op="add"), held.blocked)
            return OpCost(node.name, work, "fused", extra, layout)
        return None

    def _inside(self, work: Work, blocked: bool) -> float:
        """Return what an operator costs inside a convolution: what was measured, or nothing."""
        name = f"fused {work.op}" if blocked else f"plain fused {work.op}"
        if name not in self.table.grids:
            return 0.0
        width = self.table.layout.padded(work.outputs) if blocked else work.outputs
        elements = work.batch * work.positions * width
        return self.table.grids[name].at({"elements": elements}) * 1e-6


def account(table: Prices, program: Program, batch: int | None = None) -> list[OpCost]:
    """Return what every node costs that depends on an input; see `CostTable.account`."""
    scale = 1.0 if batch is None else batch / example_batch(program)
    walk = _Walk(table, scale, works_of(program))
    costs: list[OpCost] = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            walk.held[node] = Held(False)
        elif node.op == "output":
            layout = sum(walk.bring(node, n, False) for n in walk.operands(node))
            costs.append(OpCost(node.name, None, "none", 0.0, layout))
        elif Meta(node).size is None and any(True for _ in walk.operands(node)):
            costs.append(walk.visit(node))
    return costs


def example_batch(program: Program) -> int:
    """Return the number of examples in a program's example inputs; 1 where its batch is fixed."""
    for node in program.placeholders:
        if shape_of(node) and 0 in Meta(node).dynamic:
            return shape_of(node)[0]
    return 1


def _rescaled(work: Work, scale: float) -> Work:
    return dataclasses.replace(work, batch=max(1, round(work.batch * scale)))


def _moved(node: fx.Node) -> Work:
    shape: Any = shape_of(node)
    return Work("copy", batch=shape[0], inputs=shape[1], outputs=shape[1], space=tuple(shape[2:]))


def unblocked(table: Prices, work: Work) -> Work:
    """Return a work that the table takes for one in the plain layout."""
    if table.layout.block == 1 or not table.runs_blocked(work):
        return work
    return dataclasses.replace(work, space=(work.positions, 1, 1))
