"""Gates that are drawn in every forward call: straight-through Gumbel gates (SepPrune).

SepPrune: Structured Pruning for Efficient Deep Speech Separation, 2025; the relaxation is that of
Maddison et al. and Jang et al., both ICLR 2017.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from narrows.training.checks import share_of
from narrows.training.gates import LearnedGates
from narrows.training.masks import lowest, straight_through
from narrows.training.schedules import Schedule, temperature_at


@dataclass(eq=False, repr=False, kw_only=True)
class GumbelGates(LearnedGates):
    """Gates that are open with a probability that is learned, one number ``a`` per channel.

    A forward call in train mode draws each gate: with ``l`` a logistic number, the difference of
    two Gumbel numbers, and a temperature ``t``

        ``p = sigmoid((a + l) / t)``,  mask ``1 if p > 1/2 else 0``, gradient that of ``p``.

    So a gate is open with the probability ``sigmoid(a)``. `loss` is what holds the mean probability
    to what was asked for: ``strength * (mean sigmoid(a) - (1 - ratio)) ** 2``. In the end the least
    probable channels go, as many as the ratio says; the best of each layer stays.

    Only the scores have to be trained: give the optimizer ``gates.parameters()`` alone.

    Args, beside those of `Gates`:
        ratio: The share of all channels that is to be closed.
        temperature: ``t``; a function of the step cools it.
        strength: The strength of `loss`.
        initial: What ``a`` begins with: 2 is open with a probability of 0.88.
        seed: The seed of the draws.
    """

    ratio: float = 0.5
    temperature: Schedule = 1.0
    strength: float = 10.0
    initial: float = 2.0
    seed: int = 0

    def _build(self) -> None:
        super()._build()
        share_of(self.ratio)
        self._generator = torch.Generator().manual_seed(self.seed)

    def masks(self) -> list[Tensor]:
        """Return masks that were just drawn: zeros and ones, with the gradients of ``p``."""
        heat = temperature_at(self.temperature, self.done)
        drawn = [torch.sigmoid((a + self._logistic(a)) / heat) for a in self.scores]
        return [straight_through(p > 0.5, p) for p in drawn]

    def hard(self) -> list[Tensor]:
        """Return which channels are not among the least probable."""
        return lowest(list(self.scores), self.ratio)

    def loss(self) -> Tensor:
        """Return the penalty on the mean probability."""
        open_share = torch.cat([torch.sigmoid(a) for a in self.scores]).mean()
        return self.strength * (open_share - (1 - self.ratio)).square()

    def _logistic(self, like: Tensor) -> Tensor:
        u = torch.rand(like.shape, generator=self._generator).clamp(1e-6, 1 - 1e-6)
        return torch.logit(u).to(like.device)


__all__ = ["GumbelGates"]
