"""What one batch shows of a layer: its channels example by example, and its operands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, fx

from narrows.ir.meta import Meta
from narrows.ir.structure.layers import Layer


@dataclass
class Sight:
    """A layer in one batch.

    Attributes:
        layer: The layer.
        apply: The layer's operator for another input and another weight.
        x: What it reads; ``None`` for a lookup.
        weight: Its weight; ``None`` for a lookup.
        result: Its result.
        end: What becomes of its result before others join in.
    """

    layer: Layer
    apply: Callable[[Tensor, Tensor], Tensor]
    x: Tensor | None
    weight: Tensor | None
    result: Tensor | None = None
    end: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Seen:
    """What one batch shows of one side of a layer.

    Attributes:
        layer: The layer.
        side: ``inputs``: what it reads; ``outputs``: what becomes of its result before other
            channels join in, behind its norm and its activation.
        examples: How many examples the batch has.
        values: The channels, ``[examples, channels, *positions]``, of the program's dtype.
        grads: The gradients by ``values``: of what this layer alone reads, or of all that is made
            of its result. ``None`` where the criterion needs none.
        sight: The layer's own operands and result, as they are.
    """

    layer: Layer
    side: str
    examples: int
    values: Tensor
    grads: Tensor | None
    sight: Sight

    @property
    def flat(self) -> Tensor:
        """The channels as ``[examples, channels, positions]``."""
        return self.values.reshape(*self.values.shape[:2], -1)

    def apart(self, x: Tensor, result: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what belongs to each example, of the layer's input and its result.

        It is one pair where examples do not lie along an axis of both.
        """
        layer, c = self.layer, self.layer.contraction
        assert c is not None
        at, to = lead_of(c.x, c.x_axis), lead_of(layer.node, layer.y_axis)
        count = self.examples
        if at is None or to is None or x.shape[at] % count or result.shape[to] % count:
            yield x, result
            return
        yield from zip(x.chunk(count, at), result.chunk(count, to), strict=True)


def lead_of(node: fx.Node, axis: int) -> int | None:
    """Return the axis of a node's examples: the one of a free size, else the first."""
    free = [a for a in Meta(node).dynamic if a != axis]
    found = free[0] if len(free) == 1 else 0
    return None if found == axis else found


def by_example(tensor: Tensor, axis: int, lead: int | None, examples: int) -> Tensor:
    """Return a tensor as ``[examples, channels, *positions]``.

    Args:
        tensor: The tensor.
        axis: The axis of its channels.
        lead: The axis of its examples; ``None`` for a single one. Where it is a multiple of the
            examples, as the windows of images are, the rest counts as positions.
        examples: How many examples there are.
    """
    if lead is None:
        return tensor.movedim(axis, 0)[None]
    moved = tensor.movedim((lead, axis), (0, 1))
    length = moved.shape[0]
    if length == examples or length % examples:
        return moved
    split = moved.reshape(examples, length // examples, *moved.shape[1:])
    return split.transpose(1, 2).flatten(2)
