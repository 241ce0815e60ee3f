"""`ReorderChannels`: one order for the channels of every tensor, so that readers read intervals.

A layer that reads a part of a tensor's channels needs them side by side; where they are an
interval, a slice will do, which eager PyTorch takes as a view. Channels may stand in any order as
long as everything that touches them agrees, so the order is chosen for all readers at once: the
consecutive-ones problem (`narrows.passes.forms.families`). Reordering for copies is UPSCALE's idea
(Wan et al., arXiv 2307.08771).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from narrows.ir.program import Note, Program
from narrows.passes.base import Fidelity, Pass, PassResult
from narrows.passes.forms.families import orders
from narrows.passes.prune_channels import emit, is_idle


@dataclass(frozen=True)
class ReorderChannels(Pass):
    """Permutes channels so that what a layer reads lies side by side."""

    name: ClassVar[str] = "reorder-channels"
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT
    requires: ClassVar[tuple[str, ...]] = ("prune-channels",)

    def run(self, program: Program) -> PassResult:
        """Return the program with its channels reordered; a note per order says what it serves."""
        base = program.base
        if base is None:
            note = Note(program.name, "idle", "prune-channels must run right before it")
            return PassResult(program, False, (note,))
        order, notes = orders(base)
        if not order:
            return PassResult(program, False, notes)
        made = emit(base.choose(replace(base.choices, order=order))).replace(notes=program.notes)
        if is_idle(program, made):
            return PassResult(program, False, notes)
        return PassResult(made, True, notes)
