"""`AlignChannels`: tensors are as wide as their target likes them.

Which channels stay for that was weighed together with what layers read;
`narrows.passes.pruning.stages.widths` takes the choice that `legalize-reads` made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from narrows.ir.program import Program, Pruning
from narrows.passes.base import Fidelity, Pass, PassResult
from narrows.passes.pruning.stages import result_of, widths


@dataclass(frozen=True)
class AlignChannels(Pass):
    """Keeps channels that nobody needs where a tensor's width would be slow without them."""

    name: ClassVar[str] = "align-channels"
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT
    requires: ClassVar[tuple[str, ...]] = ("legalize-reads",)

    def run(self, program: Program) -> PassResult:
        """Return the program with the widths that `legalize-reads` chose its reads for."""
        return result_of(program, widths(Pruning.of(program)))
