"""`Udfc`: what read a channel that is gone reads the others in its place; no data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from narrows.ir.program import Note, Program
from narrows.passes.choosing.compensations.base import Task
from narrows.passes.choosing.criteria.udfc import Sums
from narrows.passes.choosing.families import Family, families_of
from narrows.passes.choosing.repair import held_by


@dataclass(frozen=True)
class Udfc(Sums):
    """Express a channel that is gone by those that are left, from the weights alone.

    A filter ``f_j`` is what a channel is multiplied from, the norm behind it folded in, and its
    shift. With ``s_j = argmin |f_j - sum_i s_ji f_i|^2 + ridge |s_j|^2`` over the channels ``i``
    that a layer still reads, its weights become ``W'_i = W_i + sum_j s_ji W_j``. What lies between,
    an activation say, is taken as linear, as the paper does.
    """

    needs_data: ClassVar[bool] = False

    def made(self, task: Task) -> tuple[Program, list[Note]]:
        """Return the network with the weights of what reads the channels."""
        base, weights = task.base, dict(task.begun.weights)
        families, notes = families_of(base, task.reads, task.there)
        for family in families:
            product = task.reads.products[family.layer]
            if held_by(base, product):
                continue
            name, bias = product.layer.weight, product.bias
            matrix = product.matrix(weights[name], weights[bias] if bias else None)
            source = product.matrix(base.weights[name], None)
            family.added(product, matrix, source, self.shares(family))
            weights[name], _ = product.weights(matrix, weights[name])
        return base.with_weights(task.left.masked(task.reads.products, weights)), notes

    def shares(self, family: Family) -> Tensor:
        """Return ``s``, ``[gone, kept]``, float64."""
        rows = torch.cat([family.filters, self.shift * family.constants], 1)
        there = torch.as_tensor(family.there)
        kept, gone = rows[there], rows[~there]
        ridge = self.damping(rows)
        if ridge == 0:
            return rows.new_zeros(len(gone), len(kept))
        square = kept @ kept.T + ridge * torch.eye(len(kept), dtype=rows.dtype)
        return torch.linalg.solve(square, kept @ gone.T).T


__all__ = ["Udfc"]
