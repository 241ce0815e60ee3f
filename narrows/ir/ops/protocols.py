"""What the rows of the op table may ask of the compiler, and nothing more.

A row answers three questions (`narrows.ir.ops.row`), and asks back: `Channels` is what the forward
analysis knows, `Needs` is where a row says what must be there, `Builder` is what emits the new
program. The analyses and the rewriter are written after the rows and know them; the rows know only
these protocols.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor, fx

from narrows.ir.held import Gathers, Held, RaggedError, Side
from narrows.ir.labels import Bools, Ints, Value
from narrows.ir.ops.contraction import Contraction
from narrows.ir.ops.flow import Flow


class Channels(Protocol):
    """What the forward analysis knows of every node.

    Attributes:
        flows: Per node its `Flow`.
        ignored: Per name of a contraction's node, the input channels that count as zero for it.
    """

    flows: dict[fx.Node, Flow]
    ignored: Mapping[str, Bools]

    def value(self, node: fx.Node) -> Value:
        """Return the channels of a node that is one tensor."""
        ...

    def is_free(self, node: Any) -> bool:
        """Whether an argument is a tensor made of weights alone."""
        ...

    def data(self, node: fx.Node) -> Tensor:
        """Return the tensor of a free value, computed from the weights at most once."""
        ...

    def moved_operand(self, node: fx.Node) -> fx.Node:
        """Return what a node that only moves elements moves; of a part, what was split."""
        ...

    def came(self, node: fx.Node) -> Tensor:
        """Return where each place of a node that only moves elements has its operand's place."""
        ...


class Needs(Protocol):
    """The channels that somebody needs, found from the outputs to the inputs."""

    @property
    def facts(self) -> Channels:
        """What the forward analysis knows."""
        ...

    def needed(self, node: fx.Node) -> Bools:
        """Return which of the node's labels are needed."""
        ...

    def valued(self, node: fx.Node) -> Bools:
        """Return which of the needed labels must hold their value; the others only fill a place."""
        ...

    def forced(self, node: fx.Node) -> Bools:
        """Return which labels must stay because a rewrite could not do without."""
        ...

    def require(self, node: fx.Node, slot: int, mask: Bools, valued: Bools | None = None) -> None:
        """Say that ``node`` reads the labels ``mask`` of the operand of its ``slot``-th read."""
        ...

    def extend(self, node: fx.Node, mask: Bools, reason: str, message: str) -> None:
        """Add labels that ``node`` has a place for although nobody reads them."""
        ...

    def columns(self, node: fx.Node) -> Bools | None:
        """Return the input channels that other uses of the node's weight read, if there are any."""
        ...

    def use_weight(self, weight: fx.Node, node: fx.Node, parts: dict[int, Bools]) -> None:
        """Record which part of a weight ``node`` uses, per axis."""
        ...

    def note(self, node: fx.Node, reason: str, message: str, channels: Bools) -> None:
        """Record that channels stay although the plan could do without."""
        ...

    def constant_operands(self, node: fx.Node) -> set[int]:
        """Return the slots of an element-wise node whose needed channels are all constants."""
        ...


class Builder(Gathers, Protocol):
    """Emits the new program: what each operand holds there, and the nodes that are made of it."""

    @property
    def facts(self) -> Channels:
        """What the forward analysis knows."""
        ...

    @property
    def order(self) -> Mapping[str, Ints]:
        """Per name of a node that makes channels, the rank of each of its labels."""
        ...

    def need(self, node: fx.Node) -> Bools:
        """Return the labels that ``node`` is to hold."""
        ...

    def made(self, node: fx.Node) -> Ints:
        """Return the labels that ``node`` is to make, in the order in which it makes them."""
        ...

    def wanted(self, node: fx.Node, axis: int) -> Ints:
        """Return the original indices of an axis at which ``node`` has a needed label."""
        ...

    def required(self, node: fx.Node, slot: int) -> Bools:
        """Return the labels that ``node`` reads of an operand."""
        ...

    def operand(self, node: fx.Node, slot: int, exact: bool = False) -> Held:
        """Return an operand that holds the labels that ``node`` reads."""
        ...

    def held(self, node: fx.Node) -> Held:
        """Return what the new program holds of an old node."""
        ...

    def deliver(self, node: fx.Node, mask: Bools, exact: bool = True) -> Held:
        """Return ``node`` restricted to the labels ``mask``, by a slice or a gather if it holds
        more."""
        ...

    def turns(self, new: fx.Node, held: Held, axis: int, index: Ints) -> None:
        """Say that a node has the channels of another at ``index``: maybe all, in another order."""
        ...

    def unturned(self, held: Held, axis: int) -> Held:
        """Return what a tensor was before all its channels were put in another order."""
        ...

    def entire(self, user: fx.Node, node: fx.Node) -> Held:
        """Return an operand of ``user`` with all its channels in their order."""
        ...

    def whole(self, node: fx.Node) -> Held:
        """Emit a barrier: the operator as it was, on whole operands."""
        ...

    def emit(
        self, node: fx.Node, changes: dict[str, Any], places: Tensor, shape: tuple[int, ...]
    ) -> Held:
        """Emit ``node`` with some arguments replaced by new nodes; the rest is copied."""
        ...

    def emit_mapped(
        self,
        node: fx.Node,
        replaced: dict[fx.Node, fx.Node],
        places: Tensor,
        shape: tuple[int, ...],
    ) -> Held:
        """Emit ``node`` with operands replaced one by one, wherever they stand among the
        arguments."""
        ...

    def item(
        self, node: fx.Node, parent: fx.Node, x: Held, places: Tensor, shape: tuple[int, ...]
    ) -> Held:
        """Emit ``parent`` on ``x`` once and ``node`` as one of its results."""
        ...

    def retag(self, node: fx.Node, new: fx.Node, places: Tensor, shape: tuple[int, ...]) -> Held:
        """Return a new node as what ``node`` holds, which needs no operator of its own."""
        ...

    def squeezed(self, node: fx.Node, held: Held, places: Tensor, axis: int) -> Held:
        """Emit the removal of an axis of size 1; ``places`` still has it."""
        ...

    def carried(self, node: fx.Node, held: Held, moved: Tensor) -> Tensor:
        """Return the places of ``node`` after it moved the places of its operand to ``moved``."""
        ...

    def preview(
        self, node: fx.Node, changes: dict[str, Any], free: dict[fx.Node, Tensor] | None = None
    ) -> Any:
        """Run the node's operator on labels given in place of arguments."""
        ...

    def trim(self, labels: Tensor, value: Value) -> Tensor:
        """Cut the axes along which ``value`` never changes to size 1."""
        ...

    def ragged(self, node: fx.Node, mask: Bools | None = None) -> RaggedError:
        """Return the error that says the needed channels of ``node`` do not fill a tensor."""
        ...

    def narrowed(self, node: fx.Node, places: Tensor) -> bool:
        """Whether ``places`` differ from what the node held originally."""
        ...

    def positions(self, node: fx.Node, places: Tensor) -> dict[int, Ints] | None:
        """Return per labelled axis the original index at each new one, or ``None`` if they are
        entangled."""
        ...

    def line(self, node: fx.Node, index: Tensor, axis: int) -> Ints:
        """Return the original index at each position of an axis, the same in every row."""
        ...

    def sides(
        self,
        node: fx.Node,
        parts: Sequence[tuple[fx.Node, Held, Sequence[int]]],
        rank: int,
        axes: Sequence[int],
        step: Sequence[int] | None = None,
    ) -> list[Side]:
        """Return operands of ``node`` in step along some axes."""
        ...

    def aligned(
        self, node: fx.Node, skip_axis: int | None = None
    ) -> tuple[list[fx.Node], Tensor, tuple[int, ...]]:
        """Return the operands of an element-wise node with their channels in step."""
        ...

    def sliced_free(self, node: fx.Node, operand: fx.Node, places: Tensor) -> fx.Node:
        """Return an element-wise operand made of weights, restricted like the result."""
        ...

    def plain(self, node: fx.Node) -> fx.Node:
        """Return the copy of a node that depends on no channel: a weight, a number."""
        ...

    def weight(self, node: fx.Node, index: dict[int, Ints]) -> fx.Node:
        """Return a weight, or a value made of weights, restricted to ``index`` per axis."""
        ...

    def free(self, node: fx.Node, index: dict[int, Ints]) -> fx.Node:
        """Return a value made of weights restricted to ``index``: the weight itself where
        possible."""
        ...

    def free_data(self, node: fx.Node) -> dict[fx.Node, Tensor]:
        """Return the tensors of the operands made of weights alone."""
        ...

    def constant(self, name: str, data: Tensor) -> fx.Node:
        """Return a new constant tensor of the graph."""
        ...

    def contracted_weight(self, c: Contraction, rows: Ints, taken: Ints, fold: Bools) -> fx.Node:
        """Return a contraction's weight for the outputs ``rows`` and the inputs ``taken``, in
        order."""
        ...

    def contracted_bias(
        self, node: fx.Node, c: Contraction, rows: Ints, amount: np.ndarray | None
    ) -> fx.Node | None:
        """Return a contraction's bias for the outputs ``rows``, with the folded constants added."""
        ...
