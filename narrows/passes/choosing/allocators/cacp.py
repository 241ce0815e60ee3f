"""`Cacp`: a policy that gives each layer its share for whatever budget it is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from narrows.errors import PlanUsageError
from narrows.passes.choosing.allocators.base import Allocator, ByWidths
from narrows.passes.choosing.allocators.reward import scaled
from narrows.passes.choosing.allocators.trials import apart
from narrows.passes.choosing.budgets.base import Goal, Limit
from narrows.passes.plans.candidates import Candidates, Widths
from narrows.passes.plans.plan import ChannelPlan
from narrows.passes.plans.setting import Setting

HIDDEN = 16
RATE = 0.05
SPREAD = 0.25  # of the logarithm of a share, of what is drawn around the policy's mean


@dataclass(frozen=True)
class Cacp(Allocator):
    """One policy for all budgets, trained by reward over budgets that are drawn.

    A small network is given what is known of a layer or coupling (where it stands, its width, what
    it costs, how unlike its channels' scores are) and how far the budget goes, and returns the mean
    of a normal distribution of the logarithm of its share. Shares are drawn in pairs, on either
    side of the mean, for budgets between all and the smallest that is asked for; each is scaled to
    its budget, masked and run. The reward is minus the divergence from the network's own outputs,
    and what the better of a pair had more of becomes likelier (REINFORCE, Williams 1992, the pair's
    other half as its baseline). Then every plan takes the mean. Needs data.

    Attributes:
        steps: How often the policy is changed.
        pairs: Of draws, for a change; all of them are tried at once where an executor runs jobs.
        seed: Of the draws.
    """

    name: ClassVar[str] = "cacp"
    paper: ClassVar[str] = "Liu et al., conditional automated channel pruning, 2021"
    parallel: ClassVar[bool] = True

    steps: int = 8
    pairs: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "pairs"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise PlanUsageError(f"{name} is a whole number of at least 1, got {value!r}")

    def plan(self, setting: Setting, goals: Sequence[Goal]) -> ChannelPlan:
        """Return the plan of the policy for one budget."""
        return self.family(setting, [goals])[0]

    def family(self, setting: Setting, steps: Sequence[Sequence[Goal]]) -> list[ChannelPlan]:
        """Return a plan per budget, all of one policy."""
        asked = Asked(self, [goal.share for goal in steps[-1]])
        return [asked.plan(setting, goals) for goals in steps]


@dataclass(frozen=True)
class Asked(ByWidths):
    """A policy that is trained when it is first asked.

    Attributes:
        how: Its options.
        least: Per budget the smallest share that it will be asked for.
    """

    name: ClassVar[str] = Cacp.name

    how: Cacp
    least: Sequence[float]
    _trained: list[Policy] = field(default_factory=list)

    def widths(self, candidates: Candidates, limits: Sequence[Limit]) -> Sequence[int]:
        """Return the widths of the policy's mean."""
        if not self._trained:
            self._trained.append(self._train(candidates, limits))
        return self._trained[0].mean(candidates, limits, self._far(limits))

    def _far(self, limits: Sequence[Limit]) -> float:
        """Return how far limits go: 0 is all of the program, 1 the smallest budget."""
        most = [(1 - limit.most / limit.whole) / max(1 - share, 1e-9)
                for limit, share in zip(limits, self.least, strict=True)]  # fmt: skip
        return min(max(most), 1.0)

    def _train(self, candidates: Candidates, limits: Sequence[Limit]) -> Policy:
        far, how = apart(candidates, self.name), self.how
        generator = np.random.default_rng(how.seed)
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
            torch.manual_seed(how.seed)
            policy = Policy(features(candidates, limits))
            optimizer = torch.optim.Adam(policy.parameters(), lr=RATE)
            for step in range(how.steps):
                amounts = generator.uniform(0, 1, how.pairs)
                noise = generator.normal(0, SPREAD, (how.pairs, len(candidates.full)))
                means = [policy(float(amount)) for amount in amounts]
                tried: list[Widths] = []
                for amount, mean, drawn in zip(amounts, means, noise, strict=True):
                    near = [self._at(limit, amount, s)
                            for limit, s in zip(limits, self.least, strict=True)]  # fmt: skip
                    for sign in (1, -1):
                        shares = np.exp(np.minimum(mean.detach().numpy() + sign * drawn, 0.0))
                        tried.append(scaled(candidates, near, shares))
                rewards = -np.array(far(tried)).reshape(how.pairs, 2)
                loss = surprise(torch.stack(means), torch.from_numpy(noise), rewards)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                text = f"policy {step + 1}: {-rewards.mean():.4g} nats lost"
                candidates.setting.tell(text, step + 1, how.steps)
        return policy

    @staticmethod
    def _at(limit: Limit, amount: float, least: float) -> Limit:
        """Return a limit that goes a part of the way to the smallest budget."""
        return replace(limit, most=limit.whole * (1 - (1 - least) * amount))


class Policy(nn.Module):
    """A network from features and how far a budget goes to the logarithm of shares.

    Args:
        known: Features per candidate, ``[candidates, features]``.
    """

    def __init__(self, known: Tensor) -> None:
        super().__init__()
        self.known = known
        self.inner = nn.Linear(known.shape[1] + 1, HIDDEN, dtype=torch.float64)
        self.outer = nn.Linear(HIDDEN, 1, dtype=torch.float64)
        nn.init.zeros_(self.outer.weight)  # before it has learned, all shares are alike
        nn.init.zeros_(self.outer.bias)

    def forward(self, amount: float) -> Tensor:
        """Return the mean of the logarithm of each candidate's share, ``[candidates]``."""
        asked = self.known.new_full((len(self.known), 1), amount)
        return self.outer(torch.tanh(self.inner(torch.cat([self.known, asked], 1))))[:, 0]

    def mean(self, candidates: Candidates, limits: Sequence[Limit], amount: float) -> list[int]:
        """Return the widths in proportion to the mean shares."""
        with torch.no_grad():
            logs = self(amount).numpy()
        return scaled(candidates, limits, np.exp(logs - logs.max()))


def features(candidates: Candidates, limits: Sequence[Limit]) -> Tensor:
    """Return what a policy is told of each candidate, ``[candidates, 4]``, float64.

    Where it stands, from 0 to 1; the logarithm of its width and of what budgets save when it is at
    its least, each with a mean of 0 and a deviation of 1; and the share of its worth that the
    better half of its channels has.
    """
    full, least = candidates.full, candidates.least
    saved, halves = [], []
    for i, worth in enumerate(candidates.worth):
        without = [*full]
        without[i] = least[i]
        saved.append(max(1 - min(limit.left(without) for limit in limits), 1e-9))
        whole = worth.sum()
        halves.append(worth[len(worth) // 2 :].sum() / whole if whole > 0 else 0.5)
    places = np.linspace(0, 1, len(full))
    columns = [places, _even(np.log(full)), _even(np.log(saved)), np.array(halves)]
    return torch.from_numpy(np.stack(columns, 1))


def _even(values: np.ndarray) -> np.ndarray:
    deviation = values.std()
    return (values - values.mean()) / deviation if deviation > 0 else np.zeros(len(values))


def surprise(means: Tensor, noise: Tensor, rewards: np.ndarray) -> Tensor:
    """Return the loss whose gradient is that of REINFORCE over pairs.

    Minus the mean over pairs of advantage times log-likelihood of what the first of the pair drew.
    The advantage is half the difference of the two rewards, over the mean size of all such.

    Args:
        means: Of the policy, ``[pairs, candidates]``.
        noise: What was added for the first of a pair and subtracted for the second.
        rewards: ``[pairs, 2]``.
    """
    half = (rewards[:, 0] - rewards[:, 1]) / 2
    size = np.abs(half).mean()
    advantage = torch.from_numpy(half / size if size > 0 else half)
    drawn = (means + noise).detach()
    likelihood = -((drawn - means) ** 2).sum(1) / (2 * SPREAD**2)
    return -(advantage * likelihood).mean()


__all__ = ["Cacp"]
