"""`LatencyPredictor`: a small network that learns from measured widths what others take.

Where a measurement takes a second, an allocator that asks about a thousand widths cannot wait for
it, and gates that are trained need a gradient. So some widths are measured beforehand, and a
network is fitted to them (Li et al., Weight-dependent gates for network pruning, 2020: a latency
predictor of fully connected layers).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from narrows.errors import UsageError
from narrows.passes.plans.candidates import Widths

LEAST = 4  # measurements
DECAY = 1e-4  # of weights: there are fewer measurements than weights


class LatencyPredictor(nn.Module):
    """A small network from the widths of layers to the latency of the whole network.

    Two hidden layers on the share of channels that each layer keeps and the products of neighbours'
    shares, which a layer's multiplications are; a straight line beside them, so that it goes on
    sensibly where nothing was measured (the paper has neither products nor line). It is fitted to
    measured pairs once, and then held fast. Shares are of the largest widths that it was fitted to.

    Args:
        gates: How many layers there are: the length of a vector of widths.
        hidden: The width of its hidden layers.
        seed: The seed of its weights.
    """

    widest: Tensor
    level: Tensor

    def __init__(self, gates: int, hidden: int = 32, seed: int = 0) -> None:
        super().__init__()
        count = 2 * gates - 1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.bent = nn.Sequential(
                nn.Linear(count, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
                nn.Linear(hidden, 1),
            )  # fmt: skip
            self.straight = nn.Linear(count, 1)
        self.register_buffer("widest", torch.zeros(gates))
        self.register_buffer("level", torch.zeros(()))

    def forward(self, widths: Tensor) -> Tensor:
        """Return the latency of widths ``[..., gates]``, in the unit that it was fitted to."""
        if not bool(self.level):
            raise UsageError(
                "the latency predictor has not been fitted",
                where="LatencyPredictor",
                why="it knows latencies from measured ones alone",
                hint="predictor.fit(widths, latencies)",
            )
        shares = widths.to(self.widest) / self.widest
        x = torch.cat([shares, shares[..., 1:] * shares[..., :-1]], -1)
        return (1 + self.bent(x) + self.straight(x))[..., 0] * self.level

    def fit(self, widths: Tensor, latencies: Tensor, steps: int = 600, rate: float = 0.02) -> float:
        """Fit it to measurements and return the mean relative error on them.

        Args:
            widths: ``[n, gates]``.
            latencies: ``[n]``, above zero.
            steps: How many steps of Adam over all measurements.
            rate: The learning rate at first; it falls as a cosine does.
        """
        widths, latencies = widths.to(self.widest), latencies.to(self.widest)
        if widths.shape != (len(latencies), len(self.widest)) or not bool((latencies > 0).all()):
            raise UsageError(
                f"latencies of shape {list(latencies.shape)} do not fit widths of shape "
                f"{list(widths.shape)}",
                where="LatencyPredictor.fit",
                why=f"it takes [n, {len(self.widest)}] widths and n latencies above zero",
                hint="one row per measured network, one column per gate",
            )
        self.widest.copy_(widths.amax(0).clamp_min(1))
        self.level.copy_(latencies.mean())
        with torch.inference_mode(False), torch.enable_grad():
            self.requires_grad_(True)
            optimizer = torch.optim.Adam(self.parameters(), rate, weight_decay=DECAY)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
            for _ in range(steps):
                optimizer.zero_grad()
                ((self(widths) - latencies) / self.level).square().mean().backward()
                optimizer.step()
                schedule.step()
            self.requires_grad_(False)
        with torch.no_grad():
            return float(((self(widths) - latencies).abs() / latencies).mean())


def drawn(full: Widths, least: Widths, count: int, seed: int) -> list[tuple[int, ...]]:
    """Return widths that are measured: all channels, the least, and draws of every size between.

    Each draw has a size of its own, around which the shares of the layers scatter, so that there
    are small programs as well as large ones.

    Args:
        full: How many channels there are.
        least: How many stay at least.
        count: How many widths, `LEAST` at least.
        seed: Of the draws.
    """
    generator = np.random.default_rng(seed)
    low, high = np.array(least), np.array(full)
    found = [tuple(map(int, high)), tuple(map(int, low))]
    for turn in range(count - 2):
        size = (turn + 0.5) / (count - 2)
        shares = np.clip(size + generator.uniform(-0.25, 0.25, len(high)), 0, 1)
        found.append(tuple(map(int, np.rint(low + shares * (high - low)))))
    return found


def fitted(
    samples: Sequence[Widths], times: Sequence[float], seed: int
) -> Callable[[Widths], float]:
    """Return a function that gives widths the time that is expected, not below zero.

    Args:
        samples: Widths that were measured, all channels among them (`drawn`).
        times: Their times.
        seed: Of the network's first weights.
    """
    predictor = LatencyPredictor(len(samples[0]), seed=seed).double()
    with torch.inference_mode(False):
        predictor.fit(torch.tensor(samples), torch.tensor(list(times), dtype=torch.float64))

    def expected(widths: Widths) -> float:
        return max(0.0, float(predictor(torch.tensor(widths))))

    return expected


__all__ = ["LEAST", "LatencyPredictor", "drawn", "fitted"]
