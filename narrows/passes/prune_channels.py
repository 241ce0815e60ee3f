"""`PruneChannels`: channels that nothing reads, and channels that are constants, go.

Three steps, each of its own module: the plan's masked program (`narrows.passes.plans.masking`), the
analysis of its channels (`narrows.ir.channels`), and the rewrite (`narrows.ir.rewrite`). Zeros that
are in the weights without a plan are found in the same way. `narrows.passes.pruning.stages` calls
them.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import ClassVar

from narrows.errors import PassError
from narrows.ir.program import Program
from narrows.ir.rewrite.factors import factor_notes
from narrows.ir.structure.computed import settled
from narrows.passes.base import Fidelity, Pass, PassResult
from narrows.passes.plans.plan import ChannelPlan
from narrows.passes.pruning.stages import prune, result_of


@dataclass(frozen=True)
class PruneChannels(Pass):
    """Removes channels that a plan drops, or that are dead or constant anyway.

    Attributes:
        plan: The plan, or the path of a saved one; ``None`` for no more than what is dead anyway.
        order: Whether the channels that stay are put in the order of `reorder-channels` as well.
            The form is the one that both passes make one after the other, made once.
    """

    name: ClassVar[str] = "prune-channels"
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT
    plan: ChannelPlan | str | os.PathLike | None = None
    order: bool = False

    def run(self, program: Program) -> PassResult:
        """Return the program that computes only what is needed; notes say what stays, and why."""
        whole = settled(program)
        result = result_of(whole, prune(whole, self._loaded(), ordered=self.order))
        if not result.changed:
            return PassResult(program, False, result.notes)
        return dataclasses.replace(result, notes=(*result.notes, *factor_notes(result.program)))

    def reference(self, program: Program) -> Program:
        """Return the plan's masked program."""
        return self._loaded().masked(program)

    def _loaded(self) -> ChannelPlan:
        if self.plan is None:
            return ChannelPlan()
        if isinstance(self.plan, str | os.PathLike):
            return ChannelPlan.load(self.plan)
        if not isinstance(self.plan, ChannelPlan):
            raise PassError(
                f"prune-channels takes a plan or its path, got {type(self.plan).__name__}",
                hint="make one with narrows.plan(program, ...)",
            )
        return self.plan
