"""LASSO: the order in which channels drop out of a sparse fit of the layer's result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from narrows.ir.program import Program
from narrows.ir.structure.layers import Layer
from narrows.passes.choosing.criteria.base import Sums
from narrows.passes.choosing.criteria.filters import blocks
from narrows.passes.choosing.criteria.obc import Reading

RIDGE = 1e-6  # relative to the mean diagonal: a channel that is a sum of others has no inverse


@dataclass(frozen=True)
class Lasso(Reading):
    """The penalty at which a channel drops out of a fit of the layer's result, the largest first.

    Per layer ``min over b of 1/2 mean |Y - sum_i b_i X_i W_i|^2 + penalty * |b|_1``: at penalty 0
    every ``b_i`` is 1, and as it rises channels drop out. The whole path is followed exactly (Efron
    et al., Least Angle Regression, 2004), on the moments of ``X_i W_i``.
    """

    name: ClassVar[str] = "lasso"
    paper: ClassVar[str] = (
        "He et al., Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017"
    )

    def weigh(self, program: Program, layer: Layer, side: str, sums: Sums) -> np.ndarray:
        """Return the penalties."""
        weights = blocks(program, layer).double().flatten(2)  # [groups, outputs, columns]
        mean = sums["gram"] / sums["rows"]
        products = mean * (weights.transpose(1, 2) @ weights)
        inputs = layer.inputs // layer.groups
        taps = products.shape[1] // inputs
        moments = products.reshape(-1, inputs, taps, inputs, taps).sum((2, 4))
        return np.concatenate([drops(m) for m in moments.numpy()])


def drops(moments: np.ndarray) -> np.ndarray:
    """Return the largest penalty at which each coefficient of a LASSO is not zero.

    The LASSO is ``1/2 b A b - b A 1 + penalty * |b|_1``.

    Args:
        moments: ``A``, float64: ``[channels, channels]``, symmetric, not negative.
    """
    count = len(moments)
    result = np.zeros(count)
    ridge = RIDGE * moments.diagonal().mean()
    if not ridge > 0:
        return result
    path = Path(moments + ridge * np.eye(count))
    while result.min() == 0:
        joined = path.step()
        if joined is None:  # the penalty is 0
            break
        result[joined] = max(result[joined], path.penalty)
    return result


class Path:
    """The solutions of a LASSO from the penalty at which all coefficients are zero, down to 0.

    Between two events all coefficients are linear in the penalty. At one, a coefficient leaves zero
    or comes back to it.
    """

    def __init__(self, a: np.ndarray) -> None:
        self.a, self.left = a, a.sum(1)  # the gradient of the squared error, its sign turned
        self.penalty = float(np.abs(self.left).max())
        self.active: list[int] = []
        self.found = np.zeros(len(a))
        self.room = np.empty(a.shape)
        self.inverse = self.room[:0, :0]  # of the active rows and columns of `a`
        self.lost = -1  # which coefficient came back to zero last

    def step(self) -> int | None:
        """Go on until a coefficient leaves zero, and return which one; ``None`` at penalty 0."""
        if not self.active:
            return self.join(int(np.abs(self.left).argmax()))
        while True:
            way = self.inverse @ np.sign(self.left[self.active])
            whole = np.zeros(len(self.a))
            whole[self.active] = way
            slope = self.a @ whole
            length, joins = self.nearest(slope)
            with np.errstate(divide="ignore", invalid="ignore"):
                ends = -self.found[self.active] / way
            ends[~(ends > 0)] = np.inf
            back = int(ends.argmin())
            length = min(length, float(ends[back]), self.penalty)
            self.found[self.active] += length * way
            self.left -= length * slope
            self.penalty -= length
            if self.penalty <= 0:
                return None
            if length < ends[back]:
                return self.join(joins)
            self.leave(back)

    def nearest(self, slope: np.ndarray) -> tuple[float, int]:
        """Return how far the penalty falls until another coefficient leaves zero, and which."""
        with np.errstate(divide="ignore", invalid="ignore"):
            lengths = np.stack([
                (self.penalty - self.left) / (1 - slope), (self.penalty + self.left) / (1 + slope)
            ])  # fmt: skip
        lengths = np.where(np.isfinite(lengths), np.maximum(lengths, 0), np.inf)
        if self.lost >= 0:  # it stands at the penalty, and must not leave zero as it came
            lengths[lengths[:, self.lost] <= 1e-12 * self.penalty, self.lost] = np.inf
        lengths[:, self.active] = np.inf
        return float(lengths.min()), int(lengths.min(0).argmin())

    def join(self, index: int) -> int:
        """Let a coefficient leave zero, and return it."""
        v = self.inverse @ self.a[self.active, index]
        rest = self.a[index, index] - self.a[self.active, index] @ v
        self.inverse += np.multiply.outer(v, v / rest)
        count = len(v)
        self.inverse = self.room[: count + 1, : count + 1]
        self.inverse[count, :count] = self.inverse[:count, count] = -v / rest
        self.inverse[count, count] = 1 / rest
        self.active.append(index)
        self.lost = -1
        return index

    def leave(self, place: int) -> None:
        """Hold the active coefficient of a place at zero."""
        edge, own = np.delete(self.inverse[place], place), self.inverse[place, place]
        rest = np.delete(np.delete(self.inverse, place, 0), place, 1)
        self.inverse = self.room[: len(edge), : len(edge)]
        self.inverse[:] = rest - np.multiply.outer(edge, edge / own)
        self.lost = self.active.pop(place)
        self.found[self.lost] = 0.0
