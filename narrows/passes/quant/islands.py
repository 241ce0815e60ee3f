"""A fake-quantized program in float64, but for what stays floating-point: the islands.

An island computes in the dtype it has, in the integer program and so in what that is held to.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from narrows.ir.meta import Meta, copy_meta, shape_of
from narrows.ir.ops import dialect, table
from narrows.ir.ops.integer import Moves
from narrows.ir.program import Program

NARROW = (torch.float16, torch.bfloat16, torch.float32)


def widened(program: Program, waiting: Container[fx.Node]) -> Program:
    """Return the program in float64 with every island in its own dtype.

    Args:
        program: The fake-quantized program.
        waiting: The nodes that a quantizer ends, which work on codes.
    """
    wide = program.to(torch.float64).copy()
    old = {n.name: n for n in program.graph.nodes}
    for node in wide.nodes:
        was = old.get(node.name)  # none for a cast that says the dtype
        dtype = None if was is None or was in waiting else _island_dtype(was)
        if was is not None and dtype is not None:
            _narrow(wide.graph, node, was, dtype)
    return wide.seal()


def _island_dtype(node: fx.Node) -> torch.dtype | None:
    """Return the dtype in which a node computes, if its result depends on that."""
    if node.op != "call_function" or getattr(node.target, "namespace", "") == "narrows":
        return None
    if isinstance(table.integer_form(node), Moves):
        return None
    dtype = Meta(node).dtype
    if dtype is None:  # several results
        items = (Meta(n).dtype for n in node.users if Meta(n).dtype in NARROW)
        dtype = next(items, None)
    return dtype if dtype in NARROW else None


def _narrow(graph: fx.Graph, node: fx.Node, was: fx.Node, dtype: torch.dtype) -> None:
    """Compute a node of a float64 program in another dtype, with the literals that it had."""
    node.args = pytree.tree_map(_literal, node.args, was.args)
    node.kwargs = {  # without the dtype that `Program.to` may have added
        name: pytree.tree_map(_literal, node.kwargs[name], value)
        for name, value in was.kwargs.items()
    }
    with graph.inserting_before(node):
        for operand in node.all_input_nodes:
            if Meta(operand).dtype is torch.float64:
                node.replace_input_with(operand, _cast(graph, operand, dtype))
    several = Meta(node).dtype is None
    for result in list(node.users) if several else [node]:
        if Meta(result).dtype is torch.float64:
            _widen(graph, result, dtype)


def _literal(new: Any, old: Any) -> Any:
    return new if isinstance(new, fx.Node) else old


def _widen(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> None:
    with graph.inserting_after(node):
        wide = _cast(graph, node, torch.float64)
    node.replace_all_uses_with(wide, delete_user_cb=lambda user: user is not wide)
    Meta(node).dtype = dtype


def _cast(graph: fx.Graph, value: fx.Node, dtype: torch.dtype) -> fx.Node:
    made = graph.call_function(dialect.CAST, (value, dtype))
    copy_meta(value, made)
    Meta(made).shape, Meta(made).dtype = shape_of(value), dtype
    return made


__all__ = ["widened"]
