"""Products of two activations: matmul, bmm, attention. With a weight on one side they are
contractions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx

from narrows.ir.labels import Bools, Value, merge, number, unknown
from narrows.ir.ops.args import arguments, is_tensor
from narrows.ir.ops.barrier import barrier_flow
from narrows.ir.ops.contract import Contract, Contraction
from narrows.ir.ops.row import Flow, Read, Row, Shared
from narrows.ir.program import shape_of

if TYPE_CHECKING:
    from narrows.ir.channels import Facts
    from narrows.ir.liveness import Demand
    from narrows.ir.rewrite import Held, Rewriter

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
    left: str = "self"
    right: str = "other"

    def contraction(self, facts: Facts, node: fx.Node) -> Contraction | None:
        args = arguments(node)
        a, b = args[self.left], args[self.right]
        for x, weight, names, axes in (
            (a, b, (self.left, self.right, ""), (-1, -1, -1, -2)),
            (b, a, (self.right, self.left, ""), (-2, -2, -2, -1)),
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
        return -1 if operand is arguments(node)[self.left] else -2

    def flow(self, facts: Facts, node: fx.Node) -> Flow:
        c = self.contraction(facts, node)
        if c is not None:
            return self.contracted(facts, node, c)
        args = arguments(node)
        a, b = args[self.left], args[self.right]
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

    def demand(self, demand: Demand, node: fx.Node) -> None:
        flow = demand.facts.flows[node]
        if not isinstance(flow.facts, Paired):
            return super().demand(demand, node)
        demand_pairs(demand, node, flow.facts, 0, 1)
        return None

    def rewrite(self, rewriter: Rewriter, node: fx.Node) -> Held:
        flow = rewriter.facts.flows[node]
        if not isinstance(flow.facts, Paired):
            return super().rewrite(rewriter, node)
        a, b = rewriter.operand(node, 0, exact=True), rewriter.operand(node, 1, exact=True)
        labels = paired_labels(
            rewriter, node, flow.facts, a.labels, b.labels.transpose(-1, -2),
            a.shape[-1], b.shape[-2], len(shape_of(node)),
        )  # fmt: skip
        shape = (*torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
        return rewriter.emit(node, {self.left: a.node, self.right: b.node}, labels, shape)

    def joins(self, facts: Facts, node: fx.Node) -> list[tuple[fx.Node, Any, fx.Node, Any]]:
        paired = facts.flows[node].facts
        if not isinstance(paired, Paired):
            return []
        args = arguments(node)
        a, b = args[self.left], args[self.right]
        if facts.value(a).tensor.shape[-1] == 1 or facts.value(b).tensor.shape[-2] == 1:
            return []  # what is summed over holds no channels
        return [(a, paired.left, b, paired.right)]

    def shared(self, facts: Facts, node: fx.Node) -> Shared | None:
        paired = facts.flows[node].facts
        if not isinstance(paired, Paired):
            return super().shared(facts, node)
        args = arguments(node)
        a, b = args[self.left], args[self.right]
        wide = facts.value(a).tensor.shape[-1] > 1, facts.value(b).tensor.shape[-2] > 1
        return one_sided((a, paired.left), (b, paired.right), wide)

    def heads(self, facts: Facts, node: fx.Node) -> list[tuple[fx.Node, Any, Any]]:
        if not isinstance(facts.flows[node].facts, Paired):
            return []
        args = arguments(node)
        nodes = (args[self.left], args[self.right], node)
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
    demand: Demand, node: fx.Node, paired: Paired, left_slot: int, right_slot: int
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


def paired_labels(
    rewriter: Rewriter,
    node: fx.Node,
    paired: Paired,
    left: Tensor,
    right: Tensor,
    left_width: int,
    right_width: int,
    rank: int,
) -> Tensor:
    """Return the result's labels for rewritten factors, or raise where their pairs do not line
    up."""
    if left_width != right_width:
        raise rewriter.ragged(node)
    known = paired.left * (int(paired.right.max()) + 1) + paired.right
    base = int(paired.right.max()) + 1
    try:
        labels, new = pair_up(left, right, rank)
    except RuntimeError:
        raise rewriter.ragged(node) from None
    order = np.argsort(known, kind="stable")
    code = new.left * base + new.right
    at = np.minimum(np.searchsorted(known[order], code), len(order) - 1)
    if not np.array_equal(known[order][at], code):
        raise rewriter.ragged(node)
    found = paired.out[order][at]
    count = int(new.out[-1]) + 1
    first = found[np.searchsorted(new.out, np.arange(count))]
    if not np.array_equal(first[new.out], found):
        raise rewriter.ragged(node)
    return torch.from_numpy(first)[labels]


@dataclass(frozen=True, kw_only=True)
class Attention(Row):
    """``scaled_dot_product_attention``: query and key channels pair up, value channels pass
    through."""

    kind = "attention"

    def flow(self, facts: Facts, node: fx.Node) -> Flow:
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

    def joins(self, facts: Facts, node: fx.Node) -> list[tuple[fx.Node, Any, fx.Node, Any]]:
        paired = facts.flows[node].facts
        if not isinstance(paired, Paired):
            return []
        args = arguments(node)
        q, k = args["query"], args["key"]
        if facts.value(q).tensor.shape[-1] == 1 or facts.value(k).tensor.shape[-1] == 1:
            return []  # what is summed over holds no channels
        return [(q, paired.left, k, paired.right)]

    def shared(self, facts: Facts, node: fx.Node) -> Shared | None:
        paired = facts.flows[node].facts
        if not isinstance(paired, Paired):
            return None
        args = arguments(node)
        q, k = args["query"], args["key"]
        wide = facts.value(q).tensor.shape[-1] > 1, facts.value(k).tensor.shape[-1] > 1
        return one_sided((q, paired.left), (k, paired.right), wide)

    def heads(self, facts: Facts, node: fx.Node) -> list[tuple[fx.Node, Any, Any]]:
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

    def demand(self, demand: Demand, node: fx.Node) -> None:
        flow = demand.facts.flows[node]
        demand_pairs(demand, node, flow.facts, 0, 1)
        need = demand.needed(node)
        for slot in range(2, len(flow.reads)):
            read = flow.reads[slot]
            count = demand.facts.value(read.operand).count
            valued = read.reached(demand.valued(node), count)
            demand.require(node, slot, read.reached(need, count), valued)

    def rewrite(self, rewriter: Rewriter, node: fx.Node) -> Held:
        args = arguments(node)
        facts = rewriter.facts
        flow = facts.flows[node]
        q, k, v = (rewriter.operand(node, i, exact=i < 2) for i in range(3))
        key, passed = k.labels, v.labels
        if args["enable_gqa"]:
            if q.shape[-3] % k.shape[-3] or k.shape[-3] != v.shape[-3]:
                raise rewriter.ragged(node)
            ratio = q.shape[-3] // k.shape[-3]
            key, passed = _spread(key, k.shape[-3], ratio), _spread(passed, v.shape[-3], ratio)
        rank = len(shape_of(node))
        # The score of each head must be made of the head's own pairs; then values decide the
        # labels.
        labels = _attended(
            rewriter, node, flow, q.labels, key, passed, q.shape[-1], k.shape[-1], rank
        )
        width = shape_of(args["query"])[-1]
        changes: dict[str, Any] = {"query": q.node, "key": k.node, "value": v.node}
        if args["scale"] is None and q.shape[-1] != width:
            changes["scale"] = 1.0 / math.sqrt(width)
        mask = args["attn_mask"]
        if is_tensor(mask):
            changes["attn_mask"] = (
                _sliced_mask(rewriter, node, mask, labels)
                if facts.is_free(mask)
                else rewriter.operand(node, 3).node
            )
        others = q.shape[:-2] if args["enable_gqa"] else v.shape[:-2]
        lead = torch.broadcast_shapes(q.shape[:-2], others)
        shape = (*lead, q.shape[-2], v.shape[-1])
        return rewriter.emit(node, changes, labels, shape)


def _sliced_mask(rewriter: Rewriter, node: fx.Node, mask: fx.Node, labels: Tensor) -> fx.Node:
    """Return a mask made of weights for the heads that stay; its last two axes are positions."""
    value, own = rewriter.facts.value(node), len(shape_of(mask))
    old, rank = value.tensor, value.tensor.dim()
    index = {}
    for axis in range(rank - own, rank - 2):
        if old.shape[axis] == 1 or shape_of(mask)[axis - rank + own] == 1:
            continue
        head = torch.arange(old.shape[axis]).view([-1 if a == axis else 1 for a in range(rank)])
        head_of = torch.zeros(value.count, dtype=torch.int64)
        head_of[old.flatten()] = head.expand(old.shape).flatten()
        index[axis - rank + own] = head_of[labels].movedim(axis, 0).flatten(1)[:, 0].numpy()
    return rewriter.free(mask, index)


def _attended(
    rewriter: Rewriter,
    node: fx.Node,
    flow: Flow,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qw: int,
    kw: int,
    rank: int,
) -> Tensor:
    paired: Paired = flow.facts
    value_of = flow.reads[2].source
    assert value_of is not None
    if qw != kw:
        raise rewriter.ragged(node)
    base_r, base_v = int(paired.right.max()) + 1, int(value_of.max()) + 1
    known = (paired.left * base_r + paired.right) * base_v + value_of[paired.out]
    try:
        score, new = pair_up(q, k, rank)
        count = int(new.out[-1]) + 1
        v, present = number(v)
        factors = [(score, count), (v, len(present))]
        labels, _, (score_of, v_of) = merge([Value((), t, n, unknown(n)) for t, n in factors], rank)
    except RuntimeError:
        raise rewriter.ragged(node) from None
    v_of = present[v_of]
    seen = _via(new, score_of)
    code = (seen.left * base_r + seen.right) * base_v + v_of[seen.out]
    order = np.argsort(known, kind="stable")
    at = np.minimum(np.searchsorted(known[order], code), len(order) - 1)
    if not np.array_equal(known[order][at], code):
        raise rewriter.ragged(node)
    found = paired.out[order][at]
    first = found[np.searchsorted(seen.out, np.arange(len(v_of)))]
    if not np.array_equal(first[seen.out], found):
        raise rewriter.ragged(node)
    return torch.from_numpy(first)[labels]


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
