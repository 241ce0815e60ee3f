"""Operators that only move data: views, permutations, padding.

They need no rule of their own: the operator is run on the labels (contract "channels are labels").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx

from narrows.ir.labels import Value, compact, even_sizes, number
from narrows.ir.ops.args import arguments, call, first_tensor
from narrows.ir.ops.barrier import barrier_flow
from narrows.ir.ops.row import Flow, Read, Row, labels_along
from narrows.ir.program import shape_of

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
        return "same" if not self.sizes and shape_of(node) == shape_of(operand) else None

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
        start = args[self.sizes_at] % len(shape_of(first_tensor(node))) if self.sizes_at else 0
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
        before = shape_of(first_tensor(node))
        if all(new != 1 or old == 1 for new, old in zip(x.shape, before, strict=True)):
            return super().apply(rewriter, node, x)
        x = rewriter.retag(node, x, rewriter.inward(node, x))
        for axis in reversed([a for a, size in enumerate(before) if size == 1]):
            x = rewriter.squeezed(node, x, x.labels, axis)
        return x


@dataclass(frozen=True, kw_only=True)
class Pad(Row):
    """Constant padding: along space it only borders each channel, along channels it adds new
    ones."""

    kind = "pad"

    def flow(self, facts: Facts, node: fx.Node) -> Flow:
        args = arguments(node)
        x = first_tensor(node)
        source, shape = facts.value(x), shape_of(node)
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
        value = Value(shape_of(node), labels, len(codes), const)
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
