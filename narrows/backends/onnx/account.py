"""The account of a program in a runtime with blocks: a tensor changes its layout on its way.

A tensor is brought into blocks, or out of them, once, where a reader needs it so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import fx

from narrows.backends.measured.layout import Layout
from narrows.ir.account import Held, OpCost, Prices, Walk
from narrows.ir.meta import shape_of
from narrows.ir.ops.args import arguments
from narrows.ir.work import CONVOLUTIONS, Work


class BlockedPrices(Prices, Protocol):
    """What an account asks of a table with blocks (`narrows.backends.onnx.staircase`)."""

    @property
    def layout(self) -> Layout:
        """How the runtime lays channels out."""
        ...

    def form(self, work: Work) -> str:
        """Return how the runtime would compute a work."""
        ...

    def runs_blocked(self, work: Work) -> bool:
        """Whether it would compute a work on blocks of channels."""
        ...

    def unblocked(self, work: Work) -> Work:
        """Return a work as one in the plain layout."""
        ...

    def seconds(self, work: Work, *, alone: bool = False) -> float:
        """Return the seconds of a work; ``alone``, without changes of layout around it."""
        ...

    def inside_seconds(self, work: Work, *, blocked: bool) -> float:
        """Return the seconds of an operator inside a convolution of either layout."""
        ...

    def reorder_seconds(self, work: Work, *, out: bool) -> float:
        """Return the seconds of a change into blocks, or out of them."""
        ...


@dataclass
class Lying(Held):
    """A tensor on its way, and how it lies.

    Attributes:
        blocked: Whether it lies in blocks.
        both: Whether it was brought into the other layout already.
    """

    blocked: bool = False
    both: bool = False

    def after(self, maker: fx.Node | None = None, room: tuple[str, ...] = ()) -> Lying:
        """Return what an operator inside the one that made this tensor makes of it."""
        return Lying(maker, room, self.blocked)


@dataclass
class LayoutWalk(Walk):
    """Goes through a program's nodes in order, and through the layouts of their tensors."""

    costs: BlockedPrices
    held: dict[fx.Node, Lying] = field(default_factory=dict)

    def given(self, operands: Sequence[fx.Node]) -> Lying:
        """Return a tensor that no operator makes: it lies as the operands do."""
        return Lying(blocked=any(self.held[n].blocked for n in operands))

    def returned(self, output: fx.Node) -> float:
        """Return the seconds to hand the results back, in the plain layout."""
        return sum(self.bring(n, False) for n in self.operands(output))

    def met(self, operand: fx.Node, other: Lying) -> float:
        """Return the seconds to lay an operand as another lies."""
        return self.bring(operand, other.blocked)

    def inside(self, work: Work, held: Lying) -> float:
        """Return the seconds of an operator inside the convolution that made a tensor."""
        return self.costs.inside_seconds(work, blocked=held.blocked)

    def bring(self, operand: fx.Node, blocked: bool) -> float:
        """Return the seconds to have an operand in one layout; nothing if it was needed before."""
        held = self.held[operand]
        if held.blocked == blocked or held.both or len(shape_of(operand) or ()) != 4:
            return 0.0
        held.both = True
        return self.costs.reorder_seconds(self.sized(_moved(operand)), out=held.blocked)

    def computed(self, node: fx.Node, work: Work, operands: list[fx.Node]) -> OpCost:
        """Return the cost of a node that is computed by itself, in the layout it can have."""
        costs = self.costs
        blocked = self.goes_blocked(node, work, operands)
        form = costs.form(work) if work.kind in CONVOLUTIONS else ""
        reads = form == "blocked" if form else blocked
        layout = sum(self.bring(n, reads) for n in operands)
        room = ("add", "activation") if form and len(node.users) == 1 else ()
        if work.kind == "scale" and blocked:
            # A norm on its own becomes a convolution by one weight a channel.
            room = ("activation",)
        self.held[node] = Lying(node if room else None, room, blocked or form == "direct")
        seconds = costs.seconds(work if blocked or form else costs.unblocked(work), alone=True)
        return OpCost(node.name, work, form or ("blocked" if blocked else "plain"), seconds, layout)

    def goes_blocked(self, node: fx.Node, work: Work, operands: list[fx.Node]) -> bool:
        """Whether the runtime computes a node on blocks: some operand must lie so already."""
        costs = self.costs
        if costs.layout.block == 1 or not costs.runs_blocked(work):
            return False
        if work.kind in CONVOLUTIONS:
            return True
        blocked = [self.held[n].blocked for n in operands]
        if not blocked or not all(blocked):
            return False
        if work.kind == "concat":
            block = costs.layout.block
            widths = [shape_of(n)[1] for n in operands if len(shape_of(n)) == 4]
            return arguments(node).get("dim", 0) in (1, -3) and not any(w % block for w in widths)
        if work.kind == "reduce":
            axes = arguments(node).get("dim")
            return isinstance(axes, list | tuple) and set(axes) in ({2, 3}, {-1, -2})
        if work.kind == "pointwise" and len(operands) > 1:
            return len({shape_of(n) for n in operands}) == 1
        return True


def _moved(node: fx.Node) -> Work:
    shape: Any = shape_of(node)
    return Work("copy", batch=shape[0], inputs=shape[1], outputs=shape[1], space=tuple(shape[2:]))
