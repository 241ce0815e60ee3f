"""`ReorderChannels`: one order for the channels of every tensor, so that readers read intervals.

A layer that reads a part of a tensor's channels needs them side by side; where they are an
interval, a slice will do, which eager PyTorch takes as a view. Channels may stand in any order as
long as everything that touches them agrees, so the order is chosen for all readers at once: the
consecutive-ones problem (`narrows.passes.forms.families`). Reordering for copies is UPSCALE's idea
(Wan et al., arXiv 2307.08771).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from narrows.ir.program import Program, Pruning
from narrows.passes.base import Fidelity, Pass, PassResult
from narrows.passes.pruning.stages import order, result_of


@dataclass(frozen=True)
class ReorderChannels(Pass):
    """Permutes channels so that what a layer reads lies side by side."""

    name: ClassVar[str] = "reorder-channels"
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT
    requires: ClassVar[tuple[str, ...]] = ("prune-channels",)

    def run(self, program: Program) -> PassResult:
        """Return the program with its channels reordered; a note per order says what it serves."""
        return result_of(program, order(Pruning.of(program)))
