"""Tensors that are put together element by element, and what of it softmax makes nothing of.

A grid that reaches down to -10000, where a mask fills scores with that, has no code left for the
scores. Softmax makes zero of whatever lies far below the rest, so its operand's grid need only
reach a little below the smallest score. Scores may be masked several times on their way there, one
mask for what is to come and one for padding, say.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from narrows.ir.meta import shape_of
from narrows.ir.ops import table
from narrows.ir.ops.args import arguments
from narrows.ir.ops.integer import Moves
from narrows.ir.ops.integer_forms import Add, Concat, Softmax
from narrows.ir.program import Program
from narrows.passes.quant.observe import Histogram
from narrows.passes.quant.survey import Survey

MASKED = 64.0  # a number so far below zero that is added to scores takes them away
ROOM = 12.0  # how far below the smallest score a masked one has to lie: exp(-12) is nothing


def merges(program: Program, found: Survey) -> dict[fx.Node, list[fx.Node]]:
    """Return the tensors with a grid that are put together of others, and these."""
    made: dict[fx.Node, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.op != "call_function" or not (node in found.forms or node in found.entries):
            continue
        if isinstance(found.forms.get(node), Moves | Concat):
            continue
        names = parts_of(node)
        if isinstance(found.forms.get(node), Add) and _only_softmax(found, node, _puts_together):
            names = ("self", "other")
        site = found.tail(node) if node in found.forms else node
        args = arguments(node) if names else {}
        parts = [x for name in names for x in _listed(args[name])]
        parts = [x for x in parts if isinstance(x, fx.Node) and shape_of(x) is not None]
        if parts:
            made[site] = parts
    return made


def parts_of(node: fx.Node) -> tuple[str, ...]:
    """Return which arguments hold what a node puts together; a number beside them is no part."""
    row = table.find(node)
    return () if row is None else row.parts


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _only_softmax(
    found: Survey, node: fx.Node, through: Callable[[Survey, fx.Node, fx.Node], bool]
) -> bool:
    """Whether all that is made of a tensor is softmax of it.

    Args:
        found: What works on codes.
        node: The tensor.
        through: Tells of a reader and the tensor that it reads whether what the reader makes is
            looked at in its stead.
    """

    def ends(user: fx.Node) -> bool:
        form = found.forms.get(user)
        if isinstance(form, Softmax):
            return True
        passed = isinstance(form, Moves) or (form is not None and through(found, user, node))
        return passed and _only_softmax(found, user, through)

    return bool(node.users) and all(map(ends, node.users))


def _puts_together(found: Survey, reader: fx.Node, read: fx.Node) -> bool:
    return isinstance(found.forms[reader], Add) or bool(parts_of(reader))


def without_masks(
    found: Survey,
    together: Mapping[fx.Node, list[fx.Node]],
    histograms: Mapping[fx.Node, Histogram],
    beside: Mapping[fx.Node, Histogram],
) -> dict[fx.Node, Histogram]:
    """Return the histograms of what softmax reads, and of masks, without what it makes zero of.

    Args:
        found: What works on codes.
        together: What `merges` found.
        histograms: Of every site.
        beside: Of what is put together.
    """

    def masks_of(reader: fx.Node, parts: Iterable[fx.Node]) -> dict[fx.Node, int]:
        """Return which of these hide others where they are put together, each with its sign."""
        form = found.forms.get(reader)
        signs = {x: 1 for x in parts}
        if isinstance(form, Add) and form.sign < 0:
            signs = {form.operands(reader)[1]: -1}
        return {x: sign for x, sign in signs.items() if x in beside and _is_mask(beside[x], sign)}

    def only_masks(found: Survey, reader: fx.Node, read: fx.Node) -> bool:
        """Whether a reader does no more than mask what it reads."""
        form = found.forms[reader]
        if not isinstance(form, Add):
            return bool(parts_of(reader))
        others = [n for n in form.operands(reader) if n is not read]
        return len(others) == 1 and masks_of(reader, others).keys() == {*others}

    made: dict[fx.Node, Histogram] = {}
    bare: dict[fx.Node, Histogram] = {}  # of scores that were masked: what is left of them
    for site, parts in together.items():
        if not _only_softmax(found, site, only_masks):
            continue
        masks = masks_of(site, parts)
        if isinstance(found.forms.get(site), Add) and not masks:
            continue  # a sum lies elsewhere than what is added
        rest = [x for x in parts if x not in masks and not beside[x].constant]
        each = [bare.get(found.site(x) or x, beside[x]) for x in rest]
        seen = histograms[site]  # infinite where it is filled with that: nothing of it is left
        if not each or not all(h.finite for h in each):
            continue
        scores = bare[site] = functools.reduce(Histogram.joined, each)
        if scores.power is None or (seen.finite and seen.low >= scores.low - ROOM):
            continue
        made[site] = _reaching(scores, scores.low - ROOM)
        for mask, sign in masks.items():
            own = found.site(mask)
            if own is not None and own in histograms and _only_masks(found, own, together):
                reach = _reaching(_of_zero(), sign * (scores.low - scores.high - ROOM))
                made[own] = max(reach, made.get(own, reach), key=lambda h: h.high - h.low)
    return made


def _is_mask(seen: Histogram, sign: int) -> bool:
    """Whether a tensor is zero, or so far below it that nothing is left of what it is added to.

    With a sign of -1 it is taken away, and lies above.
    """
    if seen.power is None or (seen.high if sign > 0 else -seen.low) > 0:
        return False
    counts = seen.counts[0 if sign > 0 else 1]
    least = int(counts.nonzero()[0]) if bool(counts.any()) else 0
    return float(seen.centres()[least]) >= MASKED


def _only_masks(found: Survey, site: fx.Node, together: Mapping[fx.Node, list[fx.Node]]) -> bool:
    """Whether a mask is only added to what softmax reads."""
    return all(
        any(user in (n, found.tail(n)) for n in together) if not _moves(found, user)
        else _only_masks(found, user, together)
        for user in site.users
    )  # fmt: skip


def _moves(found: Survey, node: fx.Node) -> bool:
    return isinstance(found.forms.get(node), Moves)


def _of_zero() -> Histogram:
    made = Histogram()
    made.add(torch.zeros(1))
    return made


def _reaching(seen: Histogram, low: float) -> Histogram:
    """Return a histogram that reaches down to a number, as if that were half of all."""
    floor = Histogram()
    floor.add(torch.tensor([low]))
    floor.counts = floor.counts * max(seen.total, 1.0)
    return seen.joined(floor)


__all__ = ["merges", "without_masks"]
