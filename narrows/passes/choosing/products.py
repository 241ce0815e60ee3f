"""`Product`: a layer as what it is, a matrix product, with what it multiplies spelled out.

A convolution multiplies patches of its input with a matrix. All that is solved for the weights of
a layer (what its channels cost, how it is repaired) is linear algebra on those patches, whatever
its stride, padding or dilation. Which place of a map each tap reads is not worked out by our own
rule: the layer's own operator tells, given a map of numbered places and a weight that picks a tap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from narrows.errors import PlanError
from narrows.ir.meta import shape_of, where
from narrows.ir.ops import table
from narrows.ir.ops.args import arguments, call
from narrows.ir.ops.contract import Contract
from narrows.ir.ops.contraction import Contraction
from narrows.ir.structure.layers import Layer, root_of

# So many rows of patches are enough to solve a layer by: these times its columns, within limits.
ROWS, LEAST_ROWS, MOST_ROWS = 64, 1 << 14, 1 << 16
ON_THE_WAY = 0.4  # of them are enough to choose by, and for a repair before the last one


@dataclass(frozen=True, eq=False)
class Product:
    """A layer as ``results = matrix @ patches``, per group.

    Attributes:
        layer: The layer.
        contraction: Its contraction.
        spatial: How many axes a kernel slides along; 0 for a linear layer.
    """

    layer: Layer
    contraction: Contraction
    spatial: int
    _known: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    @staticmethod
    def of(layer: Layer) -> Product | None:
        """Return a layer as a product; ``None`` for one that is none, such as a lookup."""
        row = table.find(layer.node)
        if layer.contraction is None or not isinstance(row, Contract):
            return None
        return Product(layer, layer.contraction, row.spatial)

    @property
    def groups(self) -> int:
        """How many independent products it is."""
        return self.layer.groups

    @cached_property
    def taps(self) -> int:
        """How many columns of the matrix belong to an input channel."""
        return self.contraction.blocks.shape[3]

    @property
    def inputs(self) -> int:
        """How many channels a group reads."""
        return self.layer.inputs // self.groups

    @property
    def outputs(self) -> int:
        """How many channels a group makes."""
        return self.layer.outputs // self.groups

    @property
    def depthwise(self) -> bool:
        """Whether a group reads one channel: it cannot go without what the group makes."""
        return self.groups > 1 and self.inputs == 1

    @property
    def bias(self) -> str:
        """The name of the bias, or an empty string."""
        return "" if self.layer.bias is None else str(self.layer.bias.target)

    # ------------------------------------------------------------------ data

    def rows(self, x: Tensor, y: Tensor, places: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return what it multiplies and what it makes of that.

        Args:
            x: Its input.
            y: Its result, or what stands for it.
            places: Which positions of every example count; ``None`` for all.

        Returns:
            Patches ``[groups, inputs * taps + 1, rows]``, the last line ones, and results
            ``[groups, outputs, rows]``; float32 where the program is of a half type, in which their
            products would overflow.
        """
        made = _wide(y).movedim(self.contraction.y_axis, 0)
        made = made.reshape(self.layer.outputs, self._apart(y), -1)
        made = made if places is None else made[:, :, places]
        patches = self.patches(x, places)
        ones = patches.new_ones(self.groups, 1, patches.shape[2])
        return torch.cat([patches, ones], 1), made.reshape(self.groups, self.outputs, -1)

    def patches(self, x: Tensor, places: Tensor | None) -> Tensor:
        """Return what it multiplies of its input: ``[groups, inputs * taps, rows]``; see `rows`."""
        return self._patches(_wide(x), places).reshape(self.groups, self.inputs * self.taps, -1)

    def places(self, y: Tensor, examples: int, turn: int, rows: float = 1.0) -> Tensor | None:
        """Return positions that are enough to solve the layer by; ``None`` for all of them.

        Args:
            y: A result of the layer.
            examples: How many examples there are, in all batches.
            turn: The number of the batch.
            rows: The share of what is enough.
        """
        goal = rows * min(max(ROWS * self.inputs * self.taps, LEAST_ROWS), MOST_ROWS)
        return self.drawn(y, goal / examples, turn)

    def drawn(self, y: Tensor, each: float, seed: int = 0) -> Tensor | None:
        """Return so many positions of every example, drawn; ``None`` for all of them."""
        # A convolution's positions are those of each example, a linear layer's of the batch.
        there = y.numel() // (self.layer.outputs * self._apart(y))
        most = max(1, round(each if self.spatial else each * y.shape[0]))
        if there <= most:
            return None
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(there, generator=generator)[:most].sort().values

    def _apart(self, y: Tensor) -> int:
        """Return how many examples of a result have positions of their own."""
        return y.shape[0] if y.dim() == self.spatial + 2 and self.spatial else 1

    def _patches(self, x: Tensor, places: Tensor | None) -> Tensor:
        if not self.spatial:
            flat = x.movedim(self.contraction.x_axis, 0).reshape(self.layer.inputs, -1)
            return flat if places is None else flat[:, places]
        x = x if x.dim() == self.spatial + 2 else x[None]
        space = tuple(x.shape[2:])
        if space not in self._known:
            self._known[space] = self._picked(space)
        reads = self._known[space]
        reads = reads if places is None else reads[:, places]
        padded = x.new_zeros(self.layer.inputs, len(x), math.prod(space) + 1)
        padded[:, :, 1:] = x.flatten(2).transpose(0, 1)
        index = reads[:, None] + torch.arange(len(x))[None, :, None] * padded.shape[2]
        return padded.flatten(1).index_select(1, index.flatten())

    def _picked(self, space: tuple[int, ...]) -> Tensor:
        """Return which place each tap of a position reads, from 1: ``[taps, positions]``.

        It is 0 beyond the border.
        """
        kernel = self.contraction.data.shape[2:]
        ruler = torch.arange(1, math.prod(space) + 1, dtype=torch.float64).reshape(1, 1, *space)
        picks = torch.eye(self.taps, dtype=ruler.dtype).reshape(self.taps, 1, *kernel)
        if self.layer.transposed:  # [inputs, outputs of a group, ...]
            picks = picks.transpose(0, 1)
        x, weight, bias = self.contraction.names
        changed = {x: ruler, weight: picks, bias: None, "groups": 1}
        target: Any = self.layer.node.target
        return target(**{**arguments(self.layer.node), **changed})[0].flatten(1).long()

    # ------------------------------------------------------------------ weights

    def matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return weights as a matrix ``[groups, outputs, inputs * taps + 1]``, float64.

        Args:
            weight: The layer's weight as the program holds it.
            bias: Its bias, which becomes the last column.
        """
        blocks = weight.detach().reshape(-1)[self._order].double().flatten(2)
        last = blocks.new_zeros(*blocks.shape[:2], 1)
        if bias is not None:
            last = bias.detach().double().reshape(self.groups, self.outputs, 1)
        return torch.cat([blocks, last], 2)

    def weights(self, matrix: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weight and the bias that a matrix stands for.

        Args:
            matrix: What `matrix` returned, changed.
            like: The weight as it was: its shape and dtype.
        """
        made = torch.empty(like.numel(), dtype=like.dtype)
        blocks = matrix[:, :, :-1].reshape(self._order.shape)
        made[self._order.flatten()] = blocks.to(like.dtype).flatten()
        return made.reshape(like.shape), matrix[:, :, -1].flatten().to(like.dtype)

    @cached_property
    def _order(self) -> Tensor:
        """Where in the weight each element of the matrix stands: ``[groups, out, in, taps]``."""
        before, chain = root_of(self.contraction.weight)
        shape = tuple(shape_of(before))
        numbers: Any = torch.arange(math.prod(shape)).reshape(shape)
        for step in chain:
            numbers, before = call(step, {before: numbers}), step
        return replace(self.contraction, data=numbers).blocks


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def gram(lines: Tensor) -> Tensor:
    """Return ``lines @ lines.T`` per group, float64; lines are float32 or float64."""
    # NumPy asks BLAS for one half of a symmetric product, torch for both.
    return torch.from_numpy(np.stack([m @ m.T for m in lines.numpy()])).double()


def refuse_infinite(product: Product, *sums: Tensor) -> None:
    """Raise `PlanError` where what was summed over data of a layer is NaN or infinite."""
    if all(bool(total.isfinite().all()) for total in sums):
        return
    raise PlanError(
        f"what {product.layer.weight!r} sees of the data is not finite",
        where=where(product.layer.node),
        why="the data, or what the network makes of it, holds NaN or infinity",
        hint="look for it: x.isfinite().all()",
    )


__all__ = ["Product", "gram", "refuse_infinite"]
