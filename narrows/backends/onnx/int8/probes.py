"""Layers of bytes as the form ``qdq`` writes them, each tagged as a probe, and at which sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
from onnx import TensorProto

from narrows.backends.onnx import probes, sweep
from narrows.backends.onnx.probes import Bench, Point
from narrows.backends.onnx.sweep import Job

BLOCK, ALIGN = 16, 4  # of ONNX Runtime's kernels for bytes, on every processor so far
SCALE = 2.0**-4

# What takes longer than a millisecond is seldom undisturbed on a busy machine; it follows from what
# is smaller.
LARGEST_MACS, LARGEST_TENSOR = 120_000_000, 2**20

# Per grid the names of its axes, in the order of a point's sizes; others have ``elements`` alone.
AXES_BY_START: dict[str, tuple[str, ...]] = {
    **{f"{form} {kind}": sweep.WINDOWED for form in ("blocked", "narrow", "plain", "direct")
       for kind in ("conv", "grouped")},
    **{f"{form} depthwise": ("positions", "outputs") for form in ("blocked", "plain")},
    "linear": ("rows", "inputs", "outputs"),
    "matmul": ("rows", "inputs", "outputs"),
}  # fmt: skip


def axes_of(name: str) -> tuple[str, ...]:
    """Return the axes of a grid."""
    start = next((s for s in AXES_BY_START if name.startswith(s)), None)
    return ("elements",) if start is None else AXES_BY_START[start]


class ByteBench(Bench):
    """A graph of layers of bytes; every result is one of codes."""

    kind = TensorProto.UINT8

    def decoded(self, x: str) -> str:
        """Return codes as the numbers they stand for."""
        terms = [self.constant(np.float32(SCALE)), self.constant(np.uint8(0))]  # type: ignore[arg-type]
        return self.node("DequantizeLinear", [x, *terms], self.shape(x))

    def coded(self, y: str, tag: str = "") -> str:
        """Return numbers as codes."""
        terms = [self.constant(np.float32(SCALE)), self.constant(np.uint8(0))]  # type: ignore[arg-type]
        return self.node("QuantizeLinear", [y, *terms], self.shape(y), tag)

    def bytes_of_weight(self, axis: int, *shape: int) -> tuple[str, str]:
        """Return a weight of int8 with a scale per output channel, and a bias of int32."""
        codes = self._random.integers(-64, 64, shape).astype(np.int8)
        made = shape[axis]
        scale = self.constant(np.full(made, SCALE, np.float32))
        zeros = self.constant(np.zeros(made, np.int8))
        terms = [self.constant(codes), scale, zeros]
        weight = self.node("DequantizeLinear", terms, shape, axis=axis)
        finer = self.constant(np.full(made, SCALE * SCALE, np.float32))
        whole = [self.constant(np.zeros(made, np.int32)) for _ in range(2)]
        bias = self.node("DequantizeLinear", [whole[0], finer, whole[1]], (made,), axis=0)
        return weight, bias

    def terms(self, x: str, outputs: int, *shape: int) -> list[str]:
        """Return what a convolution reads, with a weight of bytes."""
        weight, bias = self.bytes_of_weight(0, outputs, *shape)
        return [self.decoded(x), weight, bias]

    def followed(self, y: str, after: str, tag: str) -> str:
        """Return the codes of a convolution; what follows one is where codes are rounded."""
        return self.coded(y, tag)


def linear(bench: ByteBench, point: Any, rows: int, inputs: int, outputs: int) -> None:
    """Add a linear layer."""
    x, tag = bench.input(rows, inputs), bench.tag(point)
    weight, bias = bench.bytes_of_weight(0, outputs, inputs)
    shape = (rows, outputs)
    y = bench.node("Gemm", [bench.decoded(x), weight, bias], shape, tag, transB=1)
    bench.use(bench.coded(y, tag), conv=False)


def matmul(bench: ByteBench, point: Any, rows: int, inputs: int, outputs: int) -> None:
    """Add a product of two activations."""
    a, b, tag = bench.input(1, rows, inputs), bench.input(1, inputs, outputs), bench.tag(point)
    pair = [bench.decoded(a), bench.decoded(b)]
    y = bench.node("MatMul", pair, (1, rows, outputs), tag)
    bench.use(bench.coded(y, tag), conv=False)


# ---------------------------------------------------------------------- at which sizes


def jobs(quick: bool) -> Iterator[Job]:
    """Yield all probes of a calibration; ``quick`` leaves out most sizes."""
    wide = (64, 256) if quick else (16, 64, 256, 1024)
    for side in (7, 28) if quick else (1, 7, 14, 28, 56, 112):
        yield from _layers("blocked", side, wide, (16, 32, *wide[1:]), quick)
        yield from _layers("narrow", side, wide, (8,), quick)
        yield from _layers("plain", side, [w - 1 for w in wide], [w - 1 for w in wide], quick)
        if side == 1:
            continue
        for form, width in (*(("blocked", w) for w in wide), *(("plain", w - 4) for w in wide)):
            for kernel, stride in ((3, 1),) if quick else ((3, 1), (3, 2), (5, 1), (5, 2), (7, 1)):
                yield from _conv(form, "depthwise", side, width, width, kernel, stride, width)
        for per in () if quick else (4, 8, 16, 24):
            form = "narrow" if per < BLOCK else "blocked"
            yield from _conv(form, "grouped", side, 8 * per, 8 * per, 3, 1, 8)
    if not quick:
        for side, kernel, stride, outputs in (
            *product((32, 112), (3,), (1, 2), (16, 32, 64)), (112, 7, 2, 64), (14, 16, 16, 192),
        ):  # fmt: skip
            yield from _conv("direct", "conv", side, 3, outputs, kernel, stride)
    yield from _products(quick)


def _layers(
    form: str, side: int, ins: Sequence[int], outs: Sequence[int], quick: bool
) -> Iterator[Job]:
    windows = ((1, 1), (3, 1)) if quick else ((1, 1), (3, 1), (3, 2), (1, 2))
    for (kernel, stride), i, o in product(windows, ins, outs):
        if kernel == 3 and (side == 1 or max(i, o) > 512):
            continue
        if stride == 2 and side not in (7, 28):
            continue
        yield from _conv(form, "conv", side, i, o, kernel, stride)


def _conv(
    form: str, kind: str, side: int, inputs: int, outputs: int, kernel: int, stride: int,
    groups: int = 1,
) -> Iterator[Job]:  # fmt: skip
    macs = side * side * inputs * outputs * kernel * kernel // groups
    largest = max(side * side * outputs, (side * stride) ** 2 * inputs)
    if macs > LARGEST_MACS or largest > LARGEST_TENSOR:
        return
    sizes = {"positions": side * side, "inputs": inputs // groups, "outputs": outputs // groups}
    if kind == "depthwise":
        sizes = {"positions": side * side, "outputs": outputs}
    name = f"{form} {kind} {kernel}x{kernel}/{stride}"
    point = Point(name, tuple(sizes.items()), groups if kind == "grouped" else 1)

    def add(bench: Bench) -> None:
        probes.convolution(
            bench, point, batch=1, inputs=inputs, outputs=outputs, space=(side, side),
            kernel=(kernel, kernel), stride=stride, groups=groups, direct=form == "direct",
        )  # fmt: skip

    yield Job((0, side, stride), kernel * kernel * inputs * outputs // groups, add)


def _products(quick: bool) -> Iterator[Job]:
    rows = (1, 196) if quick else (1, 8, 49, 196, 784)
    widths = (64, 256) if quick else (64, 256, 1024)
    for r, i, o in product(rows, widths, widths):
        if math.prod((r, i, o)) <= LARGEST_MACS:
            yield _product(linear, "linear", r, i, o)
    for r, i, o in product((49, 196), (32, 64, 196), (32, 64, 196)):
        yield _product(matmul, "matmul", r, i, o)


def _product(write: Any, kind: str, rows: int, inputs: int, outputs: int) -> Job:
    point = Point(kind, (("rows", rows), ("inputs", inputs), ("outputs", outputs)))
    weight = inputs * outputs if kind == "linear" else 0
    return Job((1,), weight, lambda bench: write(bench, point, rows, inputs, outputs))
