"""Blocks for generated networks whose channels stand in several places: repeats, stacks, indices.

Each takes a width and two small numbers, and returns a module on images and the width it leaves.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .registry import conv, conv_bn

Block = tuple[nn.Module, int]


def narrow(a: int) -> int:
    """Return the width that a small number stands for: 4 to 12, even."""
    return 4 + 2 * (a % 5)


# ------------------------------------------------------------------ the same channel again


def _in_heads(x: Tensor) -> Tensor:
    return x[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2)


def _in_turns(x: Tensor) -> Tensor:
    return x[:, None].expand(-1, 3, -1, -1, -1).flatten(1, 2)


# How channels are repeated, and how often.
REPEATS: tuple[tuple[Callable[[Tensor], Tensor], int], ...] = (
    (lambda x: torch.cat([x, x], 1), 2),
    (lambda x: x.repeat(1, 2, 1, 1), 2),
    (lambda x: x.repeat_interleave(2, 1), 2),
    (_in_heads, 2),
    (_in_turns, 3),
    (lambda x: torch.cat([x, x.relu(), x], 1), 3),
)
MEETINGS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda x, y: x * y,
    lambda x, y: x + y,
    torch.maximum,
    lambda x, y: torch.where(x > 0, x, y),
    lambda x, _: x,
)


class Repeated(nn.Module):
    """A tensor several times over, perhaps normalised as such, which meets a layer that reads it
    once or as it is.
    """

    def __init__(self, width: int, outputs: int, a: int, b: int) -> None:
        super().__init__()
        self.repeat, copies = REPEATS[a % len(REPEATS)]
        self.meet, self.again = MEETINGS[b % len(MEETINGS)], bool(b // 5)
        wide = copies * width
        norms = (nn.BatchNorm2d(wide), nn.GroupNorm(2, wide))
        self.make = conv(width, width, 1) if a > 5 else nn.Identity()
        self.norm = norms[a % 2] if a > 5 else nn.Identity()
        self.other = conv(wide if self.again else width, wide, 1, bias=bool(a % 2))
        self.read = conv(wide, outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.repeat(self.make(x)))
        return self.read(self.meet(y, self.other(y if self.again else x))).relu()


# ------------------------------------------------------------------ stacks


STACKED: tuple[Callable[[list[Tensor]], Tensor], ...] = (
    lambda parts: torch.stack(parts, 1).flatten(1, 2),
    lambda parts: torch.stack(parts, 2).flatten(1, 2),
    lambda parts: torch.stack(parts, -1).mean(-1),
    lambda parts: torch.stack(parts, 1).amax(1),
    lambda parts: (torch.stack(parts, 0) * torch.tensor([0.3, 0.7]).view(2, 1, 1, 1, 1)).sum(0),
)


class Stacked(nn.Module):
    """Two tensors on an axis of their own: two of one layer's, or each of another."""

    def __init__(self, width: int, outputs: int, a: int, b: int) -> None:
        super().__init__()
        self.first = conv_bn(width, outputs)
        self.second = conv(width, outputs) if a % 2 else None
        self.stack = STACKED[b % len(STACKED)]
        self.read = conv(outputs * (2 if b % len(STACKED) < 2 else 1), outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = y.abs() if self.second is None else self.second(x)
        return self.read(self.stack([y, z])).relu()


# ------------------------------------------------------------------ indices that repeat


class Indexed(nn.Module):
    """Channels picked by an index that repeats some, as they are or beside a layer's."""

    def __init__(self, width: int, outputs: int, a: int, b: int) -> None:
        super().__init__()
        draw = random.Random(f"{width} {a} {b}")
        count = width // 2 + draw.randrange(width)
        self.picks = [draw.randrange(width) for _ in range(count)]
        self.register_buffer("index", torch.tensor(self.picks))
        self.how, self.meet = a % 5, MEETINGS[b % len(MEETINGS)]
        self.other, self.read = conv(width, count, 1), conv(count, outputs)

    def picked(self, x: Tensor) -> Tensor:
        ways = (
            lambda: x.index_select(1, self.index),
            lambda: x[:, self.picks],
            lambda: x.flip(1).index_select(1, self.index),
            lambda: x.roll(2, 1)[:, self.index],
            lambda: torch.cat([x, x.flip(1)], 1).index_select(1, self.index),
        )
        return ways[self.how]()

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.meet(self.picked(x), self.other(x))).relu()


# ------------------------------------------------------------------ heads that share keys


class GroupedQuery(nn.Module):
    """Attention whose key and value heads serve several query heads each.

    Args:
        width: Channels.
        a: How the heads are repeated, how many there are, and how wide.
        b: The residual, and whether each head has a slope of its own or sees no later position.
    """

    def __init__(self, width: int, a: int, b: int) -> None:
        super().__init__()
        self.how, self.masks, self.residual = a % 4, b // 2 % 3, bool(b % 2)
        self.groups, self.heads = ((2, 4), (2, 6), (1, 4))[a // 4 % 3]
        self.each = 2 + b % 2
        self.q = nn.Linear(width, self.heads * self.each)
        self.k = nn.Linear(width, self.groups * self.each)
        self.v = nn.Linear(width, self.groups * self.each)
        self.o = nn.Linear(self.heads * self.each, width)
        self.slopes = nn.Parameter(0.1 * torch.rand(self.heads, 1, 1) + 0.01)

    def split(self, x: Tensor, heads: int) -> Tensor:
        return x.view(x.shape[0], x.shape[1], heads, self.each).transpose(1, 2)

    def spread(self, x: Tensor) -> Tensor:
        times = self.heads // self.groups
        if self.how == 0:
            return x[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2)
        return x.repeat_interleave(times, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        t = x.flatten(2).transpose(1, 2)
        q, k, v = self.split(self.q(t), self.heads), self.k(t), self.v(t)
        k, v = self.split(k, self.groups), self.split(v, self.groups)
        places = torch.arange(h * w, device=x.device).to(x.dtype)
        options = {"is_causal": True} if self.masks == 1 else {}
        if self.masks == 2:
            options = {"attn_mask": self.slopes * -(places[:, None] - places[None]).abs()}
        if self.how == 3 and not options:
            k, v = self.spread(k), self.spread(v)
            y = (q @ k.transpose(-1, -2) / self.each**0.5).softmax(-1) @ v
        elif self.how == 2:
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)
        else:
            y = F.scaled_dot_product_attention(q, self.spread(k), self.spread(v), **options)
        y = self.o(y.transpose(1, 2).reshape(b, h * w, -1))
        return (t + y if self.residual else y).transpose(1, 2).reshape(b, c, h, w)


# ------------------------------------------------------------------ many shifted copies


class Shifted(nn.Module):
    """Eight copies of a tensor side by side, each shifted along positions."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.read = conv(8 * width, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(torch.cat([shift(x, s, 3) for s in range(-3, 5)], 1)).relu()


class Harmonic(nn.Module):
    """Channels by the hundred that become positions, and eight copies of them shifted."""

    STEPS = (-36, 0, 36, 57, 72, 84, 93, 101)

    def __init__(self, width: int, outputs: int, last: bool) -> None:
        super().__init__()
        self.spread, self.read = conv(width, 36, 1, bias=False), conv(8, outputs, 1)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean(2, keepdim=True)
        y = torch.cat([self.spread(x * (k + 1) + k * k) for k in range(7)], 1)  # [b, 252, 1, n]
        y = y.permute(0, 3, 1, 2) if self.last else y.permute(0, 2, 1, 3)  # [b, n, 252, 1] or 1, n
        y = torch.cat([shift(y, s, 2) for s in self.STEPS], 3 if self.last else 1)
        y = self.read(y.permute(0, 3, 1, 2) if self.last else y).relu()
        return F.avg_pool2d(y, (1, 28) if self.last else (28, 1))


def shift(x: Tensor, step: int, axis: int) -> Tensor:
    """Return a tensor moved down an axis by so many places, filled up with zeros."""
    size = x.shape[axis]
    before, after = min(max(-step, 0), size), min(max(step, 0), size)
    part = x.narrow(axis, after, size - before - after)
    return F.pad(part, [0, 0] * (x.dim() - 1 - axis) + [before, after])


BLOCKS: dict[str, Callable[[int, int, int], Block]] = {
    "repeated": lambda w, a, b: (Repeated(w, narrow(a), a, b), narrow(a)),
    "stacked": lambda w, a, b: (Stacked(w, narrow(a), a, b), narrow(a)),
    "indexed": lambda w, a, b: (Indexed(w, narrow(b), a, b), narrow(b)),
    "grouped_query": lambda w, a, b: (GroupedQuery(w, a, b), w),
    "shifted": lambda w, a, b: (Shifted(w, narrow(a)), narrow(a)),
    "harmonic": lambda w, a, b: (Harmonic(w, narrow(a), bool(b % 2)), narrow(a)),
}
