"""Layers whose weights forward computes from other weights, in the spellings that people use."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

Make = Callable[["Written"], Tensor]


class Written(nn.Module):
    """A convolution whose forward says how its weight is made."""

    def __init__(self, make: Make, inputs: int, outputs: int, groups: int = 1, kernel: int = 3):
        super().__init__()
        own = nn.Conv2d(inputs, outputs, kernel, groups=groups)
        self.weight, self.bias = own.weight, own.bias
        self.gain = nn.Parameter(torch.rand(outputs, 1, 1, 1) + 0.5)
        self.down = nn.Parameter(torch.randn(outputs, 2) * 0.3)
        self.up = nn.Parameter(torch.randn(2, self.weight[0].numel()) * 0.3)
        self.make, self.groups = make, groups

    def forward(self, x: Tensor) -> Tensor:
        size = self.weight.shape[-1] // 2
        return F.conv2d(x, self.make(self), self.bias, 1, size, 1, self.groups)


def standardised(layer: Written) -> Tensor:
    """Return the weight of a BiT network."""
    w = layer.weight
    std, mean = torch.std_mean(w, dim=[1, 2, 3], keepdim=True, unbiased=False)
    return (w - mean) / (std + 1e-5)


def scaled_standardised(layer: Written) -> Tensor:
    """Return the weight of a network without norms (NFNet)."""
    w = layer.weight
    mean, var = w.mean((1, 2, 3), keepdim=True), w.var((1, 2, 3), keepdim=True)
    scale = torch.rsqrt((var * w[0].numel()).clamp(min=1e-4)) * layer.gain
    return w * scale - mean * scale


def binary(layer: Written) -> Tensor:
    """Return the weight of a binary network (ReActNet)."""
    return layer.weight.sign() * layer.weight.abs().mean((1, 2, 3), keepdim=True)


def low_rank(layer: Written) -> Tensor:
    """Return a weight with a low-rank sum (LoRA)."""
    return layer.weight + (layer.down @ layer.up).view(layer.weight.shape) * 0.5


MAKES: dict[str, Make] = {
    "scaled": lambda layer: layer.weight * 0.3,
    "binary": binary,
    "standardised": standardised,
    "scaled-standardised": scaled_standardised,
    "low-rank": low_rank,
    "gains": lambda layer: layer.weight * layer.gain,
}


def _halved(layer: nn.Conv2d) -> nn.Conv2d:
    prune.ln_structured(layer, "weight", 2, 2, 0)
    layer(torch.zeros(1, layer.in_channels, 4, 4))  # a hook makes the weight
    return layer


WRAPS: dict[str, Callable[[nn.Conv2d], nn.Module]] = {
    "weight-norm": parametrizations.weight_norm,
    "weight-norm-all": lambda layer: parametrizations.weight_norm(layer, dim=None),
    "old-weight-norm": old_weight_norm,
    "spectral-norm": parametrizations.spectral_norm,
    "old-spectral-norm": old_spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "prune": _halved,
}

SPELLINGS = (*MAKES, *WRAPS)


def layer(spelling: str, inputs: int, outputs: int, groups: int = 1, kernel: int = 3) -> nn.Module:
    """Return a convolution whose weight is computed; sizes stay as they are."""
    if spelling in MAKES:
        return Written(MAKES[spelling], inputs, outputs, groups, kernel)
    plain = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups)
    return WRAPS[spelling](plain)


def chain(spelling: str, groups: int = 1) -> nn.Sequential:
    """Return a chain of convolutions, ``0`` plain, ``2`` and ``4`` computed, ``6`` plain."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), layer(spelling, 8, 8, groups), nn.ReLU(),
        layer(spelling, 8, 6), nn.ReLU(), nn.Conv2d(6, 2, 1),
    )  # fmt: skip


# ---------------------------------------------------------------------- whole networks


class _Binary(nn.Module):
    """One block of ReActNet: sign, a binary layer, batch norm, a shortcut, PReLU between shifts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.after = (nn.Parameter(torch.randn(1, width, 1, 1)) for _ in range(2))
        self.conv, self.bn = layer("binary", width, width), nn.BatchNorm2d(width)
        self.act = nn.PReLU(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.bn(self.conv((x + self.before).sign()))) + self.after


class _Free(nn.Module):
    """One block of an NFNet."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.a = layer("scaled-standardised", width, inner, kernel=1)
        self.b = layer("scaled-standardised", inner, inner)
        self.c = layer("scaled-standardised", inner, width, kernel=1)
        self.skip = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.c(F.gelu(self.b(F.gelu(self.a(x * 0.9))))) * 0.2 * self.skip


class _Vocoder(nn.Module):
    """HiFi-GAN: weight-normed layers that stretch a sequence, each with a residual block."""

    def __init__(self) -> None:
        super().__init__()
        norm = parametrizations.weight_norm
        self.first = norm(nn.Conv1d(12, 32, 7, padding=3))
        self.ups = nn.ModuleList(
            [norm(nn.ConvTranspose1d(32, 24, 4, 2, 1)), norm(nn.ConvTranspose1d(24, 16, 4, 2, 1))]
        )
        self.blocks = nn.ModuleList(
            [norm(nn.Conv1d(w, w, 3, padding=d, dilation=d)) for w, d in ((24, 1), (16, 3))]
        )
        self.last = norm(nn.Conv1d(16, 1, 7, padding=3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for up, block in zip(self.ups, self.blocks, strict=True):
            x = up(F.leaky_relu(x, 0.1))
            x = x + block(F.leaky_relu(x, 0.1))
        return torch.tanh(self.last(F.leaky_relu(x)))


class _Equal(nn.Module):
    """A layer of StyleGAN2, at an equal learning rate."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 0, rate: float = 0.01) -> None:
        super().__init__()
        window = (kernel, kernel) if kernel else ()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, *window) / rate)
        self.bias = nn.Parameter(torch.randn(outputs))
        self.gain, self.rate, self.kernel = rate / inputs**0.5 / (kernel or 1), rate, kernel

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight * self.gain, self.bias * self.rate
        if not self.kernel:
            return F.linear(x, weight, bias)
        return F.conv2d(x, weight, bias, padding=self.kernel // 2)


class _Generator(nn.Module):
    """StyleGAN2 with styles that scale what its layers read."""

    def __init__(self, z: int = 16, width: int = 24) -> None:
        super().__init__()
        self.map = nn.Sequential(
            _Equal(z, 32), nn.LeakyReLU(0.2), _Equal(32, 32), nn.LeakyReLU(0.2)
        )
        self.start = nn.Parameter(torch.randn(1, width, 4, 4))
        self.styles = nn.ModuleList([_Equal(32, width), _Equal(32, 20)])
        self.convs = nn.ModuleList([_Equal(width, 20, 3), _Equal(20, 16, 3)])
        self.rgb = _Equal(16, 3, 1)

    def forward(self, z: Tensor) -> Tensor:
        w = self.map(z)
        x = self.start.repeat(z.shape[0], 1, 1, 1)
        for style, conv in zip(self.styles, self.convs, strict=True):
            x = F.leaky_relu(conv(x * style(w)[:, :, None, None]), 0.2)
            x = F.interpolate(x, scale_factor=2.0)
        return self.rgb(x)


def _reactnet() -> nn.Module:
    stem = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24))
    return nn.Sequential(
        stem, _Binary(24), nn.AvgPool2d(2), _Binary(24), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(24, 5),
    )  # fmt: skip


def _nfnet() -> nn.Module:
    return nn.Sequential(
        layer("scaled-standardised", 3, 24), _Free(24, 12), nn.AvgPool2d(2), _Free(24, 12),
        nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5),
    )  # fmt: skip


# Per name the network and the shape of an input.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "reactnet": (_reactnet, (2, 3, 8, 8)),
    "nfnet": (_nfnet, (2, 3, 8, 8)),
    "vocoder": (_Vocoder, (2, 12, 8)),
    "stylegan": (_Generator, (2, 16)),
}
