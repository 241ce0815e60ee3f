"""Gates that a small network makes of a layer's own weights, with a predicted latency (W-Gates).

Y. Li, W. Liu, et al.: Weight-Dependent Gates for Network Pruning, 2020.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import InitVar, dataclass

import torch
from torch import Tensor, nn

from narrows.ir.program import Program
from narrows.passes.choosing.budgets.predictor import LatencyPredictor
from narrows.training.checks import divisor
from narrows.training.gates import Gates
from narrows.training.masks import straight_through


@dataclass(eq=False, repr=False, kw_only=True)
class GeneratedGates(Gates):
    """Gates that follow from the weights: a small network per layer reads each filter.

    With ``W`` the weights of a gate, a row per channel, each less its mean and over its deviation,

        ``p = sigmoid(MLP(W))``,  mask ``1 if p > 1/2 else 0``, gradient that of ``p``.

    So the gradient reaches the weights on two ways. `loss` is a term in the predicted latency ``L``
    of the open widths: ``strength * log(1 + L / target)``.

    Args, beside those of `Gates`:
        latency: A fitted `LatencyPredictor`, or any differentiable function of the widths
            ``[gates]``; without one there is no `loss`.
        target: What latencies are measured in.
        strength: The strength of `loss`.
        hidden: The width of each network's hidden layer.
        seed: The seed of their weights.
    """

    latency: InitVar[nn.Module | None] = None
    target: float = 1.0
    strength: float = 1.0
    hidden: int = 16
    seed: int = 0

    def __post_init__(self, model: nn.Module, program: Program, latency: nn.Module | None) -> None:
        """Keep the latency out of the modules that are trained with the gates."""
        self._latency = (latency,)
        super().__post_init__(model, program)

    def _build(self) -> None:
        divisor(
            self.target, f"latencies cannot be measured in {self.target!r}", where="target",
            hint="target: the latency of the network as it is, or the one to be reached",
        )  # fmt: skip
        dense = self._parameters_by_name()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.generators = nn.ModuleList(
                _generator(g.rows(dense).shape[1], self.hidden) for g in self.gates
            )
        self.generators.to(self._device())

    def masks(self) -> list[Tensor]:
        """Return the masks of the weights as they are: zeros and ones, with gradients."""
        return [straight_through(x > 0, torch.sigmoid(x)) for x in self._logits()]

    def hard(self) -> list[Tensor]:
        """Return which channels' logits are above zero."""
        with torch.no_grad():
            return [x > 0 for x in self._logits()]

    def widths(self, masks: Sequence[Tensor] | None = None) -> Tensor:
        """Return how many channels are open per gate, ``[gates]``, with the masks' gradients."""
        return torch.stack([m.sum() for m in (self.masks() if masks is None else masks)])

    def loss(self) -> Tensor:
        """Return the latency term, of the masks of the weights as they are."""
        (latency,) = self._latency
        if latency is None:
            return super().loss()
        return self.strength * torch.log1p(latency(self.widths()) / self.target)

    def _logits(self) -> list[Tensor]:
        dense, found = self._parameters_by_name(), []
        for gate, generator in zip(self.gates, self.generators, strict=True):
            rows = gate.rows(dense)
            rows = (rows - rows.mean()) / (rows.std() + 1e-8)
            found.append(generator(rows)[:, 0])
        return found


def _generator(entries: int, hidden: int) -> nn.Sequential:
    """Return a network from a channel's weights to a logit, all open at first."""
    made = nn.Sequential(nn.Linear(entries, hidden), nn.ReLU(), nn.Linear(hidden, 1))
    nn.init.constant_(made[2].bias, 1.0)  # type: ignore[arg-type]
    return made


__all__ = ["GeneratedGates", "LatencyPredictor"]
