"""The account of a whole program: what every node costs on a target, and why.

The nodes are gone through in order with what any compiler does to them: what depends on no input is
folded away, what copies nothing costs nothing, a norm goes into the convolution before it, and so
do the activations and the sums that the target says (`narrows.ir.costs`). A target whose runtime
keeps tensors in a layout of its own extends the `Walk` by what it pays for that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import fx

from narrows.ir.meta import Meta, shape_of
from narrows.ir.ops import dialect, table
from narrows.ir.ops.args import first_tensor
from narrows.ir.program import Program
from narrows.ir.work import CONVOLUTIONS, Work
from narrows.ir.workload import Works, works_of


class Prices(Protocol):
    """What an account asks of a target's costs (`narrows.ir.costs.Costs`)."""

    def seconds(self, work: Work) -> float:
        """Return the seconds of a work."""
        ...

    def fuses(self, work: Work) -> bool:
        """Whether a convolution takes in an operator that follows it."""
        ...

    @property
    def fuses_sums(self) -> bool:
        """Whether a convolution takes in the sum of its result and another tensor."""
        ...

    def fused_seconds(self, work: Work) -> float:
        """Return the seconds of an operator inside a convolution."""
        ...


@dataclass(frozen=True)
class OpCost:
    """What one node costs.

    Attributes:
        node: The node's name.
        work: What it does; ``None`` for the program's output.
        form: How it is computed: ``fused`` (into the operator before it), ``none``, ``plain``, or
            another word of the target's.
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
    """A tensor on its way: who made it.

    Attributes:
        maker: The convolution that could still take in what follows, by its node.
        room: What that convolution can still take in: an ``add`` and an ``activation``.
    """

    maker: fx.Node | None = None
    room: tuple[str, ...] = ()

    def after(self, maker: fx.Node | None = None, room: tuple[str, ...] = ()) -> Held:
        """Return what an operator inside the one that made this tensor makes of it."""
        return Held(maker, room)


@dataclass
class Walk:
    """Goes through a program's nodes in order.

    Attributes:
        costs: What operators cost.
        scale: How many times as many examples there are as in the program's example inputs.
        works: What the nodes do.
        program: Whose nodes they are.
        held: The tensors so far.
    """

    costs: Prices
    scale: float
    works: Works
    program: Program
    held: dict[fx.Node, Held] = field(default_factory=dict)

    def run(self) -> list[OpCost]:
        """Return what every node costs that depends on an input."""
        costs: list[OpCost] = []
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                self.held[node] = self.given(())
            elif node.op == "output":
                costs.append(OpCost(node.name, None, "none", 0.0, self.returned(node)))
            elif Meta(node).size is None and any(True for _ in self.operands(node)):
                costs.append(self.visit(node))
        return costs

    def visit(self, node: fx.Node) -> OpCost:
        """Return the cost of one node, and remember what it makes."""
        work = self.works[node]
        operands = list(self.operands(node))
        if work is None:  # a number, or one result of a split
            self.held[node] = self.given(operands)
            return OpCost(node.name, None, "none", 0.0)
        work = self.sized(work)
        if self.hands_on(node, work):
            self.held[node] = self.held[operands[0]]
            return OpCost(node.name, work, "none", 0.0)
        return self.fused(node, work, operands) or self.computed(node, work, operands)

    def hands_on(self, node: fx.Node, work: Work) -> bool:
        """Whether a runtime has nothing to do: a dropout that does not train, a copy, no cast."""
        same = shape_of(node) == shape_of(first_tensor(node)) if work.kind == "view" else False
        return same or table.identity_of(self.program, node) is not None

    def operands(self, node: fx.Node) -> Iterator[fx.Node]:
        """Yield the operands of a node that depend on an input."""
        return (n for n in node.all_input_nodes if n in self.held)

    def sized(self, work: Work) -> Work:
        """Return a work for as many examples as are asked for."""
        if self.scale == 1:
            return work
        return dataclasses.replace(work, batch=max(1, round(work.batch * self.scale)))

    # ------------------------------------------------------------------ one node

    def given(self, operands: Sequence[fx.Node]) -> Held:
        """Return a tensor that no operator makes: an input, or a part of the operands."""
        return Held()

    def returned(self, output: fx.Node) -> float:
        """Return the seconds to hand the program's results back."""
        return 0.0

    def met(self, operand: fx.Node, other: Held) -> float:
        """Return the seconds to bring an operand to another one's side, for their sum."""
        return 0.0

    def computed(self, node: fx.Node, work: Work, operands: list[fx.Node]) -> OpCost:
        """Return the cost of a node that is computed by itself."""
        takes = work.kind in CONVOLUTIONS and len(node.users) == 1
        self.held[node] = Held(node, ("add", "activation")) if takes else Held()
        return OpCost(node.name, work, "plain", self.costs.seconds(work))

    def inside(self, work: Work, held: Held) -> float:
        """Return the seconds of an operator inside the convolution that made a tensor."""
        return self.costs.fused_seconds(work)

    # ------------------------------------------------------------------ fusion

    def fused(self, node: fx.Node, work: Work, operands: list[fx.Node]) -> OpCost | None:
        """Return the cost of a node that goes into the convolution before it, or ``None``."""
        if not operands:
            return None
        one = self.held[operands[0]]
        if len(operands) == 1 and one.maker is not None and len(operands[0].users) == 1:
            if work.kind == "scale" and "add" in one.room and one.maker is operands[0]:
                self.held[node] = one.after(node, one.room)
                return OpCost(node.name, work, "fused", 0.0)
            if self.costs.fuses(work) and "activation" in one.room:
                self.held[node] = one.after()
                return OpCost(node.name, work, "fused", self.inside(work, one))
        if node.target is dialect.ADD and len(operands) == 2 and self.costs.fuses_sums:
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
            layout = self.met(other, held)
            room = tuple(r for r in held.room if r != "add") if len(node.users) == 1 else ()
            self.held[node] = held.after(node if room else None, room)
            extra = self.inside(dataclasses.replace(work, op="add"), held)
            return OpCost(node.name, work, "fused", extra, layout)
        return None


def account(costs: Prices, program: Program, batch: int | None = None) -> list[OpCost]:
    """Return what every node costs on a target that keeps tensors as the program has them."""
    return Walk(costs, scale_of(program, batch), works_of(program), program).run()


def scale_of(program: Program, batch: int | None) -> float:
    """Return how many times as many examples a batch has as a program's example inputs."""
    return 1.0 if batch is None else batch / example_batch(program)


def example_batch(program: Program) -> int:
    """Return the number of examples in a program's example inputs; 1 where its batch is fixed."""
    for node in program.placeholders:
        if shape_of(node) and 0 in Meta(node).dynamic:
            return shape_of(node)[0]
    return 1
