"""FPGM: filters near the geometric median of their layer are replaceable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from narrows.ir.program import Program
from narrows.ir.structure.layers import Layer
from narrows.passes.choosing.criteria.base import DataFree
from narrows.passes.choosing.criteria.filters import filters

BLOCK = 256  # channels whose distances are held at a time


@dataclass(frozen=True)
class Fpgm(DataFree):
    """The sum of the distances to all other filters of the layer, equation 6 of the paper.

    What is near all others is near their geometric median, and the others can stand in for it.
    Distances are taken from inner products in the weights' own precision.
    """

    name: ClassVar[str] = "fpgm"
    paper: ClassVar[str] = (
        "He et al., Filter Pruning via Geometric Median for Deep CNN Acceleration, CVPR 2019"
    )

    def score(self, program: Program, layer: Layer, side: str) -> np.ndarray:
        """Return the sums of distances."""
        rows = filters(program, layer, side)
        rows = (rows if rows.element_size() >= 4 else rows.float()).numpy()
        products = rows @ rows.T  # BLAS computes one half of it
        squares = products.diagonal().copy()
        result = np.zeros(len(rows))
        for start in range(0, len(rows), BLOCK):
            part = products[start : start + BLOCK]
            part *= -2
            part += squares
            part += squares[start : start + BLOCK, None]
            np.maximum(part, 0, out=part)  # rounding
            result[start : start + BLOCK] = np.sqrt(part, out=part).sum(1, dtype=np.float64)
        return result
