"""`LegalizeReads` and `AlignChannels`: the form of a pruned program that a target runs fastest.

`PruneChannels` leaves the smallest program: each layer reads just the channels that count for it,
copied together where its tensor holds others. A target may run another exact form faster, and its
cost table says which (`narrows.passes.forms.widths`). Reads and widths are weighed together and
applied one after the other: `LegalizeReads` lets layers read channels with zero weights where that
is cheaper than a copy, `AlignChannels` keeps channels so that widths meet the target's steps.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from narrows.errors import PassError
from narrows.ir.channels import Facts
from narrows.ir.costfiles import load_costs
from narrows.ir.costs import Costs
from narrows.ir.labels import Bools
from narrows.ir.meta import Meta, shape_of
from narrows.ir.ops import table
from narrows.ir.program import Note, Program
from narrows.ir.rewrite import Base, Choices, everything
from narrows.passes.base import Fidelity, Pass, PassResult
from narrows.passes.forms.padding import padded
from narrows.passes.forms.splitting import apart, split_notes
from narrows.passes.forms.widths import Chooser, Decision
from narrows.passes.prune_channels import emit, is_idle

NO_COSTS = "it was given no costs of a target"
WHOLE = "no channel is removed: by the target's costs no pruned form is faster"
FULL = "prune-channels removed nothing right before it, and no width is in the way"


@dataclass(frozen=True)
class LegalizeReads(Pass):
    """Reads all that a tensor holds, or a part copied together, whichever the target does faster.

    Attributes:
        costs: The target's cost table, or the path of a saved one; without it nothing is done.
        batch: The number of examples to choose for.
        fill: Whether masked channels stay wherever that costs nothing, those with the largest
            weights (L1) first, for who takes them back (`narrows.passes.plans.take_back`).
    """

    name: ClassVar[str] = "legalize-reads"
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT
    requires: ClassVar[tuple[str, ...]] = ("prune-channels",)
    costs: Costs | str | os.PathLike | None = None
    batch: int = 1
    fill: bool = False

    def run(self, program: Program) -> PassResult:
        """Return the program with its reads chosen; notes say which copies were not worth it."""
        table, base = table_of(self.costs, self.name), program.base or Base(program)
        if table is None:
            return _nothing(program, NO_COSTS)
        wider = padded(base, table)
        if wider is None and program.base is None:
            return _nothing(program, FULL)
        forms = {"chosen": Form.of(wider or base, table, self.batch, self.fill)}
        chosen = forms["chosen"]
        twice = apart(chosen.base, chosen.chooser, chosen.decisions)
        if twice is not None:
            forms["split"] = Form.of(twice, table, self.batch, self.fill)
        # What goes together sums up otherwise than space by space.
        wide = {"smallest": program, "whole": base.program}
        wide |= {name: emit(form.choices(aligned=True)) for name, form in forms.items()}
        seconds = {n: sum(s for _, s in table.predict(p, self.batch)) for n, p in wide.items()}
        if self.fill:
            seconds["chosen"] *= 1 - 1e-9
        best = min(wide, key=lambda name: (seconds[name], name != "smallest"))
        if best == "smallest":
            return _nothing(program, "the smallest form is the fastest by the target's costs")
        if best == "whole":
            made = pending = emit(base.choose(everything(base.facts)))
            notes = (Note(program.name, "idle", WHOLE),)
        else:
            form, pending = forms[best], wide[best]
            made = emit(form.choices(aligned=False))
            notes = (*split_notes(form.base), *_read_notes(form.base.facts, form.decisions))
        made = made.replace(base=replace(made.base, pending=pending), notes=program.notes)
        return _result(program, made, notes)


@dataclass(frozen=True, eq=False)
class Form:
    """The form of a base that its target's costs ask for.

    Attributes:
        base: What the decisions are about.
        chooser: What made them.
        decisions: One per space.
    """

    base: Base
    chooser: Chooser
    decisions: Sequence[Decision]

    @staticmethod
    def of(base: Base, table: Costs, batch: int, fill: bool) -> Form:
        """Return the form that costs least, space by space."""
        chooser = Chooser(base.facts, base.choose(Choices()).demand, table, batch, fill)
        return Form(base, chooser, chooser.run())

    def choices(self, *, aligned: bool) -> Base:
        """Return the base with what was decided; without ``aligned``, no tensor is wider for it."""
        return self.base.choose(_choices(self.decisions, aligned=aligned))


@dataclass(frozen=True)
class AlignChannels(Pass):
    """Keeps channels that nobody needs where a tensor's width would be slow without them."""

    name: ClassVar[str] = "align-channels"
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT
    requires: ClassVar[tuple[str, ...]] = ("legalize-reads",)

    def run(self, program: Program) -> PassResult:
        """Return the program with the widths that `LegalizeReads` chose its reads for."""
        base = program.base
        if base is None or base.pending is None:
            return _nothing(program, "legalize-reads found nothing to choose")
        made = base.pending.replace(notes=program.notes)
        return _result(program, made, tuple(_width_notes(program, made)))


def table_of(costs: Costs | str | os.PathLike | None, name: str) -> Costs | None:
    """Return the cost table that a pass called ``name`` was given, or that a path names."""
    if costs is None or isinstance(costs, Costs):
        return costs
    if isinstance(costs, str | os.PathLike):
        return load_costs(costs)
    raise PassError(
        f"{name} takes a cost table or its path, got {type(costs).__name__}",
        hint="a target has one: narrows.backends.make_target('onnx').costs()",
    )


def _nothing(program: Program, why: str) -> PassResult:
    return PassResult(program, False, (Note(program.name, "idle", why),))


def _result(program: Program, made: Program, notes: tuple[Note, ...]) -> PassResult:
    if is_idle(program, made):
        return PassResult(program.replace(base=made.base), False, notes)
    return PassResult(made, True, notes)


def _choices(decisions: Sequence[Decision], *, aligned: bool) -> Choices:
    """Return what the decisions ask for; without ``aligned``, in no tensor more than it asks."""
    forced: dict[str, Bools] = {}
    columns: dict[str, Bools] = {}
    for decision in decisions:
        hold = decision.hold if aligned else decision.start
        for node in decision.space.core:
            forced[node.name] = hold
        for i, reader in enumerate(decision.space.readers):
            takes, tail = decision.takes[i].labels, decision.takes[i].tail
            if not aligned:
                late = np.array_equal(tail, decision.hold)
                takes = hold if decision.reads_all(i) else reader.wants
                tail = hold if late else takes
            for node in reader.tail:
                forced[node.name] = tail
            if not np.array_equal(takes, reader.wants) or not np.array_equal(takes, hold):
                columns[reader.node.name] = np.any(takes[reader.columns], axis=0)
    return Choices(forced, columns)


def _read_notes(facts: Facts, decisions: Sequence[Decision]) -> Iterator[Note]:
    """Yield which layers read channels that count as zero for them."""
    for decision in decisions:
        for i, reader in enumerate(decision.space.readers):
            extra = int((decision.start & ~reader.wants).sum())
            if extra and decision.reads_all(i):
                node, read = reader.node, "channel is" if extra == 1 else "channels are"
                yield Note(
                    node.name, "reads", f"{extra} {read} read with zero weights: a copy without "
                    "them costs more on this target", extra, Meta(node).source,
                )  # fmt: skip


def _width_notes(before: Program, after: Program) -> Iterator[Note]:
    """Yield which tensors became wider."""
    shapes = {n.name: shape_of(n) for n in before.graph.nodes}
    for node in after.graph.nodes:
        old, new = shapes.get(node.name), shape_of(node)
        if node.op != "call_function" or old is None or new is None or len(old) != len(new):
            continue
        grown = [(a, b) for a, b in zip(old, new, strict=True) if b > a]
        row = table.find(node)
        if grown and row is not None and row.makes_channels:
            ((a, b), *_) = grown
            yield Note(
                node.name, "width", f"{b} channels wide instead of {a}: faster on this target",
                b - a, Meta(node).source,
            )  # fmt: skip


__all__ = ["AlignChannels", "Base", "LegalizeReads", "table_of"]
