"""Operators that only move data: views, permutations, selections, concatenation, padding.

They need no rule of their own: the operator is run on the labels (contract "channels are labels").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx

from narrows.ir.labels import Value, channels, compact, even_sizes, merge, number, opaque, unknown
from narrows.ir.ops.args import arguments, call, first_tensor
from narrows.ir.ops.constants import constants_of
from narrows.ir.ops.row import Flow, Read, Row, labels_along
from narrows.ir.program import Meta

if TYPE_CHECKING:
    from narrows.ir.channels import Facts
    from narrows.ir.liveness import Demand
    from narrows.ir.rewrite import Held, Rewriter


def moved(source: Value, result: Tensor) -> tuple[Value, np.ndarray]:
    """Return the value whose elements carry the source labels ``result``, and the label each
    stands for."""
    labels, origin = number(compact(result).long())
    value = Value(tuple(result.shape), labels, len(origin), source.const[origin])
    return value, origin


def carried(source: Value) -> Tensor:
    """Return the labels in the tensor's full shape, to run an operator on.

    Where the operator has to copy them, the narrowest dtype makes the copy cheap.
    """
    dtype = torch.int16 if source.count < 2**15 else torch.int32
    return source.tensor.to(dtype).expand(source.shape)


@dataclass(frozen=True, kw_only=True)
class Layout(Row):
    """``y`` holds elements of ``x``, each where the operator puts it.

    Attributes:
        sizes: The argument that spells sizes of the result, to be rewritten when channels go.
        sizes_at: The argument that says at which axis those sizes start; 0 if empty.
    """

    kind = "layout"
    sizes: str = ""
    sizes_at: str = ""

    def flow(self, facts: Facts, node: fx.Node) -> Flow:
        x = first_tensor(node)
        source = facts.value(x)
        result = call(node, {x: carried(source)})
        value, origin = moved(source, result)
        return Flow(value, (Read(x, origin),))

    def input_axis(self, node: fx.Node, operand: fx.Node) -> int | str | None:
        return "same" if not self.sizes and Meta(node).shape == Meta(operand).shape else None

    def rewrite(self, rewriter: Rewriter, node: fx.Node) -> Held:
        return self.apply(rewriter, node, rewriter.operand(node, 0))

    def apply(self, rewriter: Rewriter, node: fx.Node, x: Held) -> Held:
        """Emit the operator on ``x``, whose labels are exactly those that the result holds."""
        value = rewriter.facts.value(node)
        origin = rewriter.facts.flows[node].reads[0].source
        assert origin is not None
        back = np.full(rewriter.facts.value(first_tensor(node)).count, -1)
        back[origin] = np.arange(len(origin))
        inner = torch.from_numpy(back)[
            x.labels
        ]  # the result's own labels, where the operand has them
        changes: dict[str, Any] = {next(iter(arguments(node))): x.node}
        if self.sizes:
            mask = torch.zeros(value.count, dtype=torch.bool)
            mask[inner.flatten()] = True
            sizes = even_sizes(mask[value.tensor])
            if sizes is None:
                raise rewriter.ragged(node, mask.numpy())
            changes[self.sizes] = self._resized(rewriter, node, value, sizes)
        shown = {**changes, next(iter(arguments(node))): inner.expand(x.shape)}
        try:
            result = rewriter.preview(node, shown)
        except RuntimeError:
            raise rewriter.ragged(node) from None
        return rewriter.emit(node, changes, rewriter.trim(result, value), tuple(result.shape))

    def _resized(
        self, rewriter: Rewriter, node: fx.Node, value: Value, sizes: list[int]
    ) -> list[Any]:
        args = arguments(node)
        literal = list(args[self.sizes])
        start = args[self.sizes_at] % len(Meta(first_tensor(node)).shape) if self.sizes_at else 0
        for i, old in enumerate(literal):
            axis = start + i if self.sizes_at else i + len(value.shape) - len(literal)
            if value.tensor.shape[axis] == 1 or sizes[axis] == value.shape[axis]:
                continue
            if isinstance(old, fx.Node):
                if any(isinstance(other, int) and other == -1 for other in literal):
                    raise rewriter.ragged(node)
                literal[i] = -1
            elif old != -1:
                literal[i] = sizes[axis]
        return literal


@dataclass(frozen=True, kw_only=True)
class Squeeze(Layout):
    """``squeeze`` of every axis of size 1; an axis that has come down to one channel stays."""

    def apply(self, rewriter: Rewriter, node: fx.Node, x: Held) -> Held:
        before = Meta(first_tensor(node)).shape
        if all(new != 1 or old == 1 for new, old in zip(x.shape, before, strict=True)):
            return super().apply(rewriter, node, x)
        x = rewriter.retag(node, x, rewriter.inward(node, x))
        for axis in reversed([a for a, size in enumerate(before) if size == 1]):
            x = rewriter.squeezed(node, x, x.labels, axis)
        return x


@dataclass(frozen=True, kw_only=True)
class Selection(Row):
    """``y`` is a part of ``x`` along one axis: slice, select, split, unbind, index_select.

    Attributes:
        drops: Whether the axis itself goes away (select, unbind).
        axis: The argument that names the axis.
    """

    kind = "selection"
    drops: bool = False
    axis: str = "dim"

    def flow(self, facts: Facts, node: fx.Node) -> Flow:
        x = first_tensor(node)
        source = facts.value(x)
        operands = {x: carried(source)}
        for n in node.all_input_nodes:
            if n is not x and Meta(n).shape is not None:
                if not facts.is_free(n):
                    return barrier_flow(
                        facts, node, "which channels it takes is computed at run time"
                    )
                operands[n] = facts.data(n)
        result = call(node, operands)
        if isinstance(result, Tensor):
            value, origin = moved(source, result)
            return Flow(value, (Read(x, origin),))
        parts = [moved(source, part) for part in result]
        return Flow(tuple(v for v, _ in parts), facts=(x, [o for _, o in parts]))

    def rewrite(self, rewriter: Rewriter, node: fx.Node) -> Held:
        return take(rewriter, node, node, self)


@dataclass(frozen=True, kw_only=True)
class Item(Row):
    """``getitem`` on the result of a split: a selection from the split's own input."""

    kind = "selection"

    @property
    def name(self) -> str:
        """The function's name."""
        return "getitem"

    def flow(self, facts: Facts, node: fx.Node) -> Flow:
        parent: Any
        parent, index = node.args
        flow = facts.flows[parent]
        if flow.barrier:
            return Flow(opaque(Meta(node).shape), flow.reads, flow.barrier)
        x, origins = flow.facts
        return Flow(flow.value[index], (Read(x, origins[index]),))

    def rewrite(self, rewriter: Rewriter, node: fx.Node) -> Held:
        from narrows.ir.ops import table

        parent: Any = node.args[0]
        row = table.find(parent)
        if not isinstance(row, Selection):
            return rewriter.whole(node)
        return take(rewriter, node, parent, row)


def take(rewriter: Rewriter, node: fx.Node, call_node: fx.Node, row: Selection) -> Held:
    """Emit the selection of ``node`` by positions of what its operand now holds."""
    value, x = rewriter.facts.value(node), rewriter.facts.flows[node].reads[0].operand
    source = rewriter.facts.value(x)
    axis = arguments(call_node)[row.axis] % len(source.shape)
    held = rewriter.operand(node, 0) if source.axes != (axis,) else rewriter.held(x)
    whole = rewriter.need(node).all() and torch.equal(held.labels, source.tensor)
    if whole or axis not in source.axes:
        return _as_it_is(rewriter, node, call_node, held)
    ruler = torch.arange(source.shape[axis]).view(
        [-1 if a == axis else 1 for a in range(len(source.shape))]
    )
    part = call(call_node, {x: ruler.expand(source.shape), **rewriter.free_data(call_node)})
    part = part if isinstance(part, Tensor) else part[node.args[1]]
    asked = part.reshape(-1)[:1] if row.drops else part.movedim(axis, 0).flatten(1)[:, 0]
    if source.axes == (axis,):
        return _gathered(rewriter, node, row, axis, asked.numpy())
    inner = rewriter.inward(node, held)
    if bool((torch.diff(asked) <= 0).any()):
        raise rewriter.ragged(node)
    if not row.drops:
        return rewriter.retag(node, held, rewriter.trim(inner, value))
    if held.shape[axis] != 1:
        raise rewriter.ragged(node)
    return rewriter.squeezed(node, held, inner, axis)


def _as_it_is(rewriter: Rewriter, node: fx.Node, call_node: fx.Node, held: Held) -> Held:
    value = rewriter.facts.value(node)
    inner = rewriter.inward(node, held).expand(held.shape)
    first = next(iter(arguments(call_node)))
    result = rewriter.preview(call_node, {first: inner}, rewriter.free_data(call_node))
    if node is call_node:
        return rewriter.emit(
            node, {first: held.node}, rewriter.trim(result, value), tuple(result.shape)
        )
    result = result[node.args[1]]
    return rewriter.item(node, call_node, held, rewriter.trim(result, value), tuple(result.shape))


def _gathered(
    rewriter: Rewriter, node: fx.Node, row: Selection, axis: int, asked: np.ndarray
) -> Held:
    facts = rewriter.facts
    x = facts.flows[node].reads[0].operand
    source, held = facts.value(x), rewriter.held(x)
    old = labels_along(source, axis)[0].expand(source.shape[axis]).numpy()
    place = rewriter.places(x, held, axis)  # original index -> index now, -1 where gone
    own = facts.flows[node].reads[0].source
    assert own is not None
    back = np.full(source.count, -1)
    back[own] = np.arange(len(own))
    wanted = rewriter.need(node)[back[old[asked]]]
    index = place[asked[wanted]]
    if (index < 0).any():
        raise rewriter.ragged(node)
    picked = rewriter.gather(held, axis, index)
    inner = torch.from_numpy(back)[picked.labels]
    if not row.drops:
        return rewriter.retag(node, picked, inner)
    return rewriter.squeezed(node, picked, inner, axis)


def barrier_flow(facts: Facts, node: fx.Node, why: str) -> Flow:
    """Return the flow of a node through which nothing can be removed."""
    from narrows.ir.ops import table

    flow = table.BARRIER.flow(facts, node)
    return Flow(flow.value, flow.reads, why)


@dataclass(frozen=True, kw_only=True)
class Join(Row):
    """``cat`` and ``stack``: several tensors side by side along one axis.

    Attributes:
        stacks: Whether the axis is new.
    """

    kind = "join"
    stacks: bool = False

    def flow(self, facts: Facts, node: fx.Node) -> Flow:
        args = arguments(node)
        shape = Meta(node).shape
        axis = args["dim"] % len(shape)
        operands = [
            n for n in args["tensors"] if len(Meta(n).shape or ()) == len(shape) - self.stacks
        ]
        if len(operands) != len(args["tensors"]):  # the legacy empty tensor
            return barrier_flow(facts, node, "it joins tensors of different rank")
        bound = [n for n in operands if not facts.is_free(n)]
        if self.stacks and len(bound) < len(operands):
            return barrier_flow(facts, node, "it stacks weights on what is computed")
        if (
            not self.stacks
            and not any(axis in facts.value(n).axes for n in bound)
            and self._aside(facts, bound)
        ):
            return self._beside(facts, node, operands, bound)
        return self._along(facts, node, operands, axis)

    @staticmethod
    def _aside(facts: Facts, bound: list[fx.Node]) -> bool:
        return any(facts.value(n).count > 1 for n in bound)

    @staticmethod
    def _beside(facts: Facts, node: fx.Node, operands: list[fx.Node], bound: list[fx.Node]) -> Flow:
        # The channels lie on another axis (tokens are joined): each is the same channel of every
        # operand.
        shape = Meta(node).shape
        values = [facts.value(n) for n in bound]
        labels, count, sources = merge(values, len(shape))
        value = Value(shape, labels, count, unknown(count))
        known = [v.const[s] for v, s in zip(values, sources, strict=True)]
        known += [constants_of(facts.data(n), value) for n in operands if facts.is_free(n)]
        first = known[0]
        same = np.all([k == first for k in known], axis=0)
        value.const = np.where(same, first, np.nan)
        return Flow(
            value, tuple(Read(n, s) for n, s in zip(bound, sources, strict=True)), facts="beside"
        )

    def _along(self, facts: Facts, node: fx.Node, operands: list[fx.Node], axis: int) -> Flow:
        shape = Meta(node).shape
        parts, consts, spans, start = [], [], [], 0
        for n in operands:
            value = self._labelled(facts, n, axis)
            tensor = (value.tensor + start).expand(value.shape)
            parts.append(tensor.unsqueeze(axis) if self.stacks else tensor)
            consts.append(value.const)
            spans.append((n, start, value.count))
            start += value.count
        rank = range(len(shape))
        wide = {a for p in parts for a in rank if a != axis and p.stride(a) != 0 and p.shape[a] > 1}
        parts = [_only(p, wide | {axis}) for p in parts]
        labels, origin = number(compact(torch.cat(parts, axis)))
        value = Value(shape, labels, len(origin), np.concatenate(consts)[origin])
        reads = []
        for n, first, count in spans:
            if facts.is_free(n):
                continue
            inside = (origin >= first) & (origin < first + count)
            reads.append(Read(n, np.where(inside, origin - first, -1)))
        return Flow(value, tuple(reads), facts=(spans, origin))

    @staticmethod
    def _labelled(facts: Facts, node: fx.Node, axis: int) -> Value:
        if not facts.is_free(node):
            return facts.value(node)
        value = channels(Meta(node).shape, axis)
        value.const = constants_of(facts.data(node), value)
        return value

    def rewrite(self, rewriter: Rewriter, node: fx.Node) -> Held:
        facts = rewriter.facts
        args = arguments(node)
        axis = args["dim"] % len(Meta(node).shape)
        if facts.flows[node].facts == "beside":
            held, labels, shape = rewriter.aligned(node, skip_axis=axis)
            feed = iter(held)
            tensors = [
                rewriter.sliced_free(node, n, labels) if facts.is_free(n) else next(feed)
                for n in args["tensors"]
            ]
            shape = (*shape[:axis], Meta(node).shape[axis], *shape[axis + 1 :])
            return rewriter.emit(node, {"tensors": tensors}, labels, shape)
        return self._rewrite_along(rewriter, node, axis)

    def _rewrite_along(self, rewriter: Rewriter, node: fx.Node, axis: int) -> Held:
        facts = rewriter.facts
        spans, origin = facts.flows[node].facts
        value = facts.value(node)
        back = np.full(int(origin.max()) + 1, -1)
        back[origin] = np.arange(len(origin))
        need = rewriter.need(node)
        kept = {axis, *value.axes}
        tensors: list[fx.Node] = []
        parts: list[Tensor] = []
        shapes: list[tuple[int, ...]] = []
        slot = 0
        for n, start, count in spans:
            mine = (origin >= start) & (origin < start + count) & need
            bound = not facts.is_free(n)
            slot += bound
            if not mine.any():
                continue
            if bound:
                held = rewriter.operand(node, slot - 1)
                labels, shape, new = held.labels, held.shape, held.node
            else:
                keep = origin[mine] - start
                labels = torch.from_numpy(keep).view(_along_axis(axis, len(value.shape)))
                shape = tuple(len(keep) if a == axis else s for a, s in enumerate(Meta(n).shape))
                new = rewriter.free(n, {axis: keep})
            local = torch.from_numpy(back)[labels + start].expand(shape)
            local = local.unsqueeze(axis) if self.stacks else local
            tensors.append(new)
            shapes.append(tuple(local.shape))
            parts.append(_only(local, kept))
        shape = tuple(
            sum(s[a] for s in shapes) if a == axis else max(s[a] for s in shapes)
            for a in range(len(value.shape))
        )
        if len(parts) == 1 and not self.stacks:
            return rewriter.retag_node(tensors[0], rewriter.trim(parts[0], value), shape)
        widest = [max(p.shape[a] for p in parts) for a in range(len(shape))]
        try:
            parts = [
                p.expand([-1 if a == axis else s for a, s in enumerate(widest)]) for p in parts
            ]
            result = torch.cat(parts, axis)
        except RuntimeError:
            raise rewriter.ragged(node) from None
        return rewriter.emit(node, {"tensors": tensors}, rewriter.trim(result, value), shape)


def _along_axis(axis: int, rank: int) -> list[int]:
    return [-1 if a == axis else 1 for a in range(rank)]


def _only(tensor: Tensor, axes: set[int]) -> Tensor:
    for axis in range(tensor.dim()):
        if axis not in axes:
            tensor = tensor.narrow(axis, 0, 1)
    return tensor


@dataclass(frozen=True, kw_only=True)
class Pad(Row):
    """Constant padding: along space it only borders each channel, along channels it adds new
    ones."""

    kind = "pad"

    def flow(self, facts: Facts, node: fx.Node) -> Flow:
        args = arguments(node)
        x = first_tensor(node)
        source, shape = facts.value(x), Meta(node).shape
        if args.get("mode", "constant") != "constant":
            pads = self._pads(args, len(shape))
            if any(pads.get(a, (0, 0)) != (0, 0) for a in source.axes):
                return barrier_flow(facts, node, "it mirrors channels into new ones")
            return Flow(
                Value(shape, source.labels, source.count, source.const),
                (Read(x, np.arange(source.count)),),
            )
        fill = float(args["value"] or 0.0)
        const = source.const
        rank = len(shape)
        pads = self._pads(args, rank)
        if any(p != (0, 0) for a, p in pads.items() if a not in source.axes):
            const = np.where(const == fill, const, np.nan)
        flat = [
            p
            for a in reversed(range(rank))
            for p in (pads.get(a, (0, 0)) if a in source.axes else (0, 0))
        ]
        tensor = torch.nn.functional.pad(source.tensor, flat, value=-1)
        if not bool((tensor < 0).any()) and len(torch.unique(tensor)) == source.count:
            return Flow(
                Value(shape, source.labels, source.count, const),
                (Read(x, np.arange(source.count)),),
            )
        # New channels get labels of their own, one per position, all the same constant.
        new = tensor < 0
        tensor = tensor.clone()
        tensor[new] = torch.arange(int(new.sum())) + source.count
        labels, origin = number(tensor)
        all_const = np.concatenate([const, np.full(int(new.sum()), fill)])
        value = Value(shape, labels, len(origin), all_const[origin])
        return Flow(value, (Read(x, np.where(origin < source.count, origin, -1)),))

    @staticmethod
    def _pads(args: dict[str, Any], rank: int) -> dict[int, tuple[Any, Any]]:
        pad = list(args["pad"])
        return {rank - 1 - i // 2: (pad[i], pad[i + 1]) for i in range(0, len(pad), 2)}

    def input_axis(self, node: fx.Node, operand: fx.Node) -> int | str | None:
        return "same"

    def demand(self, demand: Demand, node: fx.Node) -> None:
        read = demand.facts.flows[node].reads[0]
        assert read.source is not None
        need = demand.needed(node)
        if not (need & (read.source >= 0)).any():  # there must be something to pad
            first = np.arange(len(need)) == np.flatnonzero(read.source >= 0)[0]
            demand.extend(node, need | first, "shape", "constants need a tensor to be added to")
        super().demand(demand, node)

    def rewrite(self, rewriter: Rewriter, node: fx.Node) -> Held:
        args = arguments(node)
        value = rewriter.facts.value(node)
        x = first_tensor(node)
        source = rewriter.facts.value(x)
        rank = len(value.shape)
        pads = self._pads(args, rank)
        read = rewriter.facts.flows[node].reads[0]
        assert read.source is not None
        need = rewriter.need(node)
        held = rewriter.operand(node, 0)
        back = np.full(source.count, -1)
        inside = read.source >= 0
        back[read.source[inside]] = np.flatnonzero(inside)
        inner = torch.from_numpy(back)[held.labels]
        added = need & ~inside
        changed = dict(pads)
        for axis in set(value.axes) & {a for a, p in pads.items() if p != (0, 0)}:
            if len(value.axes) > 1:
                if (need != np.ones_like(need)).any():
                    raise rewriter.ragged(node)
                continue
            along = labels_along(value, axis)[0].numpy()
            before = along[: pads[axis][0]]
            after = along[len(along) - pads[axis][1] :]
            changed[axis] = (int(added[before].sum()), int(added[after].sum()))
            view = [-1 if a == axis else 1 for a in range(rank)]
            ends = [torch.from_numpy(e[added[e]]).view(view) for e in (before, after)]
            inner = torch.cat([ends[0], inner, ends[1]], axis)
        widest = max((rank - a for a in changed), default=0)
        flat = [p for a in reversed(range(rank - widest, rank)) for p in changed.get(a, (0, 0))]
        shape = tuple(
            s + (sum(changed[a]) if a in changed else 0) for a, s in enumerate(held.shape)
        )
        if all(p == 0 for p in flat):
            return rewriter.retag_node(held.node, rewriter.trim(inner, value), shape)
        first = next(iter(args))
        return rewriter.emit(
            node, {first: held.node, "pad": flat}, rewriter.trim(inner, value), shape
        )


@dataclass(frozen=True, kw_only=True)
class Glu(Row):
    """``a * sigmoid(b)`` for the two halves of an axis: channel i needs channels i of both
    halves."""

    kind = "gate"

    def flow(self, facts: Facts, node: fx.Node) -> Flow:
        x = first_tensor(node)
        source = facts.value(x)
        full = source.tensor.expand(source.shape)
        a, b = full.chunk(2, arguments(node)["dim"])
        pair = compact(a * source.count + b)
        labels, codes = number(pair)
        one, two = codes // source.count, codes % source.count
        gate = 1 / (1 + np.exp(-source.const[two]))
        const = np.where(source.const[one] == 0, 0.0, source.const[one] * gate)
        value = Value(Meta(node).shape, labels, len(codes), const)
        return Flow(value, (Read(x, one), Read(x, two)))

    def rewrite(self, rewriter: Rewriter, node: fx.Node) -> Held:
        facts = rewriter.facts
        x = first_tensor(node)
        mask = rewriter.required(node, 0) | rewriter.required(node, 1)
        held = rewriter.deliver(x, mask)
        first, second = (r.source for r in facts.flows[node].reads)
        count = facts.value(x).count
        known = {int(a * count + b): i for i, (a, b) in enumerate(zip(first, second, strict=True))}  # type: ignore[arg-type]
        full = held.labels.expand(held.shape)
        axis = arguments(node)["dim"]
        if full.shape[axis] % 2:
            raise rewriter.ragged(node)
        a, b = full.chunk(2, axis)
        code = rewriter.trim(a * count + b, facts.value(node))
        found = [known.get(int(c), -1) for c in code.flatten()]
        if min(found) < 0:
            raise rewriter.ragged(node)
        labels = torch.tensor(found).view(code.shape)
        return rewriter.emit(node, {"self": held.node}, labels, tuple(a.shape))
