"""What calibration remembers of a tensor: one histogram that grows, in one pass over the data.

Counting every number of a large tensor takes several times as long as computing it. What decides
an exponent is the range, the few largest numbers, which a finer grid would clip, and how the many
others are spread; so of a large tensor the range and the largest numbers are found exactly, and the
others are counted on a sample, which is drawn evenly and is the same every time.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from narrows.ir.integer.grid import EXPONENTS, Grid

BINS = 4096  # on each side of zero
SAMPLE = 2**14  # numbers that stand for a large tensor: an octave's count is off by a few per cent
LARGE = 4 * SAMPLE  # what has fewer numbers is counted whole
TAIL = 2**-10  # at most this share of the sample is replaced by an exact count of the largest
BLOCK = 64  # numbers that are looked through, or left out, together
SEARCHED = 6  # how many exponents beyond the covering one are tried for the smallest error


@dataclass(eq=False)
class Histogram:
    """Magnitudes by sign, in bins whose width is a power of two and doubles as the range grows.

    Attributes:
        low: The smallest number seen.
        high: The largest one.
        zeros: How many were zero; they are exact on every grid.
        counts: ``[2, BINS]``: negative magnitudes, then positive ones.
        power: The bins reach from zero to ``2**power``.
        finite: Whether all numbers were.
        whole: Whether every number is counted, however large a tensor is: for who asks whether
            there is any number at all in some bins.
    """

    low: float = math.inf
    high: float = -math.inf
    zeros: float = 0.0
    counts: Tensor = field(default_factory=lambda: torch.zeros(2, BINS, dtype=torch.float64))
    power: int | None = None
    finite: bool = True
    whole: bool = False

    def add(self, x: Tensor) -> None:
        """Take in a tensor."""
        x = x.detach().cpu().flatten().float()
        if not x.numel():
            return
        blocks = None if self.whole or x.numel() < LARGE else _Blocks.of(x)
        low, high = (v.item() for v in (torch.aminmax(x) if blocks is None else blocks.ends()))
        if not (math.isfinite(low) and math.isfinite(high)):
            self.finite = False
            return
        self.low, self.high = min(self.low, low), max(self.high, high)
        reach = max(-low, high)
        if reach > 0:
            # No grid is finer than 2**-60, and the width of a bin has to be a float32's.
            self._grow(max(math.frexp(reach)[1], -EXPONENTS[-1]))
        if self.power is None:
            self.zeros += x.numel()
            return
        if blocks is None:
            counts, zeros = self._counted(x, negative=low < 0)
        else:
            counts, zeros = self._estimated(x, blocks, negative=low < 0)
        self.counts += counts
        self.zeros += zeros

    def _counted(self, x: Tensor, *, negative: bool) -> tuple[Tensor, float]:
        """Return how many numbers fall into every bin, and how many are zero."""
        assert self.power is not None
        index = (x.abs() * (BINS * 2.0**-self.power)).int().clamp_(max=BINS - 1)
        if negative:
            index += BINS * (x >= 0)
        found = torch.bincount(index, minlength=2 * BINS if negative else BINS).double()
        counts = found if negative else torch.cat([torch.zeros_like(found), found])
        zeros = x.numel() - int(torch.count_nonzero(x))
        counts[BINS] -= zeros
        return counts.reshape(2, BINS), float(zeros)

    def _estimated(self, x: Tensor, blocks: _Blocks, *, negative: bool) -> tuple[Tensor, float]:
        """Return the same of a large tensor: the largest counted, the others by a sample."""
        assert self.power is not None
        counts, zeros = self._counted(x[_places(x.numel())], negative=negative)
        beyond = counts.sum(0).flip(0).cumsum(0).flip(0)  # how many lie in a bin or above it
        first = int((beyond > TAIL * SAMPLE).sum())
        largest = blocks.beyond(first * 2.0**self.power / BINS)
        scale = (x.numel() - len(largest)) / (float(counts[:, :first].sum()) + zeros)
        counts[:, :first] *= scale
        counts[:, first:] = self._counted(largest, negative=negative)[0][:, first:]
        return counts, zeros * scale

    def _grow(self, power: int) -> None:
        """Merge bins until they reach ``2**power``."""
        if self.power is None:
            self.power = power
        while self.power < power:
            merged = self.counts.reshape(2, BINS // 2, 2).sum(2)
            self.counts = torch.cat([merged, torch.zeros_like(merged)], 1)
            self.power += 1

    def times(self, power: int) -> Histogram:
        """Return the histogram of the same numbers times ``2**power``."""
        scale = 2.0**power
        reach = None if self.power is None else self.power + power
        return Histogram(
            self.low * scale, self.high * scale, self.zeros, self.counts, reach, self.finite
        )

    def joined(self, other: Histogram) -> Histogram:
        """Return the histogram of the numbers of both."""
        made = replace(self)
        made.low, made.high = min(self.low, other.low), max(self.high, other.high)
        made.zeros, made.finite = self.zeros + other.zeros, self.finite and other.finite
        if other.power is not None:
            more = replace(other)
            made._grow(other.power)
            more._grow(made.power or other.power)
            made.counts = made.counts + more.counts
        return made

    @property
    def energy(self) -> float:
        """The sum of the squares, as far as the bins tell."""
        if self.power is None:
            return 0.0
        return float((self.counts.sum(0) * self.centres() ** 2).sum())

    @property
    def total(self) -> float:
        """How many numbers there were."""
        return float(self.counts.sum()) + self.zeros

    @property
    def constant(self) -> bool:
        """Whether there was one number only."""
        return self.low == self.high

    def centres(self) -> Tensor:
        """Return the magnitude in the middle of every bin."""
        assert self.power is not None
        return (torch.arange(BINS, dtype=torch.float64) + 0.5) * (2.0**self.power / BINS)

    # ------------------------------------------------------------------ choosing a grid

    def grid(
        self, method: str, bits: int, percentile: float = 99.99, negative: bool | None = None
    ) -> Grid:
        """Return the grid that a method chooses: signed if something was negative.

        Args:
            method: ``minmax`` covers everything seen; ``percentile`` covers that share of the
                magnitudes; ``mse`` has the smallest mean squared error, rounding and clipping
                together.
            bits: How many bits the codes take.
            percentile: For the method of that name, in percent.
            negative: Whether it is signed, where another tensor decides that.
        """
        if negative is None:
            negative = self.low < 0
        reach = self._quantile(percentile) if method == "percentile" else max(-self.low, self.high)
        covering = self._covering(reach, Grid.of(0, bits, negative))
        if method != "mse" or self.power is None:
            return Grid.of(covering, bits, negative)
        tried = range(covering, min(covering + SEARCHED, EXPONENTS[-1] + 1))
        best = min(tried, key=lambda e: self.error(Grid.of(e, bits, negative)))
        return Grid.of(best, bits, negative)

    def _covering(self, reach: float, grid: Grid) -> int:
        """Return the largest exponent at which codes reach ``reach``, to half a step."""
        top = grid.high - grid.zero + 0.5
        exponent = 0 if reach <= 0 else math.floor(math.log2(top) - math.log2(reach))
        return max(EXPONENTS[0] - 1, min(exponent, EXPONENTS[-1]))

    def _quantile(self, percentile: float) -> float:
        if self.power is None:
            return 0.0
        both = self.counts.sum(0)
        wanted = (both.sum() + self.zeros) * percentile / 100 - self.zeros
        reached = both.cumsum(0) >= wanted
        index = int(reached.float().argmax()) if bool(reached.any()) else BINS - 1
        edge = (index + 1) * 2.0**self.power / BINS
        return min(edge, max(-self.low, self.high))

    def rounding(self, step: float) -> float:
        """Return the sum of squared errors on steps that end nowhere, as far as the bins tell."""
        if self.power is None:
            return 0.0
        centres = self.centres()
        each = torch.minimum(centres**2, torch.full_like(centres, step**2 / 12))
        return float((self.counts.sum(0) * each).sum())

    def error(self, grid: Grid) -> float:
        """Return the sum of squared errors on a grid, as far as the bins tell.

        Rounding costs ``step**2 / 12`` a number, and what lies beyond the ends costs its distance;
        zeros cost nothing.
        """
        centres = self.centres()
        ends = (grid.zero - grid.low, grid.high - grid.zero)
        loss = 0.0
        for counts, end in zip(self.counts, ends, strict=True):
            beyond = (centres - end * grid.scale).clamp(min=0)
            # Numbers below half a step become zero and cost their square, not a step's worth.
            near = torch.minimum(centres**2, torch.full_like(centres, grid.scale**2 / 12))
            cost = torch.where(beyond > grid.scale / 2, beyond**2, near)
            loss += float((counts * cost).sum())
        return loss


@dataclass(frozen=True)
class _Blocks:
    """A large tensor in blocks, so that most need not be looked at twice.

    Attributes:
        body: ``[blocks, BLOCK]``.
        low: The smallest number of each block.
        high: The largest one.
        rest: What is left over.
    """

    body: Tensor
    low: Tensor
    high: Tensor
    rest: Tensor

    @staticmethod
    def of(x: Tensor) -> _Blocks:
        cut = len(x) // BLOCK * BLOCK
        body = x[:cut].view(-1, BLOCK)
        return _Blocks(body, body.amin(1), body.amax(1), x[cut:])

    def ends(self) -> tuple[Tensor, Tensor]:
        """Return the smallest and the largest number of all."""
        return torch.cat([self.low, self.rest]).min(), torch.cat([self.high, self.rest]).max()

    def beyond(self, edge: float) -> Tensor:
        """Return the numbers whose magnitude is ``edge`` or more."""
        held = self.body[(self.high >= edge) | (self.low <= -edge)]
        found = torch.cat([held.flatten(), self.rest])
        return found[found.abs() >= edge]


@functools.lru_cache(maxsize=256)
def _places(count: int) -> Tensor:
    """Return `SAMPLE` indices of so many numbers: one in every stretch, anywhere in it.

    Even steps would meet the same channels again and again.
    """
    generator = torch.Generator().manual_seed(0)
    within = torch.rand(SAMPLE, generator=generator, dtype=torch.float64)
    return ((torch.arange(SAMPLE) + within) * (count / SAMPLE)).long().clamp_(max=count - 1)
