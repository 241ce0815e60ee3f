"""Gates that a small network makes of a layer's own weights, with a predicted latency (W-Gates).

Y. Li, W. Liu, et al.: Weight-Dependent Gates for Network Pruning, 2020.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import InitVar, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from narrows.errors import UsageError
from narrows.ir.program import Program
from narrows.training.checks import divisor
from narrows.training.gates import Gates
from narrows.training.masks import straight_through


class LatencyPredictor(nn.Module):
    """A small network from the open channels of every gate to the latency of the whole network.

    It is fitted to measured pairs once, and then held fast. Widths and latencies are scaled by the
    largest that it was fitted to.

    Args:
        gates: How many gates there are: the length of a vector of widths.
        hidden: The width of its hidden layer.
        seed: The seed of its weights.
    """

    widest: Tensor
    slowest: Tensor

    def __init__(self, gates: int, hidden: int = 32, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = nn.Sequential(nn.Linear(gates, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        self.register_buffer("widest", torch.zeros(gates))
        self.register_buffer("slowest", torch.zeros(()))

    def forward(self, widths: Tensor) -> Tensor:
        """Return the latency of widths ``[..., gates]``, in the unit that it was fitted to."""
        if not bool(self.slowest):
            raise UsageError(
                "the latency predictor has not been fitted",
                where="LatencyPredictor",
                why="it knows latencies from measured ones alone",
                hint="predictor.fit(widths, latencies)",
            )
        return self.net(widths / self.widest)[..., 0] * self.slowest

    def fit(self, widths: Tensor, latencies: Tensor, steps: int = 300, rate: float = 0.01) -> float:
        """Fit it to measurements and return the mean relative error on them.

        Args:
            widths: ``[n, gates]``.
            latencies: ``[n]``, above zero.
            steps: How many steps of Adam over all measurements.
            rate: The learning rate.
        """
        widths, latencies = widths.float(), latencies.float()
        if widths.shape != (len(latencies), len(self.widest)) or not bool((latencies > 0).all()):
            raise UsageError(
                f"latencies of shape {list(latencies.shape)} do not fit widths of shape "
                f"{list(widths.shape)}",
                where="LatencyPredictor.fit",
                why=f"it takes [n, {len(self.widest)}] widths and n latencies above zero",
                hint="one row per measured network, one column per gate",
            )
        self.widest.copy_(widths.amax(0).clamp_min(1))
        self.slowest.copy_(latencies.max())
        self.requires_grad_(True)
        optimizer = torch.optim.Adam(self.parameters(), rate)
        for _ in range(steps):
            optimizer.zero_grad()
            F.mse_loss(self(widths) / self.slowest, latencies / self.slowest).backward()
            optimizer.step()
        self.requires_grad_(False)
        with torch.no_grad():
            return float(((self(widths) - latencies).abs() / latencies).mean())


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
