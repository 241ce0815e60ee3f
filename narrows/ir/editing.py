"""Changing a program that is being made: weights are added, shapes found anew."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from narrows.ir.graph import interpret
from narrows.ir.program import Meta, Origin, Program, aten


def add_weight(program: Program, name: str, data: Tensor, origin: str = "") -> fx.Node:
    """Add a weight to a program that nobody else has, and return its new ``get_attr`` node.

    Args:
        program: The program; its graph and its weights are changed in place.
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


def infer_shapes(program: Program) -> None:
    """Fill ``Meta.shape``, ``dtype`` and ``size`` of every node by running it without data.

    The program must be one the caller made: its nodes' meta is written.
    """
    inputs = [
        torch.empty_like(e, device="meta") if isinstance(e, Tensor) else e for e in program.examples
    ]
    weights = {n: torch.empty_like(t, device="meta") for n, t in program.weights.items()}

    def record(node: fx.Node, value: Any) -> None:
        meta = Meta(node)
        if isinstance(value, Tensor):
            meta.shape, meta.dtype = tuple(value.shape), value.dtype
        elif isinstance(value, (int, float, bool)):
            meta.size = value

    def call(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # The memory order of attention's result is another without data, and view minds.
        target: Any = aten.reshape.default if node.target is aten.view.default else node.target
        schema = getattr(target, "_schema", None)
        if schema is not None and any(a.name == "device" for a in schema.arguments):
            kwargs = {**kwargs, "device": "meta"}
        return target(*args, **kwargs)

    interpret(program.graph, inputs, weights, observe=record, call=call)
