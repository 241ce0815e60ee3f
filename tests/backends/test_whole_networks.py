"""Whole networks in integers, none of it a float island: ONNX and C give the interpreter's bits."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import narrows
from narrows.backends.c.compiler import find_compiler
from narrows.backends.integers import float_islands, float_outputs
from narrows.passes.quant.quantization import Quantized

BINS = 8  # over which a box's sides are distributed
SIZE = 32  # of an image
STRIDES = (8, 16)


class Block(nn.Module):
    """Convolution, batch norm, SiLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.norm(self.conv(x)))


class Split(nn.Module):
    """Half of the channels goes on, half through a residual block; all are joined (C2f)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.first, self.last = Block(inputs, outputs), Block(3 * half, outputs)
        self.inner = nn.Sequential(Block(half, half, 3), Block(half, half, 3))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x).chunk(2, 1)
        return self.last(torch.cat([a, b, b + self.inner(b)], 1))


class Pyramid(nn.Module):
    """Poolings one after another, joined (SPPF)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last = Block(width, width // 2), Block(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        made = [self.first(x)]
        for _ in range(3):
            made.append(F.max_pool2d(made[-1], 5, 1, 2))
        return self.last(torch.cat(made, 1))


class Detector(nn.Module):
    """A detector in the style of YOLOv8: boxes from distributions, and scores, in one tensor."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(Block(3, 8, 3, 2), Block(8, 12, 3, 2), Split(12, 12))
        self.middle = nn.Sequential(Block(12, 16, 3, 2), Split(16, 16))
        self.deep = nn.Sequential(Block(16, 24, 3, 2), Split(24, 24), Pyramid(24))
        self.joined = Split(40, 16)
        self.boxes = nn.ModuleList(nn.Conv2d(w, 4 * BINS, 1) for w in (16, 24))
        self.scores = nn.ModuleList(nn.Conv2d(w, classes, 1) for w in (16, 24))
        self.bins: Tensor
        self.register_buffer("bins", torch.arange(float(BINS)).reshape(1, BINS, 1, 1))
        places, steps = [], []
        for stride in STRIDES:
            line = torch.arange(SIZE // stride) + 0.5
            y, x = torch.meshgrid(line, line, indexing="ij")
            places.append(torch.stack([x, y]).flatten(1))
            steps.append(torch.full((1, (SIZE // stride) ** 2), float(stride)))
        self.places: Tensor
        self.steps: Tensor
        self.register_buffer("places", torch.cat(places, 1))
        self.register_buffer("steps", torch.cat(steps, 1))

    def forward(self, image: Tensor) -> Tensor:
        middle = self.middle(self.stem(image))
        deep = self.deep(middle)
        wide = F.interpolate(deep, scale_factor=2.0, mode="nearest")
        levels = [self.joined(torch.cat([wide, middle], 1)), deep]
        boxes, scores = (
            torch.cat([head(x).flatten(2) for head, x in zip(heads, levels, strict=True)], 2)
            for heads in (self.boxes, self.scores)
        )
        sides = boxes.unflatten(1, (4, BINS)).transpose(1, 2).softmax(1)
        near, far = self.expected(sides).chunk(2, 1)
        begin, end = self.places - near, self.places + far
        box = torch.cat([(begin + end) / 2, end - begin], 1) * self.steps
        return torch.cat([box, scores.sigmoid()], 1)

    def expected(self, shares: Tensor) -> Tensor:
        """Return the means of distributions, ``[N, BINS, 4, anchors]``, by a convolution."""
        return F.conv2d(shares, self.bins).squeeze(1)


class SummedDetector(Detector):
    """The same, its means as sums of products."""

    def expected(self, shares: Tensor) -> Tensor:
        return (shares * self.bins).sum(1)


class Layer(nn.Module):
    """Attention and an MLP, each behind a layer norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.parts, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.back = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, count, width = x.shape
        parts = self.parts(self.norms[0](x))
        q, k, v = parts.reshape(batch, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        x = x + self.out(mixed.reshape(batch, count, width))
        return x + self.back(F.gelu(self.wide(self.norms[1](x))))


class Transformer(nn.Module):
    """A small ViT: patches, a class token, positions."""

    def __init__(self, width: int = 24, patch: int = 8) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.places = nn.Parameter(torch.randn(1, (SIZE // patch) ** 2 + 1, width))
        self.layers = nn.Sequential(Layer(width, 3), Layer(width, 3))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        return self.head(self.norm(self.layers(x))[:, 0])


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "detector": Detector,
    "summed": SummedDetector,
    "transformer": Transformer,
}


@cache
def quantized(name: str, bits: int) -> Quantized:
    torch.manual_seed(0)
    module = NETWORKS[name]()
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.5, 0.5)
    images = torch.rand(2, 3, SIZE, SIZE)
    program = narrows.capture(module.eval(), (images,))
    return narrows.quantize(program, [images], activations=bits, strict=True)


CASES = [("detector", 8), ("summed", 12), ("transformer", 8)]


@pytest.mark.parametrize(("name", "bits"), CASES)
def test_a_network_lowers_wholly(name: str, bits: int) -> None:
    made = quantized(name, bits)
    assert made.plan.floats == {}
    assert bool(made.plan.parts) == (name != "transformer")  # scores have finer steps than boxes
    assert not float_islands(made.program)
    assert not float_outputs(made.program)
    narrows.lower(made.program, samples=1)  # lower itself compares, with ==


@pytest.mark.skipif(not find_compiler(), reason="there is no C compiler")
@pytest.mark.parametrize(("name", "bits"), CASES)
def test_a_network_is_the_same_in_c(name: str, bits: int) -> None:
    narrows.lower(quantized(name, bits).program, "c", samples=1)
