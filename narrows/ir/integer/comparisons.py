"""Comparisons of codes, exact whatever their grids: what comes of them are truth values.

Two tensors are brought to the finer of their exponents first, as for a sum. A number is brought to
whole steps of the one grid, downwards or upwards as the comparison asks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from narrows.ir.integer.grid import Grid
from narrows.ir.integer.library import define

# How a comparison answers what is less, equal, and greater.
ANSWERS = {
    "lt": (True, False, False), "le": (True, True, False), "eq": (False, True, False),
    "ne": (True, False, True), "ge": (False, True, True), "gt": (False, False, True),
}  # fmt: skip

MIRRORED = {"lt": "gt", "le": "ge", "eq": "eq", "ne": "ne", "ge": "le", "gt": "lt"}

BEYOND = 2**20  # a number of steps that no code has


@define
def compare(
    a: Tensor, b: Tensor, how: str, a_shift: int, b_shift: int, a_zero: int, b_zero: int
) -> Tensor:
    """Return whether ``a`` is less than ``b`` (or as ``how`` says), broadcasting.

    Args:
        a: Codes.
        b: Codes.
        how: One of `ANSWERS`.
        a_shift: By how many bits the exponent of ``b`` is finer, at least 0.
        b_shift: By how many that of ``a`` is.
        a_zero: The zero point of ``a``.
        b_zero: That of ``b``.
    """
    left = (a.to(torch.int64) - a_zero) << a_shift
    right = (b.to(torch.int64) - b_zero) << b_shift
    return getattr(torch, how)(left, right)


@define
def compare_number(x: Tensor, how: str, code: int) -> Tensor:
    """Return whether codes are less than a whole number (or as ``how`` says)."""
    return getattr(torch, how)(x.to(torch.int64), code)


def threshold(number: float, grid: Grid, how: str) -> int:
    """Return the whole number that codes compare with as the numbers they stand for do."""
    steps = number * 2.0**grid.exponent if math.isfinite(number) else number
    if not abs(steps) < BEYOND:
        return BEYOND if steps > 0 else -BEYOND
    if how in ("eq", "ne"):
        return int(steps) + grid.zero if steps.is_integer() else -BEYOND
    return (math.floor(steps) if how in ("gt", "le") else math.ceil(steps)) + grid.zero


__all__ = ["ANSWERS", "BEYOND", "MIRRORED", "compare", "compare_number", "threshold"]
