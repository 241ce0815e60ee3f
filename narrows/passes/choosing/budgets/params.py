"""`Params`: weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from narrows.passes.choosing.budgets.base import Summed
from narrows.passes.choosing.reads import Floats, Reads


@dataclass(frozen=True)
class Params(Summed):
    """The weights of all layers, biases and norms not counted."""

    name: ClassVar[str] = "params"
    unit: ClassVar[str] = "weights"

    def each(self, reads: Reads) -> Floats:
        """Return per layer those of one input channel for one output channel."""
        return reads.parameters


__all__ = ["Params"]
