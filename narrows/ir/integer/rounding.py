"""Division and shifts of int64 tensors that round to the nearest integer; the mode settles ties.

These few lines are the arithmetic that every backend has to reproduce::

    half_even:  (a + 2**(s-1) - 1 + ((a >> s) & 1)) >> s
    half_up:    (a + 2**(s-1)) >> s
"""

from __future__ import annotations

import torch
from torch import Tensor

from narrows.ir.integer.grid import HALF_EVEN


def shift(acc: Tensor, by: Tensor | int, rounding: str) -> Tensor:
    """Return ``acc * 2**-by`` rounded to an integer; a negative ``by`` shifts to the left.

    Args:
        acc: int64.
        by: One shift, or an int64 tensor of them that broadcasts.
        rounding: ``half_even`` or ``half_up``.
    """
    if isinstance(by, int) and by == 0:
        return acc
    if acc.is_meta:  # shapes are asked for, and no arithmetic
        return acc.expand(
            torch.broadcast_shapes(acc.shape, by.shape if isinstance(by, Tensor) else ())
        )
    by = torch.as_tensor(by, dtype=torch.int64, device=acc.device)
    acc = acc << (-by).clamp(min=0)
    right = by.clamp(min=0)
    half = (1 << right) >> 1  # zero where nothing is shifted out
    if rounding == HALF_EVEN:
        half = half - torch.where(right > 0, 1 - ((acc >> right) & 1), torch.zeros_like(acc))
    return (acc + half) >> right


def divide(numerator: Tensor, denominator: Tensor | int, rounding: str) -> Tensor:
    """Return ``numerator / denominator`` rounded to an integer, exactly, ties by the mode.

    Args:
        numerator: int64, below 2**62 in magnitude.
        denominator: Positive.
        rounding: ``half_even`` or ``half_up``.
    """
    doubled = 2 * numerator + denominator
    result = torch.div(doubled, 2 * denominator, rounding_mode="floor")
    if rounding != HALF_EVEN:
        return result
    tie = doubled == 2 * denominator * result
    return result - (tie & (result & 1 == 1)).to(torch.int64)


def round_float(value: Tensor, rounding: str) -> Tensor:
    """Return floating-point numbers rounded to whole ones, in their own dtype."""
    return value.round() if rounding == HALF_EVEN else (value + 0.5).floor()


def settle(value: Tensor, zero: int, low: int, high: int, wide: bool = False) -> Tensor:
    """Return codes: the zero point is added after rounding, then the clip; in int16 if wide."""
    dtype = torch.int16 if wide else torch.uint8
    if value.is_meta:
        return torch.empty_like(value, dtype=dtype)
    return (value + zero).clamp(low, high).to(dtype)
