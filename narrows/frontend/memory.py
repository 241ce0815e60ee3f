"""Which nodes write into a tensor, and which results share memory.

`shared_memory` goes by the operators' schemas and errs on the side of sharing; `views` runs the
operators on tensors without data and knows exactly.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.node import map_arg

from narrows.frontend.lifted import Lifted, is_item, val

aten = torch.ops.aten

# Operators that may return their input, or a view of it, though their schema does not say so.
UNDECLARED_VIEWS = frozenset(
    {aten.dropout, aten.feature_dropout, aten.alpha_dropout, aten.feature_alpha_dropout,
     aten.atleast_1d, aten.atleast_2d, aten.atleast_3d, aten.meshgrid, aten.broadcast_tensors,
     aten.block_diag, aten.cartesian_prod, aten.einsum, aten.pad, aten.pixel_shuffle,
     aten.pixel_unshuffle, aten.channel_shuffle, aten.sum_to_size, aten.type_as, aten.lift_fresh,
     aten.unsafe_chunk, aten.unsafe_split, aten.unsafe_split_with_sizes, aten._unsafe_view}
)  # fmt: skip
# In-place operators that change no value.
_NO_WRITE = frozenset({aten.detach_.default, aten.requires_grad_.default})


def schema_args(node: fx.Node) -> list[tuple[Any, Any]]:
    """Return each given argument of an ATen call with its entry in the schema."""
    schema = node.target._schema  # type: ignore[union-attr]
    positional = list(zip(schema.arguments, node.args, strict=False))
    named = [(a, node.kwargs[a.name]) for a in schema.arguments if a.name in node.kwargs]
    return positional + named


def written_args(node: fx.Node) -> list[fx.Node]:
    """Return the nodes whose tensors ``node`` writes into."""
    if not isinstance(node.target, OpOverload) or not node.target._schema.is_mutable:
        return []
    if node.target in _NO_WRITE:
        return []
    return _nodes(v for a, v in schema_args(node) if a.alias_info and a.alias_info.is_write)


def shared_memory(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Return for every node the oldest node whose memory its result may share (perhaps itself)."""
    root: dict[fx.Node, fx.Node] = {}

    def find(node: fx.Node) -> fx.Node:
        while root[node] is not node:
            node = root[node]
        return node

    for node in graph.nodes:
        sources = [find(a) for a in _may_view(node)]
        root[node] = sources[0] if sources else node
        for other in sources[1:]:
            root[other] = root[node]
    return {n: find(n) for n in root}


def views(lifted: Lifted, of: Iterable[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Return, for every result that does share memory with an argument, that argument.

    Args:
        lifted: The graph.
        of: The tensors of interest; only what shares memory with one of them is returned.
    """
    may_share = shared_memory(lifted.graph)
    wanted = {may_share[n] for n in of}
    found: dict[fx.Node, fx.Node] = {}
    for node in lifted.graph.nodes:
        candidates = _may_view(node)
        if not candidates or may_share[node] not in wanted:
            continue
        written = written_args(node)
        if written:  # the result of x.add_() is x
            found[node] = written[0]
        elif is_item(node):
            if candidates[0] in found:  # an item of a list of views, not of a tuple of results
                found[node] = candidates[0]
        else:
            source = _viewed(lifted, node, candidates)
            if source is not None:
                found[node] = source
    return found


def _may_view(node: fx.Node) -> list[fx.Node]:
    if node.op != "call_function":
        return []
    if not isinstance(node.target, OpOverload):
        return [a for a in node.all_input_nodes if isinstance(val(a), (Tensor, list, tuple))]
    if node.target.overloadpacket in UNDECLARED_VIEWS:
        return node.all_input_nodes
    return _nodes(v for a, v in schema_args(node) if a.alias_info is not None)


def _viewed(lifted: Lifted, node: fx.Node, candidates: list[fx.Node]) -> fx.Node | None:
    """Run one operator on the meta device and return the argument whose memory came out."""
    stand_ins: dict[fx.Node, Any] = {}

    def read(arg: fx.Node) -> Any:
        if arg not in stand_ins:
            stand_ins[arg] = pytree.tree_map(lambda v: _without_data(lifted, v), val(arg))
        return stand_ins[arg]

    args, kwargs = map_arg((node.args, node.kwargs), read)
    with torch.no_grad():
        result = node.target(*args, **kwargs)  # type: ignore[operator]
    memory = {_storage(v) for v in pytree.tree_leaves(result) if isinstance(v, Tensor)}
    shared = (c for c in candidates if isinstance(read(c), Tensor) and _storage(read(c)) in memory)
    return next(shared, None)


def _without_data(lifted: Lifted, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return lifted.number(value)
    shape, stride = ([lifted.number(n) for n in sizes] for sizes in (value.shape, value.stride()))
    return torch.empty_strided(shape, stride, dtype=value.dtype, device="meta")


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _nodes(values: Iterable[Any]) -> list[fx.Node]:
    return [n for v in values for n in pytree.tree_leaves(v) if isinstance(n, fx.Node)]
