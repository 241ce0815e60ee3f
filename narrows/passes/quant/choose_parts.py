"""`choose_parts`: by which powers of two the parts of concatenations are multiplied.

A part that is much smaller than what it is joined to has few codes on the common grid. Multiplied,
it has more; but a layer that reads it divides the columns of its weight by the same power, and
these have fewer then. So powers are chosen by an estimate of the noise at all that reads the parts:
rounding of a part costs ``step**2 / 12``, which the weights carry on; rounding of a layer's weights
costs that of their step, which the parts' mean squares carry on.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from narrows.errors import UsageError
from narrows.ir.integer.grid import WeightGrid
from narrows.ir.meta import shape_of
from narrows.ir.ops.args import arguments
from narrows.ir.program import Program
from narrows.passes.quant.observe import Histogram
from narrows.passes.quant.parts import NOTHING, Parts, columns, find_parts
from narrows.passes.quant.scale_parts import Scaling
from narrows.passes.quant.survey import survey
from narrows.passes.quant.watch import Watch

BITS = 8  # at which the natural grids of parts are compared; only their distance counts
MOST = 24  # the largest power: what is further apart is nothing beside the rest
GAIN = 0.5  # powers that do not take half of the noise are not worth having
ENOUGH = 10**-2.5  # noise to signal of a part that is not lost: 25 dB
PRICE = 1.25  # what that may cost in noise


@dataclass(frozen=True)
class Reading:
    """How a layer reads parts.

    Attributes:
        energy: The sum of the squared weights, ``[outputs, parts]``.
        largest: The largest magnitude of a weight, likewise.
        count: How many weights there are, likewise.
    """

    energy: Tensor
    largest: Tensor
    count: Tensor

    def noise(self, powers: Tensor, rounding: Tensor, squares: Tensor, top: float) -> float:
        """Return the noise of the layer's sums, relative to their size, as the mean of its outputs.

        Args:
            powers: Per part.
            rounding: Per part, the mean squared error of its rounding.
            squares: Per part, the mean of its squares.
            top: The largest code of a weight.
        """
        step = (self.largest * torch.exp2(-powers)).amax(1) / top
        rounded = (self.count * torch.exp2(2 * powers) * squares).sum(1) * step**2 / 12
        carried = (self.energy * rounding).sum(1)
        signal = (self.energy * squares).sum(1)
        alive = signal > 0
        return float(((rounded + carried)[alive] / signal[alive]).sum()) / max(len(signal), 1)


@dataclass(frozen=True)
class Family:
    """Parts that are joined to each other, directly or by way of others.

    Attributes:
        leaders: Their labels.
        exponents: Of the grid that each would have alone.
        squares: The mean of the squares of each.
        layers: How layers read them.
        exact: Indices of those that something reads as they are.
        read: Indices of those that anything reads.
    """

    leaders: list[int]
    exponents: list[int]
    squares: Tensor
    layers: list[Reading]
    exact: list[int]
    read: list[int]

    def rounding(self, powers: Sequence[int]) -> Tensor:
        """Return the mean squared error of every part's rounding."""
        common = min(e - p for e, p in zip(self.exponents, powers, strict=True))
        given = torch.tensor(powers, dtype=torch.float64)
        # A part of which nothing is left costs all that it was, and no more.
        return torch.minimum(torch.exp2(-2 * (common + given)) / 12, self.squares)

    def noise(self, powers: Sequence[int], top: float) -> float:
        """Return the estimate of the noise at all readers, each relative to what it reads."""
        given, rounding = torch.tensor(powers, dtype=torch.float64), self.rounding(powers)
        found = sum(x.noise(given, rounding, self.squares, top) for x in self.layers)
        return found + sum(float(rounding[i] / self.squares[i]) for i in self.exact)

    def choose(self, top: float) -> list[int]:
        """Return the powers of the least noise; none where they are not worth it, but for parts
        that would be lost."""
        none = [0] * len(self.exponents)
        before = self.noise(none, top)
        powers, least = self._descended(top)
        if not least < GAIN * before:
            powers = none
        kept = self._rescued(powers)
        return kept if self.noise(kept, top) <= PRICE * before else powers

    def _descended(self, top: float) -> tuple[list[int], float]:
        room = [min(e - min(self.exponents), MOST) for e in self.exponents]
        powers = [0] * len(room)
        best, moved = self.noise(powers, top), True
        while moved:
            moved = False
            for i in range(len(room)):
                for power in range(powers[i] + 1, room[i] + 1):
                    tried = [*powers[:i], power, *powers[i + 1 :]]
                    noise = self.noise(tried, top)
                    if noise < best * (1 - 1e-6):
                        powers, best, moved = tried, noise, True
        return powers, best

    def _rescued(self, powers: Sequence[int]) -> list[int]:
        """Return powers under which every part that is read keeps something.

        What a reader hardly makes use of may as well have few codes in its weights.
        """
        made = list(powers)
        least = min(e - p for e, p in zip(self.exponents, made, strict=True))
        for i, exponent in enumerate(self.exponents):
            while made[i] < min(exponent - least, MOST) and i in self.read:
                if float(self.rounding(made)[i]) < ENOUGH * float(self.squares[i]):
                    break
                made[i] += 1
        return made


def choose_parts(
    program: Program, watch: Watch, method: str, percentile: float, coding: Any = 8
) -> list[int]:
    """Return the power of every label.

    Args:
        program: The prepared program.
        watch: What was seen of it.
        method: How exponents are chosen.
        percentile: For the method of that name.
        coding: Of the weights, where it is one for all.
    """
    parts = watch.parts
    powers = [0] * (len(parts.sources) + 1)
    top = WeightGrid.spelled(coding if isinstance(coding, int | str) else 8).high
    for leaders in _families(parts):
        family = _family(program, watch, leaders, method, percentile)
        if family is not None:
            for leader, power in zip(family.leaders, family.choose(top), strict=True):
                powers[leader] = power
    return [powers[parts.leader(label)] for label in range(len(powers))]


def by_name(parts: Parts, powers: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Return the powers of the operands of every concatenation that has any."""
    found: dict[str, list[int]] = {}
    for label, (cat, index) in enumerate(parts.sources, 1):
        row = found.setdefault(cat.name, [0] * len(arguments(cat)["tensors"]))
        row[index] = powers[label]
    return {name: tuple(row) for name, row in found.items() if any(row)}


def _families(parts: Parts) -> list[list[int]]:
    """Return the leading labels that are joined to each other."""
    families: list[set[int]] = []
    for node in parts.labels:
        labels = parts.of(node)
        if labels is None:
            continue
        here = set(parts.leaders(labels)) - {NOTHING}
        joined = [f for f in families if f & here]
        families = [f for f in families if not f & here] + [here.union(*joined)]
    return [sorted(f) for f in families if len(f) > 1]


def _family(
    program: Program, watch: Watch, leaders: list[int], method: str, percentile: float
) -> Family | None:
    """Return what decides the powers of some parts; ``None`` where they have none."""
    seen = {x: h for x in leaders if (h := histogram_of(watch, x)) is not None}
    if len(seen) < 2 or not all(h.finite for h in seen.values()):
        return None
    negative = any(h.low < 0 for h in seen.values())
    try:
        exponents = [h.grid(method, BITS, percentile, negative).exponent for h in seen.values()]
    except UsageError:  # a range that no grid holds; calibration tells which
        return None
    squares = [h.energy / h.total for h in seen.values()]
    leaders = list(seen)
    layers = [r for n in watch.parts.absorbed if (r := _reading(program, watch, n, leaders))]
    as_they_are, anyhow = watch.parts.read_as_they_are(), watch.parts.read_at_all()
    exact, read = (
        [i for i, x in enumerate(leaders) if x in known] for known in (as_they_are, anyhow)
    )
    made = torch.tensor(squares, dtype=torch.float64)
    return Family(leaders, exponents, made, layers, exact, read)


def histogram_of(watch: Watch, leader: int) -> Histogram | None:
    """Return the histogram of the parts with a leading label; ``None`` if all was zero."""
    each = [
        watch.joined[cat][label][1]
        for label, (cat, _) in enumerate(watch.parts.sources, 1)
        if watch.parts.leader(label) == leader
    ]
    if not each:
        return None
    made = functools.reduce(Histogram.joined, each)
    return None if made.power is None else made


def _reading(
    program: Program, watch: Watch, node: fx.Node, leaders: Sequence[int]
) -> Reading | None:
    """Return how a layer reads some parts; ``None`` if it reads others."""
    form: Any = watch.found.forms[node]
    labels = watch.parts.of(form.operands(node)[0])
    assert labels is not None
    led = watch.parts.leaders(labels)
    if not set(leaders) & set(led):
        return None
    layer = form.weights(node)
    weight = program.tensor(layer.weight).detach().double().cpu()
    which = columns(form, layer, node, led).expand(weight.shape)
    weight, which = (x.movedim(layer.axis, 0).flatten(1) for x in (weight, which))
    masks = [(which == leader).double() for leader in leaders]
    return Reading(
        torch.stack([(weight**2 * m).sum(1) for m in masks], 1),
        torch.stack([(weight.abs() * m).amax(1) for m in masks], 1),
        torch.stack([m.sum(1) for m in masks], 1),
    )


# ------------------------------------------------------------------ what was seen, scaled


def scaled(program: Program, watch: Watch, powers: Sequence[int]) -> tuple[Program, Watch]:
    """Return the program with its parts scaled, and what would have been seen of it.

    Args:
        program: The prepared program.
        watch: What was seen of it.
        powers: Per label.
    """
    made = program.copy()
    floats = [n.name for n in watch.found.floats]
    own = survey(made, floats=floats)
    scaling = Scaling(made, own, find_parts(made, own), powers)
    scaling.run()
    old = {n.name: n for n in program.graph.nodes}
    found = survey(made, floats=floats)
    result = Watch(found, Parts())
    for site in found.sites:
        result.histograms[site] = _histogram(watch, old, powers, site)
    for node in result.layers:
        name = scaling.restored.get(node.name)
        before = old[name or node.name]
        labels = None if name else watch.parts.of(before)
        for axis in {1, len(shape_of(node)) - 1}:
            if (before, axis) not in watch.totals:
                continue
            total = watch.totals[before, axis]
            if labels is not None and labels.axis == axis:
                total = total * torch.exp2(torch.tensor([float(powers[x]) for x in labels.along]))
            result.totals[node, axis] = total
            result.seen[node, axis] = watch.seen[before, axis]
    return made.seal(), result


def _histogram(
    watch: Watch, old: Mapping[str, fx.Node], powers: Sequence[int], site: fx.Node
) -> Histogram:
    """Return the histogram of a site of the scaled program."""
    before = old.get(site.name)
    if before is None:  # what an island gave, multiplied: the part itself
        (operand,) = site.all_input_nodes
        return watch.histograms[old[operand.name]].times(_log2(site.args[1]))
    if before not in watch.joined:
        return watch.histograms[before]
    each = [h.times(powers[x]) for x, (_, h) in watch.joined[before].items()]
    return functools.reduce(Histogram.joined, each)


def _log2(factor: Any) -> int:
    return round(torch.log2(torch.tensor(float(factor), dtype=torch.float64)).item())


__all__ = ["by_name", "choose_parts", "histogram_of", "scaled"]
