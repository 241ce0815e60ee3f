"""`prelu`: what is negative is multiplied by a slope per channel, and rounded once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from narrows.ir.integer.library import define
from narrows.ir.integer.rounding import settle, shift

# Slopes are whole steps of 2**-BITS, where none passes 1; a code times one is then a float32.
BITS = 14


@define
def prelu(
    x: Tensor,
    slopes: Tensor,
    unit: int,
    shift_by: int,
    x_zero: int,
    zero: int,
    low: int,
    high: int,
    rounding: str = "half_even",
) -> Tensor:
    """Return ``x 2**unit`` where ``x`` is positive, and ``x slope`` elsewhere, shifted.

    ``slopes`` are whole numbers of 16 bits that broadcast.
    """
    whole = x.to(torch.int64) - x_zero
    factor = torch.where(whole > 0, 1 << unit, slopes.to(torch.int64))
    return settle(shift(whole * factor, shift_by, rounding), zero, low, high)


def slope_codes(weight: Tensor, rank: int) -> tuple[Tensor, int]:
    """Return slopes as whole numbers that broadcast along axis 1, and the exponent of their steps.

    Steps are as fine as 16 bits hold the largest slope; one beyond 2**15 is clipped.

    Args:
        weight: The slopes, one per channel.
        rank: How many axes the operand has.
    """
    largest = float(weight.detach().abs().max())
    unit = max(0, BITS - (math.frexp(largest)[1] if largest > 1 else 0))
    codes = (weight.detach().double() * 2.0**unit).round().clamp(-32767, 32767).to(torch.int32)
    return codes.reshape(-1, *[1] * (rank - 2)), unit


@define
def fake_prelu(x: Tensor, weight: Tensor) -> Tensor:
    """Return what `prelu` gives, in floating-point."""
    if x.is_meta:
        return torch.empty_like(x)
    codes, unit = slope_codes(weight, x.dim())
    slopes = codes.to(x.device, x.dtype) * 2.0**-unit
    return torch.where(x > 0, x, x * slopes)


__all__ = ["prelu", "slope_codes"]
