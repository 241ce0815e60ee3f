"""The copies of channels that a form makes at run time and the unpruned model does not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import fx

from narrows.ir.meta import Meta, op_name
from narrows.ir.program import Program, aten

MOVES = {
    aten.index_select.default, aten.index.Tensor, aten.gather.default, aten.slice.Tensor,
    aten.narrow.default, aten.select.int, aten.cat.default, aten.pad.default,
}  # fmt: skip


def introduced(program: Program, original: Program) -> tuple[int, int, dict[str, int]]:
    """Return how many copies the pruning has brought, their bytes for one image, and the ops.

    A copy is a node that takes channels from a tensor, or puts some together, under a name that no
    such node of the original has. A part of a split that has become a slice is none.
    """
    known = {node.name for node in original.graph.nodes}
    count, size, kinds = 0, 0, Counter()
    for node in moves(program):
        if node.name in known:
            continue
        count += 1
        size += bytes_of(node)
        kinds[op_name(node).partition(".")[0]] += 1
    return count, size, dict(kinds)


def moves(program: Program) -> Iterator[fx.Node]:
    """Yield the nodes that move channels; a selection of everything moves nothing."""
    for node in program.graph.nodes:
        if node.target not in MOVES or Meta(node).shape is None:
            continue
        sources = [n for n in node.all_input_nodes if n.op != "get_attr"]
        if sources and (len(sources) > 1 or Meta(sources[0]).shape != Meta(node).shape):
            yield node


def bytes_of(node: fx.Node) -> int:
    """Return the bytes of a node's result for one image."""
    meta = Meta(node)
    count = 1
    for axis, size in enumerate(meta.shape):
        count *= 1 if axis in meta.dynamic or axis == 0 else size
    return count * meta.dtype.itemsize
