"""`Watch`: what calibration sees of a network, while the data streams through it once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from narrows.ir.program import Meta, Note, Program
from narrows.passes.quant.batches import batches
from narrows.passes.quant.observe import Histogram
from narrows.passes.quant.survey import Survey


class Watch:
    """Histograms of every site, and the mean input of every layer, while a program runs."""

    def __init__(self, program: Program, found: Survey) -> None:
        self.found = found
        self.histograms = {n: Histogram() for n in found.sites}
        self.layers = {found.forms[n].operands(n)[0]: 0 for n in found.layers()}
        self.totals: dict[fx.Node, Tensor] = {}
        self.seen: dict[fx.Node, int] = {}
        self._observed = {*self.histograms, *self.layers}

    def run(self, program: Program, data: Iterable[Any] | None) -> int:
        """Run the program on all data; return how many batches there were."""
        count = 0
        for flat in batches(program, data, "calibrating"):
            with torch.no_grad():
                program.run_flat(flat, observe=self._observe)
            count += 1
        return count

    def _observe(self, node: fx.Node, value: Any) -> None:
        if node not in self._observed:
            return
        if node in self.histograms:
            self.histograms[node].add(value)
        if node in self.layers and value.dim() > 1:
            # Per channel of a convolution's input; the channels of a linear layer's come last.
            for axis in {1, value.dim() - 1}:
                other = [a for a in range(value.dim()) if a != axis]
                total = value.detach().double().sum(other)
                key = (node, axis)
                self.totals[key] = self.totals.get(key, 0) + total  # type: ignore[index]
                self.seen[key] = self.seen.get(key, 0) + value.numel() // total.numel()  # type: ignore

    def mean_input(self, node: fx.Node, axis: int) -> Tensor | None:
        """Return the mean of a layer's input per channel, in float64."""
        key: Any = (node, axis)
        return self.totals[key] / self.seen[key] if key in self.totals else None

    def notes(self) -> Iterable[Note]:
        """Yield what is odd about the data."""
        for node, histogram in self.histograms.items():
            if histogram.constant and node.op != "get_attr":
                text = f"it was {histogram.high + 0.0:g} throughout the calibration data"
                yield Note(node.name, "constant", text, 0, Meta(node).source)


__all__ = ["Watch"]
