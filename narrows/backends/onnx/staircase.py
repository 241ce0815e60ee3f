"""`StairTable`: a cost table of a runtime that computes convolutions on blocks of channels.

Blocked layouts make time a staircase: a convolution that runs blocked computes whole blocks of
channels, and takes them in sets, so that its width is rounded up before a grid is read. What does
not fit (a width off the alignment) runs in the plain layout, on grids of its own, and pays for the
changes of layout before and after it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from narrows.backends.measured.table import CostTable
from narrows.backends.onnx.account import LayoutWalk
from narrows.ir.account import OpCost, scale_of
from narrows.ir.costs import Joined, copied
from narrows.ir.program import Program
from narrows.ir.work import CONVOLUTIONS, Work
from narrows.ir.workload import works_of


@dataclass(frozen=True)
class StairTable(CostTable):
    """What operators cost in ONNX Runtime, in blocks (`Layout`) and out of them."""

    # ------------------------------------------------------------------ layouts

    def form(self, work: Work) -> str:
        """Return how the runtime computes a convolution or pooling.

        ``blocked``; ``direct`` (reads the plain layout, writes blocks: few input channels);
        ``plain`` for all else.
        """
        block, align = self.layout.block, self.layout.align
        if block == 1 or len(work.space) != 2:
            return "plain"
        if work.kind == "conv":
            if work.inputs < block:
                return "direct"
            return "plain" if work.inputs % align else "blocked"
        if work.kind == "depthwise":
            fits = work.outputs == work.inputs and work.outputs % align == 0
            return "blocked" if fits else "plain"
        if work.kind == "grouped":
            per = (work.inputs // work.groups, work.outputs // work.groups)
            return "plain" if any(p % block for p in per) else "blocked"
        if work.kind == "pool":
            return "plain" if work.inputs % align else "blocked"
        return "plain"

    def runs_blocked(self, work: Work) -> bool:
        """Whether the operator itself takes and gives blocks (a concat: if its operands do)."""
        if self.layout.block == 1 or len(work.space) != 2:
            return self.layout.block == 1
        if work.kind in (*CONVOLUTIONS, "pool"):
            return self.form(work) == "blocked"
        if work.kind == "reduce":
            return work.inputs % self.layout.align == 0
        if work.kind == "concat":
            return work.outputs % self.layout.block == 0
        return work.kind == "scale" or work.op in (*self.layout.fused, *self.layout.blocked)

    def unblocked(self, work: Work) -> Work:
        """Return a work that the table takes for one in the plain layout."""
        if self.layout.block == 1 or not self.runs_blocked(work):
            return work
        return dataclasses.replace(work, space=(work.positions, 1, 1))

    def reorder_seconds(self, work: Work, *, out: bool) -> float:
        """Return the time to bring what ``work`` reads out of blocks, or its result into them."""
        if self.layout.block == 1:
            return 0.0
        if out:  # out of blocks, before the operator
            positions = math.prod(work.source) if work.source else work.positions
            return self._elements("reorder out", work.batch * positions * work.inputs)
        return self._elements("reorder in", work.elements)

    # ------------------------------------------------------------------ one operator

    def _seconds(self, work: Work, alone: bool) -> float:
        """Return the time of one call.

        Unless ``alone``, an operator that cannot run in the blocked layout, but whose like does,
        pays for the change of layout before and after it, as it does among blocked convolutions.
        """
        time = self._known(work)
        if not alone and len(work.space) == 2 and not self.runs_blocked(work):
            time += self.reorder_seconds(work, out=True)
            if self.form(work) != "direct":  # which writes blocks itself
                time += self.reorder_seconds(work, out=False)
        return time

    def passing_seconds(self, work: Work, *, plain: bool = False) -> float:
        """Return the time of an operator that hands its channels on; see `Costs`."""
        if work.kind == "concat" or (plain and work.kind not in CONVOLUTIONS):
            return self.seconds(self.unblocked(work) if plain else work, alone=True)
        return self.seconds(work)

    def again(self, op: OpCost, work: Work) -> float:
        """Return the time of an operator at other widths, in the layout that it had."""
        if op.form in ("blocked", "direct"):
            # Off the blocked layout its operands and its result change layout, too.
            return self.seconds(work, alone=self.form(work) == "direct")
        kept = work if work.kind in CONVOLUTIONS else self.unblocked(work)
        return self.seconds(kept, alone=True)

    def inside_seconds(self, work: Work, *, blocked: bool) -> float:
        """Return what an operator costs inside a convolution of either layout."""
        if not blocked:
            return self.fused_seconds(work)
        elements = work.batch * work.positions * self.layout.padded(work.outputs)
        return self._inside(f"fused {work.op}", elements)

    def account(self, program: Program, batch: int | None = None) -> list[OpCost]:
        """Return what every node costs, and what the changes of layout before it do."""
        return LayoutWalk(self, scale_of(program, batch), works_of(program), program).run()

    # ------------------------------------------------------------------ widths

    @property
    def step(self) -> int:
        """The channels of a block."""
        return self.layout.block

    def fits(self, work: Work) -> bool:
        """Whether a convolution's widths let it run in blocks."""
        return self.form(work) != "plain"

    # ------------------------------------------------------------------ moving channels

    def copy_seconds(
        self,
        kind: str,
        have: int,
        take: int,
        space: Sequence[int],
        batch: int = 1,
        *,
        plain: bool = False,
    ) -> float:
        """Return what a copy of channels costs; in blocks, it leaves them and comes back."""
        if plain or self.layout.block == 1:
            return super().copy_seconds(kind, have, take, space, batch)
        key = (kind, have, take, tuple(space), batch)
        time = self._memo.get(("among blocks", *key))
        if time is None:
            work = copied(*key)
            there, back = (self.reorder_seconds(work, out=out) for out in (True, False))
            time = super().copy_seconds(kind, have, take, space, batch) + (there + back)
            self._memo["among blocks", *key] = time
        return time

    @property
    def join_step(self) -> int:
        """A concat takes and gives blocks if every operand comes in whole blocks."""
        return self.layout.block

    def join(self, work: Work, parts: Sequence[tuple[int, int]], width: int) -> Joined:
        """Return what becomes of a concat's operands.

        Where one is cut or is no multiple of a block wide, the concat is in the plain layout, and
        so is what follows up to the next convolution.
        """
        block = self.layout.block
        if block == 1 or len(work.space) != 2:
            return Joined()
        if not any(0 < take < have or take % block for have, take in parts):
            return Joined()
        seconds = 0.0
        for have, take in parts:
            if take == have:
                seconds += self.reorder_seconds(work.resized(inputs=take), out=True)
        return Joined(seconds + self.reorder_seconds(work.resized(inputs=width), out=False), True)

    # ------------------------------------------------------------------ reading the grids

    def _place(self, work: Work) -> tuple[float, ...]:
        # Widths on one stair are one place; a stair of the plain layout is a place of its own.
        form = 0.0 if self.form(work) == "plain" else 10.0
        pad = self.layout.padded if form else int
        return (form, math.log(pad(work.inputs)), math.log(pad(work.outputs)), math.log(work.batch))

    def _convolution(self, work: Work) -> float:
        form, pad = self.form(work), self.layout.padded
        if form == "plain":
            return self._windowed("plain", work)
        if work.kind == "depthwise":
            work = dataclasses.replace(
                work, inputs=pad(work.inputs), outputs=pad(work.outputs), groups=pad(work.outputs)
            )
            return self._windowed("blocked", work)
        if work.kind == "grouped":
            one = dataclasses.replace(
                work,
                kind="conv",
                groups=1,
                inputs=work.inputs // work.groups,
                outputs=work.outputs // work.groups,
            )
            return self.overhead + work.groups * (self._convolution(one) - self.overhead)
        if form == "blocked":
            work = dataclasses.replace(work, inputs=pad(work.inputs))
        return self._in_sets(form, work)

    def _in_sets(self, form: str, work: Work) -> float:
        """Return the time of a convolution whose kernel makes several blocks of outputs at once.

        A last set that is not full takes a share of a full one's time, as it does on its own.
        """
        block, most = self.layout.block, self.layout.sets

        def of(blocks: int) -> float:
            return self._windowed(form, dataclasses.replace(work, outputs=blocks * block))

        blocks = self.layout.padded(work.outputs) // block
        rest = blocks % most
        if blocks <= most or not rest:
            return of(blocks)
        share = (of(rest) - self.overhead) / max(1e-9, of(most) - self.overhead)
        whole = of(blocks - rest)
        return whole + min(1.0, max(0.0, share)) * (of(blocks - rest + most) - whole)

    def _moved(self, work: Work) -> float:
        if self.layout.block == 1 or not self.runs_blocked(work):
            return super()._moved(work)
        names = [f"{work.kind} {work.op}", work.kind]
        inputs, outputs = self.layout.padded(work.inputs), self.layout.padded(work.outputs)
        whole = dataclasses.replace(work, inputs=inputs, outputs=outputs)
        return self._first(whole, [f"blocked {n}" for n in names] + names)
