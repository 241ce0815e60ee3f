"""`Moments`: what the pruned layer makes has the mean, and perhaps the deviation, that it had."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from narrows.passes.choosing.compensations.base import Sums


@dataclass(frozen=True)
class Moments:
    """Match mean and deviation of every output channel, as batch norms measured anew do.

    Weights are scaled per output, not solved for.
    """

    name: ClassVar[str] = "moments"
    paper: ClassVar[str] = (
        "Li et al., EagleEye: Fast Sub-net Evaluation for Efficient Neural Network Pruning, ECCV "
        "2020"
    )
    reads_pruned: ClassVar[bool] = True
    deviation: ClassVar[bool] = True  # whether it is matched as well as the mean

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


@dataclass(frozen=True)
class Mean(Moments):
    """Match the mean of every output channel: bias correction."""

    name: ClassVar[str] = "mean"
    paper: ClassVar[str] = (
        "Nagel et al., Data-Free Quantization through Weight Equalization and Bias Correction, "
        "ICCV 2019"
    )
    deviation: ClassVar[bool] = False


__all__ = ["Mean", "Moments"]
