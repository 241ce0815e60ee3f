"""Whole numbers in few bytes, as plans keep them: `WeightCodes`, `Parities`, `Numbers`.

A reconstruction rounds some weights to the other side; its choice is kept as the codes themselves,
`WeightCodes`. Of codes that plain rounding makes, one bit each is enough to make the same ones of
numbers that differ in their last places: `Parities`. `Numbers` are those of biases and tables.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import math
import zlib
from collections.abc import Sequence
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
        return {"shape": list(self.shape), "codes": _packed(self.data)}

    @staticmethod
    def from_json(data: Any) -> WeightCodes:
        """Return what `to_json` wrote; `ValueError` if it is damaged."""
        shape = _shape(data["shape"])
        return WeightCodes(shape, _unpacked(data["codes"], math.prod(shape)))


@dataclass(frozen=True)
class Parities:
    """Whether each code of a tensor stands at an even or an odd place among the codes there are.

    The codes come back from numbers that are each less than half a step from what they were.

    Attributes:
        shape: The tensor's shape.
        data: One bit per code, eight to a byte.
        digest: A hash of the codes, which tells whether the right ones came back.
    """

    shape: tuple[int, ...]
    data: bytes
    digest: str

    def __post_init__(self) -> None:
        if len(self.data) != -(-math.prod(self.shape) // 8):
            raise ValueError(f"{len(self.data)} bytes do not fill the shape {list(self.shape)}")

    @staticmethod
    def of(codes: Tensor, known: Sequence[int]) -> Parities:
        """Return those of int64 codes, which are among ``known``, in order."""
        odd = torch.searchsorted(torch.tensor(list(known)), codes.cpu().contiguous()) & 1
        bits = np.packbits(odd.numpy().astype(np.uint8).reshape(-1))
        return Parities(tuple(codes.shape), bits.tobytes(), _digest(codes))

    def codes(self, steps: Tensor, known: Sequence[int]) -> Tensor | None:
        """Return the int64 codes that numbers once became, or ``None`` if those were others.

        Args:
            steps: The numbers in steps, float64.
            known: The codes that there are, in order.
        """
        if tuple(steps.shape) != self.shape:
            return None
        count = math.prod(self.shape)
        bits = np.unpackbits(np.frombuffer(self.data, dtype=np.uint8), count=count)
        odd = torch.from_numpy(bits).reshape(self.shape).bool()
        steps = steps.cpu().double().clamp(known[0], known[-1]).contiguous()
        made = torch.empty(self.shape, dtype=torch.int64)
        for side in (False, True):
            held = torch.tensor(list(known[side::2]))
            if not len(held):
                continue
            nearest = torch.bucketize(steps, (held[1:] + held[:-1]).double() / 2)
            made = torch.where(odd == side, held[nearest], made)
        return made if _digest(made) == self.digest else None

    def to_json(self) -> dict[str, Any]:
        """Return them as JSON values."""
        return {"shape": list(self.shape), "bits": _packed(self.data), "digest": self.digest}

    @staticmethod
    def from_json(data: Any) -> Parities:
        """Return what `to_json` wrote; `ValueError` if it is damaged."""
        shape = _shape(data["shape"])
        bits = _unpacked(data["bits"], -(-math.prod(shape) // 8))
        return Parities(shape, bits, str(data["digest"]))


@dataclass(frozen=True)
class Numbers:
    """A tensor of whole numbers of 32 bits, or the bits of one in float32.

    Attributes:
        shape: The tensor's shape.
        data: Four bytes per number, the lowest first.
        floats: Whether they are the bits of floating-point numbers.
    """

    shape: tuple[int, ...]
    data: bytes
    floats: bool = False

    def __post_init__(self) -> None:
        if len(self.data) != 4 * math.prod(self.shape):
            raise ValueError(f"{len(self.data)} bytes do not fill the shape {list(self.shape)}")

    @staticmethod
    def of(numbers: Tensor) -> Numbers:
        """Return those of a tensor of integers, or of one in float32."""
        floats = numbers.is_floating_point()
        kind = np.dtype("<f4" if floats else "<i4")
        values = numbers.detach().cpu().numpy().astype(kind)
        return Numbers(tuple(numbers.shape), values.tobytes(), floats)

    def tensor(self) -> Tensor:
        """Return them as a tensor of their own, int64 or float32."""
        values = np.frombuffer(self.data, dtype="<f4" if self.floats else "<i4")
        plain = values.astype(np.float32 if self.floats else np.int64)
        return torch.from_numpy(plain).reshape(self.shape)

    def to_json(self) -> dict[str, Any]:
        """Return them as JSON values: what each differs from the one before, byte by byte."""
        values = np.frombuffer(self.data, dtype="<u4")
        steps = np.diff(values, prepend=values.dtype.type(0)).astype("<u4")
        planes = steps.view(np.uint8).reshape(-1, 4).T.tobytes()
        kind = {"floats": True} if self.floats else {}
        return {"shape": list(self.shape), "numbers": _packed(planes), **kind}

    @staticmethod
    def from_json(data: Any) -> Numbers:
        """Return what `to_json` wrote; `ValueError` if it is damaged."""
        shape = _shape(data["shape"])
        size = 4 * math.prod(shape)
        planes = np.frombuffer(_unpacked(data["numbers"], size), dtype=np.uint8)
        if planes.size != size:
            raise ValueError(f"{planes.size} bytes do not fill the shape {list(shape)}")
        steps = np.ascontiguousarray(planes.reshape(4, -1).T).view("<u4").reshape(-1)
        values = np.cumsum(steps, dtype=np.uint32).astype("<u4")
        return Numbers(shape, values.tobytes(), bool(data.get("floats", False)))


def _packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 9)).decode("ascii")


def _unpacked(text: Any, size: int) -> bytes:
    """Return the bytes of a text; at most one more than there should be, which shows that it is
    too long without unpacking it all."""
    try:
        return zlib.decompressobj().decompress(base64.b64decode(text, validate=True), size + 1)
    except (binascii.Error, zlib.error) as error:
        raise ValueError(f"its codes cannot be read: {error}") from error


def _shape(data: Any) -> tuple[int, ...]:
    if not all(type(s) is int and s >= 0 for s in data):
        raise ValueError(f"{data!r} is no shape")
    return tuple(data)


def _digest(codes: Tensor) -> str:
    values = codes.cpu().contiguous().numpy().astype("<i4")
    return hashlib.sha256(values.tobytes()).hexdigest()[:16]


__all__ = ["Numbers", "Parities", "WeightCodes"]
