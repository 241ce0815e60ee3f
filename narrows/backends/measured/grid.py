"""`Grid`: measured times over one or more sizes, and what lies between."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Annotated, Any

import msgspec
import numpy as np

from narrows.files.reading import fit

# Where a grid is left, time goes on in proportion to the size at most, and never falls.
STEEPEST = 1.0

# Sizes and times; NaN is none, and neither is what overflows when it is scaled.
Positive = Annotated[float, msgspec.Meta(gt=0, le=1e15)]


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
    def _logs(self) -> tuple[list[_Axis], list[float]]:
        """The axes, and the logarithms of the times, flat."""
        values = self.us
        for axis in range(values.ndim):  # noise aside, more work takes no less time
            values = np.maximum.accumulate(values, axis)
        logs = np.log(values)
        axes, stride = [], logs.size
        for axis, (name, points) in enumerate(self.axes):
            stride //= len(points)
            known = [math.log(p) for p in points]
            axes.append(_Axis(name, known, stride, _slopes(known, logs, axis)))
        return axes, logs.flatten().tolist()

    @classmethod
    def of(cls, names: tuple[str, ...], points: Mapping[tuple[float, ...], float]) -> Grid:
        """Return the grid of measured points: what is missing follows from a smaller one.

        Args:
            names: What the axes are called.
            points: Microseconds by sizes, one per axis. A grid over elements alone keeps sizes that
                lie a factor of 1.7 apart.
        """
        known = [sorted({sizes[i] for sizes in points}) for i in range(len(names))]
        if names == ("elements",):
            known = [_thin(known[0])]
        us = np.zeros([len(k) for k in known])
        for index in product(*(range(len(k)) for k in known)):
            sizes = tuple(k[i] for k, i in zip(known, index, strict=True))
            value = points.get(sizes)
            us[index] = value if value is not None else _grown(us, known, index)
        if not us.all():  # nothing smaller was measured: what is larger counts, in proportion
            for index in sorted(product(*(range(len(k)) for k in known)), reverse=True):
                us[index] = us[index] or _grown(us, known, index, step=1) or 1.0
        return cls(tuple(zip(names, (tuple(k) for k in known), strict=True)), us)

    def at(self, sizes: Mapping[str, float]) -> float:
        """Return the time in microseconds at some sizes: multilinear in the logarithms.

        It is monotone in every size, reproduces a monotone measurement, and outside the measured
        range goes on with the slope of the last interval, at most in proportion.
        """
        axes, values = self._logs
        corners, beyond = [(0, 1.0)], 0.0
        for axis in axes:
            at, known = math.log(max(sizes[axis.name], 1e-9)), axis.known
            if at <= known[0]:
                beyond += axis.slopes[0] * (at - known[0])
                continue
            high = bisect_left(known, at - 1e-12)
            if high == len(known):
                beyond += axis.slopes[1] * (at - known[-1])
                high, share = high - 1, 1.0
            else:
                share = min(1.0, (at - known[high - 1]) / (known[high] - known[high - 1]))
            step, low = high * axis.stride, (high - 1) * axis.stride
            if share == 1.0:
                corners = [(c + step, w) for c, w in corners]
            else:
                corners = [(c + low, w * (1.0 - share)) for c, w in corners] + [
                    (c + step, w * share) for c, w in corners
                ]
        return math.exp(sum(values[c] * w for c, w in corners) + beyond)

    def to_json(self) -> dict[str, Any]:
        """Return the grid as JSON data, times to four digits."""
        us = [float(f"{v:.4g}") for v in self.us.flatten()]
        return {"axes": {name: list(points) for name, points in self.axes}, "us": us}

    @classmethod
    def from_json(cls, data: Any) -> Grid:
        """Return the grid that `to_json` wrote; `ValueError` for anything else."""
        made = fit(data, GridFile)
        axes = tuple(made.axes.items())
        us = np.array(made.us, dtype=np.float64).reshape([len(p) for _, p in axes])
        if us.size == 0 or any(list(p) != sorted(set(p)) for _, p in axes):
            raise ValueError("a grid holds times above 0 at ascending sizes")
        return cls(axes, us)

    def scaled(self, factor: float) -> Grid:
        """Return the grid with every time multiplied."""
        return Grid(self.axes, self.us * factor)


class GridFile(msgspec.Struct):
    """What JSON holds of a grid."""

    axes: dict[str, tuple[Positive, ...]]
    us: list[Positive]


@dataclass(frozen=True)
class _Axis:
    """One size: the logarithms of its points, their stride, the slopes below and above them."""

    name: str
    known: list[float]
    stride: int
    slopes: tuple[float, float]


def _slopes(known: list[float], logs: np.ndarray, axis: int) -> tuple[float, float]:
    """Return what the logarithm of the time grows by below and above the measured range.

    A slope is the mean over the other axes, so that time stays monotone in them.
    """
    if len(known) == 1:
        return STEEPEST, STEEPEST
    ends = []
    for high, low in ((1, 0), (-1, -2)):
        rise = np.mean(np.take(logs, high, axis) - np.take(logs, low, axis))
        ends.append(min(STEEPEST, max(0.0, float(rise / (known[high] - known[low])))))
    return ends[0], ends[1]


def _thin(sizes: list[float]) -> list[float]:
    """Return sizes that lie a factor of 1.7 apart at least."""
    kept = sizes[:1]
    for size in sizes[1:]:
        if size > 1.7 * kept[-1]:
            kept.append(size)
    return kept


def _grown(
    us: np.ndarray, known: list[list[float]], index: tuple[int, ...], step: int = -1
) -> float:
    """Return a time in proportion to those of the neighbours one step away; 0 if there are none."""
    found = []
    for axis, at in enumerate(index):
        if not 0 <= at + step < len(known[axis]):
            continue
        near = tuple(i + step if a == axis else i for a, i in enumerate(index))
        if us[near]:
            found.append(us[near] * known[axis][at] / known[axis][at + step])
    return float(np.exp(np.mean(np.log(found)))) if found else 0.0
