"""Networks in which one channel stands in several places, or what stands there has no channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Wrapped
from .registry import IMAGE, TOKENS, add, conv, conv_bn, network


class Meeting(nn.Module):
    """One channel in several places meets channels that have one place each."""

    def __init__(self, spread: str) -> None:
        super().__init__()
        self.spread = spread
        self.a, self.b, self.c = nn.Linear(8, 4), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        index = torch.tensor([0, 2, 2, 1, 3, 3, 3, 0])
        wide = {
            "cat": lambda: torch.cat([y, y], -1),
            "repeat": lambda: y.repeat(1, 1, 2),
            "interleave": lambda: y.repeat_interleave(2, -1),
            "index": lambda: y.index_select(-1, index),
            "expand": lambda: y[:, :, None].expand(-1, -1, 2, -1).flatten(2),
            "stack": lambda: torch.stack([y, y.abs()], -1).flatten(-2),
            "flip": lambda: torch.cat([y, y.flip(-1)], -1),
            "roll": lambda: torch.cat([y, y.roll(1, -1)], -1),
        }[self.spread]()
        return self.c(wide * self.b(x))


for _spread in ("cat", "repeat", "interleave", "index", "expand", "stack", "flip", "roll"):
    add(f"meeting_{_spread}", lambda spread=_spread: Meeting(spread), TOKENS)


@network((8,))
class StackUneven(nn.Module):
    """The operands of a stack are asked for different channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(8, 6), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.c(torch.stack([y.relu(), y.neg().relu()], 1).flatten(1))


@network(TOKENS)
class PositionsBesideChannels(nn.Module):
    """A concat of tensors that no layer makes, beside one that a layer makes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.q = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.ones_like(x[..., :4]).cumsum(-1)
        positions = torch.cat([steps.sin(), steps.cos()], -1)
        low = torch.cat([x[..., :4].sort(-1).values, x[..., 4:].sort(-1).values], -1)
        return self.q((self.a(x) + positions) * torch.stack([low, low], -2)[..., 0, :] + self.b(x))


class RepeatedHeads(Wrapped):
    """Grouped-query attention whose key and value heads are repeated by ``expand``."""

    def __init__(self, grouped: bool = False) -> None:
        super().__init__()
        self.grouped = grouped
        self.q, self.k, self.v = nn.Linear(8, 12), nn.Linear(8, 4), nn.Linear(8, 4)
        self.o = nn.Linear(12, 8)

    def attend(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, 6, 2).transpose(1, 2)
        k, v = (f(x).view(b, t, 2, 2).transpose(1, 2) for f in (self.k, self.v))
        if not self.grouped:
            k, v = (z[:, :, None].expand(-1, -1, 3, -1, -1).flatten(1, 2) for z in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.grouped)
        return self.o(y.transpose(1, 2).flatten(2))


add("repeated_heads", RepeatedHeads, TOKENS)
add("repeated_heads_grouped", lambda: RepeatedHeads(grouped=True), TOKENS)


@network(TOKENS)
class RelativeShift(nn.Module):
    """Pad, flatten and reshape: relative positions become absolute ones."""

    def __init__(self) -> None:
        super().__init__()
        self.r, self.o = nn.Linear(8, 11), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        z = F.pad(F.pad(self.r(x), [0, 1]).flatten(1), [0, 5])
        return self.o(z.reshape(-1, 7, 11)[:, :6, 5:])


@network(IMAGE)
class EfficientChannelAttention(nn.Module):
    """A convolution slides over the channels; its result is the gate of each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv_bn(3, 8), conv(8, 4)
        self.slide = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).relu()
        gate = self.slide(y.mean((2, 3)).view(x.shape[0], 1, -1)).sigmoid()
        return self.head(y * gate.view(x.shape[0], -1, 1, 1).expand_as(y))


@network((1, 5))
class ShiftedCopies(nn.Module):
    """Eight copies of some hundred positions, each shifted by another number of them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Conv1d(1, 36, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.q(x * (k + 1) + k * k) for k in range(7)], 1)
        y = y.permute(0, 2, 1).unsqueeze(3)
        shifts = [-36, 0, 36, 57, 72, 84, 93, 101]
        z = torch.cat([self.shifted(y, k) for k in shifts], 3)
        return self.o(z.permute(0, 3, 1, 2))

    @staticmethod
    def shifted(y: Tensor, by: int) -> Tensor:
        if by < 0:
            return F.pad(y[:, :, :by], (0, 0, -by, 0))
        return F.pad(y[:, :, by:], (0, 0, 0, by))


@network(TOKENS)
class WeightsBesideHeads(nn.Module):
    """Of a tensor that is joined to heads only what no layer makes is read further."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.o, self.q = nn.Linear(8, 16), nn.Linear(16, 3), nn.Linear(8, 3)
        self.places = nn.Parameter(torch.ones(1, 1, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        heads = self.a(x).view(b, n, 4, 4)
        joined = torch.cat([heads, self.places.expand(b, n, -1, -1)], -1)
        return self.o(joined[..., 4:].flatten(2)) + self.q(x)
