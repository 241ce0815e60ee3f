"""`widen_outliers`: 16 bits for the tensors that a few large channels leave too few codes.

A trained encoder has residual channels that are a hundred times the others. One grid a tensor has
the steps that the largest channel asks for, and most channels are smaller than a step or two then.
No way to choose the exponent mends that, codes of 16 bits do. They cost time, so only tensors have
them whose typical channel keeps little, and of these no more than the outputs need, as held-back
samples say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from narrows.ir.integer.grid import BITS
from narrows.ir.meta import Meta
from narrows.ir.program import Note, Program
from narrows.passes.quant.plan import QuantPlan
from narrows.passes.quant.watch import Watch, summed_axis

KEPT = 30.0  # dB that the median channel keeps at least; 8 bits leave channels that are alike 40
FEW = 4  # channels, below which there is nothing to tell of a typical one
APART = 8.0  # times the median channel is an outlier, by root mean squares
SHOWN = 4  # channels that are named

WORTH = 0.5  # what is left of the loss, at most, or wide codes are not worth their time
ENOUGH = 0.5  # a loss that no further tensors are widened for
MORE = 1.1  # times the loss with all of them may be that with fewer


@dataclass(frozen=True)
class Outliers:
    """A tensor whose largest channels leave its typical one too few codes.

    Attributes:
        node: What makes it.
        axis: Along which they lie.
        channels: Those that are far larger than the median one, the largest first.
        count: How many channels there are.
        times: How many times the median channel the largest is, by root mean squares.
        kept: The ratio of the median channel to the noise of rounding, in dB.
    """

    node: fx.Node
    axis: int
    channels: tuple[int, ...]
    count: int
    times: float
    kept: float

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.channels[:SHOWN]))
        more = len(self.channels) - SHOWN
        shown += f" and {more:,} more" if more > 0 else ""
        return (
            f"of {self.count:,} channels on axis {self.axis}, {shown} have up to {self.times:.3g} "
            f"times the size of the median one, which keeps {self.kept:.1f} dB in {BITS[-1]} bits"
        )

    def note(self, reason: str, text: str) -> Note:
        """Return what is to be said of the tensor."""
        return Note(self.node.name, reason, f"{text}: {self}", 0, Meta(self.node).source)


def outliers(watch: Watch, plan: QuantPlan) -> list[Outliers]:
    """Return the tensors of 8 bits whose median channel keeps too little, the poorest first."""
    made = []
    for node in watch.sizes:
        grid = plan.activations.get(node.name)
        if grid is None or grid.bits != BITS[-1] or node in watch.joined:
            continue
        looked = [_looked(node, a, s, grid.scale) for a, s in watch.mean_squares(node).items()]
        made += sorted(filter(None, looked), key=lambda o: o.kept)[:1]
    return sorted(made, key=lambda o: o.kept)


def _looked(node: fx.Node, axis: int, squares: Tensor, step: float) -> Outliers | None:
    """Return the outliers among the mean squares of channels, if these leave the others little."""
    alive = squares[squares > 0]
    if len(alive) < FEW:
        return None
    median = float(alive.median())
    far = int((squares > APART**2 * median).sum())
    kept = 10 * math.log10(median / (step**2 / 12))
    if kept >= KEPT or not far:
        return None
    largest = tuple(squares.argsort(descending=True)[:far].tolist())
    times = math.sqrt(float(squares.max()) / median)
    return Outliers(node, axis, largest, len(squares), times, kept)


def widen_outliers(
    found: Sequence[Outliers], loss: float, lost: Callable[[frozenset[str]], float]
) -> tuple[tuple[Outliers, ...], float]:
    """Return the tensors that get 16 bits, and what the outputs lose then.

    Args:
        found: The tensors that may, the poorest first.
        loss: What the outputs lose without.
        lost: What they lose where the tensors of some names have 16 bits.
    """
    if not found:
        return (), loss

    def tried(count: int) -> float:
        return lost(frozenset(o.node.name for o in found[:count]))

    best = tried(len(found))
    if best > WORTH * loss:
        return (), loss
    enough = max(ENOUGH, MORE * best)
    low, high = 1, len(found)
    while low < high:
        middle = (low + high) // 2
        left = tried(middle)
        if left <= enough:
            high, best = middle, left
        else:
            low = middle + 1
    return tuple(found[:high]), best


def notes_of_outliers(
    widened: Sequence[Outliers], found: Sequence[Outliers], narrow: dict[fx.Node, str]
) -> Iterator[Note]:
    """Yield which tensors got 16 bits, and which cannot have them."""
    for one in widened:
        yield one.note("wide", "has 16 bits")
    for one in found:
        if one.node in narrow:
            yield one.note("narrow", f"has {BITS[-1]} bits, as {narrow[one.node]}")


def weight_shares(program: Program, watch: Watch, plan: QuantPlan) -> dict[str, float]:
    """Return per weight what share of its layer's result its own rounding takes.

    Every weight of an output channel is rounded on the same steps. Those of an outlier channel may
    be as small as it is large, and then nothing is left of them. By variances, as the mean error
    is taken from the bias.
    """
    shares: dict[str, float] = {}
    for node in watch.found.layers():
        layer = watch.found.forms[node].weights(node)
        assert layer is not None
        name, operand = str(layer.weight.target), watch.found.forms[node].operands(node)[0]
        axis = summed_axis(watch.found, node)
        squares, mean = watch.mean_squares(operand).get(axis), watch.mean_input(operand, axis)
        weight, grid = program.tensor(layer.weight).detach().double(), plan.weights.get(name)
        if grid is None or squares is None or mean is None or layer.axis:
            continue
        if len(mean) != weight.shape[1]:  # it has groups
            continue
        spread = (squares - mean**2).clamp(min=0)
        steps = torch.tensor(grid.along(tuple(weight.shape)), dtype=torch.float64).neg().exp2()
        taps = weight.flatten(2).shape[2] if weight.dim() > 2 else 1
        noise = taps * (steps**2).mean() / 12 * spread.sum()
        made = (weight.square().reshape(*weight.shape[:2], -1).sum(2) @ spread).mean()
        shares[name] = float(noise / made) if made > 0 else 0.0
    return shares


__all__ = ["Outliers", "notes_of_outliers", "outliers", "weight_shares", "widen_outliers"]
