"""Blocks for generated networks whose tensors have no channels that a layer made, or hide them.

Barriers and their joins, reshapes askew, gates that slide over the channels, literals of sizes and
devices, weights computed from others. Each takes a width and two small numbers, and returns a
module on images and the width it leaves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .registry import conv, conv_bn
from .repeats import MEETINGS, Block, narrow

# ------------------------------------------------------------------ barriers, side by side


def _places(x: Tensor) -> Tensor:
    b, _, h, w = x.shape
    return torch.ones(b, 1, h, w, dtype=x.dtype).cumsum(2).expand_as(x)


BARRIERS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x.cumsum(1),
    lambda x: x.sort(1).values,
    lambda x: x.topk(x.shape[1], 1).values,
    _places,
    lambda x: x.softmax(1).cumsum(1),
    lambda x: x.relu(),
)


class Joined(nn.Module):
    """Two barriers on top of each other, met by a layer's channels."""

    def __init__(self, width: int, outputs: int, a: int, b: int) -> None:
        super().__init__()
        self.first, self.second = BARRIERS[a % 6], BARRIERS[(a + b) % 6]
        self.meet, self.stacked = MEETINGS[b % len(MEETINGS)], bool(a // 6)
        self.other, self.read = conv(width, 2 * width), conv(2 * width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.first(x), self.second(x)]
        y = torch.stack(parts, 2).flatten(1, 2) if self.stacked else torch.cat(parts, 1)
        return self.read(self.meet(y, self.other(x))).relu()


class Recurrent(nn.Module):
    """What one or two recurrent layers make of 4 positions, beside a layer's channels."""

    def __init__(self, width: int, a: int, b: int) -> None:
        super().__init__()
        kind = nn.GRU if a % 2 else nn.LSTM
        self.first = kind(width, width // 2, batch_first=True)
        self.second = (
            kind(width, width // 2, batch_first=True) if b % 2 else nn.Linear(width, width)
        )
        self.read, self.half = nn.Linear(width, width), width // 2

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(x, 2)
        t = x.flatten(2).transpose(1, 2)
        second = self.second(t)
        if isinstance(second, tuple):
            second = second[0]
        y = torch.cat([self.first(t)[0], second[..., : self.half]], -1)
        return self.read(t + y).transpose(1, 2).reshape(x.shape)


# ------------------------------------------------------------------ reshapes askew


class RelativeShift(nn.Module):
    """Attention of 16 positions whose scores are shifted by pad, flatten and reshape."""

    def __init__(self, width: int, a: int, b: int) -> None:
        super().__init__()
        self.heads = 1 + a % 2
        self.r, self.v = nn.Linear(width, self.heads * 31), nn.Linear(width, width)
        self.o, self.half = nn.Linear(width, width), bool(b % 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(x, 4)
        b, c, _, _ = x.shape
        t = x.flatten(2).transpose(1, 2)
        r = self.r(t).view(b, 16, self.heads, 31).transpose(1, 2)
        if self.half:  # Transformer-XL's: one column more, and everything one row on
            z = (
                F.pad(r, (1, 0))
                .view(b, self.heads, 32, 16)[:, :, 1:]
                .reshape(b, self.heads, 16, 31)
            )
            scores = z[..., :16]
        else:  # a row of zeros less than a square
            z = F.pad(F.pad(r, (0, 1)).flatten(2), (0, 15)).reshape(b, self.heads, 17, 31)
            scores = z[:, :, :16, 15:]
        v = self.v(t).view(b, 16, self.heads, -1).transpose(1, 2)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, 16, c)
        return (t + self.o(y)).transpose(1, 2).reshape(b, c, 4, 4)


def _askew(x: Tensor, how: int) -> Tensor:
    b, c, h, w = x.shape
    if how == 0:  # channels and rows change places without a transpose
        return x.reshape(b, h, c, w).transpose(1, 2)
    if how == 1:  # everything half a channel on
        return F.pad(x.flatten(1), (h * w // 2, 0))[:, : c * h * w].view(b, c, h, w)
    if how == 2:  # one channel more, and another one gone
        return F.pad(x, (0, 0, 0, 0, 1, 0))[:, :c] + x
    return x.reshape(b, c // 2, h * 2, w).reshape(b, c // 2, 2, h, w).transpose(1, 2).flatten(1, 2)


class Askew(nn.Module):
    """A layer's channels, reshaped across the borders between them, and read."""

    def __init__(self, width: int, outputs: int, a: int, b: int) -> None:
        super().__init__()
        self.make, self.read, self.how = conv_bn(width, width), conv(width, outputs), b % 4

    def forward(self, x: Tensor) -> Tensor:
        return self.read(_askew(self.make(x).relu(), self.how)).relu()


# ------------------------------------------------------------------ gates along the channels


class ChannelAttention(nn.Module):
    """A gate from a convolution that slides over the pooled channels (ECA)."""

    def __init__(self, width: int, a: int, b: int) -> None:
        super().__init__()
        kernel = 3 + 2 * (a % 2)
        self.make, self.how = conv_bn(width, width), b % 3
        self.slide = nn.Conv1d(1, 1, kernel, padding=kernel // 2, bias=bool(b // 3 % 2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.make(x).relu()
        pooled = y.mean((2, 3), keepdim=self.how == 1)
        if self.how == 0:
            gate = self.slide(pooled.view(x.shape[0], 1, -1)).view(x.shape[0], -1, 1, 1)
        elif self.how == 1:
            gate = self.slide(pooled.squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1)
        else:
            gate = self.slide(pooled.unsqueeze(1)).squeeze(1)[:, :, None, None]
        return y * gate.sigmoid().expand_as(y)


# ------------------------------------------------------------------ literals


LITERALS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x.to(x.device, x.dtype) * x.shape[-1] ** -0.5,
    lambda x: x + torch.ones(x.shape[0], 1, x.shape[2], 1).cumsum(2).type_as(x),
    lambda x: x.new_full((x.size(0), x.size(1), 1, 1), 0.5) * x,
    lambda x: x + torch.arange(x.shape[1], device=x.device).to(x.dtype).view(1, -1, 1, 1) / 8,
    lambda x: x.masked_fill(torch.ones(x.shape[2:], dtype=torch.bool).tril(-1), 0.25),
    lambda x: x.type_as(x).view(x.shape).to(x.device) + 0,
    lambda x: torch.where(torch.arange(x.shape[1])[:, None, None] % 2 == 0, x, -x),
    lambda x: x.flatten(2).view(-1, x.shape[1], *x.shape[2:]) * torch.tensor(2.0).type_as(x),
)


class Lettered(nn.Module):
    """A layer's channels with numbers, sizes and devices spelled in the code."""

    def __init__(self, width: int, outputs: int, a: int, b: int) -> None:
        super().__init__()
        self.make, self.read = conv_bn(width, width), conv(width, outputs)
        self.literal = LITERALS[b % len(LITERALS)]

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.literal(self.make(x)).relu())


# ------------------------------------------------------------------ computed weights


class Computed(nn.Module):
    """A convolution whose weight is computed from others, between two that have their own."""

    def __init__(self, width: int, outputs: int, a: int, b: int) -> None:
        super().__init__()
        self.how, self.groups = b % 6, 1 + a // 5
        self.make, self.read = conv_bn(width, width), conv(outputs, outputs, 1)
        self.weight = nn.Parameter(torch.randn(outputs, width // self.groups, 3, 3) / width)
        self.bias = nn.Parameter(torch.randn(2 * outputs))
        self.scale = nn.Parameter(torch.rand(outputs, 1, 1, 1) + 0.5)
        self.register_buffer("mask", (torch.arange(outputs) % 3 > 0).view(-1, 1, 1, 1) * 1.0)
        if self.how == 5:
            layer = nn.Conv2d(width, outputs, 3, padding=1, groups=self.groups)
            self.normed = nn.utils.parametrizations.weight_norm(layer)

    def computed(self) -> Tensor:
        w = self.weight
        ways: tuple[Callable[[], Tensor], ...] = (
            lambda: w * 0.5,
            lambda: w * self.scale,
            lambda: (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 0.1),
            lambda: w * self.mask,
            lambda: torch.cat([w[:2] * 2, w[2:]]),
        )
        return ways[self.how]()

    def forward(self, x: Tensor) -> Tensor:
        y = self.make(x).relu()
        if self.how == 5:
            return self.read(self.normed(y).relu())
        y = F.conv2d(y, self.computed(), self.bias.chunk(2)[0], padding=1, groups=self.groups)
        return self.read(y.relu())


BLOCKS: dict[str, Callable[[int, int, int], Block]] = {
    "joined": lambda w, a, b: (Joined(w, narrow(a), a, b), narrow(a)),
    "recurrent": lambda w, a, b: (Recurrent(w, a, b), w),
    "relative_shift": lambda w, a, b: (RelativeShift(w, a, b), w),
    "askew": lambda w, a, b: (Askew(w, narrow(a), a, b), narrow(a)),
    "channel_attention": lambda w, a, b: (ChannelAttention(w, a, b), w),
    "lettered": lambda w, a, b: (Lettered(w, narrow(a), a, b), narrow(a)),
    "computed": lambda w, a, b: (Computed(w, narrow(a), a, b), narrow(a)),
}
