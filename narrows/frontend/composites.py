"""Operators without a row of their own become those that ATen composes them of.

``expand_as`` is ``expand``, ``tensordot`` is reshapes and one ``mm``. ATen's own composition is
traced on the node's fake tensors and put in the node's place, if every operator in it has a row.
Otherwise the operator stays: one barrier that the user knows by name says more than several of its
parts. A few operators for which ATen has no composition, or a long-winded one, have theirs here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._C import DispatchKey
from torch._decomp import decomposition_table
from torch._guards import detect_fake_mode
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from narrows.frontend.einsum import einsum
from narrows.frontend.lifted import Lifted, is_item, val
from narrows.frontend.simplify import substitute
from narrows.frontend.spellings import respell
from narrows.ir.adaptive import windows
from narrows.ir.graph import live_nodes
from narrows.ir.ops import table

aten = torch.ops.aten

# Loops over a sequence, which would be unrolled.
_LOOPS = frozenset({aten.lstm, aten.gru, aten.rnn_tanh, aten.rnn_relu})

# The meta that says where a node came from; its parts come from there, too.
_PROVENANCE = ("stack_trace", "nn_module_stack", "custom")


def expand_composites(lifted: Lifted) -> None:
    """Replace composite operators by operators with rows, in place."""
    for node in list(lifted.graph.nodes):
        if node.all_input_nodes and not _known(node):
            body = _composition(node)
            if body is not None:
                _inline(lifted.graph, node, body)


def _known(node: fx.Node) -> bool:
    """Tell whether a node needs no composition: it has a row, or makes no tensor."""
    if node.op != "call_function" or table.find(node) is not None:
        return True
    return not isinstance(val(node), (Tensor, tuple, list))


# ---------------------------------------------------------------------- what an operator is made of


def _composition(node: fx.Node) -> fx.Graph | None:
    """Return what a node is composed of: a graph with a placeholder per input of the node.

    The output is what the node returns, ``None`` for an item that nobody reads. The result is
    ``None`` where there is no composition of operators that all have rows.
    """
    graph = next((g for rule in _rules(node.target) if (g := _trace(node, rule))), None)
    if graph is None:
        return None
    for part in list(live_nodes(graph)):
        if part.op == "get_attr":  # a tensor that the trace made up
            return None
        respell(part)
        if not _known(part):
            body = _composition(part)
            if body is None:
                return None
            _inline(graph, part, body)
    return graph


def _rules(target: Any) -> Iterator[Callable[..., Any]]:
    """Yield what computes an operator by others: ours, ATen's."""
    if not isinstance(target, OpOverload) or target.overloadpacket in _LOOPS:
        return
    if target in _COMPOSITIONS:
        yield _COMPOSITIONS[target]
    if target.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd):
        yield target.decompose
    elif target in decomposition_table:
        yield decomposition_table[target]


def _trace(node: fx.Node, rule: Callable[..., Any]) -> fx.Graph | None:
    """Return the operators that ``rule`` calls, undecomposed themselves, without unread ones."""
    inputs = node.all_input_nodes
    values = [val(n) for n in inputs]
    mode = detect_fake_mode(values)
    if mode is None:
        return None
    values = [_fake(mode, v) for v in values]
    read: list[Any] = [u.args[1] for u in node.users if is_item(u)]

    def composed(*given: Any) -> Any:
        actual = dict(zip(inputs, given, strict=True))
        args, kwargs = map_arg((node.args, node.kwargs), actual.__getitem__)
        # Under torch functions, `decompose` would call the operator itself.
        with mode, torch._C.DisableTorchFunction():
            result = rule(*args, **kwargs)
        if isinstance(result, Tensor):
            return result
        if result is None:
            raise _NoCompositionError
        items = tuple(r if i in read else None for i, r in enumerate(result))
        if any(items[i] is None for i in read) or not all(is_item(u) for u in node.users):
            raise _NoCompositionError
        return items

    try:
        return make_fx(composed, pre_dispatch=True)(*values).graph
    except Exception:  # whatever ATen's code, or an extension's, cannot do: the operator stays
        return None


def _fake(mode: Any, value: Any) -> Any:
    """Return a tensor without data for a constant, which has data; all sizes of it are known."""
    if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
        return value
    return mode.from_tensor(value, static_shapes=True)


class _NoCompositionError(Exception):
    """A rule does not fit, or knows less than what is read."""


# ---------------------------------------------------------------------- where ATen has none


def _extremum(reduce: Any) -> Callable[..., Any]:
    return lambda x, dim, keepdim=False: (reduce(x, [dim], keepdim), None)


def _moments(spread: Any) -> Callable[..., Any]:
    def moments(x: Any, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Any:
        mean = aten.mean.dim(x, dim, keepdim)
        return spread(x, dim, correction=correction, keepdim=keepdim), mean

    return moments


def _adaptive_max_pool(pool: Any, rank: int) -> Callable[..., Any]:
    """Windows of one size where the sizes allow it; which element was largest is not said."""

    def pooled(x: Any, output_size: Any) -> Any:
        sizes = x.shape[-rank:]
        if not all(isinstance(s, int) for s in sizes):
            return None, None
        if any(s % o for s, o in zip(sizes, output_size, strict=True)):
            for axis, count in enumerate(output_size, -rank):
                x = _largest_along(x, axis, count)
            return x, None
        window = [s // o for s, o in zip(sizes, output_size, strict=True)]
        return pool(x, window, window), None

    return pooled


def _largest_along(x: Any, axis: int, count: int) -> Any:
    """Return the largest elements of windows along an axis that differ in size."""
    ends = windows(x.shape[axis], count)
    parts = [aten.amax.default(x.narrow(axis, a, b - a), [axis], True) for a, b in ends]
    return torch.cat(parts, axis) if len(parts) > 1 else parts[0]


def _addbmm(x: Any, a: Any, b: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
    return x * beta + torch.bmm(a, b).sum(0) * alpha


def _slice_scatter(
    x: Any, source: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Any:
    """What lies before, the source, and what lies behind."""
    dim, size = dim % x.dim(), x.shape[dim]
    if step != 1 or not isinstance(size, int):
        return None
    start, end, _ = slice(start, end).indices(size)
    return _framed(x, source, dim, start, end)


def _select_scatter(x: Any, source: Any, dim: int, index: Any) -> Any:
    dim, size = dim % x.dim(), x.shape[dim]
    if not isinstance(size, int) or not isinstance(index, int):
        return None
    index %= size
    return _framed(x, source.unsqueeze(dim), dim, index, index + 1)


def _fill(x: Any, value: Any) -> Any:
    return value.to(x.dtype).expand(x.shape)


def _framed(x: Any, source: Any, dim: int, start: int, end: int) -> Any:
    before, behind = x.narrow(dim, 0, start), x.narrow(dim, end, x.shape[dim] - end)
    source = source.to(x.dtype)
    return torch.cat([t for t in (before, source, behind) if t.shape[dim] != 0], dim)


def _cosine_similarity(a: Any, b: Any, dim: int = 1, eps: float = 1e-8) -> Any:
    lengths = [aten.linalg_vector_norm.default(x, 2, [dim], True).clamp_min(eps) for x in (a, b)]
    return (a / lengths[0] * (b / lengths[1])).sum(dim)


_COMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten.einsum.default: einsum,
    aten.max.dim: _extremum(aten.amax.default),
    aten.min.dim: _extremum(aten.amin.default),
    aten.var_mean.correction: _moments(aten.var.correction),
    aten.std_mean.correction: _moments(aten.std.correction),
    aten.adaptive_max_pool1d.default: _adaptive_max_pool(aten.max_pool1d.default, 1),
    aten.adaptive_max_pool2d.default: _adaptive_max_pool(aten.max_pool2d.default, 2),
    aten.adaptive_max_pool3d.default: _adaptive_max_pool(aten.max_pool3d.default, 3),
    aten.addbmm.default: _addbmm,
    aten.fill.Tensor: _fill,
    aten.slice_scatter.default: _slice_scatter,
    aten.select_scatter.default: _select_scatter,
    aten.cosine_similarity.default: _cosine_similarity,
}


# ---------------------------------------------------------------------- putting it in its place


def _inline(graph: fx.Graph, node: fx.Node, body: fx.Graph) -> list[fx.Node]:
    """Replace a node by the operators of ``body`` and return them; they come from where it did."""
    actual = iter(node.all_input_nodes)
    env: dict[fx.Node, Any] = {}
    parts: list[fx.Node] = []
    result: Any = None
    provenance = {k: node.meta[k] for k in _PROVENANCE if k in node.meta}
    with graph.inserting_before(node):
        for part in live_nodes(body):
            if part.op == "placeholder":
                env[part] = next(actual)
            elif part.op == "output":
                result = map_arg(part.args[0], env.__getitem__)
            else:
                env[part] = graph.node_copy(part, env.__getitem__)
                env[part].meta = {"val": part.meta["val"], **provenance}
                parts.append(env[part])
    if isinstance(result, (tuple, list)):
        items = list(node.users)
        substitute(graph, {u: result[u.args[1]] for u in items})  # type: ignore[index]
        for item in items:
            graph.erase_node(item)
    else:
        substitute(graph, {node: result})
    graph.erase_node(node)
    return parts
