"""`Grid`: which numbers the codes of a tensor stand for; and how a number becomes a code."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from narrows.errors import UsageError

HALF_EVEN, HALF_UP = "half_even", "half_up"
ROUNDINGS = (HALF_EVEN, HALF_UP)

# Activations are stored in uint8. A signed range has its zero in the middle, whatever its bits, so
# that the zero point is even and the same for all signed tensors: ONNX Runtime's QLinearAdd adds
# it before it rounds, and an odd one would turn every tie around.
CENTRE = 128
BITS = range(2, 9)
# Wide codes are stored in int16 and have their zero at 0, signed or not.
WIDE_BITS = range(9, 17)
ACTIVATION_BITS = range(BITS[0], WIDE_BITS[-1] + 1)
GROUPS = range(2, 2**20)  # how many weights may share a scale and a zero point
POT_BITS = range(2, 5)  # of one power of two and its sign: up to 2**6, which int8 holds
POT = re.compile("pot([0-9]+)(x2)?")

# 2**-e has to be a normal float32 for every backend, with room for products of two scales.
EXPONENTS = range(-30, 61)


@dataclass(frozen=True)
class Grid:
    """The codes of a tensor and what they stand for: ``value = (code - zero) * 2**-exponent``.

    Attributes:
        exponent: The scale's exponent, negated: a step is ``2**-exponent``.
        zero: The code of zero. Up to 8 bits: 0 where nothing is negative, else 128. Beyond: 0.
        bits: How many bits the codes take, 2 to 16; 15 at most where none is negative.
        signed: Of more than 8 bits: whether codes are negative, too.
    """

    exponent: int
    zero: int = 0
    bits: int = 8
    signed: bool = False

    def __post_init__(self) -> None:
        zeros = (0,) if self.wide else (0, CENTRE)
        if self.zero not in zeros:
            raise UsageError(f"a zero point is {' or '.join(map(str, zeros))}, got {self.zero}")
        if self.bits not in ACTIVATION_BITS or self.bits - self.signed >= WIDE_BITS[-1]:
            raise UsageError(
                f"{self.bits}-bit codes are not supported",
                why=f"codes take {BITS[0]} to {BITS[-1]} bits and are stored in uint8, or "
                f"{WIDE_BITS[0]} to {WIDE_BITS[-1]} in int16, with their sign",
            )
        if self.signed and not self.wide:
            raise UsageError(f"signed codes of {self.bits} bits have the zero point {CENTRE}")
        if self.exponent not in EXPONENTS:
            raise UsageError(
                f"the scale 2^{-self.exponent} cannot be represented",
                why=f"exponents go from {EXPONENTS[0]} to {EXPONENTS[-1]}",
                hint="rescale the tensor: its range is extreme",
            )

    @staticmethod
    def of(exponent: int, bits: int, negative: bool) -> Grid:
        """Return the grid of so many bits, for numbers that may be negative or are not."""
        if bits in BITS:
            return Grid(exponent, CENTRE if negative else 0, bits)
        return Grid(exponent, 0, bits if negative else min(bits, WIDE_BITS[-2]), negative)

    @staticmethod
    def read(exponent: int, zero: int, low: int, high: int) -> Grid:
        """Return the grid that has these codes."""
        bits = (high - low + 1).bit_length() - 1
        return Grid(exponent, zero, bits, low < 0)

    @property
    def wide(self) -> bool:
        """Whether codes are stored in int16."""
        return self.bits in WIDE_BITS

    @property
    def negative(self) -> bool:
        """Whether there are codes for negative numbers."""
        return self.signed or self.zero > 0

    @property
    def low(self) -> int:
        """The smallest code."""
        return self.zero - (1 << self.bits - 1) if self.negative else 0

    @property
    def high(self) -> int:
        """The largest code."""
        return self.zero + (1 << self.bits - self.negative) - 1

    @property
    def codes(self) -> range:
        """All codes there are, in order."""
        return range(self.low, self.high + 1)

    @property
    def scale(self) -> float:
        """The step between two codes."""
        return 2.0**-self.exponent

    def code(self, value: float, rounding: str = HALF_EVEN) -> int:
        """Return the code that stands for a number, the nearest end of the grid if none does."""
        if math.isinf(value):
            return self.high if value > 0 else self.low
        rounded = round_number(value * 2.0**self.exponent, rounding)
        return min(max(rounded + self.zero, self.low), self.high)

    def __str__(self) -> str:
        text = f"2^{-self.exponent}"
        text += f" z{self.zero}" if self.zero else " signed" if self.signed else ""
        return text + (f" {self.bits}b" if self.bits != 8 else "")


@dataclass(frozen=True)
class WeightGrid:
    """The codes of a weight: ``value = code * 2**-exponent``, an exponent per output channel.

    Attributes:
        exponents: One exponent per index of ``axis``, or a single one for the whole tensor.
        bits: How many bits a code takes, 2 to 8; codes are stored in int8 and symmetric. Where
            codes are powers of two, how many each term takes, 2 to 4: a sign and an exponent.
        axis: The axis of the output channels.
        terms: 0 where every whole number is a code; 1 or 2 where only sums of so many signed powers
            of two (or zeros) are, so that a product is as many shifts.
    """

    exponents: tuple[int, ...]
    bits: int = 8
    axis: int = 0
    terms: int = 0

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise UsageError(
                f"{self.bits}-bit weights are not supported",
                why=f"weights take {BITS[0]} to {BITS[-1]} bits and are stored in int8",
            )
        if self.terms not in (0, 1, 2) or (self.terms and self.bits not in POT_BITS):
            raise UsageError(
                f"weights of {self.terms} powers of two in {self.bits} bits are not supported",
                why=f"there are 1 or 2 terms of {POT_BITS[0]} to {POT_BITS[-1]} bits, "
                "as codes are stored in int8",
            )
        for exponent in self.exponents:
            if exponent not in EXPONENTS:
                raise UsageError(
                    f"the weight scale 2^{-exponent} cannot be represented",
                    why=f"exponents go from {EXPONENTS[0]} to {EXPONENTS[-1]}",
                )

    @staticmethod
    def spelled(coding: Any, axis: int = 0) -> WeightGrid:
        """Return the grid of scale 1 for a number of bits, or for ``pot4`` or ``pot4x2``.

        `UsageError` if there is no such coding.
        """
        bits, terms = coding, 0
        if isinstance(coding, str) and (found := POT.fullmatch(coding)):
            bits, terms = int(found[1]), 2 if found[2] else 1
        if not isinstance(bits, int) or isinstance(bits, bool):
            raise UsageError(f"{coding!r} is no coding of weights")
        return WeightGrid((0,), bits, axis, terms)

    @staticmethod
    def read(
        exponents: Sequence[int], axis: int, low: int, high: int, levels: Sequence[int] = ()
    ) -> WeightGrid:
        """Return the grid that has these `arguments`; `UsageError` if none has."""
        for bits, terms in [(b, 0) for b in BITS] + [(b, t) for b in POT_BITS for t in (1, 2)]:
            grid = WeightGrid(tuple(exponents), bits, axis, terms)
            if grid.arguments[2:] == (low, high, *((list(levels),) if levels else ())):
                return grid
        raise UsageError(f"no coding of weights has codes from {low} to {high}")

    @property
    def coding(self) -> int | str:
        """How codes are chosen, as `spelled` takes it: ``8``, ``"pot4"``, ``"pot4x2"``."""
        if not self.terms:
            return self.bits
        return f"pot{self.bits}" + ("x2" if self.terms == 2 else "")

    @property
    def levels(self) -> tuple[int, ...]:
        """The magnitudes that codes have, in order; none where every whole number is a code."""
        if not self.terms:
            return ()
        powers = {0, *(1 << k for k in range((1 << self.bits - 1) - 1))}
        if self.terms == 2:
            powers = {abs(a + sign * b) for a in powers for b in powers for sign in (1, -1)}
        return tuple(sorted(p for p in powers if p <= 127))

    @property
    def high(self) -> int:
        """The largest code; the smallest is its negative, as a symmetric range has no bias."""
        return self.levels[-1] if self.terms else (1 << self.bits - 1) - 1

    @property
    def codes(self) -> Sequence[int]:
        """All codes there are, in order."""
        sizes = self.levels
        return [*(-s for s in sizes[:0:-1]), *sizes] if sizes else range(-self.high, self.high + 1)

    @property
    def reach(self) -> float:
        """The largest magnitude, in steps, that is rounded to the largest code, not clipped: it
        lies nearer to that than to the next power of two."""
        return (self.high + (1 << self.high.bit_length())) / 2

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What ``fake_quantize_weight`` and ``weight_codes`` take after the tensor."""
        levels = (list(self.levels),) if self.terms else ()
        return list(self.exponents), self.axis, -self.high, self.high, *levels

    def along(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return one exponent per output channel of a weight of ``shape``."""
        count = shape[self.axis]
        return self.exponents * count if len(self.exponents) == 1 else self.exponents


@dataclass(frozen=True)
class Levels:
    """Steps of unequal width with results of equal distance: a code ``c`` of a tensor's own grid
    becomes the code ``grid.low + k`` of another, where ``k`` of the thresholds are up to ``c``.

    Attributes:
        grid: What the results stand for.
        thresholds: Codes of the tensor's own grid, in order, at which the next level begins.
    """

    grid: Grid
    thresholds: tuple[int, ...]

    def __post_init__(self) -> None:
        rising = all(a <= b for a, b in pairwise(self.thresholds))
        if not rising or not all(0 <= t <= 256 for t in self.thresholds):
            raise UsageError(
                "thresholds have to rise, between the codes 0 and 256",
                why="a level begins where the one before it ends",
            )
        most = self.grid.high - self.grid.low
        if not 0 < len(self.thresholds) <= most:
            raise UsageError(
                f"{len(self.thresholds)} thresholds do not fit {self.grid.bits} bits",
                why=f"that are up to {most + 1} levels, one more than thresholds",
            )

    def arguments(self, own: Grid) -> tuple[list[float], float, float]:
        """Return what ``staircase`` takes after the tensor, which lies on the grid ``own``."""
        # Between two codes, so that none is near a threshold.
        begins = [(t - own.zero - 0.5) * own.scale for t in self.thresholds]
        return begins, (self.grid.low - self.grid.zero) * self.grid.scale, self.grid.scale


def round_number(value: float, rounding: str) -> int:
    """Return the nearest integer; ties go to the even one, or up."""
    return round(value) if rounding == HALF_EVEN else math.floor(value + 0.5)


def check_groups(bits: Any, group: Any) -> None:
    """Raise `UsageError` unless weights can have codes of ``bits`` bits in groups of ``group``."""
    for what, value, known in (("bits", bits, BITS), ("group", group, GROUPS)):
        if not isinstance(value, int) or isinstance(value, bool) or value not in known:
            raise UsageError(
                f"{what} goes from {known[0]} to {known[-1]:,}, got {value!r}",
                hint="bits=4, group=32",
            )


def check_rounding(rounding: Any) -> str:
    """Return a rounding mode; `UsageError` if it is none."""
    if rounding not in ROUNDINGS:
        raise UsageError(f"rounding is {' or '.join(ROUNDINGS)}, got {rounding!r}")
    return rounding


__all__ = [
    "ACTIVATION_BITS", "BITS", "CENTRE", "HALF_EVEN", "HALF_UP", "ROUNDINGS", "WIDE_BITS", "Grid",
    "Levels", "WeightGrid",
]  # fmt: skip
