"""`LegalizeReads`: layers read what their target reads fastest.

A layer may read channels with zero weights rather than have the others copied together.
`narrows.passes.pruning.stages.reads` weighs that by the target's costs, with the widths that
`align-channels` then takes.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import ClassVar

from narrows.errors import PassError
from narrows.ir.costfiles import load_costs
from narrows.ir.costs import Costs
from narrows.ir.program import Note, Program, Pruning
from narrows.passes.base import Fidelity, Pass, PassResult
from narrows.passes.pruning.stages import reads, result_of

NO_COSTS = "it was given no costs of a target"


@dataclass(frozen=True)
class LegalizeReads(Pass):
    """Reads all that a tensor holds, or a part copied together, whichever the target does faster.

    Attributes:
        costs: The target's cost table, or the path of a saved one; without it nothing is done.
        batch: The number of examples to choose for.
        fill: Whether masked channels stay wherever that costs nothing, those with the largest
            weights (L1) first, for who takes them back (`narrows.passes.plans.take_back`).
        form: The name of the form to take, one of `narrows.passes.pruning.rivals`; the one that is
            predicted to be fastest unless given.
    """

    name: ClassVar[str] = "legalize-reads"
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT
    requires: ClassVar[tuple[str, ...]] = ("prune-channels",)
    costs: Costs | str | os.PathLike | None = None
    batch: int = 1
    fill: bool = False
    form: str = ""

    def run(self, program: Program) -> PassResult:
        """Return the program with its reads chosen; notes say which copies were not worth it."""
        table = table_of(self.costs, self.name)
        if table is None:
            return PassResult(program, False, (Note(program.name, "idle", NO_COSTS),))
        pruning, how = Pruning.of(program), {"fill": self.fill, "form": self.form}
        result = result_of(program, reads(pruning, table, self.batch, **how))
        if pruning.untouched and not result.changed:
            return result
        told = Note(program.name, "costs", f"reads and widths go by the costs of {table.origin}")
        return dataclasses.replace(result, notes=(*result.notes, told))


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


__all__ = ["LegalizeReads", "table_of"]
