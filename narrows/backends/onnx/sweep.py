"""What a calibration measures: every grid of the cost table, and at which sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

from narrows.backends.measured.layout import Layout
from narrows.backends.onnx import probes
from narrows.backends.onnx.probes import Bench, Point
from narrows.ir.work import CONVOLUTIONS, Work

SIDES = (1, 7, 14, 28, 56, 112)
LARGEST_MACS = 450_000_000  # a point larger than this follows from a smaller one

# Per grid the names of its axes, in the order of a point's sizes; others have ``elements`` alone.
WINDOWED = ("positions", "inputs", "outputs")
AXES_BY_START: dict[str, tuple[str, ...]] = {
    "blocked conv": WINDOWED,
    "x8 blocked conv": WINDOWED,
    "x8 blocked depthwise": ("positions", "outputs"),
    "direct conv": WINDOWED,
    "plain conv": WINDOWED,
    "plain grouped": WINDOWED,
    "blocked depthwise": ("positions", "outputs"),
    "plain depthwise": ("positions", "outputs"),
    "linear": ("rows", "inputs", "outputs"),
    "matmul": ("rows", "inputs", "outputs"),
}


def exact(work: Work) -> Job | None:
    """Return the probe of exactly one work: of a 2-d convolution, or a product with a weight."""
    if work.kind == "linear":
        rows = work.batch * work.positions

        def product_(bench: Bench) -> None:
            probes.matrices(bench, work, rows, work.inputs, work.outputs, True)

        return Job((4,), 4 * work.inputs * work.outputs, product_)
    if work.kind not in CONVOLUTIONS or len(work.space) != 2 or len(set(work.stride)) != 1:
        return None

    def convolution(bench: Bench) -> None:
        probes.convolution(
            bench,
            work,
            batch=work.batch,
            inputs=work.inputs,
            outputs=work.outputs,
            space=work.space,
            kernel=work.kernel,
            stride=work.stride[0],
            groups=work.groups,
            direct=work.inputs < probes.NARROW,
        )

    weight = 4 * work.taps * work.inputs * work.outputs // work.groups
    return Job((0, work.batch, *work.space, work.stride[0]), weight, convolution)


@dataclass(frozen=True)
class Job:
    """One probe to be measured.

    Attributes:
        room: What probes of one graph have in common.
        weight: The bytes of its weights.
        add: Adds it to a graph.
    """

    room: tuple[int, ...]
    weight: int
    add: Callable[[Bench], Any]


def axes_of(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the axes of grids by their names."""
    found = {}
    for name in names:
        start = next((s for s in AXES_BY_START if name.startswith(s)), None)
        found[name] = AXES_BY_START[start] if start else ("elements",)
    return found


def jobs(layout: Layout, quick: bool) -> Iterator[Job]:
    """Yield all probes of a calibration; ``quick`` leaves out most sizes."""
    yield from _convolutions(layout, quick)
    yield from _plain(layout, quick)
    yield from _elementwise(layout, quick)
    yield from _pools(layout, quick)
    yield from _moves(quick)
    yield from _products(quick)


# ---------------------------------------------------------------------- convolutions


def _conv(
    grid: str,
    batch: int,
    space: tuple[int, int],
    inputs: int,
    outputs: int,
    kernel: tuple[int, int],
    stride: int,
    **options: Any,
) -> Iterator[Job]:
    groups = options.get("groups", 1)
    positions = math.prod(space)
    taps = math.prod(kernel)
    macs = batch * positions * inputs * outputs * taps // groups
    if macs > LARGEST_MACS or batch * positions * stride**2 * max(inputs, outputs) > 2**25:
        return
    window = f"{kernel[0]}x{kernel[1]}/{stride}"
    kind = grid.split()[-1]
    if kind == "depthwise":
        sizes = {"positions": positions, "outputs": outputs}
    else:
        sizes = {"positions": positions, "inputs": inputs // groups, "outputs": outputs // groups}
    share = groups if kind == "grouped" else 1
    many = f"x{batch} " if batch > 1 else ""
    point = Point(f"{many}{grid} {window}", tuple(sizes.items()), share)

    def add(bench: Bench) -> None:
        probes.convolution(
            bench, point, batch=batch, inputs=inputs, outputs=outputs, space=space, kernel=kernel,
            stride=stride, **options,
        )  # fmt: skip

    weight = 4 * taps * inputs * outputs // groups
    yield Job((0, batch, *space, stride), weight, add)


def _convolutions(layout: Layout, quick: bool) -> Iterator[Job]:
    if layout.block == 1:
        return
    block = layout.block
    sets = [block, 2 * block, 3 * block, 4 * block]
    wide = [16 * block] if quick else [16 * block, 64 * block]
    few = [2 * block, 16 * block]
    for side in (1, 7, 14, 56) if quick else SIDES:
        yield from _blocked(block, 1, side, [block, 4 * block, *wide], [*sets, *wide])
        if side > 1 and not quick:
            yield from _blocked(block, 8, side, few, few)
    if quick:
        return
    for side, o, i in product((7, 14, 28), [*sets, 8 * block], (block, 4 * block, 12 * block)):
        yield from _conv("blocked conv", 1, (side, side), i, o, (5, 5), 1)
    for side, o, i in product((8, 17), [*sets, 12 * block], (4 * block, 12 * block, 24 * block)):
        for kernel in ((1, 7), (7, 1), (1, 3), (3, 1)):
            yield from _conv("blocked conv", 1, (side, side), i, o, kernel, 1)
    yield from _direct(layout)


def _blocked(
    block: int, batch: int, side: int, ins: Sequence[int], outs: Sequence[int]
) -> Iterator[Job]:
    """Yield the convolutions that run blocked, at one size."""
    space = (side, side)
    for i, o in product(ins, outs):
        yield from _conv("blocked conv", batch, space, i, o, (1, 1), 1)
        if side == 1:
            continue
        if max(i, o) <= 32 * block:
            yield from _conv("blocked conv", batch, space, i, o, (3, 3), 1)
        if max(i, o) <= 32 * block and side < 112:
            yield from _conv("blocked conv", batch, space, i, o, (3, 3), 2)
        if side < 56 and i >= 2 * block:
            yield from _conv("blocked conv", batch, space, i, o, (1, 1), 2)
            yield from _conv("blocked conv", batch, space, i, o, (2, 2), 2)
    if side == 1:
        return
    for kernel, stride, c in product((3, 5, 7), (1, 2), ins):
        if stride == 1 or (kernel < 7 and side < 112):
            window = (kernel, kernel)
            yield from _conv("blocked depthwise", batch, space, c, c, window, stride, groups=c)


def _direct(layout: Layout) -> Iterator[Job]:
    block = layout.block
    sets = [block, 2 * block, 3 * block, 4 * block]
    for side, i, o in product((32, 112, 149), (3, 12), sets):
        yield from _conv("direct conv", 1, (side, side), i, o, (3, 3), 2, direct=True)
        if side != 149:
            yield from _conv("direct conv", 1, (side, side), i, o, (7, 7), 2, direct=True)
            yield from _conv("direct conv", 1, (side, side), i, o, (3, 3), 1, direct=True)
    for side, i, o in product((1, 7, 14, 28, 56), (4, 8, 12), [*sets, 16 * block]):
        yield from _conv("direct conv", 1, (side, side), i, o, (1, 1), 1, direct=True)
    for o in (*sets, 16 * block, 48 * block):
        yield from _conv("direct conv", 1, (14, 14), 3, o, (16, 16), 16, direct=True)
        yield from _conv("direct conv", 1, (56, 56), 3, o, (4, 4), 4, direct=True)


def _plain(layout: Layout, quick: bool) -> Iterator[Job]:
    odd = 1 if layout.block > 1 else 0
    sides = (1, 7, 28) if quick else (1, 7, 14, 28, 56)
    for side in sides:
        space = (side, side)
        wide = (16, 64, 256, 1024) if side < 28 and not quick else (16, 64, 256)
        for i, o in product(wide, wide):
            yield from _conv("plain conv", 1, space, i - odd, o, (1, 1), 1)
        for i, o in product((16 - odd, 64 - odd, 256 - odd), (16, 64, 256)):
            if side == 1:
                continue
            yield from _conv("plain conv", 1, space, i, o, (3, 3), 1)
            if not quick:
                yield from _conv("plain conv", 1, space, i, o, (3, 3), 2)
                yield from _conv("plain conv", 1, space, i, o, (1, 1), 2)
                yield from _conv("plain conv", 1, space, i, o, (2, 2), 2)
        if side == 1:
            continue
        for c in (16 - odd, 64 - odd, 256 - odd):
            for kernel, stride in ((3, 1),) if quick else ((3, 1), (3, 2), (5, 1), (5, 2), (7, 1)):
                window = (kernel, kernel)
                yield from _conv("plain depthwise", 1, space, c, c, window, stride, groups=c)
        for i, o in product((4, 8, 24, 40), (4, 8, 24, 40)):
            for stride in (1,) if quick else (1, 2):
                yield from _conv("plain grouped", 1, space, 8 * i, 8 * o, (3, 3), stride, groups=8)


# ---------------------------------------------------------------------- the rest


def _elementwise(layout: Layout, quick: bool) -> Iterator[Job]:
    channels = 64
    for side in (7, 112) if quick else (7, 28, 112):
        elements = channels * side * side
        sizes = (("elements", float(elements)),)
        for op in probes.POINTWISE:

            def plain(b: Bench, op: str = op, sizes: Any = sizes, side: int = side) -> None:
                x = b.input(1, channels, side, side)
                other = b.input(1, channels, 1, 1) if op == "mul" else x
                tag = b.tag(Point(f"pointwise {op}", sizes))
                b.use(b.pointwise(op, x, other, tag), conv=False)

            yield Job((1, side), 0, plain)
            if layout.block == 1:
                continue

            def blocked(b: Bench, op: str = op, sizes: Any = sizes, side: int = side) -> None:
                x = b.pool("MaxPool", b.blocks(1, channels, (side, side)), 3, 1)
                tag = b.tag(Point(f"blocked pointwise {op}", sizes))
                b.use(b.pointwise(op, x, b.blocks(1, channels, (side, side)), tag))

            if op in layout.blocked and op != "add":
                yield Job((1, side), 0, blocked)

            if op in layout.fused or op == "add":
                for width, name in ((probes.NARROW, "fused"), (probes.NARROW + 1, "plain fused")):
                    yield Job((1, side), 0, partial(_inside, op, width, channels, side, name))

        def norm(b: Bench, sizes: Any = sizes, side: int = side) -> None:
            for x, name in (
                (b.input(1, channels, side, side), "scale"),
                (b.pool("MaxPool", b.blocks(1, channels, (side, side)), 3, 1), "blocked scale"),
            ):
                parameters = [b.weight(channels) for _ in range(3)]
                ones = b.constant(probes.np.ones(channels, "f4"))
                tag = b.tag(Point(name, sizes))
                shape = (1, channels, side, side)
                y = b.node("BatchNormalization", [x, *parameters, ones], shape, tag)
                b.use(y, conv=name != "scale")

        yield Job((1, side), 0, norm)


def _inside(op: str, inputs: int, channels: int, side: int, name: str, bench: Bench) -> None:
    """Add a convolution without and with an operator inside it."""
    x = bench.input(1, inputs, side, side)
    bare = len(bench.probes)
    bench.use(bench.conv(x, channels, tag=bench.tag("without"), after=""), conv=False)
    point = Point(f"{name} {op}", (("elements", float(channels * side * side)),), minus=bare)
    tag = bench.tag(point)
    y = bench.conv(x, channels, tag=tag, after="")
    other = bench.blocks(1, channels, (side, side)) if op == "add" else ""
    bench.use(bench.pointwise(op, y, other, tag), conv=False)


def _pools(layout: Layout, quick: bool) -> Iterator[Job]:
    channels = 64
    windows = ((3, 2),) if quick else ((3, 2), (2, 2), (3, 1))
    spelled = (("MaxPool", "max_pool2d"), ("AveragePool", "avg_pool2d"))
    for side in (14, 56) if quick else (14, 56, 112):
        for (onnx, aten), (kernel, stride) in product(spelled, windows):

            def pool(
                b: Bench, onnx: str = onnx, aten: str = aten, kernel: int = kernel,
                stride: int = stride, side: int = side,
            ) -> None:  # fmt: skip
                for odd in (0, 1):
                    width = channels - odd
                    elements = float(width * side * side)  # of what is read
                    kind = "blocked pool" if not odd and layout.block > 1 else "pool"
                    name = f"{kind} {aten} {kernel}x{kernel}/{stride}"
                    x = b.blocks(1, width, (side, side))
                    tag = b.tag(Point(name, (("elements", elements),)))
                    b.use(b.pool(onnx, x, kernel, stride, tag))

            yield Job((2, side), 0, pool)

        def everywhere(b: Bench, side: int = side) -> None:
            for odd in (0, 1):
                width = channels - odd
                sizes = (("elements", float(width * side * side)),)
                blocked = "blocked " if not odd and layout.block > 1 else ""
                for name in ("pool adaptive_avg_pool2d", "reduce"):
                    x = b.blocks(1, width, (side, side))
                    tag = b.tag(Point(blocked + name, sizes))
                    b.use(b.node("GlobalAveragePool", [x], (1, width, 1, 1), tag))

        yield Job((2, side), 0, everywhere)


def _moves(quick: bool) -> Iterator[Job]:
    for side in (7, 28) if quick else (7, 14, 28, 56):
        for kind in ("gather", "pick", "slice", "concat", "copy", "blocked concat"):
            for width in (64, 256):
                made = width - 4 if kind == "slice" else width
                point = Point(kind, (("elements", float(made * side * side)),))

                def add(
                    b: Bench, kind: str = kind, width: int = width, point: Point = point,
                    side: int = side,
                ) -> None:  # fmt: skip
                    probes.moved(b, point, kind, 1, width, side)

                yield Job((3, side), 0, add)


def _products(quick: bool) -> Iterator[Job]:
    rows = (1, 49, 784) if quick else (1, 8, 49, 196, 784, 3136)
    widths = (64, 256, 1024) if quick else (64, 256, 1024, 4096)
    for r, i, o in product(rows, widths, widths):
        yield from _matrices("linear", r, i, o, True)
    for r, i, o in product((49, 196), (32, 64, 196), (32, 64, 196)):
        yield from _matrices("matmul", r, i, o, False)
    for r, kind in product((49, 784) if quick else (49, 784, 3136), ("norm", "softmax")):
        point = Point(kind, (("elements", float(r * 256)),))

        def add(b: Bench, r: int = r, kind: str = kind, point: Point = point) -> None:
            probes.rowwise(b, point, kind, r, 256)

        yield Job((4,), 0, add)


def _matrices(kind: str, rows: int, inputs: int, outputs: int, weight: bool) -> Iterator[Job]:
    if rows * inputs * outputs > LARGEST_MACS:
        return
    sizes = {"rows": rows, "inputs": inputs, "outputs": outputs}
    point = Point(kind, tuple((k, float(v)) for k, v in sizes.items()))

    def add(bench: Bench) -> None:
        probes.matrices(bench, point, rows, inputs, outputs, weight)

    yield Job((4,), 4 * inputs * outputs if weight else 0, add)
