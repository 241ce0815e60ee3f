"""Masks of numbers that only say which scores are hidden: zero or minus infinity.

``nn.MultiheadAttention`` makes such a mask of the padding that it is given, and adds it to scores.
Codes have no infinity. What the mask was made of is a tensor of truth values, and a choice by it,
``where(hidden, -inf, scores)``, computes the same and has an integer form.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.fx.node import map_arg

from narrows.ir.editing import add_weight
from narrows.ir.meta import Meta, copy_meta
from narrows.ir.ops import dialect, table
from narrows.ir.ops.args import arguments, first_tensor
from narrows.ir.ops.fill import Fill
from narrows.ir.ops.integer_choices import Constant, Where
from narrows.ir.ops.layout import Layout
from narrows.ir.ops.selection import Selection
from narrows.ir.program import Draft

# Where a tensor that was asked for is minus infinity.
Known = dict[fx.Node, fx.Node | bool | None]


def choose_hidden(program: Draft) -> bool:
    """Let sums with a mask of zeros and minus infinities choose; tell whether there are any."""
    changed = False
    known: Known = {}
    for node in list(program.graph.nodes):
        if node.target is not dialect.ADD or arguments(node)["alpha"] != 1:
            continue
        with program.graph.inserting_before(node):
            hidden = [_hidden(program, part, known) for part in node.args]
        for mask, scores, said in zip(hidden, node.args[::-1], hidden[::-1], strict=True):
            if isinstance(mask, fx.Node) and isinstance(scores, fx.Node) and said is None:
                node.target, node.args, node.kwargs = dialect.HIDE, (mask, -math.inf, scores), {}
                changed = True
    return changed


def _hidden(program: Draft, node: Any, known: Known) -> fx.Node | bool | None:
    """Return where a tensor is minus infinity, if it is zero everywhere else.

    Nodes are put where the graph inserts at present. It is ``True`` or ``False`` where all elements
    are alike, and ``None`` where there are other numbers. Each tensor is asked once: in a chain of
    sums every one leads to all before it.
    """
    if not isinstance(node, fx.Node):
        return {0: False, -math.inf: True}.get(node)
    if node not in known:
        known[node] = _found(program, node, known)
    return known[node]


def _found(program: Draft, node: fx.Node, known: Known) -> fx.Node | bool | None:
    if node.op == "get_attr":
        return _of_constant(program, node)
    if not isinstance(node.target, OpOverload) or not _is_float(node):
        return None
    given, row, form = arguments(node), table.find(node), table.integer_form(node)
    if isinstance(row, Fill) and row.value:
        return _hidden(program, given[row.value], known)
    if isinstance(form, Constant) and isinstance(form.lo, str):
        return _hidden(program, given[form.lo], known)
    if isinstance(form, Where):
        return _of_choice(program, node, given[form.condition], form.parts(node), known)
    if node.target is dialect.ADD and given["alpha"] == 1:
        first, second = (_hidden(program, a, known) for a in node.args)
        if first is None or second is None:
            return None
        if isinstance(first, fx.Node) and isinstance(second, fx.Node):
            return _call(program, node, dialect.EITHER, (first, second))
        return _as_large(node, first or second)
    if isinstance(row, Layout | Selection):
        moved = first_tensor(node)
        hidden = _hidden(program, moved, known)
        if not isinstance(hidden, fx.Node):
            return hidden
        args = map_arg(node.args, lambda n: hidden if n is moved else n)
        return _call(program, node, node.target, args, dict(node.kwargs))
    return None


def _of_constant(program: Draft, node: fx.Node) -> fx.Node | bool | None:
    numbers = program.tensor(node).detach()
    hidden = numbers == -math.inf
    if not bool((hidden | (numbers == 0)).all()):
        return None
    some = bool(hidden.any())
    return add_weight(program, f"{node.target}.hidden", hidden) if some else False


def _of_choice(
    program: Draft, node: fx.Node, truth: fx.Node, parts: list[Any], known: Known
) -> fx.Node | bool | None:
    """Return what is hidden of a choice between minus infinity and zero, or another mask."""
    first, second = (_hidden(program, part, known) for part in parts)
    if Meta(truth).dtype is not torch.bool or None in (first, second):
        return None
    if isinstance(first, bool) and first is second:
        return first
    if second is True:
        truth = _call(program, truth, dialect.NOT, (truth,))
        first, second = second, first
    if first is not True:
        return None
    if second is False:
        return _as_large(node, truth)
    return _call(program, node, dialect.EITHER, (truth, second))


def _as_large(node: fx.Node, hidden: fx.Node | bool) -> fx.Node | bool | None:
    """Return what is hidden of a tensor, unless that was broadcast."""
    if isinstance(hidden, bool) or Meta(hidden).shape == Meta(node).shape:
        return hidden
    return None


def _is_float(node: fx.Node) -> bool:
    dtype = Meta(node).dtype
    return dtype is not None and dtype.is_floating_point


def _call(
    program: Draft, like: fx.Node, target: Any, args: Any, kwargs: dict[str, Any] | None = None
) -> fx.Node:
    """Return a new node of truth values in the place, and of the shape, of one of numbers."""
    name = f"{like.name}_hidden"
    made = program.graph.create_node("call_function", target, args, kwargs or {}, name)
    copy_meta(like, made)
    Meta(made).shape, Meta(made).dtype = Meta(like).shape, torch.bool
    return made


__all__ = ["choose_hidden"]
