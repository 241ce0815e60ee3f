"""When an operator hands its first operand on: the rules behind `Row.identity`.

A rule is asked only where the result has the operand's shape and dtype at every size of the free
axes; it says whether the values are the operand's, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from narrows.ir.meta import Meta, shape_of
from narrows.ir.program import Program

Identity = Callable[[Program, fx.Node, dict[str, Any]], bool]

FAR = 2**62  # no axis is so long: torch spells "to the end" with the largest int64


def always(program: Program, node: fx.Node, given: dict[str, Any]) -> bool:
    """The shape decides alone, as for a view."""
    return True


def times_one(program: Program, node: fx.Node, given: dict[str, Any]) -> bool:
    """The other operand is one: a number, or a constant that is not trained."""
    other = given["other"]
    if isinstance(other, int | float):
        return other == 1
    if not isinstance(other, fx.Node) or other.op != "get_attr":
        return False
    return str(other.target) in program.buffers and bool((program.tensor(other) == 1).all())


def plus_zero(program: Program, node: fx.Node, given: dict[str, Any]) -> bool:
    """The other operand is the number zero."""
    return isinstance(given["other"], int | float) and given["other"] == 0


def selects_all(program: Program, node: fx.Node, given: dict[str, Any]) -> bool:
    """An ``index_select`` reads every index in order."""
    shape, index = shape_of(node), given["index"]
    axis = given["dim"] % len(shape)
    if axis in Meta(node).dynamic or index.op != "get_attr":
        return False
    return torch.equal(program.tensor(index).cpu(), torch.arange(shape[axis]))


def slices_all(program: Program, node: fx.Node, given: dict[str, Any]) -> bool:
    """A ``slice`` spans the axis, at every size of a free one."""
    shape, end = shape_of(node), given["end"]
    axis = given["dim"] % len(shape)
    if given["start"] not in (None, 0) or given["step"] != 1:
        return False
    if end is None or (isinstance(end, int) and end >= FAR):
        return True
    return axis not in Meta(node).dynamic and isinstance(end, int) and end >= shape[axis]


def in_order(program: Program, node: fx.Node, given: dict[str, Any]) -> bool:
    """A ``permute`` leaves every axis where it is."""
    rank = len(given["dims"])
    return [d % rank for d in given["dims"]] == list(range(rank))
