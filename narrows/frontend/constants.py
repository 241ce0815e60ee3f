"""Subgraphs that depend on nothing but literals become constants.

A tensor is constant when it is made of lifted literals and of creation operators (``arange``,
``new_zeros`` of a static size) and when everything that writes into its memory is constant too. The
subgraph is *run* once, in order, writes included, so that a mask built by ``fill_`` on slices comes
out as it does in the model. Nothing that depends on a parameter or a buffer is folded: those must
keep their names.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.experimental.symbolic_shapes import free_symbols
from torch.fx.node import map_arg

from narrows.frontend.lifted import Lifted
from narrows.frontend.memory import shared_memory, written_args

aten = torch.ops.aten

# Creation operators that read the type and device of their first argument, but not its values.
_LIKE = frozenset({aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like})
_NEW = frozenset({aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty})


def fold_constants(lifted: Lifted) -> None:
    """Run the constant subgraphs of the lifted graph and put their results in their place."""
    root = shared_memory(lifted.graph)
    constant = _constant_nodes(lifted, root)
    if not any(n.op == "call_function" for n in constant):
        return
    values: dict[fx.Node, Any] = {}
    version: dict[fx.Node, int] = defaultdict(int)
    stored: dict[tuple[fx.Node, int], Any] = {}
    for node in list(lifted.graph.nodes):
        if node in constant:
            values[node] = _run(lifted, node, values)
            for target in written_args(node):
                version[root[target]] += 1
            continue
        if not any(a in constant for a in node.all_input_nodes):
            continue

        def read(arg: fx.Node, reader: fx.Node = node) -> Any:
            if arg not in constant or arg.op == "get_attr":
                return arg
            key = (arg, version[root[arg]])
            if key not in stored:
                with lifted.graph.inserting_before(reader):
                    stored[key] = _store(lifted, arg, values[arg])
            return stored[key]

        node.args = map_arg(node.args, read)
        node.kwargs = map_arg(node.kwargs, read)
    for node in reversed(list(lifted.graph.nodes)):
        if node in constant and not node.users:
            lifted.graph.erase_node(node)


def _constant_nodes(lifted: Lifted, root: dict[fx.Node, fx.Node]) -> set[fx.Node]:
    """Return the constant nodes: the largest set that no outside value flows into."""
    # Memory that something not constant is written into, or that outlives the call.
    tainted = {
        root[target]
        for node in lifted.graph.nodes
        for target in written_args(node)
        if root[target].op == "get_attr"
    }
    while True:
        constant: set[fx.Node] = set()
        fresh = False
        for node in lifted.graph.nodes:
            if root[node] not in tainted and _is_constant(lifted, node, constant):
                constant.add(node)
                continue
            for target in written_args(node):
                if root[target] not in tainted:
                    tainted.add(root[target])
                    fresh = True
        if not fresh:
            return constant


def _is_constant(lifted: Lifted, node: fx.Node, constant: set[fx.Node]) -> bool:
    if node.op == "get_attr":
        return str(node.target) in lifted.constants
    if node.op != "call_function" or not _foldable(node):
        return False
    inputs = node.all_input_nodes
    if _reads_only_type(node):
        inputs = [a for a in inputs if a is not node.args[0]]
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or any(free_symbols(s) for s in value.shape):
            return False
    return all(a in constant for a in inputs)


def _foldable(node: fx.Node) -> bool:
    if not isinstance(node.target, OpOverload):
        return node.target.__module__ in ("_operator", "math")  # getitem, arithmetic on numbers
    return torch.Tag.nondeterministic_seeded not in node.target.tags


def _reads_only_type(node: fx.Node) -> bool:
    packet = node.target.overloadpacket if isinstance(node.target, OpOverload) else None
    return packet in _LIKE or packet in _NEW


def _run(lifted: Lifted, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    if node.op == "get_attr":
        return lifted.weights[str(node.target)]
    if _reads_only_type(node) and node.args[0] not in values:
        like = node.args[0].meta["val"]  # type: ignore[union-attr]
        shape, stride = node.meta["val"].shape, node.meta["val"].stride()
        values = {**values, node.args[0]: _stand_in(like, shape, stride)}  # type: ignore[dict-item]
    args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
    with torch.no_grad():
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _stand_in(like: Tensor, shape: Any, stride: Any) -> Tensor:
    """Return an empty tensor of the type of ``like``, of which nothing else is read."""
    shape, stride = [int(s) for s in shape], [int(s) for s in stride]
    return torch.empty_strided(shape, stride, dtype=like.dtype, device=like.device)


def _store(lifted: Lifted, node: fx.Node, value: Any) -> Any:
    """Return what stands for a constant node: a number, or a node that reads a new constant."""
    if not isinstance(value, Tensor):
        symbolic = node.meta.get("val")
        if isinstance(symbolic, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            lifted.sizes[symbolic.node.expr] = value
        return value
    name = lifted.new_constant(value.detach().clone())
    new = lifted.graph.create_node("get_attr", name)
    new.meta = {**node.meta, "val": value}
    return new
