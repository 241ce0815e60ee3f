"""`Int8Table`: a cost table of ONNX Runtime's kernels for bytes, which have stairs of their own.

Images of bytes lie with the channels last. A kernel makes a block of output channels at once, and
what is left over of a block costs nearly a whole one; less than one block is slower than one. It
sums inputs up by fours, and is slow where those do not come out even. A filter per channel takes
channels by blocks, and what is left over of those one by one.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from narrows.backends.measured.table import CostTable
from narrows.ir.costs import Costs
from narrows.ir.work import Work


@dataclass(frozen=True)
class Int8Table(CostTable):
    """What operators cost in ONNX Runtime once they are in integers."""

    def form(self, work: Work) -> str:
        """Return how a convolution is computed: ``blocked``, ``narrow`` (it makes less than a
        block), ``direct`` (it reads an image) or ``plain`` (its widths do not come out even)."""
        block, align = self.layout.block, self.layout.align
        if work.kind == "depthwise":
            return "plain" if work.outputs % block else "blocked"
        per = work.groups if work.kind == "grouped" else 1
        if work.inputs < align:
            return "direct"
        if work.inputs // per % align or work.outputs // per % align:
            return "plain"
        return "narrow" if work.outputs // per < block else "blocked"

    # A sum is an operator of its own, and a clip of codes is where they are rounded anyway: as
    # costs have it that know no fusions.
    fuses_sums = Costs.fuses_sums
    fused_seconds = Costs.fused_seconds

    @property
    def step(self) -> int:
        """The channels of a block."""
        return self.layout.block

    def fits(self, work: Work) -> bool:
        """Whether a convolution's widths come out even, or are an image's."""
        return self.form(work) != "plain"

    def _place(self, work: Work) -> tuple[float, ...]:
        # Widths on one stair are one place; what does not come out even has places of its own.
        form = {"blocked": 0.0, "narrow": 5.0, "plain": 10.0, "direct": 15.0}[self.form(work)]
        pad = self.layout.padded if form == 0.0 else int
        return (form, math.log(work.inputs), math.log(pad(work.outputs)), math.log(work.batch))

    def _convolution(self, work: Work) -> float:
        form = self.form(work)
        if form == "blocked" and work.kind == "conv":
            work = dataclasses.replace(work, outputs=self.layout.padded(work.outputs))
        return self._windowed(form, work)
