"""`Compensation`: how a layer makes up for what is gone, and what it is told for that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True)
class Sums:
    """What was summed over data of one layer. All in float64; the last column is the bias.

    Attributes:
        now: Its weights, zero where they are gone, ``[groups, outputs, columns + 1]``.
        kept: Which columns are there, ``[groups, columns + 1]``.
        square: ``mean(x x^T)`` of what it reads, ``[groups, columns + 1, columns + 1]``.
        cross: ``mean(y x^T)`` with what it should make, ``[groups, outputs, columns + 1]``.
        power: ``mean(y^2)``, ``[groups, outputs]``.
    """

    now: Tensor
    kept: Tensor
    square: Tensor
    cross: Tensor
    power: Tensor


@runtime_checkable
class Compensation(Protocol):
    """Finds a layer's weights anew."""

    @property
    def name(self) -> str:
        """What the command line calls it."""
        ...

    @property
    def summary(self) -> str:
        """What it does, in a line."""
        ...

    @property
    def reads_pruned(self) -> bool:
        """Whether a layer is told what the pruned network feeds it, or what the unpruned one does.

        With the former, what a layer makes has to make up for what was lost before it.
        """
        ...

    def solve(self, sums: Sums) -> Tensor:
        """Return the weights, ``[groups, outputs, columns + 1]``, zero where columns are gone."""
        ...


__all__ = ["Compensation", "Sums"]
