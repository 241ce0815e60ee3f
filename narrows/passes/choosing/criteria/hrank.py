"""HRank: the rank of a channel's maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from narrows.ir.program import Program
from narrows.ir.structure.layers import Layer
from narrows.passes.choosing.criteria.base import Measuring, Sums
from narrows.passes.choosing.seen import Seen


@dataclass(frozen=True)
class HRank(Measuring):
    """The mean rank of a channel's map over the examples.

    The rank is the number of singular values above ``max(rows, columns) * eps`` of the largest.
    Maps of three axes are taken as matrices of the first by the others.
    """

    name: ClassVar[str] = "hrank"
    paper: ClassVar[str] = (
        "Lin et al., HRank: Filter Pruning using High-Rank Feature Map, CVPR 2020"
    )

    def measure(self, seen: Seen) -> Sums:
        """Return the sums of the ranks over the examples."""
        if seen.values.dim() < 4:
            raise self.no("its channels are no maps: a rank is of a matrix", "mean-activation")
        maps = seen.values.flatten(3)
        maps = maps.float() if maps.element_size() < 4 else maps
        return {"ranks": torch.linalg.matrix_rank(maps).sum(0)}

    def weigh(self, program: Program, layer: Layer, side: str, sums: Sums) -> Tensor:
        """Return the mean ranks."""
        return sums["ranks"] / sums["examples"]
