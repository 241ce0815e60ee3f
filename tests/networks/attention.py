"""Networks with attention in the forms that models write it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .registry import IMAGE, TOKENS, conv_bn, network


class Wrapped(nn.Module):
    """A pre-norm residual attention block between two Linears; subclasses attend."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 5)

    def attend(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.attend(self.norm(x)))


@network(TOKENS)
class MultiheadAttention(Wrapped):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def attend(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


@network(TOKENS)
class QkvByHand(Wrapped):
    """One Linear for q, k and v; reshape, permute, unbind, softmax (ViT, Swin)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.project = nn.Linear(8, 24), nn.Linear(8, 8)

    def attend(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        weights = ((q * 0.5) @ k.transpose(-2, -1)).softmax(-1)
        return self.project((weights @ v).transpose(1, 2).reshape(b, t, c))


@network(TOKENS)
class QkvIndexed(Wrapped):
    """The same with indexing in place of unbind, and a bias on the scores (Swin)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.project = nn.Linear(8, 24), nn.Linear(8, 8)
        self.bias = nn.Parameter(torch.randn(2, 6, 6))

    def attend(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        qkv = self.qkv(x).view(b, t, 3, 2, 4).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        weights = (q.matmul(k.transpose(-2, -1)) / 2 + self.bias).softmax(-1)
        return self.project(weights.matmul(v).transpose(1, 2).flatten(2))


@network(TOKENS)
class SeparateQkv(Wrapped):
    """Three Linears and scaled_dot_product_attention; the value width differs from the key's."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 12)
        self.project = nn.Linear(12, 8)

    def attend(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, 2, 4).transpose(1, 2)
        k = self.k(x).view(b, t, 2, 4).transpose(1, 2)
        v = self.v(x).view(b, t, 2, 6).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.project(y.transpose(1, 2).reshape(b, t, 12))


@network(TOKENS)
class CausalChunks(Wrapped):
    """q, k and v by chunk, causal attention (GPT-2)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.project = nn.Linear(8, 24), nn.Linear(8, 8)

    def attend(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        parts = [p.view(b, t, 2, 4).transpose(1, 2) for p in self.qkv(x).chunk(3, dim=-1)]
        y = F.scaled_dot_product_attention(*parts, is_causal=True)
        return self.project(y.transpose(1, 2).contiguous().view(b, t, c))


@network(TOKENS)
class GroupedQuery(Wrapped):
    """Four query heads share two key and value heads through repeat_interleave."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)
        self.project = nn.Linear(8, 8)

    def attend(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, 4, 2).transpose(1, 2)
        k = self.k(x).view(b, t, 2, 2).transpose(1, 2).repeat_interleave(2, dim=1)
        v = self.v(x).view(b, t, 2, 2).transpose(1, 2).repeat_interleave(2, dim=1)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.project(y.transpose(1, 2).reshape(b, t, 8))


@network(TOKENS)
class RotaryHalves(Wrapped):
    """Rotary position embedding: halves of each head are negated, swapped and mixed."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.project = nn.Linear(8, 8)
        angles = torch.arange(6.0)[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1])
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def rotate(self, x: Tensor) -> Tensor:
        halves = torch.cat([-x[..., 2:], x[..., :2]], dim=-1)
        return x * self.cos + halves * self.sin

    def attend(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.rotate(self.q(x).view(b, t, 2, 4).transpose(1, 2))
        k = self.rotate(self.k(x).view(b, t, 2, 4).transpose(1, 2))
        v = self.v(x).view(b, t, 2, 4).transpose(1, 2)
        y = (q @ k.transpose(2, 3)).softmax(-1) @ v
        return self.project(y.transpose(1, 2).reshape(b, t, 8))


@network(TOKENS)
class QkNorm(Wrapped):
    """Queries and keys are normalised per head."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.project = nn.Linear(8, 24), nn.Linear(8, 8)
        self.q_norm, self.k_norm = nn.LayerNorm(4), nn.RMSNorm(4)

    def attend(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.project(y.transpose(1, 2).reshape(b, t, c))


@network(TOKENS)
class SwigluMlp(Wrapped):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(8, 12, bias=False), nn.Linear(8, 12, bias=False)
        self.down = nn.Linear(12, 8, bias=False)

    def attend(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


@network(TOKENS)
class PackedGlu(Wrapped):
    """The gate and the value come out of one Linear and are taken apart by chunk."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 24), nn.Linear(12, 8)

    def attend(self, x: Tensor) -> Tensor:
        value, gate = self.up(x).chunk(2, dim=-1)
        return self.down(value * F.gelu(gate))


@network(IMAGE)
class ImageAttention(nn.Module):
    """Attention between positions of a feature map, with convolutions as projections."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.q, self.k, self.v = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 8, 1)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        q, k, v = self.q(x).flatten(2), self.k(x).flatten(2), self.v(x).flatten(2)
        weights = torch.bmm(q.transpose(1, 2), k).softmax(-1)
        return self.head(x + torch.bmm(v, weights.transpose(1, 2)).view_as(x))


@network(IMAGE)
class WindowAttention(nn.Module):
    """Shifted windows: roll, partition by view and permute, attend, and back (Swin)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Conv2d(3, 8, 1), nn.LayerNorm(8)
        self.qkv, self.project = nn.Linear(8, 24), nn.Linear(8, 8)
        self.merge = nn.Linear(32, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        y = torch.roll(self.norm(x), (-2, -2), (1, 2))
        y = y.view(b, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        q, k, v = self.qkv(y).reshape(-1, 16, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        y = self.project(y.transpose(1, 2).reshape(-1, 16, c))
        y = y.view(b, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        x = x + torch.roll(y, (2, 2), (1, 2))
        corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.merge(torch.cat(corners, -1))


@network(TOKENS)
class ChannelAttention(Wrapped):
    """Channels attend to channels: both axes of the scores hold channels (XCiT, DaViT)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.project = nn.Linear(8, 24), nn.Linear(8, 8)
        self.temperature = nn.Parameter(torch.ones(2, 1, 1))

    def attend(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, 2, c // 2).permute(2, 0, 3, 4, 1).unbind(0)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        weights = (q @ k.transpose(-2, -1) * self.temperature).softmax(-1)
        return self.project((weights @ v).permute(0, 3, 1, 2).reshape(b, t, c))


@network(TOKENS)
class GramMatrix(nn.Module):
    """The products of two sets of channels over all tokens, applied to tokens and to a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(8, 7), nn.Linear(8, 6)
        self.project, self.head = nn.Linear(7, 5), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        left, right = self.left(x), self.right(x).relu()
        gram = left.mT @ right
        return self.project((gram @ right.mT).mT), self.head(gram)


@network(TOKENS)
class EinsumAttention(Wrapped):
    """Attention spelled with einsum, projections with a weight per head included."""

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk, self.wv = (nn.Parameter(torch.randn(2, 8, 4) / 3) for _ in range(3))
        self.project = nn.Parameter(torch.randn(2, 4, 8) / 3)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btc,hcd->bthd", x, w) for w in (self.wq, self.wk, self.wv))
        weights = torch.einsum("bthd,bshd->bhts", q, k).mul(0.5).softmax(-1)
        return torch.einsum(
            "bthd,hde->bte", torch.einsum("bhts,bshd->bthd", weights, v), self.project
        )
