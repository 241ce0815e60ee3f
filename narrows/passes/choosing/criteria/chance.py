"""Chance: what every other criterion has to beat."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from narrows.ir.program import Program
from narrows.ir.structure.layers import SIDES, Layer
from narrows.passes.choosing.criteria.base import DataFree
from narrows.passes.plans.within import refuse_no_whole


@dataclass(frozen=True)
class Random(DataFree):
    """Numbers from 0 to 1, drawn for each weight and side: the baseline of Mittal et al.

    Attributes:
        seed: Of the generator; the same one gives the same numbers, whatever else is in the
            network.
    """

    name: ClassVar[str] = "random"
    paper: ClassVar[str] = "Mittal et al., Recovering from Random Pruning, WACV 2018"
    seed: int = 0

    def __post_init__(self) -> None:
        refuse_no_whole("seed", self.seed)

    def score(self, program: Program, layer: Layer, side: str) -> np.ndarray:
        """Return the numbers."""
        key = [self.seed, zlib.crc32(layer.weight.encode()), SIDES.index(side)]
        return np.random.default_rng(key).random(layer.width(side))
