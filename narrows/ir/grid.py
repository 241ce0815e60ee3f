"""`Grid`: measured times over one or more sizes, and what lies between; `Layout`: its staircase."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np

# Where a grid is left, time goes on in proportion to the size at most, and never falls.
STEEPEST = 1.0


@dataclass(frozen=True)
class Layout:
    """What a runtime does with the layout of channels.

    Attributes:
        block: The channels of one block of the blocked layout; 1 where there is none.
        align: What a width must be a multiple of to be blocked at all.
        sets: How many blocks of outputs a kernel makes at once.
        fused: Operators that a convolution before them takes in, in either layout.
        blocked: Operators that run on blocks.
    """

    block: int = 1
    align: int = 1
    sets: int = 1
    fused: tuple[str, ...] = ()
    blocked: tuple[str, ...] = ()

    def padded(self, width: int) -> int:
        """Return ``width`` rounded up to whole blocks."""
        return -(-width // self.block) * self.block


@dataclass(frozen=True)
class Grid:
    """Measured times over one or more sizes.

    Attributes:
        axes: Per size its name and the measured values, ascending.
        us: The times in microseconds, ``[values of axis 0, values of axis 1, ...]``.
    """

    axes: tuple[tuple[str, tuple[float, ...]], ...]
    us: np.ndarray

    @cached_property
    def _logs(self) -> tuple[list[np.ndarray], np.ndarray]:
        values = self.us
        for axis in range(values.ndim):  # noise aside, more work takes no less time
            values = np.maximum.accumulate(values, axis)
        return [np.log(points) for _, points in self.axes], np.log(values)

    def at(self, sizes: Mapping[str, float]) -> float:
        """Return the time in microseconds at some sizes: multilinear in the logarithms.

        It is monotone in every size, reproduces a monotone measurement, and outside the measured
        range goes on with the slope of the last interval, at most in proportion.
        """
        points, values = self._logs
        corners: list[list[tuple[int, float]]] = []
        for (name, _), known in zip(self.axes, points, strict=True):
            corners.append(_bracket(known, math.log(max(sizes[name], 1e-9))))
        total = sum(
            float(values[tuple(i for i, _ in corner)]) * math.prod(w for _, w in corner)
            for corner in product(*corners)
        )
        return math.exp(total + self._beyond(sizes))

    def _beyond(self, sizes: Mapping[str, float]) -> float:
        """Return what the logarithm of the time grows by outside the measured range.

        The slope is the mean over the other axes, so that time stays monotone in them.
        """
        points, values = self._logs
        extra = 0.0
        for axis, (name, _) in enumerate(self.axes):
            known = points[axis]
            at = math.log(max(sizes[name], 1e-9))
            out = at - known[-1] if at > known[-1] else min(0.0, at - known[0])
            if not out:
                continue
            slope = STEEPEST
            if len(known) > 1:
                high, low = (-1, -2) if out > 0 else (1, 0)
                rise = np.mean(np.take(values, high, axis) - np.take(values, low, axis))
                slope = min(STEEPEST, max(0.0, float(rise / (known[high] - known[low]))))
            extra += slope * out
        return extra

    def to_json(self) -> dict[str, Any]:
        """Return the grid as JSON data, times to four digits."""
        us = [float(f"{v:.4g}") for v in self.us.flatten()]
        return {"axes": {name: list(points) for name, points in self.axes}, "us": us}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Grid:
        """Return the grid that `to_json` wrote."""
        axes = tuple((str(n), tuple(float(v) for v in p)) for n, p in data["axes"].items())
        us = np.array(data["us"], dtype=np.float64).reshape([len(p) for _, p in axes])
        if not (us > 0).all() or any(list(p) != sorted(set(p)) for _, p in axes):
            raise ValueError("a grid holds times above 0 at ascending sizes")
        return cls(axes, us)

    def scaled(self, factor: float) -> Grid:
        """Return the grid with every time multiplied."""
        return Grid(self.axes, self.us * factor)


def _bracket(known: np.ndarray, at: float) -> list[tuple[int, float]]:
    """Return the one or two known points around ``at`` and their weights."""
    if at <= known[0] or len(known) == 1:
        return [(0, 1.0)]
    if at >= known[-1]:
        return [(len(known) - 1, 1.0)]
    high = int(np.searchsorted(known, at))
    if known[high] - at < 1e-12:
        return [(high, 1.0)]
    share = float((at - known[high - 1]) / (known[high] - known[high - 1]))
    return [(high - 1, 1.0 - share), (high, share)]
