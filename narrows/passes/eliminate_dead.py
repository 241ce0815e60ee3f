"""`EliminateDead`: what nothing reads, what changes nothing and what stands twice goes.

Three rewrites in one walk, in execution order, so that each node sees inputs that are already
clean:

* an *identity* is replaced by its input. Its strides must be the input's, too: a ``view`` further
  down may rely on a copy that has no other purpose;
* a selection (``index_select``, ``slice``) of the same channels of the same tensor is computed
  once;
* then whatever nothing reads is dropped: nodes, and weights with their other names.

A dropout in eval mode stays, because `Program.to_module` may train it; so does a multiplication by
a trained parameter that happens to be one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from narrows.ir.blank import run_blank
from narrows.ir.graph import live_nodes
from narrows.ir.meta import Meta, shape_of
from narrows.ir.ops.args import arguments
from narrows.ir.program import Program, aten
from narrows.passes.base import Fidelity, Pass, PassResult

# torch spells "to the end" with the largest int64.
TO_THE_END = 2**62

Rule = Callable[[Program, fx.Node, dict[str, Any]], bool]


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
    """Return the operand whose values ``node`` passes on, or ``None``."""
    rule = IDENTITIES.get(node.target) if node.op == "call_function" else None
    if rule is None:
        return None
    given = arguments(node)
    source = next(iter(given.values()))
    if not isinstance(source, fx.Node) or not _same_kind(node, source):
        return None
    if source.op != "call_function" and any(u.op == "output" for u in node.users):
        return None  # a copy keeps an output from being an input or a weight itself
    return source if rule(program, node, given) else None


def _same_kind(node: fx.Node, source: fx.Node) -> bool:
    """Whether both are one tensor of the same shape and dtype, at every size of the free axes."""
    a, b = Meta(node), Meta(source)
    if a.shape is None or a.shape != b.shape or a.dtype != b.dtype:
        return False
    # With one free axis at most, equal element counts and equal other axes make it equal as well.
    return tuple(a.dynamic) == tuple(b.dynamic) and len(a.dynamic) <= 1


def _always(program: Program, node: fx.Node, given: dict[str, Any]) -> bool:
    """Whether the shape decides alone, as for a view."""
    return True


def _times_one(program: Program, node: fx.Node, given: dict[str, Any]) -> bool:
    """Whether the other operand is one: a number, or a constant that is not trained."""
    other = given["other"]
    if isinstance(other, int | float):
        return other == 1 and given.get("rounding_mode") is None
    if not isinstance(other, fx.Node) or other.op != "get_attr":
        return False
    return str(other.target) in program.buffers and bool((program.tensor(other) == 1).all())


def _plus_zero(program: Program, node: fx.Node, given: dict[str, Any]) -> bool:
    return isinstance(given["other"], int | float) and given["other"] == 0


def _selects_all(program: Program, node: fx.Node, given: dict[str, Any]) -> bool:
    """Whether an ``index_select`` reads every index in order."""
    shape, index = shape_of(node), given["index"]
    axis = given["dim"] % len(shape)
    if axis in Meta(node).dynamic or index.op != "get_attr":
        return False
    return torch.equal(program.tensor(index).cpu(), torch.arange(shape[axis]))


def _slices_all(program: Program, node: fx.Node, given: dict[str, Any]) -> bool:
    """Whether a ``slice`` spans the axis, at every size of a free one."""
    shape, end = shape_of(node), given["end"]
    axis = given["dim"] % len(shape)
    if given["start"] not in (None, 0) or given["step"] != 1:
        return False
    if end is None or (isinstance(end, int) and end >= TO_THE_END):
        return True
    return axis not in Meta(node).dynamic and isinstance(end, int) and end >= shape[axis]


def _in_order(program: Program, node: fx.Node, given: dict[str, Any]) -> bool:
    """Whether a ``permute`` leaves every axis where it is."""
    rank = len(given["dims"])
    return [d % rank for d in given["dims"]] == list(range(rank))


def _same_axis(program: Program, node: fx.Node, given: dict[str, Any]) -> bool:
    rank = max(1, len(shape_of(node)))
    return given["dim0"] % rank == given["dim1"] % rank


IDENTITIES: dict[Any, Rule] = {
    aten.mul.Tensor: _times_one,
    aten.mul.Scalar: _times_one,
    aten.div.Tensor: _times_one,
    aten.div.Scalar: _times_one,
    aten.add.Tensor: _plus_zero,
    aten.add.Scalar: _plus_zero,
    aten.sub.Tensor: _plus_zero,
    aten.sub.Scalar: _plus_zero,
    aten.index_select.default: _selects_all,
    aten.slice.Tensor: _slices_all,
    aten.permute.default: _in_order,
    aten.transpose.int: _same_axis,
    aten.view.default: _always,
    aten.reshape.default: _always,
    aten.flatten.using_ints: _always,
    aten.expand.default: _always,
    aten.clone.default: _always,
    aten.contiguous.default: _always,
    aten.alias.default: _always,
    aten.detach.default: _always,
    aten.to.dtype: _always,
    aten.to.device: _always,
    aten.to.dtype_layout: _always,
    aten._to_copy.default: _always,
}


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
    if node.op != "call_function" or node.target not in (
        aten.index_select.default,
        aten.slice.Tensor,
    ):
        return None
    given = arguments(node)
    rank = len(shape_of(node) or ())
    key: list[Hashable] = [node.target]
    for name, value in given.items():
        if name == "index" and value.op == "get_attr":
            key.append(tuple(program.tensor(value).tolist()))
        else:
            key.append(value % rank if name == "dim" and rank else value)
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
