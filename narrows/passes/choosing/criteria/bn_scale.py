"""BN scale: the gain of the batch norm that a channel goes through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from narrows.ir.program import Program
from narrows.ir.structure.layers import Layer
from narrows.passes.choosing.criteria.base import DataFree
from narrows.passes.choosing.criteria.chains import batch_norm, gain


@dataclass(frozen=True)
class BnScale(DataFree):
    """The magnitude of the batch norm's gain: of the norm after what makes a channel.

    For what reads a channel it is the norm before it, which a pre-activation network has there.
    """

    name: ClassVar[str] = "bn-scale"
    paper: ClassVar[str] = (
        "Liu et al., Learning Efficient Convolutional Networks through Network Slimming, ICCV 2017"
    )
    comparable: ClassVar[bool] = True

    def score(self, program: Program, layer: Layer, side: str) -> Tensor:
        """Return the gains; `NoScoreError` where there is no norm of its own."""
        norm = batch_norm(layer, side)
        found = None if norm is None else gain(program, norm)
        if found is None:
            place = "follows" if side == "outputs" else "stands right before"
            raise self.no(f"no batch norm with a gain {place} it")
        return found
