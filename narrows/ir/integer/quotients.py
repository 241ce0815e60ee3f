"""Quotients of two activations, and roots of sums of squares: exact, and rounded once.

A quotient ``a / b`` of codes is the exact rational number, rounded to the nearest code; ties go by
the mode. ``a / 0`` lies beyond the codes: it becomes the end that has the sign of ``a``, and
``0 / 0`` becomes zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from narrows.ir.integer.library import define
from narrows.ir.integer.rounding import divide, round_float, settle

# A row of codes of 16 bits may be so long that its sum of squares stays below 2**48, whose binary64
# root tells a tie from its neighbours (see `vector_norm`).
LARGEST_SQUARES = 2**48

ORDERS = (1.0, 2.0, math.inf)

BEYOND = 2**20  # a number of steps that no grid has


@define
def div(
    a: Tensor,
    b: Tensor,
    shift_by: int,
    a_zero: int,
    b_zero: int,
    zero: int,
    low: int,
    high: int,
    rounding: str = "half_even",
    wide: bool = False,
) -> Tensor:
    """Return ``a / b``, shifted, broadcasting; see the module's text."""
    over, under = a.to(torch.int64) - a_zero, b.to(torch.int64) - b_zero
    over = over * under.sign() << max(-shift_by, 0)
    under = under.abs() << max(shift_by, 0)
    made = divide(over, under.clamp(min=1), rounding)
    beyond = (a.to(torch.int64) - a_zero).sign() * BEYOND
    return settle(torch.where(under == 0, beyond, made), zero, low, high, wide)


@define
def vector_norm(
    x: Tensor,
    order: float,
    axes: Sequence[int],
    keepdim: bool,
    shift_by: int,
    x_zero: int,
    zero: int,
    low: int,
    high: int,
    rounding: str = "half_even",
    wide: bool = False,
) -> Tensor:
    """Return the norm of order 1, 2 or infinity over axes, shifted.

    The root of a whole number ``Q`` below 2**48 is further from a tie that it does not meet than
    binary64 is off: a tie is half a whole number times a power of two, so its square differs from
    ``Q`` by a quarter at least, and the roots by 2**-27, while the root is rounded to 2**-29.
    """
    whole = x.to(torch.int64) - x_zero
    if order == math.inf:
        made = whole.abs().amax(list(axes), keepdim=keepdim).double()
    elif order == 1:
        made = whole.abs().sum(list(axes), keepdim=keepdim).double()
    else:
        made = (whole * whole).sum(list(axes), keepdim=keepdim).double().sqrt()
    made = round_float(made * 2.0**-shift_by, rounding)
    return settle(made.clamp(0, BEYOND).to(torch.int64), zero, low, high, wide)


@define
def fake_div(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a / b``; ``a / 0`` is infinite with the sign of ``a``, and ``0 / 0`` is 0."""
    none = b == 0
    beyond = torch.where(a == 0, 0.0, a.sign() * math.inf).to(a.dtype)
    return torch.where(none, beyond, a / torch.where(none, 1.0, b).to(b.dtype))


__all__ = ["BEYOND", "LARGEST_SQUARES", "ORDERS", "div", "fake_div", "vector_norm"]
