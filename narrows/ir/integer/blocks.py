"""`Blocks`: a weight in codes with a scale and a zero point per group, for layers that compute in
floating-point.

A group is a run of weights along one axis: along the inputs of one output channel (axis 1), or
along the output channels of one input (axis 0), which keeps an input that is much larger than the
others apart from them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from narrows.ir.integer.grid import check_groups
from narrows.ir.integer.library import define

CODE = 127  # the largest code of an activation


@dataclass(frozen=True)
class Blocks:
    """How the weight of a linear layer, ``[out, in]``, is cut into groups, and how it is coded.

    Attributes:
        bits: Of a code, 2 to 8; codes are stored in uint8.
        group: How many weights share a scale and a zero point.
        axis: Along which axis they lie: 1 for inputs, 0 for output channels.
    """

    bits: int
    group: int
    axis: int = 1

    def __post_init__(self) -> None:
        check_groups(self.bits, self.group)

    @property
    def most(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def scales(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return scales (float32) and zero points (uint8) that cover numbers and zero.

        Args:
            rows: The numbers of one group per row.
        """
        low, high = rows.amin(-1).clamp(max=0), rows.amax(-1).clamp(min=0)
        scale = ((high - low) / self.most).to(torch.float32)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        return scale, (-low / scale).round().clamp(0, self.most).to(torch.uint8)

    def codes(self, numbers: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Return the nearest codes, as uint8; the scales and zero points broadcast."""
        return ((numbers / scale).round() + zero).clamp(0, self.most).to(torch.uint8)


@define
def dequantize_blocks(codes: Tensor, scale: Tensor, zero: Tensor, axis: int, group: int) -> Tensor:
    """Return ``(codes - zero) * scale``; a scale and a zero point for ``group`` along ``axis``."""
    length = codes.shape[axis]

    def spread(x: Tensor) -> Tensor:
        return x.repeat_interleave(group, axis).narrow(axis, 0, length)

    return (codes.to(scale.dtype) - spread(zero).to(scale.dtype)) * spread(scale)


@define
def round_blocks(x: Tensor, group: int) -> Tensor:
    """Return the nearest numbers that codes from -127 to 127 stand for, in the dtype of ``x``.

    A scale serves ``group`` numbers along the last axis: their largest magnitude over 127, found
    when the program runs. That is what ``MatMulNBits`` of ONNX Runtime does to its input at
    accuracy level 4, where a group of the input is one of the weights; ties go to the even code.
    """
    length = x.shape[-1]
    padded = torch.nn.functional.pad(x, (0, -length % group))
    parts = padded.unflatten(-1, (padded.shape[-1] // group, group))
    largest = parts.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, CODE / largest, torch.zeros_like(largest))
    codes = (parts * inverse).round()
    return (codes * (largest / CODE)).reshape(padded.shape)[..., :length]


__all__ = ["Blocks", "dequantize_blocks", "round_blocks"]
