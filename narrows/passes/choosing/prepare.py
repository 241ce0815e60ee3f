"""`prepared`: a program whose layers can be solved for."""

from __future__ import annotations

import torch

from narrows.ir.editing import add_weight
from narrows.ir.ops import table
from narrows.ir.ops.args import arguments, changed
from narrows.ir.ops.contract import Contract
from narrows.ir.program import Program
from narrows.ir.structure.computed import settled
from narrows.ir.structure.layers import Layer, layers_of
from narrows.passes.fold_batch_norm import fold


def prepared(program: Program) -> Program:
    """Return a program with its norms folded, its weights computed, a bias in every layer that can
    have one.

    It computes what the program does, up to rounding, and its weights keep their names, so that a
    plan of one is a plan of the other. A bias costs nothing at run time, and takes up the mean of
    what is removed.
    """
    return program.memo("prepared", lambda: _prepared(program))


def _prepared(program: Program) -> Program:
    made, _, _ = fold(settled(program))
    layers = [layer for found in layers_of(made).values() for layer in found]
    bare = [layer for layer in layers if _lacks_bias(layer)]
    if not bare:
        return made
    draft = made.copy()
    places = {node.name: node for node in draft.graph.nodes}
    for layer in bare:
        node = places[layer.node.name]
        row = table.find(node)
        assert isinstance(row, Contract)
        stem, _, leaf = layer.weight.rpartition(".")
        name = ".".join(filter(None, (stem, "bias" if leaf == "weight" else f"{leaf}_bias")))
        zeros = torch.zeros(layer.outputs, dtype=draft.weights[layer.weight].dtype)
        node.args, node.kwargs = changed(node, {row.bias: add_weight(draft, name, zeros)})
    return draft.seal()


def _lacks_bias(layer: Layer) -> bool:
    row = table.find(layer.node)
    if not isinstance(row, Contract) or layer.contraction is None or layer.bias is not None:
        return False
    return row.bias in arguments(layer.node)


__all__ = ["prepared"]
