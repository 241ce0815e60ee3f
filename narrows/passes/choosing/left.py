"""`Left`: what a plan leaves of every layer, as rows and columns of its matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from narrows.ir.labels import Bools
from narrows.passes.choosing.products import Product
from narrows.passes.choosing.reads import Reads
from narrows.passes.plans.plan import ChannelPlan


@dataclass(frozen=True, eq=False)
class Left:
    """What is left of every layer.

    Attributes:
        columns: Per layer which columns of its matrix are there, ``[groups, columns + 1]``.
        rows: Per layer which of its outputs are there, ``[groups, outputs]``.
    """

    columns: tuple[Tensor, ...]
    rows: tuple[Tensor, ...]

    @staticmethod
    def of(reads: Reads, there: Bools) -> Left:
        """Return what is left where some reads are gone."""
        inputs = [torch.ones(p.layer.inputs, dtype=torch.bool) for p in reads.products]
        for read in np.flatnonzero(~there):
            inputs[reads.layer[read]][torch.as_tensor(reads.columns[read])] = False
        outputs = [torch.ones(p.layer.outputs, dtype=torch.bool) for p in reads.products]
        return Left._of(reads.products, inputs, outputs)

    @staticmethod
    def by(reads: Reads, plan: ChannelPlan) -> Left:
        """Return what a plan leaves."""
        sides = []
        for keeps, side in ((plan.inputs, "inputs"), (plan.outputs, "outputs")):
            masks = []
            for product in reads.products:
                width = product.layer.width(side)
                keep = keeps.get(product.layer.weight)
                mask = torch.ones(width, dtype=torch.bool)
                if keep is not None:
                    mask[:] = False
                    mask[list(keep)] = True
                masks.append(mask)
            sides.append(masks)
        return Left._of(reads.products, *sides)

    def __and__(self, other: Left) -> Left:
        """Return what both leave."""
        columns = (a & b for a, b in zip(self.columns, other.columns, strict=True))
        rows = (a & b for a, b in zip(self.rows, other.rows, strict=True))
        return Left(tuple(columns), tuple(rows))

    @staticmethod
    def _of(products: Sequence[Product], inputs: list[Tensor], outputs: list[Tensor]) -> Left:
        columns = []
        for product, channels in zip(products, inputs, strict=True):
            own = channels.reshape(product.groups, -1).repeat_interleave(product.taps, 1)
            columns.append(torch.cat([own, torch.ones(product.groups, 1, dtype=torch.bool)], 1))
        rows = [o.reshape(p.groups, -1) for p, o in zip(products, outputs, strict=True)]
        return Left(tuple(columns), tuple(rows))

    def masked(
        self, products: Sequence[Product], weights: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return weights with zeros where something is gone."""
        result = dict(weights)
        for product, columns, rows in zip(products, self.columns, self.rows, strict=True):
            if columns.all() and rows.all():
                continue
            name, bias = product.layer.weight, product.bias
            matrix = product.matrix(result[name], result[bias] if bias else None)
            matrix = matrix * columns[:, None] * rows[:, :, None]
            result[name], constant = product.weights(matrix, result[name])
            if bias:
                result[bias] = constant
        return result


__all__ = ["Left"]
