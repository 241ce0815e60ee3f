"""The operators of quantized programs, ``torch.ops.narrows.*``; their code is their meaning.

Codes are uint8, or int16 where results are ``wide``, weights int8, biases int32 (at the exponent of
the accumulator). Sums are formed exactly: in int64, or in float64 where every partial sum is a
whole number below 2**53, which the proven bound of the accumulator implies. Every operator ends in
the same three arguments ``zero, low, high``: the zero point, added after rounding, and the clip,
which also stands for the ReLU or clamp that followed.

The fake-quantized program uses the ``fake_*`` operators, which round floating-point numbers to the
grid and leave them floating-point.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from narrows.ir.integer.rounding import divide, round_float, settle, shift

LIBRARY = torch.library.Library("narrows", "DEF")

TYPES = {
    "Tensor": "Tensor", "Tensor | None": "Tensor?", "Sequence[Tensor]": "Tensor[]",
    "int": "int", "float": "float", "bool": "bool", "str": "str", "Sequence[int]": "int[]",
    "Sequence[float]": "float[]",
}  # fmt: skip


def define(function: Callable[..., Any]) -> Any:
    """Register a function as ``torch.ops.narrows.<name>`` and return the overload.

    The function is its own shape rule: it runs on tensors without data.
    """
    parameters = []
    for name, parameter in inspect.signature(function).parameters.items():
        default = parameter.default
        text = f"{TYPES[str(parameter.annotation)]} {name}"
        if default is not inspect.Parameter.empty:
            spelled = f'"{default}"' if isinstance(default, str) else str(default)
            text += "=" + ("[]" if default == () else spelled)
        parameters.append(text)
    name = function.__name__
    LIBRARY.define(f"{name}({', '.join(parameters)}) -> Tensor")
    LIBRARY.impl(name, function, "CompositeImplicitAutograd")
    return getattr(torch.ops.narrows, name).default


# ------------------------------------------------------------------ in and out


@define
def quantize(
    x: Tensor,
    exponent: int,
    zero: int,
    low: int,
    high: int,
    rounding: str = "half_even",
    wide: bool = False,
) -> Tensor:
    """Return the codes of floating-point numbers."""
    # Scaling by a power of two is exact, unless it leaves the range of the dtype.
    scaled = round_float(x * 2.0**exponent, rounding).clamp(low - zero, high - zero)
    return (scaled + zero).to(torch.int16 if wide else torch.uint8)


@define
def dequantize(
    x: Tensor, exponent: int, zero: int, powers: Sequence[int] = (), axis: int = 0
) -> Tensor:
    """Return the numbers that codes stand for, in float32, which holds them exactly.

    Where there are ``powers``, one per index of ``axis``, they add to the exponent.
    """
    numbers = (x.to(torch.float32) - zero) * 2.0**-exponent
    return scale_parts(numbers, powers, axis) if powers else numbers


@define
def scale_parts(x: Tensor, powers: Sequence[int], axis: int) -> Tensor:
    """Return ``x * 2**-power``, with a power per index of ``axis``; see the pass of that name."""
    scale = torch.tensor([2.0**-p for p in powers], dtype=x.dtype, device=x.device)
    return x * scale.reshape([-1 if a == axis else 1 for a in range(x.dim())])


@define
def fake_quantize(
    x: Tensor,
    exponent: int,
    zero: int,
    low: int,
    high: int,
    rounding: str = "half_even",
    entry: bool = False,
) -> Tensor:
    """Return the nearest number that a code stands for, in the dtype of ``x``.

    ``entry`` marks where floating-point numbers become codes: an input, or behind an island.
    """
    codes = round_float(x * 2.0**exponent, rounding).clamp(low - zero, high - zero)
    return codes * 2.0**-exponent


@define
def staircase(x: Tensor, thresholds: Sequence[float], low: float, step: float) -> Tensor:
    """Return ``low + step * k``, where ``k`` of the thresholds are up to ``x``; they rise."""
    held = torch.tensor(list(thresholds), dtype=x.dtype, device=x.device)
    return low + step * torch.bucketize(x.contiguous(), held, right=True).to(x.dtype)


@define
def fake_quantize_weight(
    x: Tensor,
    exponents: Sequence[int],
    axis: int,
    low: int,
    high: int,
    levels: Sequence[int] = (),
) -> Tensor:
    """Return the nearest number that a code stands for; an exponent per index of ``axis``.

    Where there are ``levels``, in order, codes have these magnitudes only.
    """
    codes, scale = _weight_codes(x, exponents, axis, low, high, levels)
    return codes / scale


def weight_codes(
    x: Tensor,
    exponents: Sequence[int],
    axis: int,
    low: int,
    high: int,
    levels: Sequence[int] = (),
) -> Tensor:
    """Return the int64 codes of a weight or a bias; ties go to the even one, or towards zero where
    there are ``levels``."""
    return _weight_codes(x.double(), exponents, axis, low, high, levels)[0].to(torch.int64)


def _weight_codes(
    x: Tensor, exponents: Sequence[int], axis: int, low: int, high: int, levels: Sequence[int]
) -> tuple[Tensor, Tensor]:
    scale = torch.tensor([2.0**e for e in exponents], dtype=x.dtype, device=x.device)
    scale = scale.reshape([-1 if a == axis else 1 for a in range(x.dim())])
    if not levels:
        return (x * scale).round().clamp(low, high), scale
    held = torch.tensor(list(levels), dtype=x.dtype, device=x.device)
    scaled = x * scale
    nearest = torch.bucketize(scaled.abs().contiguous(), (held[1:] + held[:-1]) / 2)
    return torch.copysign(held[nearest], scaled), scale


# ------------------------------------------------------------------ sums against a weight


@define
def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift_by: Sequence[int],
    x_zero: int,
    zero: int,
    low: int,
    high: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    rounding: str = "half_even",
    wide: bool = False,
) -> Tensor:
    """Return a convolution over one to three spatial axes; padding stands for zero."""
    run = (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3]
    # Not int64: its kernels are ten times slower. Whole numbers below 2**53 add exactly.
    acc = run(
        x.double() - x_zero, weight.double(), None if bias is None else bias.double(),
        list(stride), list(padding), list(dilation), groups,
    )  # fmt: skip
    by = _along(shift_by, 1, acc)
    return settle(shift(acc.to(torch.int64), by, rounding), zero, low, high, wide)


@define
def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift_by: Sequence[int],
    x_zero: int,
    zero: int,
    low: int,
    high: int,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    rounding: str = "half_even",
    wide: bool = False,
) -> Tensor:
    """Return a transposed convolution over one to three spatial axes."""
    run = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[weight.dim() - 3]
    acc = run(
        x.double() - x_zero, weight.double(), None if bias is None else bias.double(),
        list(stride), list(padding), list(output_padding), groups, list(dilation),
    )  # fmt: skip
    by = _along(shift_by, 1, acc)
    return settle(shift(acc.to(torch.int64), by, rounding), zero, low, high, wide)


@define
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift_by: Sequence[int],
    x_zero: int,
    zero: int,
    low: int,
    high: int,
    rounding: str = "half_even",
    wide: bool = False,
) -> Tensor:
    """Return ``x W^T + b`` over the last axis."""
    acc = F.linear(x.double() - x_zero, weight.double(), None if bias is None else bias.double())
    by = _along(shift_by, acc.dim() - 1, acc)
    return settle(shift(acc.to(torch.int64), by, rounding), zero, low, high, wide)


def _along(shifts: Sequence[int], axis: int, acc: Tensor) -> Tensor | int:
    """Return the shifts as a tensor that broadcasts over ``acc``, or the one shift."""
    if len(shifts) == 1:
        return shifts[0]
    by = torch.tensor(list(shifts), dtype=torch.int64, device=acc.device)
    return by.reshape([-1 if a == axis else 1 for a in range(acc.dim())])


@define
def matmul(
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
    """Return the matrix product of two activations."""
    acc = torch.matmul(a.double() - a_zero, b.double() - b_zero)
    return settle(shift(acc.to(torch.int64), shift_by, rounding), zero, low, high, wide)


# ------------------------------------------------------------------ element by element


@define
def add(
    a: Tensor,
    b: Tensor,
    a_shift: int,
    b_shift: int,
    shift_by: int,
    a_zero: int,
    b_zero: int,
    zero: int,
    low: int,
    high: int,
    sign: int = 1,
    rounding: str = "half_even",
    wide: bool = False,
) -> Tensor:
    """Return ``a + sign * b``: both are aligned to the finer exponent, and one shift follows."""
    left = (a.to(torch.int64) - a_zero) << a_shift
    right = (b.to(torch.int64) - b_zero) << b_shift
    return settle(shift(left + sign * right, shift_by, rounding), zero, low, high, wide)


@define
def mul(
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
    """Return ``a * b``, broadcasting."""
    acc = (a.to(torch.int64) - a_zero) * (b.to(torch.int64) - b_zero)
    return settle(shift(acc, shift_by, rounding), zero, low, high, wide)


@define
def rescale(
    x: Tensor,
    shift_by: int,
    x_zero: int,
    zero: int,
    low: int,
    high: int,
    rounding: str = "half_even",
    wide: bool = False,
) -> Tensor:
    """Return the same numbers on another grid, or clipped."""
    return settle(shift(x.to(torch.int64) - x_zero, shift_by, rounding), zero, low, high, wide)


@define
def concat(
    xs: Sequence[Tensor],
    axis: int,
    shift_by: Sequence[int],
    zeros: Sequence[int],
    zero: int,
    low: int,
    high: int,
    rounding: str = "half_even",
    wide: bool = False,
) -> Tensor:
    """Return tensors side by side, each aligned to the result's grid by a shift of its own."""
    parts = [
        settle(shift(x.to(torch.int64) - z, by, rounding), zero, low, high, wide)
        for x, by, z in zip(xs, shift_by, zeros, strict=True)
    ]
    return torch.cat(parts, axis)


@define
def lookup(x: Tensor, table: Tensor, function: str = "", first: int = 0) -> Tensor:
    """Return ``table[x - first]``; the table has one code per code of ``x``, 256 if that is uint8.

    ``function`` names what the table was made of; it is only a hint to backends.
    """
    return table[x.to(torch.int64) - first]


# ------------------------------------------------------------------ averages


@define
def mean(
    x: Tensor,
    axes: Sequence[int],
    keepdim: bool,
    shift_by: int,
    x_zero: int,
    zero: int,
    low: int,
    high: int,
    divisor: int = 0,
    rounding: str = "half_even",
    wide: bool = False,
) -> Tensor:
    """Return averages over axes: the exact quotient, rounded once.

    A ``divisor`` other than 0 takes the place of the count; with 1 these are sums.
    """
    total = (x.to(torch.int64) - x_zero).sum(list(axes), keepdim=keepdim)
    count = divisor or math.prod(x.shape[a] for a in axes)
    return settle(_average(total, count, shift_by, rounding), zero, low, high, wide)


@define
def average_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    shift_by: int,
    x_zero: int,
    zero: int,
    low: int,
    high: int,
    divisor: int = 0,
    rounding: str = "half_even",
    wide: bool = False,
) -> Tensor:
    """Return averages over windows of the last one to three axes: the exact quotient, rounded once.

    A ``divisor`` other than 0 takes the place of every window's count.
    """
    how = (list(kernel), list(stride), list(padding), ceil_mode, count_include_pad)
    total = _pooled(x.double() - x_zero, *how, divisor=1).to(torch.int64)
    sizes = [int(size) for size in x.shape[2:]]
    count = divisor or average_counts(sizes, *how).to(x.device)
    return settle(_average(total, count, shift_by, rounding), zero, low, high, wide)


def average_counts(sizes: Sequence[int], *how: Any) -> Tensor:
    """Return what every window of an average pooling is divided by: int64 ``[1, 1, *sizes]``.

    Args:
        sizes: Of the spatial axes of the input.
        *how: ``kernel, stride, padding, ceil_mode, count_include_pad``.
    """
    ones = torch.ones((1, 1, *sizes), dtype=torch.float64)
    # What a window counts over the average of as many ones is torch's own divisor.
    return (_pooled(ones, *how, divisor=1) / _pooled(ones, *how)).round().to(torch.int64)


def _pooled(
    x: Tensor, kernel: list[int], stride: list[int], padding: list[int], ceil: bool, pads: bool,
    divisor: int | None = None,
) -> Tensor:  # fmt: skip
    """Return an average pooling over one to three axes, which ATen spells in three ways."""
    if len(kernel) == 3:
        return F.avg_pool3d(x, kernel, stride, padding, ceil, pads, divisor)
    if len(kernel) == 2:
        return F.avg_pool2d(x, kernel, stride, padding, ceil, pads, divisor)
    kernel, stride, padding = [1, *kernel], [1, *stride], [0, *padding]
    return F.avg_pool2d(x.unsqueeze(-2), kernel, stride, padding, ceil, pads, divisor).squeeze(-2)


def _average(total: Tensor, count: Tensor | int, by: int, rounding: str) -> Tensor:
    return divide(total << max(-by, 0), count * (1 << max(by, 0)), rounding)
