"""What a row of the op table is, and the three questions every row answers.

A row belongs to one ATen overload and knows all that the compiler knows of it:

* ``flow``: given what is known of the operands' channels, what is known of the result's, and which
  result channel reads which operand channel (forwards);
* ``demand``: given the result channels that are needed, the operand channels that must be there
  (backwards);
* ``rewrite``: given operands that hold only some of their channels, the call that computes the
needed
  channels of the result, literal arguments included.

Kinds of operators (pointwise, layout, contraction ...) are subclasses that answer the three
questions once; a row fills in the facts of one operator.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, fx

from narrows.ir.held import Held
from narrows.ir.labels import Ints, Value
from narrows.ir.ops.flow import Flow
from narrows.ir.ops.identities import Identity
from narrows.ir.ops.integer import IntegerForm
from narrows.ir.ops.protocols import Builder, Channels, Needs
from narrows.ir.ops.sample import Sample
from narrows.ir.ops.works import elementwise
from narrows.ir.work import Work


@dataclass(frozen=True)
class WeightAxis:
    """A weight axis that follows the channels of a tensor.

    Attributes:
        weight: The ``get_attr`` node.
        axis: The axis of the weight.
        role: ``out`` where channels are made, ``in`` where they are summed over, ``with`` where
            they are only scaled or shifted.
        holder: The node whose channels they are.
        labels: Per index of the axis the label in ``holder`` it belongs to.
    """

    weight: fx.Node
    axis: int
    role: str
    holder: fx.Node
    labels: Ints


@dataclass(frozen=True)
class Shared:
    """Channels of one tensor that an operator reads as sets: a statistic, a softmax, an even width.

    Where there are several sets each can go as a whole; a single one stays, for ``reason``.

    Attributes:
        holder: The node whose channels they are.
        labels: Labels of ``holder``.
        sets: The number of the set that each entry of ``labels`` is in.
        reason: Why a single set stays whole; empty where its channels can go one by one.
    """

    holder: fx.Node
    labels: Ints
    sets: Ints
    reason: str


@dataclass(frozen=True, kw_only=True)
class Row(ABC):
    """One operator of the table.

    What holds for every operator of a kind stands in its class, what differs in the row's fields.

    Attributes:
        kind: The heading under which ``narrows ops`` lists it; nothing is decided by it.
        passes_on: Whether a result channel is a channel of each operand, whatever that holds.
        broadcasts: Whether operands are repeated along the axes that they lack.
        rearranges: Whether it picks or moves elements of one operand and computes none.
        keeps_all: Whether, moving them, it leaves none of them out.
        concatenates: Whether its operands lie side by side in its result.
        contracts: Whether it sums products over an axis, with a weight or of two operands.
        makes_channels: Whether its result has channels of its own, made of a weight.
        reads_masked: Whether an input mask of its weight can be handed to the analysis beside the
            program (`narrows.ir.channels.Facts.ignored`).
        target: The ATen overload.
        summary: One line for ``narrows ops``.
        samples: Example calls; the table's test runs the operator on them.
        costs: The work of what sums over a weight or another activation, from the operand and
            result shapes; the multiply-accumulates follow from it.
        work_kind: What kind of work it is otherwise (see `narrows.ir.work`); empty for none.
        integer: What becomes of it when its operands are codes; ``None`` keeps it floating-point.
        any_width: Whether it takes any number of channels: it does the same to each that it passes
            on, and no literal argument tells how many there are.
        identity: When it hands its first operand on (`narrows.ir.ops.identities`); ``None`` for
            never.
        parts: The arguments whose elements its result is put together of, each element of one;
            empty for what computes, or moves the elements of one operand.
        gain: The argument whose zero entries make the result the ``bias`` there, whatever comes in
            (a norm's weight); empty if it has none.
        affine: Whether it is a scale and a shift per channel of axis 1 by weights alone, where it
            is not in training (batch norm).
    """

    kind: ClassVar[str]
    passes_on: ClassVar[bool] = False
    broadcasts: ClassVar[bool] = False
    rearranges: ClassVar[bool] = False
    keeps_all: ClassVar[bool] = False
    concatenates: ClassVar[bool] = False
    contracts: ClassVar[bool] = False
    makes_channels: ClassVar[bool] = False
    reads_masked: ClassVar[bool] = False

    target: Any
    summary: str = ""
    samples: tuple[Sample, ...] = ()
    costs: Callable[[fx.Node], Work] | None = field(default=None)
    work_kind: str = ""
    integer: IntegerForm | None = None
    any_width: bool = False
    identity: Identity | None = None
    parts: tuple[str, ...] = ()
    gain: str = ""
    affine: bool = False

    @property
    def name(self) -> str:
        """The overload as ATen spells it: ``conv2d.default``."""
        return f"{self.target._opname}.{self.target._overloadname}"

    @abstractmethod
    def flow(self, facts: Channels, node: fx.Node) -> Flow:
        """Return the channels of the result from those of the operands."""

    def demand(self, demand: Needs, node: fx.Node) -> None:
        """Mark the operand channels that the needed result channels read."""
        need, valued = demand.needed(node), demand.valued(node)
        for slot, read in enumerate(demand.facts.flows[node].reads):
            count = demand.facts.value(read.operand).count
            demand.require(node, slot, read.reached(need, count), read.reached(valued, count))

    @abstractmethod
    def rewrite(self, rewriter: Builder, node: fx.Node) -> Held:
        """Emit the call that computes the needed channels and return what it holds."""

    def input_axis(self, node: fx.Node, operand: fx.Node) -> int | str | None:
        """Return which axis of ``operand`` the operator sums over, or ``same`` if it passes axes
        on."""
        return None

    def parameter_axis(self, axis: int, rank: int, parameter_rank: int) -> int | None:
        """Return the axis of a parameter that runs along ``axis`` of the operand, if one does.

        Parameters of a norm lie on its trailing axes unless its kind says otherwise.
        """
        own = axis - rank + parameter_rank
        return own if own >= 0 else None

    def shared(self, facts: Channels, node: fx.Node) -> Shared | None:
        """Return which channels of an operand can only go together, besides what ``reads`` says."""
        return None

    def joins(self, facts: Channels, node: fx.Node) -> list[tuple[fx.Node, Ints, fx.Node, Ints]]:
        """Return labels of two operands that are summed against each other, and so couple."""
        return []

    def heads(self, facts: Channels, node: fx.Node) -> list[tuple[fx.Node, Ints, Ints]]:
        """Return the tensors that must have the same heads (batch axes of a product), if any.

        Per tensor: its node, labels of it, and the number of the head that each is in.
        """
        return []

    def weight_axes(self, facts: Channels, node: fx.Node) -> Iterator[WeightAxis]:
        """Yield the weight axes that follow the channels of the operands and the result."""
        yield from ()

    def work(self, node: fx.Node) -> Work | None:
        """Return what ``node`` has to do at the example's sizes; ``None`` for nothing."""
        if self.costs is not None:
            return self.costs(node)
        return elementwise(node, self.work_kind) if self.work_kind else None


def labels_along(value: Value, axis: int) -> Tensor:
    """Return the labels with ``axis`` last and the others flattened: ``[others, size or 1]``."""
    tensor = value.tensor.movedim(axis, -1)
    return tensor.reshape(-1, tensor.shape[-1])
