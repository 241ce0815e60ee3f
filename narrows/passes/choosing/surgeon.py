"""`Surgeon`: what it costs a layer to do without a channel, the other weights making up for it.

The optimal brain surgeon (Hassibi and Stork, 1993) on blocks of columns, as in OBC (Frantar and
Alistarh, 2022): with the Gram matrix ``H`` of what the layer multiplies and ``K = H^-1``, removing
the columns ``c`` at the least squared error of the layer's outputs costs
``1/2 w_c [K]_cc^-1 w_c^T`` per output, and changes the other columns by ``-w_c [K]_cc^-1 K_c``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from narrows.ir.labels import Bools, Ints
from narrows.ir.program import Program
from narrows.passes.choosing.reads import Floats, Reads
from narrows.passes.choosing.statistics import Statistics

DAMPING = 1e-2  # of the mean of the Gram matrix's diagonal


class Surgeon:
    """One layer that loses channels one after the other. All in float64.

    Attributes:
        matrix: The weights by now, ``[groups, outputs, columns + 1]``; the last column is the bias.
        gone: The reads that were removed, by their numbers.
    """

    def __init__(
        self, matrix: Tensor, gram: Tensor, sensitivity: Tensor, reads: Sequence[Ints], taps: int
    ) -> None:
        """Begin with all channels.

        Args:
            matrix: The weights, ``[groups, outputs, columns + 1]``.
            gram: ``mean(x x^T)``, ``[groups, columns + 1, columns + 1]``. The last column is a
                constant one: it is neither damped nor removed.
            sensitivity: What a squared error of each output costs, ``[groups, outputs]``.
            reads: Per read the input channels that it is, counted over all groups.
            taps: The columns of a channel.
        """
        self.matrix = matrix.clone()
        self.gone: set[int] = set()
        self._sensitivity = sensitivity
        self._where = [_columns(read, taps) for read in reads]
        self._inverse = inverted(gram, DAMPING, constants=1)
        even = len(matrix) == 1 and len({len(w) for w in self._where}) == 1
        self._even = torch.stack(self._where) if even else None

    def scores(self) -> Floats:
        """Return what each read costs; infinite for one that is gone."""
        if self._even is None:
            return np.array([self._score(read) for read in range(len(self._where))])
        result = np.full(len(self._where), np.inf)
        left = [read for read in range(len(self._where)) if read not in self.gone]
        where = self._even[left]
        costs = losses(self.matrix[0], self._inverse[0], where, self._sensitivity[0])
        result[left] = costs.numpy()
        return result

    def remove(self, reads: Sequence[int]) -> float:
        """Remove reads, and let the other columns make up for them; return what that costs."""
        total = 0.0
        for group, own, solved, cost in self._parts(reads):
            inverse = self._inverse[group]
            lines = inverse[own]
            self.matrix[group] -= solved.mT @ lines
            inverse -= lines.mT @ torch.linalg.solve(lines[:, own], lines)
            self.matrix[group][:, own] = 0
            inverse[own] = 0
            inverse[:, own] = 0
            total += cost
        self.gone.update(reads)
        return total

    def _score(self, read: int) -> float:
        if read in self.gone:
            return np.inf
        return sum(cost for *_, cost in self._parts([read]))

    def _parts(self, reads: Sequence[int]) -> Iterator[tuple[int, Tensor, Tensor, float]]:
        """Yield per group the columns of reads, ``[K]_cc^-1 w_c^T``, and what they cost."""
        where = torch.cat([self._where[r] for r in reads])
        width = self.matrix.shape[2] - 1
        for group in range(len(self.matrix)):
            own = where[where.div(width, rounding_mode="floor") == group] - group * width
            if not len(own):
                continue
            columns = self.matrix[group][:, own]
            solved = torch.linalg.solve(self._inverse[group][own[:, None], own], columns.mT)
            each = (columns * solved.mT).sum(1)
            yield group, own, solved, 0.5 * float(each @ self._sensitivity[group])


def inverted(gram: Tensor, damping: float, constants: int = 0) -> Tensor:
    """Return the inverse of Gram matrices, damped.

    Args:
        gram: ``[groups, columns, columns]``, float64.
        damping: What is added to a diagonal, relative to its mean.
        constants: How many of the last columns are ones, which need no damping.
    """
    damped = gram.clone()
    diagonal = damped.diagonal(dim1=1, dim2=2)[:, : gram.shape[1] - constants]
    mean = diagonal.mean(1, keepdim=True)
    diagonal += damping * mean + (mean == 0)
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))


def losses(matrix: Tensor, inverse: Tensor, where: Tensor, sensitivity: Tensor) -> Tensor:
    """Return what each of several sets of columns costs, all of one size.

    Args:
        matrix: The weights, ``[outputs, columns]``.
        inverse: Of the Gram matrix, ``[columns, columns]``.
        where: The columns of every set, ``[sets, columns of a set]``.
        sensitivity: What a squared error of each output costs, ``[outputs]``.
    """
    blocks = inverse[where[:, :, None], where[:, None, :]]
    columns = matrix[:, where].permute(1, 2, 0)  # [sets, columns of a set, outputs]
    each = (columns * torch.linalg.solve(blocks, columns)).sum(1)
    return 0.5 * (each @ sensitivity)


def surgeons_of(
    program: Program, reads: Reads, found: Statistics, there: Bools
) -> list[Surgeon | None]:
    """Return the surgeon of every layer, ``None`` for one that keeps all it reads."""
    result: list[Surgeon | None] = []
    for j, (product, own) in enumerate(zip(reads.products, reads.of_layer, strict=True)):
        gram = found.grams[j]
        if gram is None:
            result.append(None)
            continue
        bias = program.weights[product.bias] if product.bias else None
        matrix = product.matrix(program.weights[product.layer.weight], bias)
        columns = [reads.columns[r] for r in own]
        made = Surgeon(matrix, gram, found.sensitivities[j], columns, product.taps)
        gone = np.flatnonzero(~there[own]).tolist()
        if gone:
            made.remove(gone)
        result.append(made)
    return result


def _columns(read: Ints, taps: int) -> Tensor:
    """Return the columns of channels, those of all groups one after the other."""
    return (torch.as_tensor(read)[:, None] * taps + torch.arange(taps)).flatten()


__all__ = ["Surgeon", "inverted", "losses", "surgeons_of"]
