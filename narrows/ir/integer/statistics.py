"""Softmax and layer normalisation with one meaning everywhere.

Both need a quotient, and layer normalisation a root. Their sums are whole numbers, formed exactly
in any order; exp is a table; what is left (``/``, ``sqrt``, ``*``, ``+``) IEEE 754 defines to the
last bit. So the operators below give the same codes on every machine that does not contract a
product and a sum into one rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from narrows.ir.integer.grid import Grid
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
    centred: bool = True,
    rounding: str = "half_even",
    wide: bool = False,
) -> Tensor:
    """Return codes normalised over the last ``axes`` axes.

    With ``n`` elements and the whole numbers ``S = sum(x)``, ``Q = sum(x**2)``, ``d = n x - S``::

        s = 1 / (sqrt((n Q - S**2) / n**2 + eps) n)     in binary64, rounded to binary32
        y = (d s) gain + offset                         in binary32, operation by operation

    where ``n Q - S**2``, exact below 2**63, becomes a binary64 first, and ``d`` a binary32.

    Args:
        x: Codes.
        gain: float32, the layer's weight in steps of the result; it broadcasts over ``x``.
        offset: float32, the layer's bias in steps of the result, in the shape of ``gain``.
        axes: How many trailing axes.
        eps: The layer's, in squared steps of ``x``; positive.
        x_zero: The zero point of ``x``.
        zero: The zero point of the result.
        low: The smallest code.
        high: The largest code.
        centred: Whether the mean is taken away. Else ``S`` is 0: the root mean square alone counts.
        rounding: How the result is rounded.
        wide: Whether it has codes of more than 8 bits.
    """
    over = list(range(x.dim() - axes, x.dim()))
    count = math.prod(x.shape[a] for a in over)
    whole = x.to(torch.int64) - x_zero
    total, squares = whole.sum(over, keepdim=True), (whole * whole).sum(over, keepdim=True)
    total = total if centred else torch.zeros_like(total)
    variance = (count * squares - total * total).double() / float(count**2)
    spread = (1.0 / (torch.sqrt(variance + eps) * float(count))).to(torch.float32)
    d = (count * whole - total).to(torch.float32)
    y = (d * spread) * gain + offset
    y = round_float(y, rounding).clamp(-65536, 65536).to(torch.int64)
    return settle(y, zero, low, high, wide)


# Elements: n Q <= (255 n)**2 is a float64 without rounding, and 1 / n**2 far from its ends.
LARGEST_NORM = 2**18
# Of 16 bits: n Q and S**2 <= (2**15 n)**2 <= 2**62 are an int64; Q <= 2**46, d <= 2**32 float64s.
LARGEST_WIDE_NORM = 2**16
# Up to so many |d| <= 255 n is a float32 without rounding.
PLAIN_NORM = 2**16


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
    centred: bool,
    grid: Sequence[int],
    out: Sequence[int],
    rounding: str = "half_even",
) -> Tensor:
    """Return what `layer_norm` gives, as floating-point numbers; ``x`` has to lie on ``grid``."""
    gain, offset = norm_parameters(weight, bias, list(x.shape[x.dim() - axes :]), out[0])
    made = torch.ops.narrows.layer_norm.default(
        _codes(x, grid), gain.to(x.device), offset.to(x.device), axes,
        norm_eps(eps, grid[0]), grid[1], *out[1:], centred, rounding, _wide(out),
    )  # fmt: skip
    return _numbers(made, out, x)


@define
def fake_group_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    grid: Sequence[int],
    out: Sequence[int],
    rounding: str = "half_even",
) -> Tensor:
    """Return `layer_norm` over groups of channels; ``x`` is ``[N, C, ...]`` and on ``grid``."""
    gain, offset = norm_parameters(weight, bias, [x.shape[1]], out[0])
    apart = [groups, x.shape[1] // groups, 1]
    made = torch.ops.narrows.layer_norm.default(
        _codes(x, grid).reshape([-1, *apart[:2], math.prod(x.shape[2:])]),
        gain.reshape(apart).to(x.device), offset.reshape(apart).to(x.device), 2,
        norm_eps(eps, grid[0]), grid[1], *out[1:], True, rounding, _wide(out),
    )  # fmt: skip
    return _numbers(made, out, x).reshape(x.shape)


def norm_parameters(
    weight: Tensor | None, bias: Tensor | None, shape: list[int], exponent: int
) -> tuple[Tensor, Tensor]:
    """Return ``gain`` and ``offset`` of `layer_norm` for a result of step ``2**-exponent``."""
    gain = torch.ones(shape) if weight is None else weight.detach()
    offset = torch.zeros(shape) if bias is None else bias.detach()
    return gain.float() * 2.0**exponent, offset.float() * 2.0**exponent


def norm_eps(eps: float, exponent: int) -> float:
    """Return a layer's eps in squared steps of an input of step ``2**-exponent``.

    It is positive: one that no variance but 0 feels stands for none, and 0 / 0 is 0.
    """
    return max(eps * 4.0**exponent, 2.0**-200)


def _plain_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, axes: int, eps: float, centred: bool
) -> Tensor:
    shape = list(x.shape[x.dim() - axes :])
    if centred:
        return F.layer_norm(x, shape, weight, bias, eps)
    y = F.rms_norm(x, shape, weight, eps)
    return y if bias is None else y + bias


def _plain_group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> Tensor:
    return torch.group_norm(x, groups, weight, bias, eps)


# What these operators stand for, in floating-point and differentiable: it takes the arguments
# before the grids.
PLAIN: dict[Any, Callable[..., Tensor]] = {
    fake_softmax: torch.softmax,
    fake_layer_norm: _plain_layer_norm,
    fake_group_norm: _plain_group_norm,
}


def _codes(x: Tensor, grid: Sequence[int]) -> Tensor:
    return torch.ops.narrows.quantize.default(x, *grid, wide=_wide(grid))


def _wide(grid: Sequence[int]) -> bool:
    return Grid.read(*grid).wide


def _numbers(codes: Tensor, grid: Sequence[int], like: Tensor) -> Tensor:
    return torch.ops.narrows.dequantize.default(codes, grid[0], grid[1]).to(like.dtype)
