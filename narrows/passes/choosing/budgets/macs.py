"""`Macs`: multiply-accumulates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from narrows.passes.choosing.budgets.base import Summed
from narrows.passes.choosing.reads import Floats, Reads


@dataclass(frozen=True)
class Macs(Summed):
    """The multiply-accumulates of all layers with weights."""

    name: ClassVar[str] = "macs"
    unit: ClassVar[str] = "multiply-accumulates"

    def each(self, reads: Reads) -> Floats:
        """Return per layer those of one input channel for one output channel."""
        return reads.macs


__all__ = ["Macs"]
