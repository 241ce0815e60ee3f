"""A small residual network for the demo's digits, and a loop: what gates are tried on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import narrows
from narrows.demo.digits import Residual, load_splits
from narrows.ir.program import Program
from narrows.training import Gates


@functools.cache
def digits(count: int = 256) -> tuple[Tensor, Tensor]:
    """Return images ``[count, 1, 8, 8]`` in 0..1 and their digits."""
    pytest.importorskip("sklearn")
    training, _, _ = load_splits()
    return training.images[:count], training.digits[:count]


class Net(nn.Module):
    """A stem, two residual blocks, a layer without a norm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.block1 = Residual(8)
        self.block2 = Residual(8)
        self.plain = nn.Conv2d(8, 12, 3, padding=1)
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.block1(F.relu(self.norm(self.stem(x)))))
        return self.head(F.relu(self.plain(x)).mean((2, 3)))


def made(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def captured(model: nn.Module) -> Program:
    images, _ = digits(4)
    return narrows.capture(model.eval(), (images,))


def train(
    model: nn.Module,
    gates: Gates | None = None,
    steps: int = 30,
    rate: float = 0.01,
    gate_rate: float = 0.05,
    more: Callable[[], Tensor] | None = None,
) -> float:
    """Train model and gates, and leave the model in eval mode; returns the last loss."""
    images, labels = digits()
    parameters: list[Any] = [{"params": model.parameters(), "lr": rate}]
    if gates is not None and list(gates.parameters()):
        parameters.append({"params": gates.parameters(), "lr": gate_rate})
    optimizer = torch.optim.Adam(parameters)
    model.train()
    loss = torch.zeros(())
    for step in range(steps):
        rows = torch.arange(64) + 64 * (step % 4)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images[rows]), labels[rows])
        if gates is not None:
            loss = loss + gates.loss()
        if more is not None:
            loss = loss + more()
        loss.backward()
        if gates is not None:
            gates.step()
        optimizer.step()
    model.eval()
    return loss.item()


def accuracy(model: Callable[[Tensor], Any]) -> float:
    images, labels = digits()
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).double().mean())
