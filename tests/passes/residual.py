"""A small residual network with a gate, and data for it."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

import narrows
from narrows.ir.program import Program
from narrows.ir.workload import macs, works_of
from tests.networks.registry import conv, conv_bn


class Small(nn.Module):
    """A residual network with a gate, whose channels are not all alike."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16)
        self.first = conv_bn(16, 24)
        self.second = conv_bn(24, 16)
        self.gate = nn.Sequential(nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 16), nn.Sigmoid())
        self.last = conv(16, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        y = self.second(self.first(x).relu())
        y = y * self.gate(y.mean((2, 3)))[:, :, None, None]
        return self.head(self.last((x + y).relu()).relu().mean((2, 3)))


def images(count: int, seed: int = 0) -> Tensor:
    """Return images that have few directions, as real ones do."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(6, 3 * 64, generator=torch.Generator().manual_seed(9))
    mixed = torch.randn(count, 6, generator=generator) @ basis
    return mixed.reshape(count, 3, 8, 8) + 0.1 * torch.randn(count, 3, 8, 8, generator=generator)


def model() -> nn.Module:
    """Return the network in eval mode, its norms as they begin."""
    torch.manual_seed(0)
    return Small().eval()


@cache
def settled() -> Program:
    """Return the network captured, its norms settled on data."""
    module = model()
    with torch.no_grad():
        for _ in range(3):
            module.train()(images(64))
    return narrows.capture(module.eval(), (images(2),))


def left(program: Program) -> int:
    """Return the multiply-accumulates of a program."""
    works = works_of(program)
    return sum(macs(n, works) for n in program.graph.nodes if n.op == "call_function")
