"""`Channels`: how many channels layers make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from narrows.ir.program import Program
from narrows.passes.choosing.budgets.base import Budget
from narrows.passes.choosing.prepare import prepared
from narrows.passes.choosing.reads import reads_of
from narrows.passes.plans.candidates import Candidates, Widths
from narrows.passes.plans.setting import Setting


@dataclass(frozen=True)
class Channels(Budget):
    """The channels that all layers make, what nobody reads any more not counted."""

    name: ClassVar[str] = "channels"
    unit: ClassVar[str] = "channels"

    def of(self, candidates: Candidates, widths: Widths) -> float:
        """Return how many are made."""
        return float(candidates.reads.widths(candidates.there(widths))[1].sum())

    def whole(self, candidates: Candidates) -> float:
        """Return how many the unpruned layers make."""
        return float(sum(p.layer.outputs for p in candidates.reads.products))

    def left(self, setting: Setting, program: Program) -> float:
        """Return the share of the channels that a program's layers make."""
        small, whole = (
            sum(product.layer.outputs for product in reads_of(prepared(p)).products)
            for p in (program, setting.program)
        )
        return small / whole


__all__ = ["Channels"]
