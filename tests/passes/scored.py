"""Networks whose channels the tests of the criteria score, and data for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import narrows
from narrows.ir.program import Program
from narrows.ir.structure.layers import Layer, layers_of
from narrows.passes.choosing.criteria.base import scores
from narrows.passes.choosing.criteria.catalog import find
from narrows.passes.choosing.evidence import informed
from tests.networks.registry import conv_bn, randomise


class Small(nn.Module):
    """A CNN with norms, a skip, a depthwise and a grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.up, self.wise, self.down = conv_bn(8, 12), conv_bn(12, 12, groups=12), conv_bn(12, 8)
        self.split = conv_bn(8, 8, groups=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.down(self.wise(self.up(x).relu()).relu())
        x = self.split(x).relu()
        return self.head(x.mean((2, 3)))


class Block(nn.Module):
    """A transformer's block: attention and an MLP behind layer norms."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(b, n, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(y.transpose(1, 2).reshape(b, n, c))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


class Vit(nn.Module):
    """Patches, two blocks, the mean over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.head = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 5)
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.head(self.blocks(x).mean(1))


def captured(module: nn.Module) -> Program:
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)).double()
    module = module.double().eval()
    randomise(module, 0, (x,))
    return narrows.capture(module, (x,))


def layer(program: Program, weight: str) -> Layer:
    return layers_of(program)[weight][0]


def score(program: Program, criterion: Any, weight: str, side: str) -> np.ndarray:
    return scores(find(criterion), program, layer(program, weight), side)


def x_of(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


BATCHES = [x_of(4, 3, 6, 6, seed=1), x_of(2, 3, 6, 6, seed=2)]  # of unequal sizes
IMAGES = torch.cat(BATCHES)


def told(program: Program, criterion: Any, weight: str, side: str, **options: Any) -> np.ndarray:
    """Return scores by `BATCHES`, or other data."""
    options = {"data": BATCHES, **options}
    known = informed(program, find(criterion), **options)
    return scores(known, program, layer(program, weight), side)


def labels(outputs: Tensor, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(outputs, batch[1], reduction="sum")


LABELLED = [(x, torch.arange(len(x)) % 5) for x in BATCHES]
