"""Norms that a model writes out become the operators that they are.

``(x - x.mean(d)) / (x.var(d) + eps).sqrt() * w + b`` is ``layer_norm``, and without the mean
``rms_norm``; over the positions of every channel it is ``instance_norm``. As one operator it is
analysed and quantized as a norm: its variance needs no grid of its own.

Only what is equal for every input is taken: an unbiased variance, or an epsilon beside the root, is
another function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from narrows.frontend.lifted import Lifted, val
from narrows.frontend.memory import schema_args
from narrows.frontend.simplify import drop_unread, substitute

aten = torch.ops.aten

_PROVENANCE = ("stack_trace", "nn_module_stack", "custom")
_MULTIPLIED = {aten.mul.Tensor}
_ADDED = {aten.add.Tensor}
_VIEWS = {aten.reshape.default, aten.unsqueeze.default}


@dataclass(frozen=True)
class _Norm:
    """A norm as it stands in the graph.

    Attributes:
        x: What is normalised.
        axes: The axes it is normalised over, in order.
        eps: What is added to the variance.
        centred: Whether the mean is taken away.
        end: The last node of it.
        weight: A weight that multiplies it, or ``None``.
        bias: One that is added then.
        groups: Into how many groups its channels were viewed for it, 0 where they were not.
        channelwise: Whether weight and bias have a number per channel, not per normalised place.
    """

    x: fx.Node
    axes: tuple[int, ...]
    eps: float
    centred: bool
    end: fx.Node
    weight: fx.Node | None = None
    bias: fx.Node | None = None
    groups: int = 0
    channelwise: bool = False


def recognise_norms(lifted: Lifted) -> None:
    """Replace norms that are written out by operators, in place."""
    for node in list(lifted.graph.nodes):
        norm = _scaled(node)
        if norm is None:
            continue
        norm = _with_parameters(_grouped(norm) or norm)
        write = _spelling(norm)
        if write is not None:
            _replace(lifted.graph, norm, write)
    drop_unread(lifted)


# ---------------------------------------------------------------------- what is there


def _scaled(node: fx.Node) -> _Norm | None:
    """Return the norm that ends in a node: something over its own spread."""
    if node.op != "call_function" or not isinstance(val(node), Tensor):
        return None
    if node.target is aten.div.Tensor:
        pairs = [(node.args[0], _root(node.args[1]))]
    elif node.target in _MULTIPLIED:
        a, b = node.args[:2]
        pairs = [(a, _inverse_root(b)), (b, _inverse_root(a))]
    else:
        return None
    for top, under in pairs:
        if under is not None and isinstance(top, fx.Node):
            return _over(node, top, *under)
    return None


def _root(node: Any) -> tuple[fx.Node, float] | None:
    """Return ``v`` and ``eps`` where a node is ``sqrt(v + eps)``."""
    if _is(node, aten.sqrt.default) or _power(node) == 0.5:
        return _offset(node.args[0])
    return None


def _inverse_root(node: Any) -> tuple[fx.Node, float] | None:
    """Return ``v`` and ``eps`` where a node is ``1 / sqrt(v + eps)``."""
    if _is(node, aten.rsqrt.default) or _power(node) == -0.5:
        return _offset(node.args[0])
    if _is(node, aten.mul.Tensor) and node.args[1] == 1:  # what 1 / x becomes
        node = node.args[0]
    return _root(node.args[0]) if _is(node, aten.reciprocal.default) else None


def _offset(node: Any) -> tuple[fx.Node, float]:
    if isinstance(node, fx.Node) and node.target in _ADDED and _plain_sum(node):
        value, more = node.args[:2]
        if isinstance(more, (int, float)) and isinstance(value, fx.Node) and more >= 0:
            return value, float(more)
    return node, 0.0


def _plain_sum(node: fx.Node) -> bool:
    return _given(node).get("alpha", 1) == 1


def _power(node: Any) -> Any:
    return node.args[1] if _is(node, aten.pow.Tensor_Scalar) else None


def _over(end: fx.Node, top: fx.Node, spread: fx.Node, eps: float) -> _Norm | None:
    """Return the norm of which ``top`` is the numerator and ``spread`` the variance."""
    centred = _centred(top)
    if _is(spread, aten.mean.dim):
        axes, squared = _axes(spread), _squared(spread.args[0])
        if axes is None or not _alike(squared, top):
            return None
        if centred is not None and centred[1] == axes:
            return _Norm(centred[0], axes, eps, True, end)
        return _Norm(top, axes, eps, False, end)
    if centred is None:
        return None
    x, axes = centred
    if _variance(spread) == (x, axes) or _difference(spread) == (x, axes):
        return _Norm(x, axes, eps, True, end)
    return None


def _centred(node: Any) -> tuple[fx.Node, tuple[int, ...]] | None:
    """Return ``x`` and the axes where a node is ``x - x.mean(axes)``."""
    if not _is(node, aten.sub.Tensor) or not _plain_sum(node):
        return None
    x, mean = node.args[:2]
    axes = _axes(mean) if _is(mean, aten.mean.dim) and mean.args[0] is x else None
    return None if axes is None else (x, axes)


def _alike(a: Any, b: fx.Node) -> bool:
    """Whether two nodes are one, or take the same mean from the same tensor."""
    return a is b or (_centred(a) is not None and _centred(a) == _centred(b))


def _variance(node: Any) -> tuple[Any, tuple[int, ...] | None] | None:
    """Return ``x`` and the axes where a node is its variance, divided by the count."""
    if not _is(node, aten.var.correction):
        return None
    return (node.args[0], _axes(node)) if _given(node).get("correction") == 0 else None


def _difference(node: Any) -> tuple[Any, tuple[int, ...] | None] | None:
    """Return ``x`` and the axes where a node is ``mean(x^2) - mean(x)^2``."""
    if not _is(node, aten.sub.Tensor) or not _plain_sum(node):
        return None
    first, second = node.args[0], _squared(node.args[1])
    if not _is(first, aten.mean.dim) or not _is(second, aten.mean.dim):
        return None
    x, axes = second.args[0], _axes(second)
    same = _squared(first.args[0]) is x and _axes(first) == axes
    return (x, axes) if same else None


def _squared(node: Any) -> Any:
    """Return ``x`` where a node is its square."""
    if _power(node) == 2:
        return node.args[0]
    return node.args[0] if _is(node, aten.mul.Tensor) and node.args[0] is node.args[1] else None


def _axes(node: Any) -> tuple[int, ...] | None:
    """Return the axes that a reduction keeps with size 1; ``None`` if it takes them away."""
    given = _given(node)
    if not given.get("keepdim") or not given.get("dim") or given.get("dtype") is not None:
        return None
    dims = [given["dim"]] if isinstance(given["dim"], int) else given["dim"]
    rank = val(node).dim()
    return tuple(sorted(d % max(rank, 1) for d in dims))


def _is(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is target


def _given(node: fx.Node) -> dict[str, Any]:
    return {a.name: v for a, v in schema_args(node)}


def _grouped(norm: _Norm) -> _Norm | None:
    """Return the norm of what was viewed as groups of channels for it, and is viewed back."""
    users, rank = list(norm.end.users), val(norm.x).dim()
    viewed = norm.x.target in _VIEWS and len(users) == 1 and users[0].target in _VIEWS
    if not (viewed and norm.centred and norm.axes == tuple(range(2, rank))):
        return None
    x: Any = norm.x.args[0]
    before, inside = val(x).shape, val(norm.x).shape
    groups = inside[1]
    fits = len(before) > 2 and str(before[0]) == str(inside[0]) and isinstance(groups, int)
    back = [str(s) for s in val(users[0]).shape] == [str(s) for s in before]
    if not (fits and back and before[1] % groups == 0):
        return None
    axes = tuple(range(1, len(before)))
    return replace(norm, x=x, axes=axes, end=users[0], groups=groups, channelwise=True)


# ---------------------------------------------------------------------- what follows


def _with_parameters(norm: _Norm) -> _Norm:
    """Return the norm with the weight and the bias that follow it alone.

    Those of one over the positions of every channel may be of either kind.
    """
    made = _taken(norm)
    if made is norm and _over_positions(norm):
        other = _taken(replace(norm, channelwise=True))
        return other if other.end is not norm.end else norm
    return made


def _over_positions(norm: _Norm) -> bool:
    """Whether every channel of an image is normalised over all of its positions."""
    rank = val(norm.x).dim()
    return norm.centred and rank in (3, 4, 5) and norm.axes == tuple(range(2, rank))


def _taken(norm: _Norm) -> _Norm:
    weight = _parameter(norm, _MULTIPLIED)
    if weight is not None:
        norm = replace(norm, end=weight[0], weight=weight[1])
    bias = _parameter(norm, _ADDED) if norm.centred else None
    return norm if bias is None else replace(norm, end=bias[0], bias=bias[1])


def _parameter(norm: _Norm, targets: set[Any]) -> tuple[fx.Node, fx.Node] | None:
    """Return the one reader of a norm's end and the weight in it, if its shape is a parameter's."""
    users = list(norm.end.users)
    if len(users) != 1 or users[0].target not in targets or not _plain_sum(users[0]):
        return None
    others = [a for a in users[0].args[:2] if a is not norm.end]
    weight = _weight(others[0], norm) if len(others) == 1 else None
    return None if weight is None else (users[0], weight)


def _weight(node: Any, norm: _Norm) -> fx.Node | None:
    """Return the weight behind a node, if its numbers are those of the norm's places."""
    if not isinstance(node, fx.Node) or not isinstance(val(node), Tensor):
        return None
    shape, rank = tuple(val(node).shape), val(norm.x).dim()
    source: Any = node
    while source.target in _VIEWS:
        source = source.args[0]
    if source.op != "get_attr" or source.meta["val"].dtype != val(norm.x).dtype:
        return None
    kept = {1} if norm.channelwise else set(norm.axes)
    wanted = [s if a in kept else 1 for a, s in enumerate(val(norm.x).shape)]
    aligned = [1] * (rank - len(shape)) + list(shape)
    plain = [s for a, s in enumerate(val(norm.x).shape) if a in kept]
    if [str(s) for s in aligned] != [str(s) for s in wanted]:
        return None
    return source if [str(s) for s in val(source).shape] == [str(s) for s in plain] else None


# ---------------------------------------------------------------------- how it is spelled

_Spelling = Callable[[fx.Graph, _Norm], fx.Node]


def _spelling(norm: _Norm) -> _Spelling | None:
    """Return how a norm is written, or ``None`` where no operator says it."""
    rank = val(norm.x).dim()
    if norm.groups:
        return _groups
    if any(not isinstance(val(norm.x).shape[a], int) for a in norm.axes):
        return None
    if rank < 2 or 0 in norm.axes:
        return None
    if norm.channelwise:
        return _instance
    if norm.axes == tuple(range(rank - len(norm.axes), rank)):
        return _trailing
    return _turned if len(norm.axes) == 1 else None


def _trailing(graph: fx.Graph, norm: _Norm) -> fx.Node:
    return _norm_of(graph, norm, norm.x)


def _norm_of(graph: fx.Graph, norm: _Norm, x: fx.Node) -> fx.Node:
    """Return a norm over as many trailing axes of ``x``."""
    shape = [int(val(norm.x).shape[a]) for a in norm.axes]
    if not norm.centred:
        return graph.call_function(aten.rms_norm.default, (x, shape, norm.weight, norm.eps))
    args = (x, shape, norm.weight, norm.bias, norm.eps)
    return graph.call_function(aten.layer_norm.default, args)


def _groups(graph: fx.Graph, norm: _Norm) -> fx.Node:
    args = (norm.x, norm.groups, norm.weight, norm.bias, norm.eps)
    return graph.call_function(aten.group_norm.default, args)


def _instance(graph: fx.Graph, norm: _Norm) -> fx.Node:
    args = (norm.x, norm.weight, norm.bias, None, None, True, 0.1, norm.eps, False)
    return graph.call_function(aten.instance_norm.default, args)


def _turned(graph: fx.Graph, norm: _Norm) -> fx.Node:
    """Return a norm over an axis that is stored last for it."""
    (axis,), rank = norm.axes, val(norm.x).dim()
    there = [*(a for a in range(rank) if a != axis), axis]
    back = [there.index(a) for a in range(rank)]
    turned = graph.call_function(aten.permute.default, (norm.x, there))
    turned.meta["val"] = val(norm.x).permute(there)
    normed = _norm_of(graph, norm, turned)
    normed.meta["val"] = val(norm.end).permute(there)
    return graph.call_function(aten.permute.default, (normed, back))


def _replace(graph: fx.Graph, norm: _Norm, write: _Spelling) -> None:
    """Put a norm in the place of its last node; it comes from where that did."""
    before = set(graph.nodes)
    with graph.inserting_before(norm.end):
        made = write(graph, norm)
    made.meta["val"] = val(norm.end)
    for node in graph.nodes:
        if node not in before:
            node.meta |= {k: norm.end.meta[k] for k in _PROVENANCE if k in norm.end.meta}
    substitute(graph, {norm.end: made})


__all__ = ["recognise_norms"]
