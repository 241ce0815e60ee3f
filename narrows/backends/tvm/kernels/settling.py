"""Where an accumulator becomes a code: shifted, rounded, moved by the zero point, clipped.

`narrows.ir.integer.rounding` says what it means. Three spellings give the same codes; `Settle.form`
says which of them is exact for the accumulators that can occur.

``float``
    Codes are ``acc * 2**-s + zero``, rounded by adding 1.5 * 2^23 in binary32, in which whole
    numbers are a unit in the last place apart there: one multiply-add, two clips. The product is
    exact. An accumulator beyond 2^24 is not, but where no shift is above 16 it is clipped in any
    case.
``narrow``
    The definition in 32 bits.
``wide``
    The definition in 64 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx

HALF_EVEN = "half_even"  # as `narrows.ir.integer.grid` spells it, which needs torch's neighbours

EXACT = 2**24  # up to here a float32 holds every whole number
EXACT_SHIFT = 16
INT32 = 2**31

MAGIC = 1.5 * 2**23

# A shift by more gives 0, or the end of the codes, whatever the accumulator: it has 32 bits.
MOST_RIGHT, MOST_LEFT = 40, 31


@dataclass(frozen=True)
class Settle:
    """How accumulators of one operator become codes.

    Attributes:
        shifts: int64: one shift, or one per channel; negative ones go to the left.
        zero: The zero point.
        low: The smallest code.
        high: The largest code.
        rounding: ``half_even`` or ``half_up``.
        bound: No accumulator is larger in magnitude.
    """

    shifts: np.ndarray
    zero: int
    low: int
    high: int
    rounding: str
    bound: int

    @property
    def form(self) -> str:
        """The spelling that is exact."""
        right = int(self.shifts.max())
        even = self.rounding == HALF_EVEN and self.zero % 2 == 0 and self.bound < INT32
        if even and (self.bound <= EXACT or right <= EXACT_SHIFT):
            return "float"
        half = (1 << max(right, 0)) >> 1
        narrow = self.bound + half < INT32 and right < 31 and int(self.shifts.min()) >= 0
        return "narrow" if narrow else "wide"

    @property
    def dtype(self) -> str:
        """The dtype that the accumulator is needed in."""
        return "int32" if self.bound < INT32 else "int64"

    def constants(self, width: int) -> list[np.ndarray]:
        """Return what `codes` wants per channel, for ``width`` channels; nothing for one shift."""
        if self.shifts.size == 1:
            return []
        filled = np.pad(self.shifts, (0, width - self.shifts.size))
        if self.form == "float":
            return [np.exp2(-filled.astype("float64")).astype("float32")]
        kind = "int32" if self.form == "narrow" else "int64"
        return [filled.clip(-MOST_LEFT, MOST_RIGHT).astype(kind)]

    def codes(self, acc: Any, along: Any = None) -> Any:
        """Return the code of an accumulator, an int32 or int64 expression.

        Args:
            acc: The accumulator.
            along: What `constants` returned, at the accumulator's channel; ``None`` for one shift.
        """
        if self.form == "float":
            return self._by_float(acc, along)
        kind = "int32" if self.form == "narrow" else "int64"
        acc = tirx.Cast(kind, acc) if acc.ty.dtype != kind else acc
        value = self._shifted(acc, along, kind) + tirx.const(self.zero, kind)
        value = tirx.min(tirx.max(value, tirx.const(self.low, kind)), tirx.const(self.high, kind))
        return tirx.Cast("uint8", value)

    def _by_float(self, acc: Any, along: Any) -> Any:
        def number(value: float) -> Any:
            return tirx.const(value, "float32")

        scale = number(2.0 ** -int(self.shifts[0])) if along is None else along
        value = tirx.Cast("float32", acc) * scale + number(MAGIC + self.zero)
        # The clip comes after the sum: numbers that are too large keep their order.
        value = tirx.min(tirx.max(value, number(MAGIC + self.low)), number(MAGIC + self.high))
        return tirx.Cast("uint8", tirx.reinterpret("int32", value))

    def _shifted(self, acc: Any, along: Any, kind: str) -> Any:
        one, none = tirx.const(1, kind), tirx.const(0, kind)
        if along is None:
            by = max(-MOST_LEFT, min(int(self.shifts[0]), MOST_RIGHT))
            if by <= 0:
                return tirx.shift_left(acc, tirx.const(-by, kind)) if by else acc
            right, half = tirx.const(by, kind), tirx.const(1 << by - 1, kind)
        else:
            right = tirx.max(along, none)
            half = tirx.shift_right(tirx.shift_left(one, right), one)
            if int(self.shifts.min()) < 0:
                acc = tirx.shift_left(acc, tirx.max(none - along, none))
        if self.rounding == HALF_EVEN:
            odd = tirx.bitwise_and(tirx.shift_right(acc, right), one)
            # Where nothing is shifted out, half is 0, and nothing may be added.
            less = one - odd if along is None else tirx.min(one - odd, half)
            half = half - less
        return tirx.shift_right(acc + half, right)


def quotient(numerator: Any, denominator: Any, rounding: str, kind: str) -> Any:
    """Return ``numerator / denominator`` rounded to a whole number; both are of dtype ``kind``."""
    two, one = tirx.const(2, kind), tirx.const(1, kind)
    doubled = numerator * two + denominator
    twice = denominator * two
    result = tirx.floordiv(doubled, twice)
    if rounding != HALF_EVEN:
        return result
    tie = tirx.all(doubled == result * twice, tirx.bitwise_and(result, one) == one)
    return tirx.Select(tie, result - one, result)
