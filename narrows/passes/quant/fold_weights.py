"""`FoldWeights`: a weight that is computed from other weights is computed once.

Weight norm, masks of ``torch.nn.utils.prune``, standardised or scaled weights, one matrix that
several layers have parts of: in training they have to be computed at every call. Codes are made of
the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from narrows.ir.editing import add_weight
from narrows.ir.meta import Meta
from narrows.ir.ops import table
from narrows.ir.program import Program
from narrows.passes.base import Fidelity, Pass, PassResult
from narrows.passes.eliminate_dead import EliminateDead


@dataclass(frozen=True)
class FoldWeights(Pass):
    """Computes the weights, biases and other constants that layers and norms read beside data."""

    name: ClassVar[str] = "fold-weights"
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT

    def run(self, program: Program) -> PassResult:
        """Return the program with its computed weights folded."""
        fixed = _fixed(program)
        wanted = {n.name for n in fixed if any(_is_constant_of(n, user) for user in n.users)}
        if not wanted:
            return PassResult(program, False)
        values = _values(program, fixed)
        result = program.copy()
        for node in list(result.graph.nodes):
            if node.name not in wanted:
                continue
            made = add_weight(result, node.name, values[node.name].detach().clone())
            for user in list(node.users):
                if _is_constant_of(node, user):
                    user.replace_input_with(node, made)
        return PassResult(EliminateDead().run(result).program, True)


def _fixed(program: Program) -> dict[fx.Node, None]:
    """Return the nodes that weights alone decide, in execution order."""
    fixed: dict[fx.Node, None] = {}
    for node in program.graph.nodes:
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        inputs = node.all_input_nodes
        alone = inputs and all(n.op == "get_attr" or n in fixed for n in inputs)
        if node.op == "call_function" and alone and not random:
            fixed[node] = None
    return fixed


def _is_constant_of(node: fx.Node, reader: fx.Node) -> bool:
    """Whether a reader takes a tensor for something else than data."""
    form = table.integer_form(reader)
    return Meta(node).dtype is not None and form is not None and node not in form.operands(reader)


def _values(program: Program, fixed: dict[fx.Node, None]) -> dict[str, Any]:
    """Return what the nodes compute, by name."""
    values: dict[fx.Node, Any] = {}

    def value(node: fx.Node) -> Any:
        return program.tensor(node) if node.op == "get_attr" else values[node]

    with torch.no_grad():
        for node in fixed:
            args, kwargs = map_arg((node.args, node.kwargs), value)
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return {n.name: v for n, v in values.items() if isinstance(v, Tensor)}


__all__ = ["FoldWeights"]
