"""Products of two activations: matmul, bmm, attention. With a weight on one side they are
contractions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from narrows.ir.held import Held, Side, merged
from narrows.ir.labels import Bools, Value, merge, unknown
from narrows.ir.meta import shape_of
from narrows.ir.ops.args import arguments, is_tensor
from narrows.ir.ops.barrier import barrier_flow
from narrows.ir.ops.contract import Contract, fill_up
from narrows.ir.ops.contraction import Contraction
from narrows.ir.ops.flow import Flow, Read
from narrows.ir.ops.protocols import Builder, Channels, Needs
from narrows.ir.ops.row import Row, Shared

Part = tuple[fx.Node, Held, Sequence[int]]

# Labels of one factor beyond which each of its entries being a channel costs too much to follow.
LARGE = 1 << 20


@dataclass(eq=False)
class Paired:
    """How ``a @ b`` sums: one triple per result label and index of the summed axis that matters.

    Attributes:
        out, left, right: Labels of the result, of ``a`` and of ``b``, entry by entry.
    """

    out: np.ndarray
    left: np.ndarray
    right: np.ndarray

    def live(self, left: Value, right: Value) -> Bools:
        """Return which triples can be non-zero."""
        return (left.const[self.left] != 0) & (right.const[self.right] != 0)


def classes(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Number the rows of a label tensor by what they hold along its last axis.

    Returns:
        The class of each row, last axis cut to 1, and per class its labels along that axis.
    """
    width = labels.shape[-1]
    rows, index = torch.unique(labels.reshape(-1, width), dim=0, return_inverse=True)
    return index.view(*labels.shape[:-1], 1), rows


def pair_up(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Paired]:
    """Return the result's labels and triples for ``left [..., M, K]`` and ``right [..., N, K]``."""
    a_class, a_rows = classes(left)
    b_class, b_rows = classes(right)
    a = Value((), a_class, len(a_rows), unknown(len(a_rows)))
    b = Value((), b_class.transpose(-1, -2), len(b_rows), unknown(len(b_rows)))
    labels, count, (a_of, b_of) = merge([a, b], rank)
    width = max(a_rows.shape[1], b_rows.shape[1])
    lefts = a_rows.expand(-1, width).numpy()[a_of]
    rights = b_rows.expand(-1, width).numpy()[b_of]
    outs = np.repeat(np.arange(count), width)
    return labels, Paired(outs, lefts.flatten(), rights.flatten())


@dataclass(frozen=True, kw_only=True)
class Product(Contract):
    """``a @ b``; a contraction where one of them is one matrix made of weights."""

    kind = "product"
    makes_channels = False  # where its factors are both computed
    reads_masked = False

    def contraction(self, facts: Channels, node: fx.Node) -> Contraction | None:
        args = arguments(node)
        a, b = args["self"], args["other"]
        for x, weight, names, axes in (
            (a, b, ("self", "other", ""), (-1, -1, -1, -2)),
            (b, a, ("other", "self", ""), (-2, -2, -2, -1)),
        ):
            if not facts.is_free(weight) or facts.is_free(x):
                continue
            rank = len(shape_of(weight))
            if rank < 2 or len(shape_of(x)) < 2 or math.prod(shape_of(weight)[:-2]) != 1:
                return None
            x_axis, y_axis = axes[:2]
            out_axis, in_axis = (axis % rank for axis in axes[2:])
            return Contraction(
                x=x, weight=weight, bias=None, data=facts.data(weight), bias_data=None,
                x_axis=x_axis % len(shape_of(x)), y_axis=y_axis % len(shape_of(node)),
                out_axis=out_axis, in_axis=in_axis, groups=1, transposed=False, uniform=False,
                names=names,
            )  # fmt: skip
        return None

    def input_axis(self, node: fx.Node, operand: fx.Node) -> int | str | None:
        return -1 if operand is arguments(node)["self"] else -2

    def flow(self, facts: Channels, node: fx.Node) -> Flow:
        c = self.contraction(facts, node)
        if c is not None:
            return self.contracted(facts, node, c)
        args = arguments(node)
        a, b = args["self"], args["other"]
        if facts.is_free(a) or facts.is_free(b):
            return barrier_flow(facts, node, "one factor is a weight that is not a matrix")
        if len(shape_of(a)) < 2 or len(shape_of(b)) < 2:
            return barrier_flow(facts, node, "one factor is a vector")
        left, right = facts.value(a), facts.value(b)
        if max(left.count, right.count) > LARGE:
            return barrier_flow(facts, node, "too many channels lie on both axes of a factor")
        shape = shape_of(node)
        labels, paired = pair_up(left.tensor, right.tensor.transpose(-1, -2), len(shape))
        count = int(paired.out[-1]) + 1
        value = Value(shape, labels, count, unknown(count))
        value.const[~np.isin(np.arange(count), paired.out[paired.live(left, right)])] = 0.0
        reads = (
            Read(a, pairs=(paired.out, paired.left), couples=False),
            Read(b, pairs=(paired.out, paired.right), couples=False),
        )
        return Flow(value, reads, facts=paired)

    def demand(self, demand: Needs, node: fx.Node) -> None:
        flow = demand.facts.flows[node]
        if not isinstance(flow.facts, Paired):
            return super().demand(demand, node)
        demand_pairs(demand, node, flow.facts, 0, 1)
        return None

    def rewrite(self, rewriter: Builder, node: fx.Node) -> Held:
        flow = rewriter.facts.flows[node]
        if not isinstance(flow.facts, Paired):
            return super().rewrite(rewriter, node)
        a, b = rewriter.operand(node, 0, exact=True), rewriter.operand(node, 1, exact=True)
        args, value = arguments(node), rewriter.facts.value(node)
        rank = len(value.shape)
        summed = rank  # an axis of its own behind those of the result
        lead = [range(rank - len(x.shape), rank - 2) for x in (a, b)]
        parts = [
            (args["self"], a, [*lead[0], rank - 2, summed]),
            (args["other"], b, [*lead[1], summed, rank - 1]),
        ]
        sides = rewriter.sides(node, parts, rank + 1, [*value.axes, summed])
        a, b = (s.held for s in sides)
        places = _result_places(rewriter, node, sides)
        shape = (*torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
        return rewriter.emit(node, {"self": a.node, "other": b.node}, places, shape)

    def joins(self, facts: Channels, node: fx.Node) -> list[tuple[fx.Node, Any, fx.Node, Any]]:
        paired = facts.flows[node].facts
        if not isinstance(paired, Paired):
            return []
        args = arguments(node)
        a, b = args["self"], args["other"]
        if facts.value(a).tensor.shape[-1] == 1 or facts.value(b).tensor.shape[-2] == 1:
            return []  # what is summed over holds no channels
        return [(a, paired.left, b, paired.right)]

    def shared(self, facts: Channels, node: fx.Node) -> Shared | None:
        paired = facts.flows[node].facts
        if not isinstance(paired, Paired):
            return super().shared(facts, node)
        args = arguments(node)
        a, b = args["self"], args["other"]
        wide = facts.value(a).tensor.shape[-1] > 1, facts.value(b).tensor.shape[-2] > 1
        return one_sided((a, paired.left), (b, paired.right), wide)

    def heads(self, facts: Channels, node: fx.Node) -> list[tuple[fx.Node, Any, Any]]:
        if not isinstance(facts.flows[node].facts, Paired):
            return []
        args = arguments(node)
        nodes = (args["self"], args["other"], node)
        return by_head([(n, facts.value(n).tensor) for n in nodes])


def one_sided(
    left: tuple[fx.Node, Any], right: tuple[fx.Node, Any], wide: tuple[bool, bool]
) -> Shared | None:
    """Return the channels of a factor that stay because the other one has none to go with them."""
    if wide[0] == wide[1]:
        return None
    holder, labels = left if wide[0] else right
    return Shared(holder, labels, np.zeros_like(labels), "the other factor needs all of them")


def by_head(tensors: list[tuple[fx.Node, Tensor]]) -> list[tuple[fx.Node, Any, Any]]:
    """Return the label tensors whose batch axes hold channels, entry by entry: node, labels,
    head."""
    rank = max(t.dim() for _, t in tensors)
    padded = [(n, t.reshape([1] * (rank - t.dim()) + list(t.shape))) for n, t in tensors]
    batch = torch.broadcast_shapes(*(t.shape[:-2] for _, t in padded))
    found = []
    for n, t in padded:
        if max(t.shape[:-2], default=1) > 1:
            rows = t.expand(*batch, *t.shape[-2:]).reshape(math.prod(batch), -1)
            heads = np.repeat(np.arange(len(rows)), rows.shape[1])
            found.append((n, rows.flatten().numpy(), heads))
    return found if len(found) > 1 else []


def demand_pairs(
    demand: Needs, node: fx.Node, paired: Paired, left_slot: int, right_slot: int
) -> None:
    """Mark both sides of every pair that a needed result sums over and that is not zero."""
    reads = demand.facts.flows[node].reads
    a, b = reads[left_slot].operand, reads[right_slot].operand
    left, right = demand.facts.value(a), demand.facts.value(b)
    need = demand.needed(node)
    live = paired.live(left, right)
    wanted = need[paired.out] & live
    weighs = demand.valued(node)[paired.out] & live
    # What another rule forces on one side must be there on the other, or the pairs would not line
    # up.
    wanted |= need[paired.out] & (demand.forced(a)[paired.left] | demand.forced(b)[paired.right])
    # A sum of nothing but zeros must still be a sum of something.
    summed = np.zeros(len(need), dtype=bool)
    summed[paired.out[wanted]] = True
    alone = need & ~summed
    wanted[np.searchsorted(paired.out, np.flatnonzero(alone))] = True
    if alone.any():
        demand.note(node, "shape", "a product needs something to sum", alone)
    for slot, labels, count in (
        (left_slot, paired.left, left.count),
        (right_slot, paired.right, right.count),
    ):
        mask, valued = np.zeros(count, dtype=bool), np.zeros(count, dtype=bool)
        mask[labels[wanted]] = True
        valued[labels[weighs]] = True
        demand.require(node, slot, mask, valued)


def _result_places(rewriter: Builder, node: fx.Node, sides: Sequence[Side]) -> Tensor:
    """Return the places of a result whose factors are in step."""

    value = rewriter.facts.value(node)
    rank = len(value.shape)
    index = merged(sides, value.axes)
    if any(size > 1 for one in index.values() for size in one.shape[rank:]):
        raise rewriter.ragged(node)  # it depends on what is summed over
    return value.placed({axis: one.reshape(one.shape[:rank]) for axis, one in index.items()})


@dataclass(frozen=True, kw_only=True)
class Attention(Row):
    """``scaled_dot_product_attention``: query and key channels pair up, value channels pass
    through."""

    kind = "attention"

    def flow(self, facts: Channels, node: fx.Node) -> Flow:
        args = arguments(node)
        q, k, v, mask = args["query"], args["key"], args["value"], args["attn_mask"]
        if any(facts.is_free(n) for n in (q, k, v)):
            return barrier_flow(facts, node, "query, key or value is a weight")
        if is_tensor(mask) and not facts.is_free(mask) and facts.value(mask).count > 1:
            return barrier_flow(facts, node, "its mask depends on channels")
        rank = len(shape_of(q))
        value = [facts.value(n) for n in (q, k, v)]
        if any(x.tensor.shape[-2] > 1 for x in value):
            return barrier_flow(facts, node, "channels lie on the sequence axis")
        ratio = self._ratio(q, k, args["enable_gqa"])
        key = value[1].tensor if ratio == 1 else _spread(value[1].tensor, shape_of(k)[-3], ratio)
        passed = value[2].tensor if ratio == 1 else _spread(value[2].tensor, shape_of(v)[-3], ratio)
        score, paired = pair_up(value[0].tensor, key, rank)
        count = int(paired.out[-1]) + 1
        labels, total, (score_of, value_of) = merge(
            [
                Value((), score, count, unknown(count)),
                Value((), passed, value[2].count, unknown(value[2].count)),
            ],
            rank,
        )
        result = Value(shape_of(node), labels, total, value[2].const[value_of])
        score_reads = _via(paired, score_of)
        reads = [
            Read(q, pairs=(score_reads.out, score_reads.left), couples=False),
            Read(k, pairs=(score_reads.out, score_reads.right), couples=False),
            Read(v, value_of),
        ]
        if is_tensor(mask) and not facts.is_free(mask):
            reads.append(Read(mask, np.zeros(total, dtype=np.int64), couples=False))
        return Flow(result, tuple(reads), facts=score_reads)

    @staticmethod
    def _ratio(q: fx.Node, k: fx.Node, grouped: bool) -> int:
        if not grouped:
            return 1
        return shape_of(q)[-3] // shape_of(k)[-3]

    def joins(self, facts: Channels, node: fx.Node) -> list[tuple[fx.Node, Any, fx.Node, Any]]:
        paired = facts.flows[node].facts
        if not isinstance(paired, Paired):
            return []
        args = arguments(node)
        q, k = args["query"], args["key"]
        if facts.value(q).tensor.shape[-1] == 1 or facts.value(k).tensor.shape[-1] == 1:
            return []  # what is summed over holds no channels
        return [(q, paired.left, k, paired.right)]

    def shared(self, facts: Channels, node: fx.Node) -> Shared | None:
        paired = facts.flows[node].facts
        if not isinstance(paired, Paired):
            return None
        args = arguments(node)
        q, k = args["query"], args["key"]
        wide = facts.value(q).tensor.shape[-1] > 1, facts.value(k).tensor.shape[-1] > 1
        return one_sided((q, paired.left), (k, paired.right), wide)

    def heads(self, facts: Channels, node: fx.Node) -> list[tuple[fx.Node, Any, Any]]:
        if facts.flows[node].barrier:
            return []
        args = arguments(node)
        q, k, v = (args[a] for a in ("query", "key", "value"))
        ratio = self._ratio(q, k, args["enable_gqa"])
        tensors = [(n, facts.value(n).tensor) for n in (q, node)]
        spread = [(n, _spread(facts.value(n).tensor, shape_of(n)[-3], ratio)) for n in (k, v)]
        return by_head(
            [*tensors, *(spread if ratio > 1 else [(n, facts.value(n).tensor) for n in (k, v)])]
        )

    def demand(self, demand: Needs, node: fx.Node) -> None:
        flow = demand.facts.flows[node]
        demand_pairs(demand, node, flow.facts, 0, 1)
        need = demand.needed(node)
        for slot in range(2, len(flow.reads)):
            read = flow.reads[slot]
            count = demand.facts.value(read.operand).count
            valued = read.reached(demand.valued(node), count)
            demand.require(node, slot, read.reached(need, count), valued)

    def rewrite(self, rewriter: Builder, node: fx.Node) -> Held:
        args = arguments(node)
        sides = self._in_step(rewriter, node)
        q, k, v = (s.held for s in sides[:3])
        places = _result_places(rewriter, node, sides[:3])
        width = shape_of(args["query"])[-1]
        changes: dict[str, Any] = {"query": q.node, "key": k.node, "value": v.node}
        if args["scale"] is None and q.shape[-1] != width:
            changes["scale"] = 1.0 / math.sqrt(width)
        mask = args["attn_mask"]
        if is_tensor(mask):
            free = rewriter.facts.is_free(mask)
            changes["attn_mask"] = (
                _sliced_mask(rewriter, node, mask, sides[0]) if free else sides[3].held.node
            )
        others = q.shape[:-2] if args["enable_gqa"] else v.shape[:-2]
        lead = torch.broadcast_shapes(q.shape[:-2], others)
        return rewriter.emit(node, changes, places, (*lead, q.shape[-2], v.shape[-1]))

    def _in_step(self, rewriter: Builder, node: fx.Node) -> list[Side]:
        """Return query, key and value, and a mask that is computed, each head beside its own."""
        args, value = arguments(node), rewriter.facts.value(node)
        reads = rewriter.facts.flows[node].reads
        rank = len(value.shape)
        summed, keys = rank, rank + 1  # axes behind those of the result
        tails = [(rank - 2, summed), (keys, summed), (keys, rank - 1), (rank - 2, keys)]
        parts = []
        for slot, (read, tail) in enumerate(zip(reads, tails, strict=False)):
            held = rewriter.operand(node, slot, exact=slot < 2)
            parts.append((read.operand, held, [*range(rank - len(held.shape), rank - 2), *tail]))
        axes = [*value.axes, summed]
        ratio = self._ratio(args["query"], args["key"], args["enable_gqa"])
        if ratio == 1 or rank - 3 not in axes:
            return rewriter.sides(node, parts, rank + 2, axes)
        return _grouped(rewriter, node, parts, axes, ratio)


def _grouped(
    rewriter: Builder, node: fx.Node, parts: list[Part], axes: list[int], ratio: int
) -> list[Side]:
    """Return the factors in step where each head of key and value serves ``ratio`` query heads."""
    rank = len(rewriter.facts.value(node).shape)
    head, served = rank - 3, rank + 2  # the heads of key and value are an axis of their own
    for slot in (1, 2):
        one, held, stands = parts[slot]
        parts[slot] = one, held, [served if a == head else a for a in stands]
    heads = np.zeros(shape_of(parts[0][0])[-3], dtype=bool)
    heads[rewriter.wanted(node, head)] = True
    rows = heads.reshape(-1, ratio)
    counts = rows.sum(1)
    if len(set(counts[counts > 0].tolist())) > 1:
        raise rewriter.ragged(node, _with_heads(rewriter, node, fill_up(rows).flatten()))
    wanted = {head: np.flatnonzero(heads), served: np.flatnonzero(counts)}
    sides = rewriter.sides(node, parts, rank + 3, [*axes, served], [a for a in axes if a != head])
    for side in sides:
        for axis, index in wanted.items():
            if axis in side.index and not side.cut(rewriter, axis, index):
                raise rewriter.ragged(node)
    return sides


def _with_heads(rewriter: Builder, node: fx.Node, heads: Bools) -> Bools:
    """Return the labels of an attention's result in some heads, as wide as the needed ones."""
    value = rewriter.facts.value(node)
    kept = torch.from_numpy(rewriter.need(node))[value.tensor]
    axis = kept.dim() - 3
    view = [-1 if a == axis else 1 for a in range(kept.dim())]
    wider = kept.any(axis, keepdim=True) & torch.from_numpy(heads).view(view)
    mask = np.zeros(value.count, dtype=bool)
    mask[value.tensor[wider].numpy()] = True
    return mask


def _sliced_mask(rewriter: Builder, node: fx.Node, mask: fx.Node, query: Side) -> fx.Node:
    """Return a mask made of weights for the heads that stay; its last two axes are positions."""
    value, own = rewriter.facts.value(node), len(shape_of(mask))
    rank = len(value.shape)
    index = {}
    for axis in range(rank - own, rank - 2):
        at = axis - rank + own
        if axis in value.axes and axis in query.index and shape_of(mask)[at] > 1:
            index[at] = rewriter.line(node, query.index[axis], axis)
    return rewriter.free(mask, index)


def _spread(labels: Tensor, heads: int, ratio: int) -> Tensor:
    if labels.shape[-3] == 1:
        return labels
    return labels.repeat_interleave(ratio, -3)


def _via(paired: Paired, score_of: np.ndarray) -> Paired:
    """Return the triples per result label, given the score label each result label reads."""
    starts = np.searchsorted(paired.out, np.arange(int(paired.out[-1]) + 2))
    width = int(starts[1] - starts[0])
    rows = (starts[score_of][:, None] + np.arange(width)).flatten()
    return Paired(np.repeat(np.arange(len(score_of)), width), paired.left[rows], paired.right[rows])
