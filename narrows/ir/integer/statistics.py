"""Softmax and layer normalisation with one meaning everywhere.

Both need a quotient, and layer normalisation a root. Their sums are whole numbers, formed exactly
in any order; exp is a table; what is left (``/``, ``sqrt``, ``*``, ``+``) IEEE 754 defines to the
last bit. So the operators below give the same codes on every machine that does not contract a
product and a sum into one rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from narrows.ir.integer.library import define
from narrows.ir.integer.rounding import divide, round_float, settle


def table_bits(exponent: int, length: int) -> int:
    """Return how many bits exponentials get in a softmax over ``length`` numbers.

    With a result of step ``2**-e`` they are as many as leave the sum a binary32, and the quotient
    ``q = T 2**e / S`` what it is when it is divided in binary32 and then rounded: ``q`` is at least
    ``1 / 2S = q 2**-(e + 1) / T`` away from a tie that it does not meet, and the division moves it
    by less than ``q 2**-24``.
    """
    return max(8, min(15, 23 - exponent, 24 - math.ceil(math.log2(length))))


@cache
def exponentials(exponent: int, bits: int) -> Tensor:
    """Return ``round(M exp(-d * 2**-exponent))`` for ``d`` from 0 to 255, in int32.

    ``M`` is the number up to ``2**bits`` that keeps all of them furthest from a tie, so that a
    float32 kernel's exp, rounded, gives the same.
    """
    powers = torch.exp(-torch.arange(256, dtype=torch.float64) * 2.0**-exponent)
    factors = torch.arange(2**bits, 2**bits - 2 ** (bits - 3), -1, dtype=torch.float64)
    products = factors[:, None] * powers
    margins = (products - products.floor() - 0.5).abs().amin(1)
    return products[margins.argmax()].round().to(torch.int32)


def distinct(table: Tensor, exponent: int) -> bool:
    """Whether a float32 exp, off by a few units in its last place, gives the same table."""
    products = table[0].double() * torch.exp(
        -torch.arange(256, dtype=torch.float64) * 2.0**-exponent
    )
    margins = (products - products.floor() - 0.5).abs()
    return bool((margins > products * 2.0**-21 + 2.0**-20).all())


@define
def softmax(
    x: Tensor,
    table: Tensor,
    axis: int,
    exponent: int,
    zero: int,
    low: int,
    high: int,
    rounding: str = "half_even",
) -> Tensor:
    """Return ``table[max - x] / sum(table[max - x])`` as codes of step ``2**-exponent``.

    The quotient is exact and rounded once. ``table`` holds 256 exponentials (`exponentials`).
    """
    codes = x.to(torch.int64)
    powers = table[codes.amax(axis, keepdim=True) - codes].to(torch.int64)
    total = powers.sum(axis, keepdim=True)
    up, down = max(exponent, 0), max(-exponent, 0)
    return settle(divide(powers << up, total << down, rounding), zero, low, high)


@define
def layer_norm(
    x: Tensor,
    gain: Tensor,
    offset: Tensor,
    axes: int,
    eps: float,
    x_zero: int,
    zero: int,
    low: int,
    high: int,
    rounding: str = "half_even",
) -> Tensor:
    """Return codes normalised over the last ``axes`` axes.

    With ``n`` elements and the whole numbers ``S = sum(x)``, ``Q = sum(x**2)``, ``d = n x - S``::

        s = 1 / (sqrt((n Q - S**2) / n**2 + eps) n)     in binary64, rounded to binary32
        y = (d s) gain + offset                         in binary32, operation by operation

    Args:
        x: Codes.
        gain: float32, the layer's weight in steps of the result.
        offset: float32, the layer's bias in steps of the result.
        axes: How many trailing axes.
        eps: The layer's, in squared steps of ``x``.
        x_zero: The zero point of ``x``.
        zero: The zero point of the result.
        low: The smallest code.
        high: The largest code.
        rounding: How the result is rounded.
    """
    over = list(range(x.dim() - axes, x.dim()))
    count = math.prod(x.shape[a] for a in over)
    whole = x.to(torch.int64) - x_zero
    total, squares = whole.sum(over, keepdim=True), (whole * whole).sum(over, keepdim=True)
    variance = (count * squares - total * total).double() / float(count**2)
    spread = (1.0 / (torch.sqrt(variance + eps) * float(count))).to(torch.float32)
    d = (count * whole - total).to(torch.float32)
    y = (d * spread) * gain + offset
    return settle(round_float(y, rounding).clamp(-65536, 65536).to(torch.int64), zero, low, high)


# Elements: |d| <= 255 n is a float32, and n Q <= (255 n)**2 a float64, without rounding.
LARGEST_NORM = 2**16


@define
def fake_softmax(
    x: Tensor,
    axis: int,
    grid: Sequence[int],
    out: Sequence[int],
    rounding: str = "half_even",
) -> Tensor:
    """Return what `softmax` gives, as floating-point numbers; ``x`` has to lie on ``grid``.

    ``grid`` and ``out`` are ``exponent, zero, low, high``.
    """
    codes = _codes(x, grid)
    table = exponentials(grid[0], table_bits(out[0], x.shape[axis])).to(x.device)
    made = torch.ops.narrows.softmax.default(codes, table, axis, *out, rounding)
    return _numbers(made, out, x)


@define
def fake_layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    axes: int,
    eps: float,
    grid: Sequence[int],
    out: Sequence[int],
    rounding: str = "half_even",
) -> Tensor:
    """Return what `layer_norm` gives, as floating-point numbers; ``x`` has to lie on ``grid``."""
    gain, offset = norm_parameters(weight, bias, list(x.shape[x.dim() - axes :]), out[0])
    made = torch.ops.narrows.layer_norm.default(
        _codes(x, grid), gain.to(x.device), offset.to(x.device), axes,
        norm_eps(eps, grid[0]), grid[1], *out[1:], rounding,
    )  # fmt: skip
    return _numbers(made, out, x)


def norm_parameters(
    weight: Tensor | None, bias: Tensor | None, shape: list[int], exponent: int
) -> tuple[Tensor, Tensor]:
    """Return ``gain`` and ``offset`` of `layer_norm` for a result of step ``2**-exponent``."""
    gain = torch.ones(shape) if weight is None else weight.detach()
    offset = torch.zeros(shape) if bias is None else bias.detach()
    return gain.float() * 2.0**exponent, offset.float() * 2.0**exponent


def norm_eps(eps: float, exponent: int) -> float:
    """Return a layer's eps in squared steps of an input of step ``2**-exponent``."""
    return eps * 4.0**exponent


def _codes(x: Tensor, grid: Sequence[int]) -> Tensor:
    return torch.ops.narrows.quantize.default(x, *grid)


def _numbers(codes: Tensor, grid: Sequence[int], like: Tensor) -> Tensor:
    return torch.ops.narrows.dequantize.default(codes, grid[0], grid[1]).to(like.dtype)
