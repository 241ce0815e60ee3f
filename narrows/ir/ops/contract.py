"""Contractions with a weight: convolutions, linear layers, products with a parameter.

A contraction sums its input's channels into fresh ones. An input channel whose weights are zero
for all needed outputs is not read; one that is a known constant is folded into the bias, unless
padding makes its contribution differ at the border.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from narrows.ir.held import Held
from narrows.ir.labels import Bools, Ints, Value, channels, count_to, distinct, is_count, some
from narrows.ir.meta import Meta, shape_of
from narrows.ir.ops.args import arguments
from narrows.ir.ops.barrier import barrier_flow
from narrows.ir.ops.contraction import Contraction, used_columns, used_rows
from narrows.ir.ops.flow import Flow, Read
from narrows.ir.ops.protocols import Builder, Channels, Needs
from narrows.ir.ops.row import Row, Shared, WeightAxis, labels_along


@dataclass(frozen=True, kw_only=True)
class Contract(Row):
    """A contraction whose operands stand in fixed arguments.

    Attributes:
        x: The activation's argument, ``weight`` and ``bias``: the parameters' arguments.
        x_axis: The axis summed over.
        out_axis: The weight axis of the outputs; ``in_axis``: of the inputs.
        transposed: Whether it is a transposed convolution.
        spatial: The number of spatial axes; 0 for linear.
    """

    kind = "contraction"
    contracts = True
    makes_channels = True
    reads_masked = True
    x: str = "input"
    weight: str = "weight"
    bias: str = "bias"
    x_axis: int = -1
    out_axis: int = 0
    in_axis: int = 1
    transposed: bool = False
    spatial: int = 0

    def contraction(self, facts: Channels, node: fx.Node) -> Contraction | None:
        """Return the contraction, or ``None`` where an operand that must be a weight is
        computed."""
        args = arguments(node)
        x, weight, bias = args[self.x], args[self.weight], args.get(self.bias)
        if facts.is_free(x) or not facts.is_free(weight) or Meta(weight).dynamic:
            return None
        if not isinstance(args.get("groups", 1), int):
            return None
        if bias is not None and not facts.is_free(bias):
            return None
        if args.get("alpha", 1) != 1 or args.get("beta", 1) != 1:
            return None
        if bias is not None and len(shape_of(bias)) != 1:
            return None
        rank = len(shape_of(x))
        axis = self.x_axis if self.spatial == 0 else -1 - self.spatial
        return Contraction(
            x=x, weight=weight, bias=bias, data=facts.data(weight),
            bias_data=None if bias is None else facts.data(bias),
            x_axis=axis % rank, y_axis=axis % len(shape_of(node)),
            out_axis=self.out_axis, in_axis=self.in_axis, groups=args.get("groups", 1),
            transposed=self.transposed, uniform=self._uniform(args) and len(weight.users) == 1,
            names=(self.x, self.weight, self.bias), heard=self._heard(facts, node, args),
        )  # fmt: skip

    @staticmethod
    def _heard(facts: Channels, node: fx.Node, args: dict[str, Any]) -> Bools | None:
        ignored = facts.ignored.get(node.name)
        return None if ignored is None else ~ignored.reshape(args.get("groups", 1), -1)

    def _uniform(self, args: dict[str, Any]) -> bool:
        if self.transposed:
            return False  # kernels overlap unevenly
        padding = args.get("padding", 0)
        if isinstance(padding, str):
            return padding == "valid"
        return not any(padding) if isinstance(padding, Sequence) else not padding

    def flow(self, facts: Channels, node: fx.Node) -> Flow:
        c = self.contraction(facts, node)
        if c is None:
            return barrier_flow(
                facts, node, "its weight is computed from the inputs, or its sum is scaled"
            )
        return self.contracted(facts, node, c)

    @staticmethod
    def contracted(facts: Channels, node: fx.Node, c: Contraction) -> Flow:
        """Return the flow of a contraction with a weight."""
        value = channels(shape_of(node), c.y_axis)
        along = labels_along(facts.value(c.x), c.x_axis)
        columns = along.expand(-1, c.inputs) if along.shape[1] == 1 else along
        c.fold = foldable(c, facts.value(c.x), columns.numpy())
        value.const = _constant_outputs(c, facts.value(c.x), columns.numpy())
        depthwise = c.blocks.shape[2] == 1 and c.groups > 1
        read = Read(c.x, couples=False)
        if depthwise and columns.shape[0] == 1:
            read = Read(c.x, np.repeat(columns[0].numpy(), c.blocks.shape[1]))
        return Flow(value, (read,), facts=(c, columns.numpy()))

    def input_axis(self, node: fx.Node, operand: fx.Node) -> int | str | None:
        args = arguments(node)
        if operand is not args[self.x]:
            return None
        return self.x_axis if self.spatial == 0 else -1 - self.spatial

    def weight_axes(self, facts: Channels, node: fx.Node) -> Iterator[WeightAxis]:
        if not isinstance(facts.flows[node].facts, tuple):
            return
        c, columns = facts.flows[node].facts
        if c.weight.op == "get_attr":
            g, outs, ins, _ = c.blocks.shape
            # The one axis of a grouped weight that spans a single group counts positions in each
            # group.
            whole_out, whole_in = g == 1 or not c.transposed, g == 1 or c.transposed
            if whole_in or min(ins, outs) > 1:
                yield WeightAxis(
                    c.weight, c.in_axis, "in", c.x, columns[0][: None if whole_in else ins]
                )
            if whole_out or min(ins, outs) > 1:
                yield WeightAxis(
                    c.weight, c.out_axis, "out", node, np.arange(c.outputs if whole_out else outs)
                )
        if c.bias is not None and c.bias.op == "get_attr":
            yield WeightAxis(c.bias, 0, "with", node, np.arange(c.outputs))

    def shared(self, facts: Channels, node: fx.Node) -> Shared | None:
        if not isinstance(facts.flows[node].facts, tuple):
            return None
        c, columns = facts.flows[node].facts
        if len(columns) == 1:
            return None
        if facts.value(c.x).tensor.shape[c.x_axis] == 1:
            columns = columns[:, :1]
        sets = np.tile(np.arange(columns.shape[1]), len(columns))
        return Shared(c.x, columns.flatten(), sets, "it sums over an axis beside theirs")

    def joins(self, facts: Channels, node: fx.Node) -> list[tuple[fx.Node, Ints, fx.Node, Ints]]:
        """Return what keeps the groups of a convolution equally wide.

        Channels at equal positions of the groups go together. Where a group has one input or one
        output, the group goes as a whole.
        """
        if not isinstance(facts.flows[node].facts, tuple):
            return []
        c, columns = facts.flows[node].facts
        groups, outs, ins, _ = c.blocks.shape
        if groups == 1:
            return []
        made, read = np.arange(c.outputs), columns[0]
        if outs == 1:
            return [(node, made.repeat(ins), c.x, read)]
        if ins == 1:
            return [(node, made, c.x, read.repeat(outs))]
        return [
            (node, np.tile(made[:outs], groups), node, made),
            (c.x, np.tile(read[:ins], groups), c.x, read),
        ]

    # ------------------------------------------------------------------ backwards

    def demand(self, demand: Needs, node: fx.Node) -> None:
        flow = demand.facts.flows[node]
        c, columns = flow.facts
        value = demand.facts.value(c.x)
        need = demand.needed(node)
        groups, outs, ins, _ = c.blocks.shape
        rows: Any = need.reshape(groups, outs)
        if groups > 1:
            even = fill_up(rows)
            demand.extend(
                node, even.flatten(), "groups", "the groups of a convolution need equal widths"
            )
            rows = even
        fold = c.fold
        used = used_columns(c, demand.valued(node).reshape(groups, outs))
        wanted = used & ~fold.reshape(groups, ins)
        kept = rows.any(1)
        others = demand.columns(node)  # what other uses of the same weight read
        if others is not None and c.weight.op != "get_attr":  # its weights cannot be made zero
            others = others & ~fold
        full = wanted if others is None else wanted | (others.reshape(groups, ins) & kept[:, None])
        full = full.copy()
        asked = demand.needed(c.x)[columns].any(0).reshape(groups, ins)  # by others, so far
        full[kept] = fill_up(full[kept], 1, asked[kept])
        demand.use_weight(c.weight, node, {c.out_axis: rows.flatten(), c.in_axis: full.flatten()})
        mask = np.zeros(value.count, dtype=bool)
        mask[columns[:, wanted.reshape(-1)]] = True
        filled = mask
        if not np.array_equal(full, wanted):
            filled = np.zeros(value.count, dtype=bool)
            filled[columns[:, full.reshape(-1)]] = True
        stuck = mask & value.known()
        if some(stuck):
            demand.note(
                node,
                "padding",
                "a constant channel adds another amount at the padded border",
                stuck,
            )
        extra = filled & ~mask
        if others is None and some(extra):
            reason = "groups" if ins > 1 and groups > 1 else "shape"
            why = (
                "the groups of a convolution need equal widths"
                if reason == "groups"
                else "a layer needs an input"
            )
            demand.note(node, reason, why, extra)
        # Weights of what only fills a place are made zero, unless another use of them is not zero.
        demand.require(node, 0, filled, mask if len(c.weight.users) == 1 else filled)

    # ------------------------------------------------------------------ rewriting

    def rewrite(self, rewriter: Builder, node: fx.Node) -> Held:
        facts = rewriter.facts
        c, columns = facts.flows[node].facts
        value = facts.value(c.x)
        fold = c.fold
        # Weights of constants that are there all the same must be zero, which only a weight of the
        # layer's own can be.
        fixed = c.weight.op != "get_attr" and bool(fold.any())
        exact = c.groups > 1 or len(c.weight.users) > 1 or fixed
        held = rewriter.operand(node, 0, exact=exact)
        if not exact and c.weight.op == "get_attr":  # its columns may stand in any order
            held = rewriter.unturned(held, c.x_axis)
        rows = rewriter.made(node)
        held, taken = _columns_held(rewriter, node, c, held)
        groups, outs, ins, _ = c.blocks.shape
        if groups > 1:
            order = _group_order(taken, ins)
            if order is None:  # the groups' channels lie mixed: put them back in order
                sort = np.argsort(taken, kind="stable")
                held, taken = rewriter.gather(held, c.x_axis, sort), taken[sort]
                order = _group_order(taken, ins)
            if order is None or distinct(rows // outs) != len(order):
                raise rewriter.ragged(node)
            rank = np.empty(groups, dtype=np.int64)
            rank[order] = np.arange(len(order))
            rows = rows[np.argsort(rank[rows // outs], kind="stable")]
        counted = fold if len(c.weight.users) == 1 else np.zeros_like(fold)
        if c.heard is not None:
            counted = counted | ~c.heard.flatten()
        weight = rewriter.contracted_weight(c, rows, taken, counted)
        bias = rewriter.contracted_bias(node, c, rows, self._fold_amount(c, value, columns, fold))
        args = arguments(node)
        changes: dict[str, Any] = {c.names[0]: held.node, c.names[1]: weight}
        if bias is not None:
            changes[c.names[2]] = bias
        if "groups" in args:
            changes["groups"] = len(order) if groups > 1 else 1
        places = torch.from_numpy(rows).view(
            [-1 if a == c.y_axis else 1 for a in range(len(shape_of(node)))]
        )
        shape = tuple(len(rows) if a == c.y_axis else s for a, s in enumerate(shape_of(node)))
        return rewriter.emit(node, changes, places, shape)

    @staticmethod
    def _fold_amount(
        c: Contraction, value: Value, columns: np.ndarray, fold: Bools
    ) -> np.ndarray | None:
        if c.heard is not None:
            fold = fold & c.heard.flatten()
        if not some(fold):
            return None
        amounts = np.where(fold, value.const[columns[0]], 0.0)
        if not amounts.any():
            return None
        groups, _, ins, _ = c.blocks.shape
        which = np.flatnonzero(amounts.reshape(groups, ins).any(0))
        part = c.blocks[:, :, torch.from_numpy(which)].double().sum(-1)
        per = torch.from_numpy(amounts.reshape(groups, ins)[:, which])
        return torch.einsum("goi,gi->go", part, per).flatten().numpy()


def _columns_held(
    rewriter: Builder, node: fx.Node, c: Contraction, held: Held
) -> tuple[Held, Ints]:
    """Return the operand, and the original input channel at each of its positions.

    Where channels lie on further axes (heads, or positions that a kernel slides over), each of
    their positions must be there, in order.
    """
    where = rewriter.positions(c.x, held.places)
    if where is None:
        raise rewriter.ragged(node)
    for axis, along in where.items():
        if axis == c.x_axis or (is_count(along) and len(along) == shape_of(c.x)[axis]):
            continue
        if not np.array_equal(np.sort(along), count_to(shape_of(c.x)[axis])):
            raise rewriter.ragged(node)
        held = rewriter.gather(held, axis, np.argsort(along))
    return held, where.get(c.x_axis, count_to(c.inputs))


def foldable(c: Contraction, value: Value, columns: np.ndarray) -> Bools:
    """Return which input channels are constants whose contribution is one number: ``[inputs]``."""
    const = value.const[columns]
    if len(columns) > 1:
        return (const == 0).all(0)
    return const[0] == 0 if not c.uniform else ~np.isnan(const[0])


def fill_up(mask: Bools, least: int = 0, prefer: Bools | None = None) -> Bools:
    """Return ``mask`` with its rows filled to the width of the fullest.

    Entries in ``prefer`` are taken first, then the first free ones. Rows without an entry stay
    empty, unless ``least`` asks for that many in each.
    """
    if len(mask) == 1 and least <= 1 and some(mask):
        return mask.copy()
    counts = mask.sum(1)
    width = max(int(counts.max(initial=0)), least)
    result = mask.copy()
    for i in np.flatnonzero((counts < width) & ((counts > 0) | (least > 0))):
        rank = result[i].astype(np.int64) * 2 if prefer is None else result[i] * 2 - prefer[i]
        result[i, np.argsort(rank, kind="stable")[: width - counts[i]]] = True
    return result


def _group_order(positions: Ints, width: int) -> Ints | None:
    """Return the groups in the order in which their inputs come, or ``None`` if these come
    mixed."""
    group = positions // width
    starts = np.flatnonzero(np.r_[True, group[1:] != group[:-1]])
    order = group[starts]
    if distinct(order) != len(order) or len(positions) % len(order):
        return None
    return order if np.array_equal(group, np.repeat(order, len(positions) // len(order))) else None


def _constant_outputs(c: Contraction, value: Value, columns: np.ndarray) -> np.ndarray:
    fold = c.fold.reshape(c.blocks.shape[0], c.blocks.shape[2])
    live = used_rows(c, ~fold)
    result = np.full(c.outputs, np.nan)
    constant = ~live.flatten()
    if not constant.any():
        return result
    total = np.zeros(c.outputs) if c.bias_data is None else c.bias_data.double().numpy().copy()
    amount = Contract._fold_amount(c, value, columns, fold.flatten())
    if amount is not None:
        total = total + amount
    result[constant] = total[constant]
    return result
