"""Graph clean-up on the way to the dialect: inlined contexts, sizes, and nodes that do nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx.experimental.symbolic_shapes import free_symbols
from torch.fx.node import map_arg

from narrows.errors import CaptureError
from narrows.frontend.lifted import Lifted, is_item, val
from narrows.frontend.memory import schema_args

aten = torch.ops.aten
higher_order = torch.ops.higher_order

# Where the body stands among the arguments of the context operators that a program can inline.
_BODY = {higher_order.wrap_with_set_grad_enabled: 1, higher_order.wrap_with_autocast: 4}


def inline_contexts(lifted: Lifted) -> None:
    """Replace ``with torch.no_grad():`` blocks, and autocast that is off, by their bodies."""
    pending = [n for n in lifted.graph.nodes if isinstance(n.target, HigherOrderOperator)]
    while pending:
        node = pending.pop()
        position = _BODY.get(node.target)  # type: ignore[arg-type]
        if position is None:
            raise CaptureError(
                f"the model uses the operator {node.target}",
                where=lifted.where(node),
                why="a program has no control flow",
                hint="compute both sides and choose with torch.where, or unroll the loop",
            )
        if node.target is higher_order.wrap_with_autocast and node.args[2]:
            raise CaptureError(
                "the model switches autocast on",
                where=lifted.where(_first_inside(node)),
                why="the types that autocast chooses are in no operator of the graph",
                hint="convert with .to(dtype) instead, or capture without autocast",
            )
        pending += _inline(lifted.graph, node, position)


def _first_inside(node: fx.Node) -> fx.Node:
    body = next(a.meta["body"] for a in node.all_input_nodes if "body" in a.meta)
    return next((n for n in body.graph.nodes if n.op == "call_function"), node)


def _inline(graph: fx.Graph, node: fx.Node, position: int) -> list[fx.Node]:
    """Replace one context operator by its body; return the context operators inside."""
    body = node.args[position].meta["body"]  # type: ignore[union-attr]
    actual = iter(node.args[position + 1 :])
    env: dict[fx.Node, Any] = {}
    results: tuple[Any, ...] = ()
    inner = []
    with graph.inserting_before(node):
        for old in body.graph.nodes:
            if old.op == "placeholder":
                env[old] = next(actual)
            elif old.op == "output":
                results = map_arg(old.args[0], env.__getitem__)
            else:
                env[old] = graph.node_copy(old, env.__getitem__)
                if old.op == "get_attr":
                    env[old].meta["body"] = getattr(body, str(old.target))
                if isinstance(old.target, HigherOrderOperator):
                    inner.append(env[old])
    substitute(graph, {u: results[u.args[1]] for u in node.users if is_item(u)})  # type: ignore[index]
    for user in list(node.users):
        graph.erase_node(user)
    graph.erase_node(node)
    return inner


def drop_unread(lifted: Lifted) -> None:
    """Remove assertions and every other node that nothing reads and that writes nothing."""
    for node in reversed(list(lifted.graph.nodes)):
        writes = isinstance(node.target, OpOverload) and node.target._schema.is_mutable
        if node.op in ("call_function", "get_attr") and not node.users and not writes:
            lifted.graph.erase_node(node)


def respell_extrema(lifted: Lifted) -> None:
    """Write ``x.max(dim).values`` as ``amax`` where nobody asks where the largest is."""
    named = {aten.max.dim: aten.amax.default, aten.min.dim: aten.amin.default}
    for node in list(lifted.graph.nodes):
        if node.target not in named or not all(is_item(u) and u.args[1] == 0 for u in node.users):
            continue
        for item in list(node.users):
            given = dict(schema_args(node))
            args = {a.name: value for a, value in given.items()}
            item.target = named[node.target]
            item.args = (args["self"], [args["dim"]], args.get("keepdim", False))
        lifted.graph.erase_node(node)


def respell_unbound(lifted: Lifted) -> None:
    """Write what is read of ``x.unbind(dim)`` as ``select``."""
    for node in list(lifted.graph.nodes):
        if node.target is not aten.unbind.int or not all(is_item(u) for u in node.users):
            continue
        for item in list(node.users):
            given = {a.name: value for a, value in schema_args(node)}
            item.target, index = aten.select.int, item.args[1]
            item.args = (given["self"], given.get("dim", 0), index)
        lifted.graph.erase_node(node)


def respell_indices(lifted: Lifted) -> None:
    """Write ``x[:, index]`` as ``index_select`` or ``select`` where the index is known.

    An index that counts from the end, has several axes, or says yes or no of each place, becomes a
    literal of the places, unless a checkpoint may hold another; such a one is read as it is.
    """
    for node in lifted.graph.nodes:
        if node.target is not aten.index.Tensor:
            continue
        x, indices = node.args
        given = [(axis, n) for axis, n in enumerate(indices) if n is not None]
        if len(given) != 1 or given[0][1].op != "get_attr":
            continue
        (axis, index), name = given[0], str(given[0][1].target)
        known = lifted.weights[name]
        places = _places(known, val(x).shape[axis])
        if places is None or (places is not known and name in lifted.stored):
            continue
        if places.dim() == 0:
            node.target, node.args = aten.select.int, (x, axis, int(places))
            continue
        size = val(node).shape[axis]
        if isinstance(size, torch.SymInt):  # torch did not count how often it says yes
            lifted.sizes[size.node.expr] = len(places)
        with lifted.graph.inserting_before(node):
            if places is not known:
                index = _literal(lifted, places.flatten())
            chosen = (x, axis, index)
            if places.dim() > 1:
                flat = lifted.graph.call_function(aten.index_select.default, chosen)
                flat.meta = {**node.meta, "val": val(node).flatten(axis, axis + places.dim() - 1)}
        if places.dim() > 1:
            node.target, node.args = aten.unflatten.int, (flat, axis, list(places.shape))
        else:
            node.target, node.args = aten.index_select.default, chosen


def _literal(lifted: Lifted, tensor: Tensor) -> fx.Node:
    node = lifted.graph.create_node("get_attr", lifted.new_constant(tensor))
    node.meta = {"val": tensor}
    return node


def _places(index: Tensor, size: Any) -> Tensor | None:
    """Return the places of an axis that an index names, itself if it does; ``None`` if unclear."""
    if not isinstance(size, int) or index.numel() == 0:
        return None
    if index.dtype == torch.bool:
        return index.nonzero().flatten() if tuple(index.shape) == (size,) else None
    if index.dtype not in (torch.int32, torch.int64):
        return None
    if index.dim() == 1 and bool((index >= 0).all()):
        return index
    return index % size


def drop_empty(lifted: Lifted) -> None:
    """Take what has no elements out of concatenations, to which it adds nothing.

    Rotary embeddings of whole heads, and prefixes of no tokens, concatenate such a part.
    """
    for node in lifted.graph.nodes:
        if node.target is not aten.cat.default:
            continue
        parts: Any = node.args[0]
        full = [n for n in parts if not _is_empty(val(n))]
        if (
            not full
            or len(full) == len(parts)
            or any(val(n).dtype != val(node).dtype for n in full)
        ):
            continue
        if len(full) > 1:
            node.args = (full, *node.args[1:])
        else:
            node.target, node.args, node.kwargs = aten.clone.default, (full[0],), {}


def _is_empty(value: Any) -> bool:
    return isinstance(value, Tensor) and any(isinstance(s, int) and s == 0 for s in value.shape)


def unify_sizes(lifted: Lifted) -> None:
    """Make sizes that are known literals, and let every free size be read by one node."""
    replaced: dict[fx.Node, Any] = {}
    readers: dict[Any, fx.Node] = {}
    for node in list(lifted.graph.nodes):
        value = val(node)
        if node.op != "call_function" or isinstance(value, (Tensor, tuple, list, type(None))):
            continue
        symbols = free_symbols(value)
        if symbols - set(lifted.sizes):
            continue  # depends on data; refused later
        if not symbols & lifted.free:
            replaced[node] = lifted.number(value)
        elif value.node.expr in lifted.readers:
            replaced[node] = _size_reader(lifted, value, readers)
    substitute(lifted.graph, replaced)
    for node in reversed(list(replaced)):
        lifted.graph.erase_node(node)


def _size_reader(lifted: Lifted, value: Any, readers: dict[Any, fx.Node]) -> fx.Node:
    size = value.node.expr
    if size not in readers:
        holder, axis = lifted.readers[size]
        with lifted.graph.inserting_before(_first_call(lifted.graph)):
            readers[size] = lifted.graph.call_function(aten.sym_size.int, (holder, axis))
        readers[size].meta = {"val": value}
    return readers[size]


def _first_call(graph: fx.Graph) -> fx.Node:
    return next(n for n in graph.nodes if n.op != "placeholder")


def drop_no_ops(lifted: Lifted) -> None:
    """Remove calls that return one of their inputs as it is."""
    replaced: dict[fx.Node, Any] = {}
    for node in lifted.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, OpOverload):
            continue
        rule = _NO_OPS.get(node.target.overloadpacket)
        if rule is not None and rule(node):
            # A scatter that covers the whole tensor leaves only what it writes.
            scatter = node.target.overloadpacket is aten.slice_scatter
            replaced[node] = node.args[1 if scatter else 0]
    substitute(lifted.graph, replaced)
    for node in reversed(list(replaced)):
        lifted.graph.erase_node(node)


def _always(node: fx.Node) -> bool:
    return True


def _never_drops(node: fx.Node) -> bool:
    return _given(node)["p"] == 0


def _whole_slice(node: fx.Node) -> bool:
    return _same_shape(node) and _given(node).get("step", 1) == 1


def _whole_scatter(node: fx.Node) -> bool:
    covers = [str(s) for s in val(node.args[0]).shape] == [str(s) for s in val(node.args[1]).shape]
    return covers and _given(node).get("step", 1) == 1


def _no_padding(node: fx.Node) -> bool:
    return all(p == 0 for p in _given(node)["pad"])


def _same_shape(node: fx.Node) -> bool:
    before, after = val(node.args[0]), val(node)
    return len(before.shape) == len(after.shape) and all(
        str(a) == str(b) for a, b in zip(before.shape, after.shape, strict=True)
    )


def _same_type(node: fx.Node) -> bool:
    """Tell whether a conversion changes neither the type, nor the place, nor the memory's order."""
    before, after = val(node.args[0]), val(node)
    same = before.dtype == after.dtype and before.device == after.device
    return same and _given(node).get("memory_format") in (None, torch.preserve_format)


def _plain_copy(node: fx.Node) -> bool:
    dense = val(node.args[0]).is_contiguous()
    return dense and _given(node).get("memory_format") in (None, torch.preserve_format)


def _given(node: fx.Node) -> dict[str, Any]:
    return {a.name: v for a, v in schema_args(node)}


_NO_OPS: dict[Any, Callable[[fx.Node], bool]] = {
    aten.lift_fresh: _always,
    aten.detach_: _always,
    aten.alias: _always,
    aten.slice: _whole_slice,
    aten.slice_scatter: _whole_scatter,
    aten.expand: _same_shape,
    aten.expand_as: _same_shape,
    aten.reshape: _same_shape,
    aten.pad: _no_padding,
    aten.to: _same_type,
    aten.type_as: _same_type,
    aten.clone: _plain_copy,
    aten.dropout: _never_drops,
    aten.feature_dropout: _never_drops,
}


def substitute(graph: fx.Graph, replaced: dict[fx.Node, Any]) -> None:
    """Let every reader of a replaced node read its replacement, a node or a literal."""
    if not replaced:
        return

    def read(node: fx.Node) -> Any:
        while node in replaced:
            node = replaced[node]
            if not isinstance(node, fx.Node):
                break
        return node

    for node in graph.nodes:
        if any(a in replaced for a in node.all_input_nodes):
            node.args = map_arg(node.args, read)
            node.kwargs = map_arg(node.kwargs, read)
