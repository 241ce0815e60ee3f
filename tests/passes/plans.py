"""Programs and plans for the tests of plans."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import narrows
from narrows.ir.program import Program
from narrows.passes.plans.plan import ChannelPlan
from tests.networks.registry import randomise


def captured(module: nn.Module, *shape: int, seed: int = 0) -> Program:
    """Return the program of a module with random weights and statistics, in float64."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    module = module.double().eval()
    randomise(module, seed, (x,))
    return narrows.capture(module, (x,))


class Net(nn.Module):
    """A convolution with a norm, one without, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 6, 3)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.norm(self.first(x)).relu()).sigmoid()
        return self.head(x.mean((2, 3)))


class TiedHead(nn.Module):
    """An embedding that is the head's weight too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(10, 6), nn.Linear(6, 6)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.mix(self.embed(ids)).relu(), self.embed.weight)


def plan_of(program: Program) -> ChannelPlan:
    keep = {"first.weight": [0, 1, 7]}
    return narrows.plan(program, {"head.weight": []}, keep, zeros=False)
