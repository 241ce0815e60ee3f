"""`fitted`: a small network that learns from measured widths what others take.

Where a measurement takes a second, an allocator that asks about a thousand widths cannot wait for
it. So some are drawn and measured beforehand, and a network is fitted to them (Li et al., Weight-
dependent gates for network pruning, 2020: a latency predictor of fully connected layers).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from narrows.passes.plans.candidates import Widths

LEAST = 4  # measurements
HIDDEN = 32
STEPS = 600
RATE = 0.02
DECAY = 1e-4  # of weights: there are fewer measurements than weights


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
    full: Widths, samples: Sequence[Widths], times: Sequence[float], seed: int
) -> Callable[[Widths], float]:
    """Return a function that gives widths the time that is expected.

    Two hidden layers on the share of channels that each candidate keeps and the products of
    neighbours' shares, which a layer's multiplications are; a straight line beside them, so that it
    goes on sensibly where nothing was measured.

    Args:
        full: How many channels there are.
        samples: Widths that were measured.
        times: Their times.
        seed: Of the network's first weights.
    """
    scale = np.array(full, dtype=np.float64)

    def features(widths: Sequence[Widths]) -> Tensor:
        shares = np.array(widths, dtype=np.float64) / scale
        return torch.from_numpy(np.concatenate([shares, shares[:, 1:] * shares[:, :-1]], 1))

    x, y = features(samples), torch.tensor(list(times), dtype=torch.float64)
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(seed)
        count = x.shape[1]
        bent = nn.Sequential(
            nn.Linear(count, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(),
            nn.Linear(HIDDEN, 1),
        ).double()  # fmt: skip
        straight = nn.Linear(count, 1).double()
        parameters = [*bent.parameters(), *straight.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=RATE, weight_decay=DECAY)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        level = float(y.mean())
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = ((bent(x) + straight(x))[:, 0] - (y / level - 1)).square().mean()
            loss.backward()
            optimizer.step()
            schedule.step()

    def expected(widths: Widths) -> float:
        with torch.no_grad():
            row = features([widths])
            return max(0.0, level * (1 + float(bent(row) + straight(row))))

    return expected


__all__ = ["LEAST", "drawn", "fitted"]
