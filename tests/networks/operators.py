"""Networks about one operator with weights, or about a constant that is not zero."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .registry import IMAGE, TOKENS, Ids, add, conv, conv_bn, network, sandwich

sandwich("grouped_conv", lambda: conv_bn(8, 8, groups=2))
sandwich("grouped_conv_widening", lambda: conv(8, 12, groups=4), head=12)
sandwich("grouped_conv_chain", lambda: nn.Sequential(conv_bn(8, 8, groups=2), conv(8, 8, groups=4)))
sandwich("depthwise", lambda: nn.Sequential(conv_bn(8, 8, groups=8), nn.ReLU6()))
sandwich("depthwise_no_pad", lambda: nn.Conv2d(8, 8, 3, groups=8))
sandwich("depthwise_multiplier", lambda: conv_bn(8, 16, groups=8), head=16)
sandwich("transposed_conv", lambda: nn.ConvTranspose2d(8, 6, 3, stride=2, output_padding=1), head=6)
sandwich("transposed_conv_grouped", lambda: nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2), head=6)
sandwich("transposed_depthwise", lambda: nn.ConvTranspose2d(8, 8, 2, stride=2, groups=8))
sandwich("strided_dilated", lambda: nn.Conv2d(8, 8, 3, stride=2, padding=2, dilation=2))
sandwich("same_padding", lambda: nn.Conv2d(8, 8, (3, 5), padding="same"))
sandwich("reflect_padded_conv", lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"))
sandwich("conv_without_bias", lambda: conv(8, 8, bias=False))
sandwich("norm_before_conv", lambda: nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8)))
sandwich("norm_without_affine", lambda: nn.BatchNorm2d(8, affine=False))
sandwich("norm_twice", lambda: nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm2d(8)))

ACTIVATIONS = {
    "sigmoid": nn.Sigmoid(), "hardswish": nn.Hardswish(), "gelu": nn.GELU(),
    "softplus": nn.Softplus(), "hardsigmoid": nn.Hardsigmoid(), "elu": nn.ELU(),
    "leaky_relu": nn.LeakyReLU(0.2), "tanh": nn.Tanh(), "exp": torch.exp,
}  # fmt: skip
for _name, _function in ACTIVATIONS.items():
    sandwich(f"constant_{_name}", lambda f=_function: lambda x: f(x - 0.25))
sandwich("clamp", lambda: lambda x: x.clamp(0.2, 0.9))
sandwich("clamp_min", lambda: lambda x: torch.clamp_min(x, 0.1))
sandwich("add_scalar", lambda: lambda x: x + 0.5)
sandwich("divide_by_scalar", lambda: lambda x: x / 3)
sandwich("divide_scalar_by", lambda: lambda x: 2 / (1 + x))
sandwich("power", lambda: lambda x: x**2 + torch.sqrt(x + 0.3))
sandwich("masked_fill", lambda: lambda x: x.masked_fill(x > 0.5, 0.25))
sandwich("dropout", lambda: nn.Dropout(0.4))
sandwich("prelu_per_channel", lambda: nn.Sequential(conv_bn(8, 8), nn.PReLU(8)))
sandwich("prelu_shared", lambda: nn.Sequential(conv_bn(8, 8), nn.PReLU()))
sandwich("max_pool_padded", lambda: nn.MaxPool2d(3, 2, padding=1))
sandwich("average_pool_counting_pad", lambda: nn.AvgPool2d(3, 2, padding=1))
sandwich(
    "average_pool_not_counting_pad",
    lambda: nn.AvgPool2d(3, 2, padding=1, count_include_pad=False),
)
sandwich("adaptive_max_pool", lambda: nn.AdaptiveMaxPool2d(3))
sandwich("upsample_bilinear", lambda: nn.Upsample(scale_factor=2, mode="bilinear"))
sandwich("upsample_nearest", lambda: lambda x: F.interpolate(x, size=(11, 13)))
sandwich("unfold", lambda: nn.Unfold(2, stride=2), head=lambda: nn.Linear(16, 5))


class Pipe(nn.Module):
    """A chain of layers whose input is no image."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


add(
    "conv1d",
    lambda: Pipe(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 5, 3, padding=1)),
    (3, 12),
)
add(
    "conv3d",
    lambda: Pipe(nn.Conv3d(2, 8, 2), nn.BatchNorm3d(8), nn.SiLU(), nn.Conv3d(8, 4, 2, padding=1)),
    (2, 4, 4, 4),
)
add("mlp", lambda: Pipe(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.SELU(), nn.Linear(12, 5)), (8,))


@network(IMAGE)
class SharedConv(nn.Module):
    """One convolution used at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared, self.head = conv_bn(3, 8), conv(8, 8), conv(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.stem(x).relu()).relu()
        return self.head(self.shared(x).relu())


@network(IMAGE)
class SharedHead(nn.Module):
    """One convolution that reads two unrelated tensors (detection heads)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv_bn(3, 8), conv(3, 8), conv(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(self.a(x).relu()), self.head(F.max_pool2d(self.b(x), 2).sigmoid())


@network(Ids(11, (6,)))
class TiedEmbedding(nn.Module):
    """The output layer shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(11, 8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(x + self.down(F.gelu(self.up(x))))


@network(Ids(11, (6,)))
class EmbeddingMean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.head = nn.Embedding(11, 8), nn.Linear(8, 10), nn.Linear(10, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.hidden(self.embed(ids).mean(1)).tanh())


@network(IMAGE)
class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = conv_bn(3, 8), conv(8, 8), conv(8, 5)
        self.scale = nn.Parameter(torch.ones(8, 1, 1) * 0.1)
        self.shift = nn.Parameter(torch.zeros(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.head(x + self.body(x) * self.scale + self.shift)


@network(TOKENS)
class PositionEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.head = nn.Linear(8, 10), nn.Linear(10, 12), nn.Linear(12, 5)
        self.position = nn.Parameter(torch.randn(1, 6, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(self.embed(x) + self.position).relu())


@network(TOKENS)
class ClassToken(nn.Module):
    """A learned token joins along the token axis, and is read back alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.head = nn.Linear(8, 10), nn.Linear(10, 12), nn.Linear(12, 5)
        self.token = nn.Parameter(torch.randn(1, 1, 10))
        self.mix = nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), self.embed(x)], dim=1)
        x = x + self.mix(x.transpose(1, 2)).transpose(1, 2)
        return self.head(self.hidden(x).relu()[:, 0])


@network(TOKENS)
class RawMatmul(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 10), nn.Linear(7, 5)
        self.weight = nn.Parameter(torch.randn(10, 7))
        self.bias = nn.Parameter(torch.randn(7))

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.embed(x).relu() @ self.weight + self.bias).relu())


@network(TOKENS)
class FunctionalLinear(nn.Module):
    """A Linear made by hand on a transposed raw weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 10), nn.Linear(7, 5)
        self.weight = nn.Parameter(torch.randn(7, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.matmul(self.embed(x).relu(), self.weight.t()).tanh())


@network(TOKENS)
class Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 10), nn.Linear(7, 5)
        self.weight = nn.Parameter(torch.randn(10, 7))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.einsum("btc,cd->btd", self.embed(x).relu(), self.weight))


@network(TOKENS)
class Bmm(nn.Module):
    """Two activations multiply, as attention scores do, without softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(8, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.bmm(self.a(x), self.b(x).transpose(1, 2))
        return self.head(torch.bmm(scores, self.c(x)))


@network(IMAGE)
class BilinearPooling(nn.Module):
    """The outer product of two maps' channels, flattened: every pair feeds one column."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv_bn(3, 4), conv(3, 6), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x).relu().flatten(2), self.b(x).flatten(2)
        return self.head((a @ b.transpose(1, 2)).flatten(1))
