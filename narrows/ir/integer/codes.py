"""`WeightCodes`: the whole numbers that stand for a weight, where something chose them one by one.

Plain rounding takes the nearest code, and needs no record. A reconstruction rounds some weights to
the other side; its choice is kept as the codes themselves, in bytes, so that a plan stays data.
"""

from __future__ import annotations

import base64
import binascii
import math
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class WeightCodes:
    """The codes of one weight.

    Attributes:
        shape: The weight's shape.
        data: One signed byte per code, in row-major order.
    """

    shape: tuple[int, ...]
    data: bytes

    def __post_init__(self) -> None:
        if len(self.data) != math.prod(self.shape):
            raise ValueError(f"{len(self.data)} codes do not fill the shape {list(self.shape)}")

    @staticmethod
    def of(codes: Tensor) -> WeightCodes:
        """Return the codes that a tensor of whole numbers from -128 to 127 holds."""
        values = codes.detach().to("cpu", torch.int8).contiguous()
        return WeightCodes(tuple(values.shape), values.numpy().tobytes())

    def tensor(self) -> Tensor:
        """Return them as an int8 tensor of their own."""
        values = np.frombuffer(self.data, dtype=np.int8).copy()
        return torch.from_numpy(values).reshape(self.shape)

    def to_json(self) -> dict[str, Any]:
        """Return them as JSON values, compressed."""
        packed = base64.b64encode(zlib.compress(self.data, 9)).decode("ascii")
        return {"shape": list(self.shape), "codes": packed}

    @staticmethod
    def from_json(data: Any) -> WeightCodes:
        """Return what `to_json` wrote; `ValueError` if it is damaged."""
        shape = tuple(data["shape"])
        if not all(type(s) is int and s >= 0 for s in shape):
            raise ValueError(f"{data['shape']!r} is no shape")
        try:
            packed = base64.b64decode(data["codes"], validate=True)
            # One byte more than there should be shows what is too long without unpacking it all.
            codes = zlib.decompressobj().decompress(packed, math.prod(shape) + 1)
        except (binascii.Error, zlib.error) as error:
            raise ValueError(f"its codes cannot be read: {error}") from error
        return WeightCodes(shape, codes)


__all__ = ["WeightCodes"]
