"""The program that a pruning's choices ask for, and whether it is another one."""

from __future__ import annotations

import torch
from torch import fx

from narrows.ir.meta import shape_of
from narrows.ir.ops import dialect
from narrows.ir.program import Program, Pruning
from narrows.ir.rewrite import rewrite
from narrows.passes.eliminate_dead import identity_of


def emit(pruning: Pruning) -> Program:
    """Return the exact form that a pruning asks for; its notes say why channels stay.

    It is made at most once for a pruning.
    """
    return pruning.form(lambda p: _without_gates(rewrite(p)[0]))


def _without_gates(program: Program) -> Program:
    """Return the program without products with a literal that is one everywhere.

    A mask of a plan is such a literal once the channels that it zeroes are gone.
    """
    if not any(_is_idle_gate(program, node) for node in program.graph.nodes):
        return program
    result = program.copy()
    for node in list(result.graph.nodes):
        if not _is_idle_gate(result, node):
            continue
        source, gate = node.args
        node.replace_all_uses_with(source)
        result.graph.erase_node(node)
        if not gate.users:
            result.graph.erase_node(gate)
            del result.weights[str(gate.target)]
            result.buffers = result.buffers - {str(gate.target)}
    return result.seal()


def _is_idle_gate(program: Program, node: fx.Node) -> bool:
    """Whether a node multiplies by a literal, one that no checkpoint holds, and changes nothing."""
    if node.target is not dialect.MULTIPLY or identity_of(program, node) is None:
        return False
    gate = node.args[1]
    return isinstance(gate, fx.Node) and str(gate.target) not in program.stored


# ------------------------------------------------------------------ did anything change?


def is_idle(old: Program, new: Program) -> bool:
    """Whether a rewrite has removed nothing: the same weights, and every tensor of the same shape.

    The rewriter may spell some operators otherwise, a split as slices; that alone is no change.
    """
    if old.weights.keys() != new.weights.keys() or old.aliases != new.aliases:
        return False
    shapes = {node.name: shape_of(node) for node in new.graph.nodes}
    for node in old.graph.nodes:
        if shape_of(node) is not None and shapes.get(node.name) != shape_of(node):
            return False
    return all(_same_tensor(t, new.weights[name]) for name, t in old.weights.items())


def _same_tensor(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))
