"""What the nodes of a program have to do: the `Work` that the op table has for each."""

from __future__ import annotations

from torch import fx

from narrows.ir.meta import Meta
from narrows.ir.ops import table
from narrows.ir.ops.integer import integer_macs
from narrows.ir.ops.works import elementwise
from narrows.ir.program import Program
from narrows.ir.work import Work


class Works(dict[fx.Node, "Work | None"]):
    """The work of each node of a program, found when it is first asked for."""

    def __missing__(self, node: fx.Node) -> Work | None:
        work = self[node] = work_of(node)
        return work


def works_of(program: Program) -> Works:
    """Return the works of a program's nodes, which are found once."""
    return program.memo("works", Works)


def work_of(node: fx.Node) -> Work | None:
    """Return the work of a node at the example's sizes, as its row describes it.

    ``None`` for what does nothing: inputs, weights, numbers, results picked from a tuple.
    """
    if node.op != "call_function" or Meta(node).size is not None:
        return None
    row = table.find(node)
    if row is table.ITEM:
        return None
    return elementwise(node, "copy") if row is None else row.work(node)


def macs(node: fx.Node, works: Works) -> int:
    """Return the multiply-accumulates of a node, one of a program with these works."""
    row = table.find(node)
    if row is None:
        return integer_macs(node)
    work = None if row.costs is None else works[node]  # else it sums over nothing
    return 0 if work is None else work.macs
