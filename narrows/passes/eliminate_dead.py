"""`EliminateDead`: what nothing reads, what changes nothing and what stands twice goes.

Three rewrites in one walk, in execution order, so that each node sees inputs that are already
clean:

* an *identity* is replaced by its input. Its strides must be the input's, too: a ``view`` further
  down may rely on a copy that has no other purpose;
* a selection (``index_select``, ``slice``, ``select``) of the same channels of the same tensor is
  computed once;
* then whatever nothing reads is dropped: nodes, and weights with their other names.

A dropout in eval mode stays, because `Program.to_module` may train it; so does a multiplication by
a trained parameter that happens to be one.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, fx

from narrows.ir.blank import run_blank
from narrows.ir.graph import live_nodes
from narrows.ir.meta import shape_of
from narrows.ir.ops import table
from narrows.ir.ops.args import arguments, first_tensor
from narrows.ir.ops.selection import Selection
from narrows.ir.program import Program
from narrows.passes.base import Fidelity, Pass, PassResult


@dataclass(frozen=True)
class EliminateDead(Pass):
    """Drops dead nodes, identities, repeated selections and unread weights."""

    name: ClassVar[str] = "eliminate-dead"
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT

    def run(self, program: Program) -> PassResult:
        """Return the program without what is dead."""
        finder = _Finder(program)
        if not any(map(finder.replacement, program.graph.nodes)) and not _has_dead(program):
            return PassResult(program, False)
        result = program.copy()
        finder.start()
        for node in list(result.graph.nodes):
            source = finder.replacement(node)
            if source is not None:
                node.replace_all_uses_with(source)
        _drop_dead(result)
        return PassResult(result, True)


class _Finder:
    """Finds for each node, in execution order, an earlier one with the same result."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.strides: dict[str, tuple[int, ...]] = {}
        self.start()

    def start(self) -> None:
        """Forget the selections of the last walk; the strides are the same for every copy."""
        self.selections: dict[Hashable, fx.Node] = {}

    def replacement(self, node: fx.Node) -> fx.Node | None:
        """Return the node to read in place of ``node``, or ``None``."""
        source = identity_of(self.program, node)
        if source is not None and self.same_strides(node, source):
            return source
        key = _selection_key(self.program, node)
        first = node if key is None else self.selections.setdefault(key, node)
        return None if first is node else first

    def same_strides(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether both lie in memory alike, found by running the program without data."""
        if not self.strides:
            self.strides = strides_of(self.program)
        return self.strides.get(node.name) == self.strides.get(source.name)


# ------------------------------------------------------------------ identities


def identity_of(program: Program, node: fx.Node) -> fx.Node | None:
    """Return the operand that can stand in for ``node``, or ``None``."""
    source = table.identity_of(program, node)
    if source is None or source.op == "call_function":
        return source
    # A copy keeps an output from being an input or a weight itself.
    return None if any(user.op == "output" for user in node.users) else source


def strides_of(program: Program) -> dict[str, tuple[int, ...]]:
    """Return the strides of every tensor of a program at the example's sizes, by node name."""
    found: dict[str, tuple[int, ...]] = {}

    def record(node: fx.Node, value: Any) -> None:
        if isinstance(value, Tensor):
            found[node.name] = value.stride()

    run_blank(program, record)
    return found


# ------------------------------------------------------------------ repetitions


def _selection_key(program: Program, node: fx.Node) -> Hashable | None:
    """Return what a selection computes: equal keys, equal results. ``None`` for other nodes."""
    if not isinstance(table.find(node), Selection) or shape_of(node) is None:
        return None
    given = arguments(node)
    rank = len(shape_of(first_tensor(node)))
    key: list[Hashable] = [node.target]
    for name, value in given.items():
        if name == "index" and isinstance(value, fx.Node) and value.op == "get_attr":
            key.append(tuple(program.tensor(value).tolist()))
        else:
            key.append(value % rank if name == "dim" and isinstance(value, int) else value)
    return tuple(key)


# ------------------------------------------------------------------ dropping


def _has_dead(program: Program) -> bool:
    """Whether there is a node or a weight that nothing reads."""
    read = {n.target for n in program.graph.nodes if n.op == "get_attr" and n.users}
    count = sum(1 for _ in live_nodes(program.graph))
    return count < len(program.graph.nodes) or len(read) < len(program.weights)


def _drop_dead(program: Program) -> None:
    """Erase the nodes and weights that nothing reads."""
    live = set(live_nodes(program.graph))
    dead = [n for n in program.graph.nodes if n not in live]
    for node in reversed(dead):
        program.graph.erase_node(node)
    read = {str(n.target) for n in program.graph.nodes if n.op == "get_attr"}
    program.weights = {n: t for n, t in program.weights.items() if n in read}
    program.buffers = program.buffers & read
    program.aliases = {a: n for a, n in program.aliases.items() if n in read}
