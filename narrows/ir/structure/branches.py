"""Branches: what a network can do without altogether, because another path goes around it.

A layer that reads nothing is a constant. Where its result is added to the tensor that the branch
began with, or multiplies it, the network goes on; in a chain nothing would reach the outputs.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from narrows.ir.program import Program
from narrows.ir.structure import Structure


def passable(program: Program, constant: Collection[fx.Node]) -> bool:
    """Return whether all outputs still depend on the inputs when some nodes are constants.

    Outputs that never did are left out of this.

    Args:
        program: The program.
        constant: The nodes that no longer depend on anything.
    """
    return _reached(program, constant) == _reached(program, ())


def readers_of(structure: Structure, program: Program, tie: int) -> tuple[fx.Node, ...] | None:
    """Return the layers that read a tie; ``None`` where something else reads it, too.

    Those alone are constants when the tie has no channel left: what else reads channels, such as a
    mean over them or the product of queries and keys, need not be defined for none.
    """
    places = {node.name: node for node in program.graph.nodes}
    holding = [places[name] for name in dict.fromkeys(structure.ties[tie].nodes)]
    inside = set(holding)
    readers: dict[fx.Node, None] = {}
    for node in holding:
        for user in node.users:
            layer = structure.layer_at.get(user.name)
            if layer is not None and layer.sums and layer.x is node:
                readers[user] = None
            elif user not in inside:
                return None
    alone = all(dict(structure.read(n)).keys() == {tie} for n in readers)
    return tuple(readers) if readers and alone else None


def _reached(program: Program, constant: Collection[fx.Node]) -> set[fx.Node]:
    """Return the outputs that a path leads to from an input."""
    todo = [n for n in program.placeholders if n not in constant]
    seen = set(todo)
    while todo:
        for user in todo.pop().users:
            if user not in seen and user not in constant:
                seen.add(user)
                todo.append(user)
    return seen & set(program.output.all_input_nodes)


__all__ = ["passable", "readers_of"]
