"""Sigmoid masks that harden within every epoch (DER).

S. Yan, J. Xie, X. He: DER: Dynamically Expandable Representation for Class Incremental Learning,
CVPR 2021; the annealing is that of J. Serra et al., ICML 2018.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from narrows.training.footprint import Footprint
from narrows.training.gates import LearnedGates
from narrows.training.schedules import Sawtooth


@dataclass(eq=False, repr=False, kw_only=True)
class AnnealedMasks(LearnedGates):
    """Gates with the masks ``m = sigmoid(s e)``, ``e`` one parameter per channel.

    Within an epoch of ``B`` batches ``s`` rises, at batch ``b`` of ``1 .. B``:

        ``s = 1 / s_max + (s_max - 1 / s_max) (b - 1) / (B - 1)``,

    so that an epoch begins with masks near one half, which learn, and ends with masks near zero and
    one. `loss` is the share of the weights that the masks use,

        ``strength * sum_l K_l |m_(l-1)|_1 |m_l|_1 / sum_l K_l c_(l-1) c_l``

    with ``K_l`` the size of a layer's kernel and ``c_l`` its width (`Footprint`).

    Args, beside those of `Gates`:
        steps: ``B``, the batches of an epoch.
        highest: ``s_max``.
        strength: The strength of `loss`.
        kind: What the share is of: ``weights`` as in the paper, or ``macs``.
        initial: What every ``e`` begins with.
    """

    steps: int
    highest: float = 10.0
    strength: float = 0.5
    kind: str = "weights"
    initial: float = 1.0

    def _build(self) -> None:
        super()._build()
        self.schedule = Sawtooth(self.highest, self.steps)
        self._footprint = Footprint(self._program, self.gates, self.kind)

    def masks(self) -> list[Tensor]:
        """Return the masks of this step."""
        s = self.schedule(self.done)
        return [torch.sigmoid(s * e) for e in self.scores]

    def loss(self) -> Tensor:
        """Return the sparsity loss of this step's masks."""
        return self.strength * self._footprint.share(self.masks())


__all__ = ["AnnealedMasks"]
