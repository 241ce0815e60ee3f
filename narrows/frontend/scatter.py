"""What a write into a view means for the tensor that was viewed.

For every kind of view there is an operator that puts a new value of the view back: ``slice`` has
``slice_scatter``, a permutation its inverse, and a reshape a reshape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from narrows.frontend.lifted import is_item, val
from narrows.frontend.memory import schema_args

aten = torch.ops.aten

# Views of all elements in their order: the way back is a reshape.
_RESHAPES = frozenset(
    {aten.view, aten.reshape, aten._unsafe_view, aten.view_as, aten.reshape_as, aten.flatten,
     aten.unflatten, aten.ravel, aten.squeeze, aten.unsqueeze, aten.alias, aten.detach,
     aten.contiguous, aten.to, aten.type_as, aten.lift_fresh, aten.expand, aten.expand_as,
     aten.slice, aten.dropout, aten.feature_dropout, aten.alpha_dropout,
     aten.feature_alpha_dropout, aten.atleast_1d, aten.atleast_2d, aten.atleast_3d}
)  # fmt: skip

Call = Callable[..., fx.Node]
Given = dict[str, Any]  # a view's arguments by their schema names


def scatter(call: Call, view: fx.Node, source: fx.Node, value: fx.Node) -> fx.Node | None:
    """Return what ``source`` becomes when its view gets a new value; ``None`` if that is not known.

    Args:
        call: Inserts an operator.
        view: The node that views; its arguments say how.
        source: The present value of what it views.
        value: The new value of the view.
    """
    if is_item(view):
        return _scatter_item(call, view, source, value)
    given = {a.name: v for a, v in schema_args(view)}
    packet = view.target.overloadpacket  # type: ignore[union-attr]
    if val(view).dtype != val(source).dtype:  # the same bytes, read as another type
        return None
    if packet in _RESHAPES and val(view).numel() == val(source).numel():
        return _reshaped(call, value, source)
    rule = _RULES.get(packet)
    return rule(call, source, value, given) if rule is not None else None


def _reshaped(call: Call, value: fx.Node, source: fx.Node) -> fx.Node:
    shape = val(source).shape
    if [str(s) for s in shape] == [str(s) for s in val(value).shape]:
        return value
    sizes = [-1 if isinstance(s, torch.SymInt) else s for s in shape]
    if sizes.count(-1) > 1 or 0 in sizes:
        return call(aten.reshape_as.default, value, source)
    return call(aten.reshape.default, value, sizes)


def _scatter_item(call: Call, view: fx.Node, source: fx.Node, value: fx.Node) -> fx.Node | None:
    """Scatter one item of what split, chunk or unbind returned."""
    whole: Any = view.args[0]
    index: Any = view.args[1]
    axis = {a.name: v for a, v in schema_args(whole)}.get("dim", 0)
    packet = whole.target.overloadpacket
    if packet is aten.unbind:
        return call(aten.select_scatter.default, source, value, axis, index)
    if packet not in _SPLITS:
        return None
    widths = [part.shape[axis] for part in val(whole)]
    if any(isinstance(w, torch.SymInt) for w in widths):
        return None
    start = sum(widths[:index])
    return call(aten.slice_scatter.default, source, value, axis, start, start + widths[index])


_SPLITS = frozenset(
    {aten.split, aten.split_with_sizes, aten.chunk, aten.tensor_split, aten.unsafe_split,
     aten.unsafe_chunk, aten.unsafe_split_with_sizes}
)  # fmt: skip


def _slice(call: Call, source: fx.Node, value: fx.Node, given: Given) -> fx.Node:
    rest = (given.get("dim", 0), given.get("start"), given.get("end"), given.get("step", 1))
    return call(aten.slice_scatter.default, source, value, *rest)


def _narrow(call: Call, source: fx.Node, value: fx.Node, given: Given) -> fx.Node | None:
    start, length = given["start"], given["length"]
    if not isinstance(start, int) or not isinstance(length, int) or start < 0:
        return None
    return call(aten.slice_scatter.default, source, value, given["dim"], start, start + length)


def _select(call: Call, source: fx.Node, value: fx.Node, given: Given) -> fx.Node:
    return call(aten.select_scatter.default, source, value, given["dim"], given["index"])


def _diagonal(call: Call, source: fx.Node, value: fx.Node, given: Given) -> fx.Node:
    rest = (given.get("offset", 0), given.get("dim1", 0), given.get("dim2", 1))
    return call(aten.diagonal_scatter.default, source, value, *rest)


def _permute(call: Call, source: fx.Node, value: fx.Node, given: Given) -> fx.Node:
    dims = [d % len(given["dims"]) for d in given["dims"]]
    return call(aten.permute.default, value, [dims.index(i) for i in range(len(dims))])


def _transpose(call: Call, source: fx.Node, value: fx.Node, given: Given) -> fx.Node:
    _, first, second = given.values()
    return call(aten.transpose.int, value, first, second)


def _matrix_transpose(call: Call, source: fx.Node, value: fx.Node, given: Given) -> fx.Node:
    return call(aten.t.default, value)


def _move(call: Call, source: fx.Node, value: fx.Node, given: Given) -> fx.Node:
    back = given["destination"], given["source"]
    op = aten.movedim.int if isinstance(back[0], int) else aten.movedim.intlist
    return call(op, value, *back)


_RULES: dict[Any, Callable[..., fx.Node | None]] = {
    aten.slice: _slice,
    aten.narrow: _narrow,
    aten.select: _select,
    aten.diagonal: _diagonal,
    aten.permute: _permute,
    aten.transpose: _transpose,
    aten.swapaxes: _transpose,
    aten.swapdims: _transpose,
    aten.t: _matrix_transpose,
    aten.movedim: _move,
    aten.moveaxis: _move,
}
