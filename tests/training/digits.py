"""Digits drawn as seven segments, a small residual network, and a loop: what gates are tried on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import narrows
from narrows.ir.program import Program
from narrows.training import Gates

# The rows and columns of the segments a to g on 8 x 8 pixels, and which of them a digit lights.
SEGMENTS = {
    "a": (slice(0, 1), slice(2, 6)),
    "b": (slice(0, 4), slice(5, 6)),
    "c": (slice(4, 8), slice(5, 6)),
    "d": (slice(7, 8), slice(2, 6)),
    "e": (slice(4, 8), slice(2, 3)),
    "f": (slice(0, 4), slice(2, 3)),
    "g": (slice(4, 5), slice(2, 6)),
}
LIT = ("abcdef", "bc", "abged", "abgcd", "fgbc", "afgcd", "afgedc", "abc", "abcdefg", "abcdfg")


def digits(count: int = 256, noise: float = 0.3) -> tuple[Tensor, Tensor]:
    """Return noisy images ``[count, 1, 8, 8]``, shifted sideways, and their digits."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 10
    images = noise * torch.randn(count, 1, 8, 8, generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        drawn = torch.zeros(8, 8)
        for segment in LIT[label]:
            drawn[SEGMENTS[segment]] = 1
        shift = int(torch.randint(-1, 2, (), generator=generator))
        image[0] += drawn.roll(shift, 1)
    return images, labels


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(y)))


class Net(nn.Module):
    """A stem, two residual blocks, a layer without a norm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.block1 = Block(8)
        self.block2 = Block(8)
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
