"""What the rewriter passes around: a tensor of the new program, and the news that one is ragged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, fx

from narrows.ir.labels import Bools, Ints, Value, even_out, match, some


@dataclass(eq=False)
class Held:
    """A tensor of the new program.

    Attributes:
        node: The node in the new graph.
        places: The original place at each position (see `Value.places`): labelled axes as wide as
            the tensor, the others of size 1. No place stands twice. Along axes without labels the
            tensor is as it was.
        shape: The shape at the example's sizes.
    """

    node: fx.Node
    places: Tensor
    shape: tuple[int, ...]


class Gathers(Protocol):
    """Emits gathers."""

    def gather(self, held: Held, axis: int, index: Ints) -> Held:
        """Emit the channels at ``index`` of ``axis``: nothing, a slice, or an index_select."""
        ...


class Side:
    """One operand, seen along the axes of the result.

    Attributes:
        held: The operand.
        stands: Per axis of the operand the axis of the result that it lies along.
        index: Per axis of the result, the original index at each position, in a shape that
            broadcasts; axes along which the operand is broadcast are left out.
    """

    def __init__(
        self, source: Value, held: Held, rank: int, stands: Sequence[int], axes: Iterable[int]
    ) -> None:
        self.held, self.stands = held, list(stands)
        self.index: dict[int, Tensor] = {}
        own = source.index(held.places)
        sorts = np.argsort(self.stands).tolist()
        for axis in axes:
            if axis not in self.stands:
                continue
            at = self.stands.index(axis)
            if at in own:
                sizes = [1] * rank
                for a in sorts:
                    sizes[self.stands[a]] = own[at].shape[a]
                self.index[axis] = own[at].permute(sorts).reshape(sizes)
            elif source.shape[at] > 1:  # no channels, but as long as the result
                ruler = torch.arange(held.shape[at])
                self.index[axis] = ruler.view([-1 if a == axis else 1 for a in range(rank)])

    def cut(self, builder: Gathers, axis: int, wanted: Ints) -> bool:
        """Gather the original indices ``wanted`` along an axis; whether that can be done."""
        along = line(self.index[axis], axis)
        if along is None:
            return False
        index = match(along, wanted)
        if index is None:
            return False
        self.held = builder.gather(self.held, self.stands.index(axis), index)
        for a, one in self.index.items():
            if one.shape[axis] > 1 or a == axis:
                self.index[a] = one.index_select(axis, torch.from_numpy(index))
        return True


def line(index: Tensor, axis: int) -> Ints | None:
    """Return the original index at each position of an axis, ``None`` where it is not one."""
    rows = index.movedim(axis, -1).reshape(-1, index.shape[axis])
    return rows[0].numpy() if len(rows) == 1 or bool((rows == rows[:1]).all()) else None


def merged(sides: Sequence[Side], axes: Iterable[int]) -> dict[int, Tensor]:
    """Return the index along each axis, of operands that are in step."""
    return {
        axis: max((s.index[axis] for s in sides if axis in s.index), key=Tensor.numel)
        for axis in axes
    }


class RaggedError(Exception):
    """The needed channels of ``node`` do not fill a rectangular tensor.

    Attributes:
        node: The node.
        mask: The labels that were to be kept; ``None`` if only all of them will do.
    """

    def __init__(self, node: fx.Node, mask: Bools | None) -> None:
        super().__init__(node.name)
        self.node, self.mask = node, mask


def evened(value: Value, mask: Bools) -> Bools:
    """Return the labels to keep so that what is left of ``value`` is rectangular."""
    grid = even_out(torch.from_numpy(mask)[value.tensor])
    wider = mask.copy()
    wider[np.unique(value.tensor[grid].numpy())] = True
    return wider


def proven(node: fx.Node, value: Value, need: Bools, held: Held) -> Held:
    """Return what a node holds if it can be what the other nodes take it for.

    Every place of a needed label is there, none twice, and axes without labels are as they were;
    else `RaggedError`.
    """
    if held.places is value.places:
        return held
    sizes = tuple(value.tensor.shape)
    for size, was, now, place in zip(
        sizes, value.shape, held.shape, held.places.shape, strict=True
    ):
        if (now != was or place != 1) if size == 1 else now != place:
            raise RaggedError(node, None)
    if len(sizes) - sizes.count(1) == 0:
        return held
    there = np.bincount(held.places.reshape(-1).numpy(), minlength=value.tensor.numel())
    wanted = need if value.natural else need[value.tensor.reshape(-1).numpy()]
    if int(there.max()) > 1 or some(wanted & (there == 0)):
        raise RaggedError(node, None)
    return held
