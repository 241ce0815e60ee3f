"""`FoldWeights`: a weight that is computed from other weights is computed once.

Weight norm, masks of ``torch.nn.utils.prune``, standardised or scaled weights, one matrix that
several layers have parts of: in training they have to be computed at every call. Codes are made of
the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from narrows.ir.meta import Meta
from narrows.ir.ops import table
from narrows.ir.program import Program
from narrows.ir.structure.computed import fixed_nodes, folded, settled
from narrows.passes.base import Fidelity, Pass, PassResult
from narrows.passes.eliminate_dead import EliminateDead


@dataclass(frozen=True)
class FoldWeights(Pass):
    """Computes the weights, biases and other constants that layers and norms read beside data."""

    name: ClassVar[str] = "fold-weights"
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT

    def run(self, program: Program) -> PassResult:
        """Return the program with its computed weights folded."""
        start = settled(program)
        fixed = fixed_nodes(start)
        wanted = [n for n in fixed if any(_is_constant_of(n, user) for user in n.users)]
        if not wanted:
            return PassResult(start, start is not program)
        made = folded(start, wanted, {node: node.name for node in wanted})
        return PassResult(EliminateDead().run(made).program, True)


def _is_constant_of(node: fx.Node, reader: fx.Node) -> bool:
    """Whether a reader takes a tensor for something else than data."""
    form = table.integer_form(reader)
    return Meta(node).dtype is not None and form is not None and node not in form.operands(reader)


__all__ = ["FoldWeights"]
