"""Weighted averages over windows that differ from place to place: resizing, uneven pooling.

Along every axis a result index is a weighted average of a few operand indices; over several axes
the weights multiply. Weights are whole numbers, so the average is one exact quotient. Those of a
resizing are rounded to steps of a power of two that add up to 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from narrows.ir.adaptive import windows
from narrows.ir.integer.library import define
from narrows.ir.integer.rounding import divide, settle

aten = torch.ops.aten

# The steps of weights, by how many axes are resized. Sums of two axes are then float32 numbers,
# and of three int32. A weight is off by half a step at most, 2**-9 of what neighbours differ by.
BITS = {1: 12, 2: 8, 3: 7}

FINE = 2.0**40


@define
def resample(
    x: Tensor,
    places: Sequence[Tensor],
    weights: Sequence[Tensor],
    shift_by: int,
    x_zero: int,
    zero: int,
    low: int,
    high: int,
    rounding: str = "half_even",
) -> Tensor:
    """Return weighted averages along the last ``len(places)`` axes: the exact quotient.

    Args:
        x: Codes.
        places: Per axis which operand indices a result index reads, int64 ``[out, taps]``.
        weights: Their weights, whole numbers; those of a result index have a positive sum.
        shift_by: What the quotient is shifted by.
        x_zero: The zero point of ``x``.
        zero: The zero point of the result.
        low: The smallest code.
        high: The largest code.
        rounding: How the result is rounded.
    """
    total = weighted(x.to(torch.int64) - x_zero, places, weights)
    count = totals(weights) << max(shift_by, 0)
    return settle(divide(total << max(-shift_by, 0), count, rounding), zero, low, high)


def weighted(x: Tensor, places: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Return sums along the last axes, an axis after the other, in the dtype of ``x``."""
    for axis, (place, weight) in enumerate(zip(places, weights, strict=True), -len(places)):
        taps = x.index_select(axis, place.flatten()).unflatten(axis, place.shape)
        spread = weight.to(x.dtype).reshape([*weight.shape, *[1] * (-1 - axis)])
        x = (taps * spread).sum(axis)
    return x


def totals(weights: Sequence[Tensor]) -> Tensor:
    """Return what the sums are divided by: int64, broadcasting over the last axes."""
    count = torch.ones((), dtype=torch.int64, device=weights[0].device)
    for weight in weights:
        count = count.unsqueeze(-1) * weight.to(torch.int64).sum(1)
    return count


@define
def fake_resize(
    x: Tensor, kind: str, size: Sequence[int], scales: Sequence[float], align_corners: bool
) -> Tensor:
    """Return a tensor whose last axes are resized, with the weights of the integer operator."""
    made = [
        resizing(kind, *ends, align_corners, len(size))
        for ends in zip(x.shape[-len(size) :], size, scales, strict=True)
    ]
    places, weights = ([t[i].to(x.device) for t in made] for i in range(2))
    return weighted(x, places, weights) / totals(weights).to(x.dtype)


# ------------------------------------------------------------------ tables


def resizing(
    kind: str, size: int, out: int, scale: float, align_corners: bool, axes: int
) -> tuple[Tensor, Tensor]:
    """Return places and weights that resize one axis as torch does.

    Args:
        kind: ``linear``, ``cubic``, ``smooth`` (anti-aliased) or ``nearest``.
        size: The operand's size.
        out: The result's.
        scale: The factor between them where one was given, else 0.
        align_corners: Whether the first and the last elements lie upon each other.
        axes: How many axes are resized.
    """
    return _resizing(kind, size, out, scale, align_corners, BITS[axes])


@cache
@torch.inference_mode(False)  # what is kept has to serve training, too
def _resizing(
    kind: str, size: int, out: int, scale: float, corners: bool, bits: int
) -> tuple[Tensor, Tensor]:
    given = scale or None
    eye = torch.eye(size, dtype=torch.float64)[None]
    if kind == "linear":
        matrix = aten.upsample_linear1d.default(eye, [out], corners, given)[0].t()
    elif kind == "nearest":
        matrix = aten._upsample_nearest_exact1d.default(eye, [out], given)[0].t()
    else:  # torch has these for images alone, and is wrong about smooth ones of one column
        plane = aten._upsample_bilinear2d_aa if kind == "smooth" else aten.upsample_bicubic2d
        matrix = plane.default(eye[:, :, None], [1, out], corners, None, given)[0, :, 0].t()
    return _taps(_whole(matrix, bits))


def _whole(matrix: Tensor, bits: int) -> Tensor:
    """Return weights in whole steps that add up to 1: as few steps as are exact, or 2**bits."""
    matrix = (matrix * FINE).round() / FINE  # processors round their last bits differently
    for fewer in range(bits + 1):
        steps = matrix * 2.0**fewer
        if torch.equal(steps, steps.round()):
            return steps.to(torch.int64)
    steps = matrix * 2.0**bits
    whole = steps.floor()
    # What the steps lack of their sum goes to those that were rounded down the most.
    missing = 2**bits - whole.sum(1, keepdim=True)
    order = (steps - whole).argsort(dim=1, descending=True, stable=True).argsort(1)
    return (whole + (order < missing)).to(torch.int64)


def _taps(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return which indices the rows of a matrix weigh, and how; the same number in every row."""
    count = int((matrix != 0).sum(1).max())
    order = (matrix != 0).to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :count]
    weights = matrix.gather(1, order)
    # What a shorter row has beyond its own is its last index, with no weight.
    last = ((weights != 0).sum(1, keepdim=True) - 1).clamp(min=0)
    places = torch.where(weights != 0, order, order.gather(1, last))
    return places, weights.to(torch.int32)


def uneven(size: int, out: int) -> tuple[Tensor, Tensor]:
    """Return places and weights of an average over windows that differ in size."""
    starts, stops = torch.tensor(windows(size, out)).view(-1, 2, 1).unbind(1)
    inside = torch.arange(size)
    return _taps(((inside >= starts) & (inside < stops)).to(torch.int64))


def reach(weights: Sequence[Tensor]) -> int:
    """Return the largest sum of magnitudes of the weights of a result index."""
    return math.prod(int(w.to(torch.int64).abs().sum(1).max()) for w in weights)


__all__ = ["BITS", "fake_resize", "reach", "resample", "resizing", "totals", "uneven", "weighted"]
