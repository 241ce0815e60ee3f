"""Rules for pooling and resizing."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from narrows.backends.tvm.kernels import pooling
from narrows.backends.tvm.kernels.pooling import Pool
from narrows.backends.tvm.lowering import Lowering
from narrows.backends.tvm.rules.reductions import mean
from narrows.backends.tvm.rules.resample import nearest, resampled
from narrows.backends.tvm.rules.table import Call, rule
from narrows.backends.tvm.values import Value
from narrows.ir.adaptive import windows


def _spread(value: Any, rank: int) -> tuple[int, ...]:
    values = [value] if isinstance(value, int) else list(value)
    return tuple(values * rank if len(values) == 1 else values)


def _rank(call: Call) -> int:
    return int(call.op[call.op.index("d.") - 1])


@rule("max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d")
def _pool(low: Lowering, call: Call) -> Value:
    rank = _rank(call)
    kernel = _spread(call.args["kernel_size"], rank)
    pool = Pool(
        kernel,
        _spread(call.args["stride"] or kernel, rank),
        _spread(call.args["padding"], rank),
        _spread(call.args.get("dilation", 1), rank),
        call.shape[-rank:],
        call.op.startswith("max"),
        bool(call.args.get("count_include_pad", True)),
        call.args.get("divisor_override") or 0,
    )
    return _apply(low, call, pool, rank)


def _apply(low: Lowering, call: Call, pool: Pool, rank: int) -> Value:
    x = call.args["self"]
    batched = x.rank == rank + 2
    x = x if batched else low.reshaped(x, (1, *x.shape))
    x = low.channels_last(x)
    expr = low.kernel(pooling.pooling(pool), low.expr(x), name="pool")
    shape = (*x.shape[:2], *call.shape[-rank:])
    y = Value(shape, x.dtype, x.order, x.width, expr)
    return y if batched else low.reshaped(y, call.shape)


@rule("adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d")
def _adaptive(low: Lowering, call: Call) -> Value:
    rank, x = _rank(call), call.args["self"]
    sizes, wanted = x.shape[-rank:], call.shape[-rank:]
    if all(w == 1 for w in wanted):
        return mean(low, x, list(range(x.rank - rank, x.rank)), True)
    if all(s % w == 0 for s, w in zip(sizes, wanted, strict=True)):
        kernel = tuple(s // w for s, w in zip(sizes, wanted, strict=True))
        pool = Pool(kernel, kernel, (0,) * rank, (1,) * rank, wanted, False, True, 0)
        return _apply(low, call, pool, rank)
    for i, (size, count) in enumerate(zip(sizes, wanted, strict=True)):
        x = resampled(low, x, x.rank - rank + i, *_uneven(size, count))
    return x


def _uneven(size: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the tables of means over windows that differ in size."""
    starts, stops = np.array(windows(size, count)).reshape(-1, 2).T
    widths = stops - starts
    taps = np.arange(widths.max())
    indices = np.minimum(starts[:, None] + taps, size - 1)
    weights = (taps < widths[:, None]) / widths[:, None]
    return indices, weights


# ---------------------------------------------------------------------- resizing


@rule(
    "upsample_nearest1d.vec upsample_nearest2d.vec upsample_nearest3d.vec upsample_linear1d.vec "
    "_upsample_nearest_exact2d.vec upsample_bilinear2d.vec upsample_trilinear3d.vec "
    "upsample_bicubic2d.vec _upsample_bilinear2d_aa.vec"
)
def _resize(low: Lowering, call: Call) -> Value:
    x, rank = call.args.get("input", call.args.get("self")), call.rank - 2
    x = low.channels_last(x)
    corners = bool(call.args.get("align_corners", False))
    for i in range(rank):
        size, count = x.shape[2 + i], call.shape[2 + i]
        scale = _scale(call, i, size, count, corners)
        x = resampled(low, x, 2 + i, *_tables(call.op, size, count, scale, corners))
    return x


def _scale(call: Call, i: int, size: int, count: int, corners: bool) -> float:
    """Return how many operand indices one result index is."""
    if corners and "nearest" not in call.op:
        return (size - 1) / (count - 1) if count > 1 else 0.0
    factors = call.args["scale_factors"]
    return 1 / factors[i] if factors else size / count


def _tables(
    op: str, size: int, count: int, scale: float, corners: bool
) -> tuple[np.ndarray, np.ndarray]:
    places = np.arange(count)
    if "nearest" in op and "exact" not in op and count in (size, 2 * size):
        return nearest(places * size // count)  # whatever the scale is said to be
    if "nearest" in op:
        shift = 0.5 if "exact" in op else 0.0
        # The reference computes the place in float32.
        found = np.floor((places + shift).astype("float32") * np.float32(scale)).astype(int)
        return nearest(np.minimum(found, size - 1))
    if "_aa" in op:
        return _smoothed(size, count, scale)
    spots = places * scale if corners else (places + 0.5) * scale - 0.5
    if "bicubic" in op:
        base = np.floor(spots).astype(int)
        rest = spots - base
        taps = np.arange(-1, 3)
        weights = _cubic(np.abs(taps - rest[:, None]))
        return np.clip(base[:, None] + taps, 0, size - 1), weights
    spots = np.clip(spots, 0, None)
    base = np.minimum(np.floor(spots).astype(int), size - 1)
    rest = np.clip(spots - base, 0, 1)
    indices = np.stack([base, np.minimum(base + 1, size - 1)], 1)
    return indices, np.stack([1 - rest, rest], 1)


def _cubic(distance: np.ndarray, a: float = -0.75) -> np.ndarray:
    """Return the weights of cubic convolution by distance."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0))


def _smoothed(size: int, count: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the tables of linear resizing with a filter as wide as the step."""
    width = max(scale, 1.0)
    centres = (np.arange(count) + 0.5) * scale
    starts = np.maximum((centres - width + 0.5).astype(int), 0)
    stops = np.minimum((centres + width + 0.5).astype(int), size)
    taps = np.arange(max(1, int((stops - starts).max())))
    indices = starts[:, None] + taps
    distance = np.abs((indices + 0.5 - centres[:, None]) / width)
    weights = np.where(indices < stops[:, None], np.clip(1 - distance, 0, None), 0)
    total = weights.sum(1, keepdims=True)
    assert math.isfinite(float(total.sum()))
    return np.minimum(indices, size - 1), weights / total
