"""`Watch`: what calibration sees of a network, while the data streams through it once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from narrows.ir.meta import Meta, shape_of
from narrows.ir.ops.args import arguments
from narrows.ir.program import Note, Program
from narrows.passes.quant.batches import batches
from narrows.passes.quant.merges import without_masks
from narrows.passes.quant.observe import Histogram
from narrows.passes.quant.parts import NOTHING, Labels, Parts
from narrows.passes.quant.survey import Survey


class Watch:
    """Histograms of every site, and the mean input of every layer, while a program runs.

    Attributes:
        found: What works on codes in the program.
        parts: Where the parts of its concatenations go.
        histograms: Of every site.
        joined: Of the parts that a tensor holds, by tensor and by label, with their places.
        merged: What a tensor is put together of, element by element.
        beside: The histograms of that.
        energies: Of every site the sum of the squares per channel: axis 1 of an image, else the
            last one.
        sizes: Of every site the sums of the squares along axis 1, and along the last: two tensors
            by axis; of the first sample of every batch. An outlier channel shows in any sample.
    """

    def __init__(
        self, found: Survey, parts: Parts, merged: Mapping[fx.Node, list[fx.Node]] | None = None
    ) -> None:
        self.found, self.parts = found, parts
        self.merged = {} if merged is None else merged
        self._own = {n: Histogram() for n in found.sites}
        self.histograms = dict(self._own)
        held = {**parts.labels, **parts.single}
        kept = {n for n, _ in parts.sources} | (self.histograms.keys() & held.keys())
        self._lent: set[Histogram] = set()  # filled where they belong
        self.held = {n: x for n in kept if isinstance(x := held[n], Labels)}
        self.joined = {n: self._apart(n, labels) for n, labels in self.held.items()}
        inner = {x for each in self.merged.values() for x in each}
        self.beside = {x: self.histograms.get(x, Histogram()) for x in inner}
        for histogram in self.beside.values():
            histogram.whole = True  # a mask is told by what it does not hold
        self.energies: dict[fx.Node, Tensor] = {}
        self.sizes: dict[fx.Node, dict[int, Tensor]] = {}
        self._sampled: dict[fx.Node, int] = {}
        self.layers: dict[fx.Node, set[int]] = {}  # what layers read, and along which axes
        for node in found.layers():
            operand = found.forms[node].operands(node)[0]
            self.layers.setdefault(operand, set()).add(summed_axis(found, node))
        self.totals: dict[tuple[fx.Node, int], Tensor] = {}
        self.seen: dict[tuple[fx.Node, int], int] = {}
        self._observed = {*self.histograms, *self.layers, *self.joined, *self.beside}

    def _apart(self, node: fx.Node, labels: Labels) -> dict[int, tuple[Tensor, Histogram]]:
        """Return per part of a tensor its places and its histogram: a new one to fill, or that of
        the very tensor that is joined here."""
        along = torch.tensor(labels.along)
        return {
            label: ((along == label).nonzero().flatten(), self._lend(node, label))
            for label in sorted(set(labels.along) - {NOTHING})
        }

    def _lend(self, node: fx.Node, label: int) -> Histogram:
        cat, index = self.parts.sources[label - 1]
        operand = arguments(cat)["tensors"][index]
        if node is not cat or operand in self.held or operand not in self.histograms:
            return Histogram()
        self._lent.add(self.histograms[operand])
        return self.histograms[operand]

    def run(
        self,
        program: Program,
        data: Iterable[Any] | None,
        hold_back: Callable[[list[Any]], list[Any] | None] | None = None,
    ) -> int:
        """Run the program on all data, or on what ``hold_back`` leaves of each batch; return how
        many batches there were."""
        count = 0
        for flat in batches(program, data, "calibrating"):
            count += 1
            left = flat if hold_back is None else hold_back(flat)
            if left is not None:
                self.take(program, left)
        self.settle()
        return count

    def take(self, program: Program, flat: list[Any]) -> None:
        """Run the program on one batch; `settle` comes after the last."""
        with torch.no_grad():
            program.run_flat(flat, observe=self._observe)

    def settle(self) -> None:
        """Put together what was seen of parts and masks. More may be seen, and settled again."""
        self.histograms = dict(self._own)
        for node in self.histograms.keys() & self.joined.keys():
            each = (h for _, h in self.joined[node].values())
            made = functools.reduce(Histogram.joined, each)
            self.histograms[node] = made
            self.beside |= {node: made} if node in self.beside else {}
        self.histograms |= without_masks(self.found, self.merged, self.histograms, self.beside)

    def _observe(self, node: fx.Node, value: Any) -> None:
        if node not in self._observed:
            return
        if node in self.joined:
            axis = self.held[node].axis
            for places, histogram in self.joined[node].values():
                if histogram not in self._lent:
                    histogram.add(value.index_select(axis, places.to(value.device)))
        elif node in self._own:
            self._own[node].add(value)
        elif node in self.beside:
            self.beside[node].add(value)
        axis = 1 if value.dim() > 3 else value.dim() - 1
        free = Meta(node).dynamic  # batches may differ in size there
        if node in self.histograms and value.dim() > 1 and axis not in free:
            found = _along(value, axis, squared=True)
            self.energies[node] = self.energies.get(node, 0) + found
        if node in self.histograms and value.dim() > 1:
            one = value if value.dim() == 2 else value[:1]
            self._sampled[node] = self._sampled.get(node, 0) + one.numel()
            sums = self.sizes.setdefault(node, {})
            for axis in {1, value.dim() - 1} - set(free):
                sums[axis] = sums.get(axis, 0) + _along(one, axis, squared=True)
        for axis in self.layers.get(node, set()) - set(free):
            total = _along(value, axis)
            key = (node, axis)
            self.totals[key] = self.totals.get(key, 0) + total
            self.seen[key] = self.seen.get(key, 0) + value.numel() // total.numel()

    def mean_squares(self, node: fx.Node) -> dict[int, Tensor]:
        """Return the mean squares of the channels of a site, by the axis that they may lie on."""
        sums = self.sizes.get(node, {})
        return {axis: each * len(each) / self._sampled[node] for axis, each in sums.items()}

    def mean_input(self, node: fx.Node, axis: int) -> Tensor | None:
        """Return the mean of a layer's input per channel, in float64."""
        key = (node, axis)
        return self.totals[key] / self.seen[key] if key in self.totals else None

    def notes(self) -> Iterable[Note]:
        """Yield what is odd about the data."""
        for node, histogram in self.histograms.items():
            if histogram.constant and node.op != "get_attr":
                text = f"it was {histogram.high + 0.0:g} throughout the calibration data"
                yield Note(node.name, "constant", text, 0, Meta(node).source)


def summed_axis(found: Survey, layer: fx.Node) -> int:
    """Return along which axis of its operand the channels lie that a layer sums over."""
    weights = found.forms[layer].weights(layer)
    assert weights is not None
    if len(shape_of(weights.weight)) > 2:
        return 1
    return len(shape_of(found.forms[layer].operands(layer)[0])) - 1


def _along(value: Tensor, axis: int, *, squared: bool = False) -> Tensor:
    """Return the sums over all axes but one, of the numbers or of their squares.

    Those of one sample are taken in its own dtype, and added up in float64.
    """
    value = value.detach()
    value = value if value.is_floating_point() else value.float()
    other = [a for a in range(1, value.dim()) if a != axis]
    if not other:
        each = value.double().square() if squared else value.double()
    elif not squared:
        each = value.sum(other).double()
    elif axis == 1:
        each = torch.linalg.vector_norm(value, dim=other).double().square()
    else:
        each = value.square().sum(other).double()
    return each if axis == 0 else each.sum(0)


__all__ = ["Watch", "summed_axis"]
