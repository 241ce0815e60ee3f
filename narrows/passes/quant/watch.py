"""`Watch`: what calibration sees of a network, while the data streams through it once."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from narrows.ir.meta import Meta
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
    """

    def __init__(
        self, found: Survey, parts: Parts, merged: Mapping[fx.Node, list[fx.Node]] | None = None
    ) -> None:
        self.found, self.parts = found, parts
        self.merged = {} if merged is None else merged
        self.histograms = {n: Histogram() for n in found.sites}
        held = {**parts.labels, **parts.single}
        kept = {n for n, _ in parts.sources} | (self.histograms.keys() & held.keys())
        self.held = {n: x for n in kept if isinstance(x := held[n], Labels)}
        self.joined = {n: _apart(labels) for n, labels in self.held.items()}
        inner = {x for each in self.merged.values() for x in each}
        self.beside = {x: self.histograms.get(x, Histogram()) for x in inner}
        self.energies: dict[fx.Node, Tensor] = {}
        self.layers = {found.forms[n].operands(n)[0]: 0 for n in found.layers()}
        self.totals: dict[tuple[fx.Node, int], Tensor] = {}
        self.seen: dict[tuple[fx.Node, int], int] = {}
        self._observed = {*self.histograms, *self.layers, *self.joined, *self.beside}

    def run(self, program: Program, data: Iterable[Any] | None) -> int:
        """Run the program on all data; return how many batches there were."""
        count = 0
        for flat in batches(program, data, "calibrating"):
            with torch.no_grad():
                program.run_flat(flat, observe=self._observe)
            count += 1
        for node in self.histograms.keys() & self.joined.keys():
            each = (h for _, h in self.joined[node].values())
            made = functools.reduce(Histogram.joined, each)
            self.histograms[node] = made
            self.beside |= {node: made} if node in self.beside else {}
        self.histograms |= without_masks(self.found, self.merged, self.histograms, self.beside)
        return count

    def _observe(self, node: fx.Node, value: Any) -> None:
        if node not in self._observed:
            return
        if node in self.joined:
            axis = self.held[node].axis
            for places, histogram in self.joined[node].values():
                histogram.add(value.index_select(axis, places.to(value.device)))
        elif node in self.histograms:
            self.histograms[node].add(value)
        elif node in self.beside:
            self.beside[node].add(value)
        axis = 1 if value.dim() > 3 else value.dim() - 1
        free = Meta(node).dynamic  # batches may differ in size there
        if node in self.histograms and value.dim() > 1 and axis not in free:
            other = [a for a in range(value.dim()) if a != axis]
            found = value.detach().double().square().sum(other)
            self.energies[node] = self.energies.get(node, 0) + found
        if node in self.layers and value.dim() > 1:
            # Per channel of a convolution's input; the channels of a linear layer's come last.
            for axis in {1, value.dim() - 1} - set(free):
                other = [a for a in range(value.dim()) if a != axis]
                total = value.detach().double().sum(other)
                key = (node, axis)
                self.totals[key] = self.totals.get(key, 0) + total
                self.seen[key] = self.seen.get(key, 0) + value.numel() // total.numel()

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


def _apart(labels: Labels) -> dict[int, tuple[Tensor, Histogram]]:
    """Return per part of a tensor its places, and a histogram to fill."""
    along = torch.tensor(labels.along)
    return {
        label: ((along == label).nonzero().flatten(), Histogram())
        for label in sorted(set(labels.along) - {NOTHING})
    }


__all__ = ["Watch"]
