"""The registry of one-feature networks, and how one is built: seeded, randomised, in float64."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

IMAGE = (3, 8, 8)
TOKENS = (6, 8)


@dataclass(frozen=True)
class Ids:
    """An input of token numbers below ``vocabulary``; ``shape`` leaves the batch axis out."""

    vocabulary: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Network:
    """A small network that is about one feature.

    Attributes:
        name: The feature.
        factory: Makes the module with torch's own initialisation.
        specs: One shape without the batch axis, or `Ids`, per input.
    """

    name: str
    factory: Callable[[], nn.Module]
    specs: tuple[tuple[int, ...] | Ids, ...]

    def build(self, seed: int = 0) -> nn.Module:
        """Return the module in float64 and eval mode, every number in it random and non-trivial."""
        torch.manual_seed(seed)
        module = self.factory().double()
        randomise(module, seed, self.inputs(4, seed + 1))
        return module

    def inputs(self, batch: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
        """Return random inputs, float64 or int64."""
        generator = torch.Generator().manual_seed(seed)

        def make(spec: tuple[int, ...] | Ids) -> Tensor:
            if isinstance(spec, Ids):
                return torch.randint(spec.vocabulary, (batch, *spec.shape), generator=generator)
            return torch.randn(batch, *spec, generator=generator, dtype=torch.float64)

        return tuple(make(spec) for spec in self.specs)


NETWORKS: dict[str, Network] = {}


def network(*specs: tuple[int, ...] | Ids) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Register a module class under its name in snake case."""

    def register(cls: type[nn.Module]) -> type[nn.Module]:
        add(re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower(), cls, *specs)
        return cls

    return register


def add(name: str, factory: Callable[[], nn.Module], *specs: tuple[int, ...] | Ids) -> None:
    """Register a network; the default input is one image."""
    if name in NETWORKS:
        raise ValueError(f"network {name!r} is registered twice")
    NETWORKS[name] = Network(name, factory, specs or (IMAGE,))


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    """Return a convolution that keeps the image's size."""
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def conv_bn(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Sequential:
    """Return a convolution and the BatchNorm that follows it."""
    return nn.Sequential(conv(inputs, outputs, kernel, **options), nn.BatchNorm2d(outputs))


class Sandwich(nn.Module):
    """Convolution, BatchNorm, ReLU, then the feature, then a layer that reads it."""

    def __init__(
        self,
        feature: Callable[[Tensor], Tensor],
        width: int = 8,
        head: int | nn.Module = 8,
    ) -> None:
        super().__init__()
        self.stem = conv_bn(3, width)
        self.feature = feature
        self.head = conv(head, 5) if isinstance(head, int) else head

    def forward(self, x: Tensor) -> Tensor:
        """Return the head's result."""
        return self.head(self.feature(self.stem(x).relu()))


def sandwich(
    name: str, feature: Callable[[], Callable[[Tensor], Tensor]], width: int = 8, head: Any = 8
) -> None:
    """Register a `Sandwich`; ``feature`` and a callable ``head`` are made anew for each build."""
    add(name, lambda: Sandwich(feature(), width, head if isinstance(head, int) else head()))


def randomise(module: nn.Module, seed: int, inputs: tuple[Any, ...]) -> None:
    """Give a module weights under which no mistake hides, and set it to eval mode.

    Fresh models have zero biases, unit scales, trivial BatchNorm statistics and near-zero layer
    scales: a lost constant would change nothing. BatchNorm statistics are set near those of
    ``inputs``, so that deep networks neither vanish nor overflow, and then moved off them.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)

    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.numel() > 1 and float(parameter.double().std()) > 1e-3:
                if parameter.dim() > 1:
                    continue
                parameter.add_(0.3 * noise(parameter))  # a bias
            elif float(parameter.double().mean()) > 0.1:
                parameter.mul_(1 + 0.3 * noise(parameter))  # a scale of ones
            else:  # zeros, or a layer scale of 1e-6
                fan = parameter[0].numel() if parameter.dim() > 1 else 1
                parameter.copy_(0.5 * noise(parameter) / max(fan, 1) ** 0.5)
        norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        momenta = [norm.momentum for norm in norms]
        module.eval()
        for norm in norms:
            norm.momentum = 1.0
            norm.train()
        if norms:
            module(*inputs)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.eval()
            norm.momentum = momentum
            mean, variance = norm.running_mean, norm.running_var
            if mean is not None and variance is not None:
                mean.add_(0.3 * noise(mean) * (variance.sqrt() + 0.1))
                variance.mul_(torch.exp(0.5 * noise(variance))).add_(1e-2)
