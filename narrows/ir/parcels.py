"""A program in plain parts, so that `pickle` takes it to another process of the same narrows.

It is no format of files: those that narrows keeps are data, and a pickle is code.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch.fx.node import map_aggregate, map_arg

from narrows.ir.graph import add_node
from narrows.ir.program import Program

SPECS = ("in_spec", "out_spec")


@dataclass(frozen=True)
class Place:
    """A node as an argument: its place in the graph."""

    number: int


@dataclass(frozen=True)
class Operator:
    """An overload of an operator, by its names: ``aten``, ``conv2d``, ``default``."""

    namespace: str
    name: str
    overload: str


def parcel(program: Program) -> tuple[Any, tuple[Any, ...]]:
    """Return what `pickle` makes a program of: a function, and its arguments.

    What a pruned program was made from is left behind, as a copy leaves it.
    """
    place: dict[fx.Node, Any] = {n: Place(i) for i, n in enumerate(program.graph.nodes)}
    lines = []
    for node in program.graph.nodes:
        args, kwargs = map_arg((node.args, node.kwargs), place.__getitem__)
        target = node.target
        if isinstance(target, torch._ops.OpOverload):
            target = Operator(target.namespace, target._opname, target._overloadname)
        lines.append((node.op, target, args, kwargs, node.name, dict(node.meta)))
    held = {f.name: getattr(program, f.name) for f in dataclasses.fields(program)}
    held = {k: v for k, v in held.items() if k not in ("graph", "pruning", "_memo")}
    # A structure of numbers in place of a specification, whose own way of pickling torch changes.
    held |= {k: held[k].unflatten(range(held[k].num_leaves)) for k in SPECS}
    return opened, (type(program), lines, held)


def opened(kind: type[Program], lines: list[Any], held: dict[str, Any]) -> Program:
    """Return the program of a parcel."""
    import narrows.ir.ops.table  # noqa: F401  # it declares the operators of narrows' own

    graph, nodes = fx.Graph(), []
    for op, target, args, kwargs, name, meta in lines:
        args, kwargs = map_aggregate((args, kwargs), lambda a: _node(a, nodes))
        made = add_node(graph, op, _function(target), args, kwargs, name)
        made.meta = meta
        nodes.append(made)
    return kind(graph=graph, **{**held, **{k: pytree.tree_structure(held[k]) for k in SPECS}})


def _node(value: Any, nodes: list[fx.Node]) -> Any:
    return nodes[value.number] if isinstance(value, Place) else value


def _function(target: Any) -> Any:
    if not isinstance(target, Operator):
        return target
    room = getattr(torch.ops, target.namespace)
    return getattr(getattr(room, target.name), target.overload)


__all__ = ["opened", "parcel"]
