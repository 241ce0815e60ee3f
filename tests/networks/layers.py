"""Blocks for generated networks around one layer of a kind of its own: shared, transposed, gated.

Each takes a width and two small numbers, and returns a module on images and the width it leaves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .registry import conv, conv_bn
from .repeats import Block, narrow


class Tokens(nn.Module):
    """A module on positions by channels, with a shortcut around it."""

    def __init__(self, body: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        t = x.flatten(2).transpose(1, 2)
        return (t + self.body(t)).transpose(1, 2).reshape(x.shape)


class SelfAttention(nn.Module):
    """PyTorch's own attention module, with two heads or one."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, t: Tensor) -> Tensor:
        return self.attention(t, t, t, need_weights=False)[0]


class CrossAttention(nn.Module):
    """Queries of the positions, keys and values of a few learned ones beside their mean."""

    def __init__(self, width: int, places: int) -> None:
        super().__init__()
        self.memory = nn.Parameter(torch.randn(1, places, width))
        self.q, self.kv, self.o = (nn.Linear(width, n * width) for n in (1, 2, 1))

    def forward(self, t: Tensor) -> Tensor:
        k, v = self.kv(self.memory + t.mean(1, keepdim=True)).chunk(2, -1)
        scores = torch.einsum("btc,bsc->bts", self.q(t), k) / t.shape[-1] ** 0.5
        return self.o(torch.einsum("bts,bsc->btc", scores.softmax(-1), v))


class Mixer(nn.Module):
    """A gated hidden layer behind a LayerNorm, as language models have it."""

    def __init__(self, width: int, hidden: int, halves: bool) -> None:
        super().__init__()
        self.norm, self.halves = nn.LayerNorm(width), halves
        self.up, self.down = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, t: Tensor) -> Tensor:
        y = self.up(self.norm(t))
        if self.halves:
            gate, value = y.chunk(2, -1)
        else:  # the two take turns
            gate, value = y.unflatten(-1, (-1, 2)).unbind(-1)
        return self.down(F.silu(gate) * value)


class Twice(nn.Module):
    """One layer that is called on two tensors, added or side by side."""

    def __init__(self, width: int, outputs: int, joined: bool) -> None:
        super().__init__()
        self.first, self.shared, self.joined = conv_bn(width, width), conv(width, outputs), joined
        self.read = conv(2 * outputs if joined else outputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        y, z = self.shared(x), self.shared(self.first(x).relu())
        return self.read(torch.cat([y, z.relu()], 1) if self.joined else y * z).relu()


class Resized(nn.Module):
    """A smaller image and back: pooled, strided or unfolded, then interpolated or transposed."""

    def __init__(self, width: int, outputs: int, a: int, b: int) -> None:
        super().__init__()
        downs = (nn.AvgPool2d(2), nn.MaxPool2d(2, ceil_mode=True), conv(width, width, stride=2))
        ups = (
            nn.Upsample(scale_factor=2),
            nn.Upsample(scale_factor=2, mode="bilinear"),
            nn.ConvTranspose2d(width, width, 2, 2, groups=1 + a % 2),
        )
        self.down, self.up, self.read = downs[a % 3], ups[b % 3], conv(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.up(self.down(x))).relu()


class Lines(nn.Module):
    """Rows as sequences under a one-dimensional convolution, or a third dimension of channels."""

    def __init__(self, width: int, deep: bool) -> None:
        super().__init__()
        self.make, self.deep = conv_bn(width, width), deep
        self.slide = (
            nn.Conv3d(2, 2, 3, padding=1) if deep else nn.Conv1d(width, width, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.make(x).relu()
        if self.deep:
            return self.slide(y.unflatten(1, (2, -1))).flatten(1, 2)
        b, c, h, w = y.shape
        rows = y.transpose(1, 2).reshape(b * h, c, w)
        return self.slide(rows).reshape(b, h, c, w).transpose(1, 2)


def _maxout(x: Tensor) -> Tensor:
    return torch.cat([x.unflatten(1, (2, -1)).amax(1), x.unflatten(1, (-1, 2)).mean(2)], 1)


SHAPED: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: torch.cat([F.glu(x, 1), x[:, : x.shape[1] // 2]], 1),
    _maxout,
    lambda x: F.normalize(x, dim=1),
    lambda x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 0.1),
    lambda x: torch.stack(list(x.unbind(1))[::-1], 1),
    lambda x: x - x.amax(1, keepdim=True),
    lambda x: torch.cat(x.split([1, x.shape[1] - 1], 1)[::-1], 1),
    lambda x: x.unflatten(1, (2, -1)).softmax(1).flatten(1, 2),
)


class Shaped(nn.Module):
    """A layer's channels under a function that pairs, splits or normalises them."""

    def __init__(self, width: int, outputs: int, a: int, b: int) -> None:
        super().__init__()
        self.make, self.read = conv_bn(width, width), conv(width, outputs, 1)
        self.function = SHAPED[b % len(SHAPED)]
        self.act = nn.PReLU(width) if a % 2 else nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.function(self.act(self.make(x))))


def _tokens(width: int, a: int, b: int) -> Block:
    bodies: tuple[Callable[[], nn.Module], ...] = (
        lambda: SelfAttention(width, 1 + b % 2),
        lambda: CrossAttention(width, 2 + b),
        lambda: Mixer(width, narrow(b), bool(b % 2)),
        lambda: nn.Sequential(nn.RMSNorm(width), nn.Linear(width, width)),
    )
    return Tokens(bodies[a % len(bodies)]()), width


BLOCKS: dict[str, Callable[[int, int, int], Block]] = {
    "tokens": _tokens,
    "twice": lambda w, a, b: (Twice(w, narrow(a), bool(b % 2)), narrow(a)),
    "resized": lambda w, a, b: (Resized(w, narrow(a), a, b), narrow(a)),
    "lines": lambda w, a, b: (Lines(w, bool(b % 2)), w),
    "shaped": lambda w, a, b: (Shaped(w, narrow(a), a, b), narrow(a)),
}
