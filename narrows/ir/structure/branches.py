"""`Branches`: what a network can do without altogether, because another path goes around it.

A layer that reads nothing is a constant. Where its result is added to the tensor that the branch
began with, or multiplies it, the network goes on; in a chain nothing would reach the outputs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import cached_property

from torch import fx

from narrows.ir.program import Program
from narrows.ir.structure import Structure, structure_of


class Branches:
    """Which couplings of a program may lose all channels, together.

    Attributes:
        program: The program.
        readers: Per coupling that may be asked for, by its number, the layers that read it.
    """

    def __init__(self, program: Program, ties: Iterable[int]) -> None:
        """Look at couplings, by their numbers in the structure."""
        self.program = program
        structure = structure_of(program)
        found = ((tie, _readers(program, structure, tie)) for tie in ties)
        self.readers = {tie: layers for tie, layers in found if layers}

    def open_without(self, gone: Collection[int]) -> bool:
        """Return whether all outputs still depend on the inputs without some couplings."""
        if not self.readers.keys() >= set(gone):
            return False
        return self.open_past([layer for tie in gone for layer in self.readers[tie]])

    def open_past(self, constant: Collection[fx.Node]) -> bool:
        """Return whether they do when some layers are constants; what never did counts, too."""
        return _reached(self.program, set(constant)) == self._all

    @cached_property
    def _all(self) -> set[fx.Node]:
        return _reached(self.program, set())


def _readers(program: Program, structure: Structure, tie: int) -> tuple[fx.Node, ...]:
    """Return the layers that read a coupling and nothing else.

    There are none where something else reads it, too: a mean over channels, or the product of
    queries and keys, need not be defined for none.
    """
    places = {node.name: node for node in program.graph.nodes}
    holding = dict.fromkeys(places[name] for name in structure.ties[tie].nodes)
    readers: dict[fx.Node, None] = {}
    for node in holding:
        for user in node.users:
            layer = structure.layer_at.get(user.name)
            if layer is not None and layer.sums and layer.x is node:
                readers[user] = None
            elif user not in holding:
                return ()
    alone = all(dict(structure.read(n)).keys() == {tie} for n in readers)
    return tuple(readers) if alone else ()


def _reached(program: Program, constant: set[fx.Node]) -> set[fx.Node]:
    """Return the outputs that a path leads to from an input."""
    todo = [n for n in program.placeholders if n not in constant]
    seen = set(todo)
    while todo:
        for user in todo.pop().users:
            if user not in seen and user not in constant:
                seen.add(user)
                todo.append(user)
    return seen & set(program.output.all_input_nodes)


__all__ = ["Branches"]
