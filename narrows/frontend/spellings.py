"""Second names of operators: one spelling of each meaning reaches the op table.

Each rule returns the call in the dialect's spelling, or ``None`` where it is not the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from narrows.frontend.lifted import val

aten = torch.ops.aten

# An overload, its arguments and keyword arguments; or None where the rule does not fit.
Call = tuple[Any, tuple[Any, ...], dict[str, Any]] | None
Rule = Callable[..., Call]

TO_THE_END = 2**63 - 1  # as torch spells it: the largest int64


def renamed(target: Any) -> Rule:
    """Return the rule of an operator that takes the same arguments as ``target``."""
    return lambda *args, **kwargs: (target, args, kwargs)


def _with_number(target: Any) -> Rule:
    """Return the rule of an overload for a number where ``target`` takes a tensor or a number."""

    def rule(x: Any, other: Any, alpha: Any = 1) -> Call:
        return target, (x, other), {} if alpha == 1 else {"alpha": alpha}

    return rule


def _turned(order: Callable[..., Sequence[int]]) -> Rule:
    """Return the rule of an operator that puts axes into another order."""

    def rule(x: Any, *args: Any) -> Call:
        return aten.permute.default, (x, list(order(val(x).dim(), *args))), {}

    return rule


def _moved(rank: int, source: Any, destination: Any) -> list[int]:
    """Return the order of axes that ``movedim`` makes."""
    come = [a % rank for a in ([source] if isinstance(source, int) else source)]
    go = [a % rank for a in ([destination] if isinstance(destination, int) else destination)]
    placed = dict(zip(go, come, strict=True))
    rest = iter(a for a in range(rank) if a not in come)
    return [placed[a] if a in placed else next(rest) for a in range(rank)]


def _last_two(rank: int) -> list[int]:
    return [*range(rank - 2), rank - 1, rank - 2]


def _adjoint(x: Any) -> Call:
    return None if val(x).is_complex() else _turned(_last_two)(x)


def _narrow(x: Any, axis: int, start: Any, length: Any) -> Call:
    if start == 0:  # the length may be computed, from the batch's size
        return aten.slice.Tensor, (x, axis, 0, length), {}
    if not isinstance(start, int) or not isinstance(length, int):
        return None
    end = start + length
    return aten.slice.Tensor, (x, axis, start, TO_THE_END if start < 0 and end == 0 else end), {}


def _moment(target: Any) -> Rule:
    """Return the rule of ``var`` and ``std`` that take away one or nothing of the count."""

    def rule(x: Any, axes: Any, unbiased: bool = True, keepdim: bool = False) -> Call:
        return target, (x, axes), {"correction": int(unbiased), "keepdim": keepdim}

    return rule


SPELLINGS: dict[Any, Rule] = {
    aten.subtract.Tensor: renamed(aten.sub.Tensor),
    aten.multiply.Tensor: renamed(aten.mul.Tensor),
    aten.divide.Tensor: renamed(aten.div.Tensor),
    aten.true_divide.Tensor: renamed(aten.div.Tensor),
    aten.add.Scalar: _with_number(aten.add.Tensor),
    aten.sub.Scalar: _with_number(aten.sub.Tensor),
    aten.subtract.Scalar: _with_number(aten.sub.Tensor),
    aten.mul.Scalar: _with_number(aten.mul.Tensor),
    aten.multiply.Scalar: _with_number(aten.mul.Tensor),
    aten.div.Scalar: _with_number(aten.div.Tensor),
    aten.divide.Scalar: _with_number(aten.div.Tensor),
    aten.true_divide.Scalar: _with_number(aten.div.Tensor),
    aten.absolute.default: renamed(aten.abs.default),
    aten.negative.default: renamed(aten.neg.default),
    aten.positive.default: renamed(aten.alias.default),
    aten.clip.default: renamed(aten.clamp.default),
    aten.clip.Tensor: renamed(aten.clamp.Tensor),
    aten.max.other: renamed(aten.maximum.default),
    aten.min.other: renamed(aten.minimum.default),
    aten.__and__.Tensor: renamed(aten.bitwise_and.Tensor),
    aten.__or__.Tensor: renamed(aten.bitwise_or.Tensor),
    aten.__xor__.Tensor: renamed(aten.bitwise_xor.Tensor),
    aten.concat.default: renamed(aten.cat.default),
    aten.concatenate.default: renamed(aten.cat.default),
    aten.swapaxes.default: renamed(aten.transpose.int),
    aten.swapdims.default: renamed(aten.transpose.int),
    aten.movedim.int: _turned(_moved),
    aten.movedim.intlist: _turned(_moved),
    aten.moveaxis.int: _turned(_moved),
    aten.moveaxis.intlist: _turned(_moved),
    aten.numpy_T.default: _turned(lambda rank: range(rank)[::-1]),
    aten.t.default: _turned(lambda rank: range(rank)[::-1]),
    aten.mT.default: _turned(_last_two),
    aten.adjoint.default: _adjoint,
    aten.narrow.default: _narrow,
    aten.narrow_copy.default: _narrow,
    aten.split_with_sizes.default: renamed(aten.split.sizes),
    aten.var.dim: _moment(aten.var.correction),
    aten.std.dim: _moment(aten.std.correction),
}
