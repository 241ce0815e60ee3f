"""`Reward`: widths that are bred for accuracy and efficiency."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from narrows.errors import PlanUsageError
from narrows.passes.choosing.allocators.base import ByWidths
from narrows.passes.choosing.allocators.scalar import bisected, factor, filled
from narrows.passes.choosing.allocators.trials import apart
from narrows.passes.choosing.budgets.base import Limit
from narrows.passes.choosing.reads import Floats
from narrows.passes.plans.candidates import Candidates
from narrows.passes.plans.within import refuse_no_whole

SPREAD = 0.3  # of the logarithm of a share, of what is drawn
SMALLEST = 0.05  # share that is drawn
CHANGED = 0.3  # of a child's shares


@dataclass(frozen=True)
class Reward(ByWidths):
    """Shares per layer or coupling are bred: the reward is accuracy^a times efficiency^b.

    Every child is scaled to the budgets, masked, and run, those of a generation at once where an
    executor runs several jobs. The accuracy is the likelihood of the
    network's own outputs over what it gives them itself, e to the minus divergence; the efficiency
    is how many times less than unpruned it costs. Needs data.

    Attributes:
        accuracy: The exponent a.
        efficiency: The exponent b. Beyond the budgets it pays to be still smaller.
        population: How many survive each generation.
        generations: How many there are.
        seed: Of the draws.
    """

    name: ClassVar[str] = "reward"
    paper: ClassVar[str] = "Rewarded meta-pruning, 2023: reward with two coefficients, evolution"

    parallel: ClassVar[bool] = True

    accuracy: float = 1.0
    efficiency: float = 0.1
    population: int = 8
    generations: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("accuracy", "efficiency"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise PlanUsageError(f"{name} is an exponent of at least 0, got {value!r}")
        for name in ("population", "generations"):
            refuse_no_whole(name, getattr(self, name), 1)
        refuse_no_whole("seed", self.seed)

    def widths(self, candidates: Candidates, limits: Sequence[Limit]) -> Sequence[int]:
        """Return the widths of the largest reward that was found."""
        far = apart(candidates, self.name)
        generator = np.random.default_rng(self.seed)
        count = len(candidates.full)
        known: dict[tuple[int, ...], tuple[float, Floats]] = {}

        def live(drawn: Sequence[Floats]) -> None:
            new: dict[tuple[int, ...], Floats] = {}
            for shares in drawn:
                widths = tuple(scaled(candidates, limits, shares))
                if widths not in known and all(limit.meets(widths) for limit in limits):
                    new.setdefault(widths, shares)
            for (widths, shares), distance in zip(new.items(), far([*new]), strict=True):
                left = math.prod(limit.left(widths) for limit in limits) ** (1 / len(limits))
                reward = -self.accuracy * distance - self.efficiency * math.log(left)
                known[widths] = (reward, shares)

        first = (
            -np.abs(generator.normal(0, 2 * SPREAD, count)) for _ in range(2 * self.population)
        )
        live([np.ones(count), *map(np.exp, first)])
        for turn in range(self.generations):
            best = sorted(known.values(), key=lambda found: -found[0])[: self.population]
            children = []
            for _ in range(self.population if best else 0):
                one, other = (best[int(generator.integers(len(best)))][1] for _ in range(2))
                child = np.where(generator.random(count) < 0.5, one, other)
                drawn = child * np.exp(generator.normal(0, SPREAD, count))
                changed = generator.random(count) < CHANGED
                children.append(np.clip(np.where(changed, drawn, child), SMALLEST, 1.0))
            live(children)
            told = max((r for r, _ in known.values()), default=-math.inf)
            text = f"generation {turn + 1}: reward {math.exp(told):.4g}"
            candidates.setting.tell(text, turn + 1, self.generations)
        if not known:
            return candidates.least
        return list(max(known, key=lambda widths: known[widths][0]))


def scaled(candidates: Candidates, limits: Sequence[Limit], shares: Floats) -> list[int]:
    """Return widths in proportion to shares, as wide as the limits allow."""
    ends = list(zip(candidates.least, candidates.full, shares, strict=True))
    smallest = float(shares.min())

    def at(amount: float) -> list[int]:
        scale = factor(amount, smallest)
        return [max(le, int(full * min(1.0, scale * s) + 1e-9)) for le, full, s in ends]

    return filled(candidates, limits, at(bisected(candidates, limits, at)))


__all__ = ["Reward", "scaled"]
