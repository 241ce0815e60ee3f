"""`Memory`: the bytes of activations that are alive at one time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import fx

from narrows.ir.meta import Meta, shape_of
from narrows.ir.program import Program
from narrows.ir.structure import structure_of
from narrows.ir.workload import works_of
from narrows.passes.choosing.budgets.base import Budget
from narrows.passes.choosing.reads import Floats
from narrows.passes.plans.candidates import Candidates, Widths
from narrows.passes.plans.setting import Setting
from narrows.passes.pruning.form import emit
from narrows.passes.pruning.stages import prune


@dataclass(frozen=True)
class Memory(Budget):
    """The most bytes of activations that are alive at once: read, made, or kept for later.

    Operators run in the graph's order, each makes a tensor of its own, and what only looks at one
    in another shape makes none. Weights do not count, and no runtime's fusions: it is what an arena
    holds that reuses the place of what is dead.
    """

    name: ClassVar[str] = "memory"
    unit: ClassVar[str] = "peak bytes of activations"
    coupled: ClassVar[bool] = True
    slack: ClassVar[float] = 0.01

    def of(self, candidates: Candidates, widths: Widths) -> float:
        """Return the bytes of the pruned program."""
        setting = candidates.setting
        plan = candidates.plan(widths, self.name)
        return peak(emit(prune(setting.program, plan, ordered=True).pruning))

    def whole(self, candidates: Candidates) -> float:
        """Return the bytes of the unpruned program."""
        return peak(candidates.setting.program)

    def left(self, setting: Setting, program: Program) -> float:
        """Return the share of the bytes that a program takes."""
        return peak(program) / peak(setting.program)

    def quick(self, candidates: Candidates) -> Callable[[Widths], float]:
        """Return the bytes where every tensor of the unpruned program has fewer channels."""
        program = candidates.setting.program
        alive, tensors = lives(program)
        structure = structure_of(program)
        full = np.array([tie.width for tie in structure.ties], dtype=np.float64)
        number = {id(tie): i for i, tie in enumerate(structure.ties)}
        ties = [number[id(c.coupling)] for c in candidates.members]
        parts = np.zeros((len(tensors), len(full)))
        for row, node in enumerate(tensors):
            holds = structure.made(node)
            total = sum(full[tie] * each for tie, each in holds)
            for tie, each in holds:
                parts[row, tie] += each * full[tie] / total
        fixed = 1 - parts.sum(1)
        size = np.array([_bytes(node) for node in tensors])

        def bytes_of(widths: Widths) -> float:
            share = np.ones(len(full))
            share[ties] = np.array(widths) / full[ties]
            return float((alive @ (size * (fixed + parts @ share))).max(initial=0.0))

        return bytes_of


def peak(program: Program) -> float:
    """Return the most bytes of activations of a program that are alive at once."""
    alive, tensors = lives(program)
    return float((alive @ np.array([_bytes(node) for node in tensors])).max(initial=0.0))


def lives(program: Program) -> tuple[Floats, list[fx.Node]]:
    """Return which tensors are alive while each operator runs, ``[operators, tensors]``, and they.

    A tensor is alive from where it is made to where it, or a view of it, is read last; an input
    from the beginning, an output to the end.
    """
    works = works_of(program)
    place: dict[fx.Node, int] = {}
    root: dict[fx.Node, fx.Node] = {}
    last: dict[fx.Node, int] = {}
    operators = [n for n in program.graph.nodes if n.op in ("call_function", "output")]
    at = {node: i for i, node in enumerate(operators)}
    for node in program.graph.nodes:
        for read in node.all_input_nodes:
            if read in root:
                last[root[read]] = at[node]
        if node.op == "get_attr" or node.op == "output":
            continue
        work = works[node] if node.op == "call_function" else None
        sources = [n for n in node.all_input_nodes if n in root]
        if sources and (shape_of(node) is None or (work is not None and work.kind == "view")):
            root[node] = root[sources[0]]
        elif shape_of(node) is not None:
            root[node] = node
            place[node] = at.get(node, 0)
    alive = np.zeros((len(operators), len(place)))
    for column, (node, begun) in enumerate(place.items()):
        alive[begun : last.get(node, begun) + 1, column] = 1
    return alive, list(place)


def _bytes(node: fx.Node) -> float:
    """Return the bytes of a tensor at the example's sizes."""
    dtype = Meta(node).dtype
    return float(np.prod([int(s) for s in shape_of(node)]) * dtype.itemsize)


__all__ = ["Memory", "lives", "peak"]
