"""Ratios per layer by attention over statistics of the layers (ASWL), for channels.

Q. He, W. Shi, M. Dong: Learning Pruned Structure and Weights Simultaneously from Scratch: an
Attention based Approach, 2021. Its masks are of single weights, these are of channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from narrows.training.checks import share_of
from narrows.training.gates import Gates
from narrows.training.masks import straight_through
from narrows.training.schedules import Schedule, at, temperature_at


@dataclass(eq=False, repr=False, kw_only=True)
class AttendedRatios(Gates):
    """Gates that close the weakest channels of each layer, as many as an attention says.

    Each layer ``l`` has statistics ``f_l``: the logarithms of its mean magnitude, of the deviation
    of its channels' norms over their mean, of its width, and of its weights per channel; each less
    its mean over the layers and over its deviation. Then

        ``a = softmax_l(u . tanh(V f_l))``,  ``r_l = min(L a_l ratio, highest)``

    so that the mean of ``r_l`` over the ``L`` layers is the ratio, where none is at its limit. With
    ``q`` a channel's rank by its norm, from 0 to 1, the mask is ``1 if q > r_l else 0`` with the
    gradient of ``sigmoid((q - r_l) / tau)``, through which the attention learns.

    Dense and sparse weights are one set, trained together: add the loss of the model ``with
    gates.off():`` to the loss with masks.

    Args, beside those of `Gates`:
        ratio: The global share of channels that goes; a function of the step raises it.
        highest: The largest share of one layer, below 1.
        tau: How far from the limit a channel's mask still has a gradient, in ranks.
        hidden: The width of the attention's hidden layer.
        seed: The seed of its weights.
    """

    ratio: Schedule = 0.5
    highest: float = 0.9
    tau: float = 0.1
    hidden: int = 8
    seed: int = 0

    def _build(self) -> None:
        share_of(self.highest, "highest")
        temperature_at(self.tau, 0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.attention = nn.Sequential(
                nn.Linear(4, self.hidden), nn.Tanh(), nn.Linear(self.hidden, 1, bias=False)
            )
        self.attention.to(self._device())

    def masks(self) -> list[Tensor]:
        """Return the masks of this step: zeros and ones, with gradients to the attention."""
        found = []
        for rank, ratio in zip(self._ranks(), self.ratios(), strict=True):
            soft = torch.sigmoid((rank - ratio) / self.tau)
            found.append(straight_through(rank > ratio, soft))
        return found

    def hard(self) -> list[Tensor]:
        """Return which channels' ranks are above their layer's ratio."""
        with torch.no_grad():
            pairs = zip(self._ranks(), self.ratios(), strict=True)
            return [rank > ratio for rank, ratio in pairs]

    def ratios(self) -> Tensor:
        """Return the share of channels that goes per gate, ``[gates]``, differentiable."""
        ratio = share_of(at(self.ratio, self.done))
        scores = self.attention(self.statistics())[:, 0]
        shares = torch.softmax(scores, 0) * len(self.gates) * ratio
        return shares.clamp_max(self.highest)

    @torch.no_grad()
    def statistics(self) -> Tensor:
        """Return the statistics of each layer's weights, ``[gates, 4]``, made comparable."""
        dense, found = self._parameters_by_name(), []
        for gate in self.gates:
            rows = gate.rows(dense)
            norms = torch.linalg.vector_norm(rows, dim=1)
            spread = norms.std(correction=0) / norms.mean().clamp_min(1e-12)
            size = rows.new_tensor([rows.shape[0], rows.shape[1]])
            found.append(torch.stack([rows.abs().mean(), spread, *size]))
        values = torch.stack(found).clamp_min(1e-12).log()
        return (values - values.mean(0)) / values.std(0, correction=0).clamp_min(1e-6)

    def _ranks(self) -> list[Tensor]:
        """Return each channel's rank by its norm, ``(position + 1/2) / width``."""
        dense = self._parameters_by_name()
        orders = [g.norms(dense).detach().argsort(stable=True).argsort() for g in self.gates]
        return [(order + 0.5) / len(order) for order in orders]


__all__ = ["AttendedRatios"]
