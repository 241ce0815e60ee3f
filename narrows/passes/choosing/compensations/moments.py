"""`Moments`: what the pruned layer makes has the mean, and perhaps the deviation, that it had."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from narrows.passes.choosing.compensations.base import Sums


@dataclass(frozen=True)
class Moments:
    """Statistics of every output channel are matched, weights are not solved for.

    With the mean alone it is bias correction (Nagel et al., ICCV 2019). With the deviation, too, it
    is what measuring the statistics of batch norms anew does (Li et al., EagleEye, ECCV 2020).

    Attributes:
        name: Its name.
        summary: What it does.
        deviation: Whether the deviation is matched as well as the mean.
        reads_pruned: Whether it is told what the pruned network feeds a layer.
    """

    name: str
    summary: str
    deviation: bool
    reads_pruned: bool = True

    def solve(self, sums: Sums) -> Tensor:
        """Return the weights, scaled per output, with other biases."""
        result = sums.now.clone()
        mean = (result @ sums.square[:, :, -1:])[..., 0]
        if self.deviation:
            power = ((result @ sums.square) * result).sum(2)
            found = (power - mean.square()).clamp(min=0).sqrt()
            wanted = (sums.power - sums.cross[:, :, -1].square()).clamp(min=0).sqrt()
            scale = torch.where(found > 1e-6 * wanted, wanted / found, 1.0)
            result, mean = result * scale[..., None], mean * scale
        result[:, :, -1] += sums.cross[:, :, -1] - mean
        return result * sums.kept[:, None]


MEAN = Moments("mean", "match the mean of every output channel (bias correction)", False)
MOMENTS = Moments(
    "moments", "match mean and deviation of every output channel (as batch norms measured anew)",
    True,
)  # fmt: skip

__all__ = ["MEAN", "MOMENTS", "Moments"]
