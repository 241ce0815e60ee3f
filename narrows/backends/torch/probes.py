"""What a calibration of eager PyTorch measures: every grid of its cost table, at which sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from narrows.ir.costs import CHANNELS_LAST, DILATED

LARGEST_MACS = 300_000_000  # a point larger than this follows from a smaller one
CHANNELS = 64

Call = Callable[[], Any]
Pool = Callable[[Tensor, Tensor], Tensor]

# By the names that the cost table knows them by.
POINTWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda x, y: F.relu(x),
    "relu6": lambda x, y: F.relu6(x),
    "hardtanh": lambda x, y: F.hardtanh(x),
    "leaky_relu": lambda x, y: F.leaky_relu(x),
    "elu": lambda x, y: F.elu(x),
    "silu": lambda x, y: F.silu(x),
    "gelu": lambda x, y: F.gelu(x),
    "sigmoid": lambda x, y: torch.sigmoid(x),
    "tanh": lambda x, y: torch.tanh(x),
    "hardswish": lambda x, y: F.hardswish(x),
    "hardsigmoid": lambda x, y: F.hardsigmoid(x),
    "mul": lambda x, y: x * y[:, :, :1, :1],
    "add": lambda x, y: x + y,
}


@dataclass(frozen=True)
class Probe:
    """One point of a grid.

    Attributes:
        grid: The grid.
        names: What its axes are called; ``place``: where the point lies on them.
        make: Returns the call to be timed.
        share: What its time is divided by: a grid of groups is of one group.
    """

    grid: str
    names: tuple[str, ...]
    place: tuple[float, ...]
    make: Callable[[], Call]
    share: int = 1


def probes(quick: bool) -> Iterator[Probe]:
    """Yield all probes of a calibration; ``quick`` leaves out most sizes."""
    for side in (7, 28) if quick else (7, 14, 28, 56, 112):
        yield from _dense(side, quick)
        yield from _depthwise(side, quick)
    for side in (7, 28, 112) if quick else (7, 14, 28, 56, 112, 224):  # large ones for batches
        yield from _elements(side)
        yield from _moves(side)
    yield from _products(quick)


# ------------------------------------------------------------------ convolutions


def _dense(side: int, quick: bool) -> Iterator[Probe]:
    wide = (16, 64, 256) if quick else (16, 64, 256, 1024)
    for i, o in product(wide, wide):
        yield from _conv(1, side, i, o, (1, 1), 1)
        yield from _conv(1, side, i, o, (1, 1), 1, dilation=2)
    for i, o in product(wide[:3], wide[:3]):
        yield from _conv(1, side, i, o, (3, 3), 1)
        if not quick:
            yield from _conv(1, side, i, o, (3, 3), 2)
            yield from _conv(1, side, i, o, (1, 1), 2)
    if quick:
        return
    for i, o in product((16, 256), (16, 256)):
        yield from _conv(8, side, i, o, (1, 1), 1)
        yield from _conv(8, side, i, o, (3, 3), 1)
        for kernel in ((5, 5), (1, 7), (7, 1)):
            yield from _conv(1, side, i, o, kernel, 1)
    for i, o in product((3, 12), (16, 64)):
        yield from _conv(1, side, i, o, (7, 7), 2)
    for i, o in product((4, 24, 40), (4, 24, 40)):
        yield from _conv(1, side, 8 * i, 8 * o, (3, 3), 1, groups=8)


def _depthwise(side: int, quick: bool) -> Iterator[Probe]:
    windows = ((3, 1),) if quick else ((3, 1), (3, 2), (5, 1), (5, 2), (7, 1))
    for (kernel, stride), c in product(windows, (16, 64, 256, 1024)):
        yield from _conv(1, side, c, c, (kernel, kernel), stride, groups=c)
    for c in () if quick else (16, 256):
        yield from _conv(8, side, c, c, (3, 3), 1, groups=c)


def _conv(
    batch: int,
    side: int,
    inputs: int,
    outputs: int,
    kernel: tuple[int, int],
    stride: int,
    groups: int = 1,
    dilation: int = 1,
) -> Iterator[Probe]:
    """Yield the probe of a convolution whose result has ``side`` rows, unless it is too large."""
    positions, taps = side * side, kernel[0] * kernel[1]
    rows = side * stride
    if batch * positions * inputs * outputs * taps // groups > LARGEST_MACS:
        return
    if batch * rows * rows * max(inputs, outputs) > 2**25:
        return
    kind = "conv" if groups == 1 else "depthwise" if groups == inputs else "grouped"
    many = f"x{batch} " if batch > 1 else ""
    many = f"{DILATED} " if dilation > 1 else many
    name = f"{many}plain {kind} {kernel[0]}x{kernel[1]}/{stride}"
    names, place = ("positions", "inputs", "outputs"), (inputs // groups, outputs // groups)
    if kind == "depthwise":
        names, place = ("positions", "outputs"), (outputs,)
    padding = (kernel[0] // 2, kernel[1] // 2)

    def make() -> Call:
        x = torch.randn(batch, inputs, rows, rows)
        w, b = torch.randn(outputs, inputs // groups, *kernel), torch.randn(outputs)
        return lambda: F.conv2d(x, w, b, stride, padding, dilation, groups)

    share = groups if kind == "grouped" else 1
    yield Probe(name, names, (float(positions), *map(float, place)), make, share)


# ------------------------------------------------------------------ the rest


def _single(grid: str, elements: int, make: Callable[[], Call]) -> Probe:
    return Probe(grid, ("elements",), (float(elements),), make)


def _elements(side: int) -> Iterator[Probe]:
    shape = (1, CHANNELS, side, side)
    count = CHANNELS * side * side

    def each(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Call]:
        def make() -> Call:
            x, y = torch.randn(shape), torch.randn(shape)
            return lambda: function(x, y)

        return make

    for name, function in POINTWISE.items():
        yield _single(f"pointwise {name}", count, each(function))
    yield _single("plain fused add", count, each(lambda x, y: x + y))
    c = torch.ones(CHANNELS)
    yield _single("scale", count, each(lambda x, y: F.batch_norm(x, c, c, c, c)))
    for window, stride in ((3, 2), (2, 2), (3, 1)):
        size = f"{window}x{window}/{stride}"
        pad = window // 2 if window == 3 else 0

        def most(x: Tensor, y: Tensor, k: int = window, s: int = stride, p: int = pad) -> Tensor:
            return F.max_pool2d(x, k, s, p)

        def mean(x: Tensor, y: Tensor, k: int = window, s: int = stride, p: int = pad) -> Tensor:
            return F.avg_pool2d(x, k, s, p)

        for name, pool in (("max_pool2d", most), ("avg_pool2d", mean)):

            def last(x: Tensor, y: Tensor, pool: Pool = pool) -> Tensor:
                return pool(x.contiguous(memory_format=torch.channels_last), y).contiguous()

            yield _single(f"pool {name} {size}", count, each(pool))
            yield _single(f"{CHANNELS_LAST} pool {name} {size}", count, each(last))
    average = each(lambda x, y: F.adaptive_avg_pool2d(x, 1))
    yield _single("pool adaptive_avg_pool2d", count, average)
    yield _single("reduce", count, each(lambda x, y: x.mean((2, 3), keepdim=True)))
    for name, function in (
        ("softmax", lambda x, y: x.softmax(-1)),
        ("norm", lambda x, y: F.layer_norm(x, x.shape[-1:])),
    ):
        yield _single(name, count, each(function))


def _moves(side: int) -> Iterator[Probe]:
    shape = (1, CHANNELS, side, side)
    order = torch.randperm(CHANNELS, generator=torch.Generator().manual_seed(0))
    calls: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
        "gather": (CHANNELS, lambda x: x.index_select(1, order)),
        "pick": (CHANNELS, lambda x: x.view(1, side, side, CHANNELS).index_select(3, order)),
        "concat": (2 * CHANNELS, lambda x: torch.cat((x, x), 1)),
        "copy": (CHANNELS, lambda x: x.transpose(2, 3).contiguous()),
    }
    for name, (width, function) in calls.items():

        def make(function: Callable[[Tensor], Tensor] = function) -> Call:
            x = torch.randn(shape)
            return lambda: function(x)

        yield _single(name, width * side * side, make)
    for batch in (1, 8):  # of one example, a slice of channels is contiguous as it is

        def cut(batch: int = batch) -> Call:
            x = torch.randn(batch, CHANNELS // batch + 4, side, side)
            return lambda: x[:, 4:].contiguous()

        place = (float(batch), float(CHANNELS * side * side))
        yield Probe("slice", ("batch", "elements"), place, cut)


def _products(quick: bool) -> Iterator[Probe]:
    rows = (1, 49, 784) if quick else (1, 8, 49, 196, 784)
    widths = (64, 256, 1024) if quick else (64, 256, 1024, 4096)
    names = ("rows", "inputs", "outputs")
    for r, i, o in product(rows, widths, widths):
        if r * i * o > LARGEST_MACS:
            continue

        def linear(r: int = r, i: int = i, o: int = o) -> Call:
            x, w, b = torch.randn(r, i), torch.randn(o, i), torch.randn(o)
            return lambda: F.linear(x, w, b)

        yield Probe("linear", names, (float(r), float(i), float(o)), linear)
    for r, i, o in product((49, 196), (32, 64, 196), (32, 64, 196)):

        def matmul(r: int = r, i: int = i, o: int = o) -> Call:
            x, y = torch.randn(1, r, i), torch.randn(1, i, o)
            return lambda: x @ y

        yield Probe("matmul", names, (float(r), float(i), float(o)), matmul)
