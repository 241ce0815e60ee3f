"""Changing a draft: weights are added and dropped, shapes found anew."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, fx

from narrows.ir.blank import run_blank
from narrows.ir.meta import Meta
from narrows.ir.program import Draft, Origin


def add_weight(program: Draft, name: str, data: Tensor, origin: str = "") -> fx.Node:
    """Add a weight to a draft, and return its new ``get_attr`` node.

    Args:
        program: The draft; its graph and its weights are changed in place.
        name: The weight's name; a number is added where it is taken.
        data: The tensor.
        origin: The weight that it is a copy of, perhaps changed; without one it is a constant.
    """
    stem, count = name, 0
    while name in program.weights or name in program.aliases:
        count += 1
        name = f"{stem}_{count}"
    program.weights[name] = data
    if origin:
        whole = Origin(origin, tuple(data.shape), (None,) * data.dim())
        program.origins = {**program.origins, name: program.origins.get(origin, whole)}
    if not origin or origin in program.buffers:
        program.buffers = program.buffers | {name}
    first = next(n for n in program.graph.nodes if n.op != "placeholder")
    with program.graph.inserting_before(first):
        node = program.graph.create_node("get_attr", name, name=name.replace(".", "_"))
    Meta(node).shape, Meta(node).dtype = tuple(data.shape), data.dtype
    return node


def drop_unread(program: Draft, sources: Iterable[fx.Node]) -> None:
    """Drop those ``get_attr`` nodes that nothing reads any more, and their weights."""
    for node in dict.fromkeys(sources):
        if node.op != "get_attr" or node.users:
            continue
        name = str(node.target)
        program.graph.erase_node(node)
        program.weights.pop(name, None)
        program.buffers, program.stored = program.buffers - {name}, program.stored - {name}
        program.aliases = {a: n for a, n in program.aliases.items() if n != name}


def infer_shapes(program: Draft) -> None:
    """Fill ``Meta.shape``, ``dtype`` and ``size`` of every node by running it without data.

    The nodes' meta is written.
    """

    def record(node: fx.Node, value: Any) -> None:
        meta = Meta(node)
        if isinstance(value, Tensor):
            meta.shape, meta.dtype = tuple(value.shape), value.dtype
        elif isinstance(value, (int, float, bool)):
            meta.size = value

    run_blank(program, record)
