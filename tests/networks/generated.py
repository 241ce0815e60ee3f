"""Networks made of randomly chosen blocks: what Hypothesis draws, and the module it stands for.

A network is a list of steps ``(kind, a, b)`` with small numbers whose meaning each kind decides,
so that a failing example shrinks to few steps and small numbers, and prints as plain data.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from . import layers, repeats, unlabelled
from .masks import KINDS
from .registry import conv, conv_bn
from .repeats import Block
from .repeats import narrow as _out

Step = tuple[str, int, int]
Size = tuple[int, int]


def bounded(usual: int) -> settings:
    """Return settings for so many examples, always the same; NARROWS_EXAMPLES asks for others."""
    examples = int(os.environ.get("NARROWS_EXAMPLES", "0"))
    return settings(
        max_examples=examples or usual,
        derandomize=not examples,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        # Explaining a failure traces every line that torch.export runs: minutes per example.
        phases=[Phase.explicit, Phase.generate, *([Phase.shrink] if examples else [])],
    )


class Lambda(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Residual(nn.Module):
    """A body around a shortcut, merged by one of four operators."""

    def __init__(self, body: nn.Module, shortcut: nn.Module, merge: int) -> None:
        super().__init__()
        self.body, self.shortcut, self.merge = body, shortcut, merge

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.body(x), self.shortcut(x)
        merged = (a + b, a * torch.sigmoid(b), a - b, torch.maximum(a, b))
        return merged[self.merge % 4].relu()


class Join(nn.Module):
    """The results of several modules, concatenated."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], 1)


class Split(nn.Module):
    """A split by sizes; one part is worked on, and the parts come back in either order."""

    def __init__(self, width: int, left: int, swap: bool) -> None:
        super().__init__()
        self.sizes, self.swap = [left, width - left], swap
        self.body = conv_bn(left, left)

    def forward(self, x: Tensor) -> Tensor:
        left, right = torch.split(x, self.sizes, 1)
        parts = [self.body(left).relu(), right]
        return torch.cat(parts[::-1] if self.swap else parts, 1)


class Attention(nn.Module):
    """Self-attention over the image's positions, two heads, with a residual."""

    def __init__(self, width: int, norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        t = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(t)).reshape(b, h * w, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, h * w, c)
        return (t + self.project(y)).transpose(1, 2).reshape(b, c, h, w)


class Gate(nn.Module):
    """Squeeze and excite, or a gate of one channel."""

    def __init__(self, width: int, one: bool) -> None:
        super().__init__()
        self.reduce, self.expand = conv(width, 4, 1), conv(4, 1 if one else width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardsigmoid(self.expand(self.reduce(x.mean((2, 3), keepdim=True)).relu()))


def _shuffle(x: Tensor, blocks: int) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, blocks, c // blocks, h, w).transpose(1, 2).reshape(b, c, h, w)


ACTIVATIONS = (nn.ReLU, nn.Sigmoid, nn.GELU, nn.Hardswish, nn.Tanh)
FUNCTIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x + 0.5,
    lambda x: x.flip(1) + x,
    lambda x: x.roll(1, 1),
    lambda x: x * x.mean(1, keepdim=True),
    lambda x: x.clamp(-0.5, 0.8),
    lambda x: x.roll(2, 3),
)


def _conv(width: int, a: int, b: int) -> Block:
    kernel = 1 + 2 * (b // 2 % 2)
    layer = conv_bn(width, _out(a)) if b % 2 else conv(width, _out(a), kernel)
    return nn.Sequential(layer, ACTIVATIONS[b % 5]()), _out(a)


def _residual(width: int, a: int, b: int) -> Block:
    body = nn.Sequential(conv_bn(width, _out(a)), nn.ReLU(), conv_bn(_out(a), width))
    return Residual(body, nn.Identity(), b), width


def _projection(width: int, a: int, b: int) -> Block:
    return Residual(conv_bn(width, _out(a)), conv(width, _out(a), 1), b), _out(a)


def _concat(width: int, a: int, b: int) -> Block:
    """Join the tensor or every second channel of it with itself or a convolution of it."""
    kept = nn.Identity() if b % 2 else Lambda(lambda x: x[:, ::2])
    other = nn.Identity() if b // 2 % 2 else conv_bn(width, _out(a))
    total = (width if b % 2 else width // 2) + (width if b // 2 % 2 else _out(a))
    return nn.Sequential(Join(other, kept), conv(total, _out(a))), _out(a)


def _depthwise(width: int, a: int, b: int) -> Block:
    wide = width * 2 if a % 2 and width <= 12 else width
    return nn.Sequential(conv_bn(width, wide, groups=width), nn.SiLU()), wide


def _norm(width: int, a: int, b: int) -> Block:
    norms = (nn.GroupNorm(2, width), nn.InstanceNorm2d(width, affine=True), nn.Softmax(1))
    return norms[a % 3], width


def _pool(width: int, a: int, b: int) -> Block:
    pools = (nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1), nn.ReflectionPad2d((0, 1, 1, 0)))
    return pools[a % 3], width


def _pixel(width: int, a: int, b: int) -> Block:
    middle = conv(4 * width, 4 * _out(a))
    layers = (nn.AdaptiveAvgPool2d(4), nn.PixelUnshuffle(2), middle, nn.PixelShuffle(2))
    return nn.Sequential(*layers), _out(a)


def _wide(width: int, a: int, b: int) -> Block:
    """Return a layer as wide as those of real networks, and one that reads it."""
    wide = 48 + 24 * (a % 4)
    body = nn.Sequential(conv_bn(width, wide, 1), nn.SiLU(), conv(wide, _out(b), 1))
    return nn.Sequential(body, nn.ReLU()), _out(b)


# Each takes a width and two numbers and returns a module and the width it leaves, even and 4 to 24.
BLOCKS: dict[str, Callable[[int, int, int], Block]] = {
    "conv": _conv,
    "residual": _residual,
    "projection": _projection,
    "concat": _concat,
    "split": lambda w, a, b: (Split(w, 1 + a % (w - 1), bool(b % 2)), w),
    "grouped": lambda w, a, b: (nn.Sequential(conv_bn(w, _out(a), groups=2), nn.ReLU()), _out(a)),
    "depthwise": _depthwise,
    "shuffle": lambda w, a, b: (Lambda(lambda x: _shuffle(x, 2)), w),
    "gate": lambda w, a, b: (Gate(w, bool(a % 2)), w),
    "norm": _norm,
    "pool": _pool,
    "pixel": _pixel,
    "attention": lambda w, a, b: (Attention(w, bool(a % 2)), w),
    "function": lambda w, a, b: (Lambda(FUNCTIONS[a % len(FUNCTIONS)]), w),
    "wide": _wide,
    **layers.BLOCKS,
    **repeats.BLOCKS,
    **unlabelled.BLOCKS,
}
HEADS = ("pooled", "flat", "map", "both")
# Most images are small; some have hundreds of positions, in a square or in two rows.
SIZES: tuple[Size, ...] = ((8, 8),) * 6 + ((16, 16), (2, 130))


class Generated(nn.Module):
    """A stem, the drawn blocks, and a head: Linear on pooled or flat features, or maps."""

    def __init__(self, steps: Sequence[Step], head: str) -> None:
        super().__init__()
        self.stem, width = conv_bn(3, 8), 8
        blocks = []
        for kind, a, b in steps:
            block, width = BLOCKS[kind](width, a, b)
            blocks.append(block)
        self.blocks, self.kind = nn.Sequential(*blocks), head
        self.pool = nn.AdaptiveAvgPool2d(1 if head == "pooled" else 2)
        self.linear = nn.Linear(width if head == "pooled" else 4 * width, 3)
        self.map = conv(width, 3) if head in ("map", "both") else None

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.blocks(self.stem(x).relu())
        if self.kind == "map" and self.map is not None:
            return self.map(x)
        y = self.linear(self.pool(x).flatten(1))
        return y if self.map is None else (y, self.map(x))


_numbers = st.integers(0, 9)
steps = st.lists(
    st.tuples(st.sampled_from(sorted(BLOCKS)), _numbers, _numbers), min_size=1, max_size=6
)
heads = st.sampled_from(HEADS)
sizes = st.sampled_from(SIZES)
kinds = st.sampled_from(KINDS)
