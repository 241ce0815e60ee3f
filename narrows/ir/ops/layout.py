"""Operators that only move data: views, permutations, padding.

They need no rule of their own: the operator is run on the labels (contract "channels are labels").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from narrows.ir.held import Held
from narrows.ir.labels import Ints, Value, compact, even_sizes, number
from narrows.ir.meta import shape_of
from narrows.ir.ops.args import arguments, call, first_tensor, numeric
from narrows.ir.ops.barrier import barrier_flow
from narrows.ir.ops.flow import Flow, Read
from narrows.ir.ops.protocols import Builder, Channels, Needs
from narrows.ir.ops.row import Row


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
        keeps_axes: Whether every axis of the result is one of the operand's, in its order, or holds
            each element over and over.
    """

    kind = "layout"
    passes_on = True
    rearranges = True
    keeps_all = True
    work_kind: str = "copy"
    keeps_axes: bool = False
    sizes: str = ""
    sizes_at: str = ""

    def flow(self, facts: Channels, node: fx.Node) -> Flow:
        x = first_tensor(node)
        source = facts.value(x)
        result = call(node, {x: carried(source)})
        value, origin = moved(source, result)
        return Flow(value, (Read(x, origin),))

    def input_axis(self, node: fx.Node, operand: fx.Node) -> int | str | None:
        return "same" if not self.sizes and shape_of(node) == shape_of(operand) else None

    def rewrite(self, rewriter: Builder, node: fx.Node) -> Held:
        return self.apply(rewriter, node, rewriter.operand(node, 0))

    def apply(self, rewriter: Builder, node: fx.Node, x: Held) -> Held:
        """Emit the operator on ``x``, which holds just what the result is to hold."""
        facts = rewriter.facts
        value = facts.value(node)
        changes: dict[str, Any] = {next(iter(arguments(node))): x.node}
        if self.sizes:
            there = torch.zeros(facts.value(first_tensor(node)).tensor.numel(), dtype=torch.bool)
            there[x.places.flatten()] = True
            kept = there[facts.came(node)]
            kept = kept.sum_to_size(value.tensor.shape) > 0
            sizes = even_sizes(kept)
            if sizes is None:
                mask = np.zeros(value.count, dtype=bool)
                mask[value.tensor[kept].numpy()] = True
                raise rewriter.ragged(node, mask)
            changes[self.sizes] = self._resized(rewriter, node, value, sizes)
        shown = {**changes, next(iter(arguments(node))): x.places.expand(x.shape)}
        try:
            result = rewriter.preview(node, shown)
        except RuntimeError:
            raise rewriter.ragged(node) from None
        return rewriter.emit(node, changes, rewriter.carried(node, x, result), tuple(result.shape))

    def _resized(
        self, rewriter: Builder, node: fx.Node, value: Value, sizes: list[int]
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

    def apply(self, rewriter: Builder, node: fx.Node, x: Held) -> Held:
        before = shape_of(first_tensor(node))
        if all(new != 1 or old == 1 for new, old in zip(x.shape, before, strict=True)):
            return super().apply(rewriter, node, x)
        for axis in reversed([a for a, size in enumerate(before) if size == 1]):
            x = rewriter.squeezed(node, x, x.places, axis)
        return x


@dataclass(frozen=True, kw_only=True)
class Pad(Row):
    """Constant padding: along space it only borders each channel, along channels it adds new
    ones."""

    kind = "pad"
    passes_on = True
    work_kind: str = "copy"

    def flow(self, facts: Channels, node: fx.Node) -> Flow:
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
        rank = len(shape)
        pads = self._pads(args, rank)
        told = [args["value"], *(p for a in source.axes for p in pads.get(a, ()))]
        if any(isinstance(number, fx.Node) for number in told):
            return barrier_flow(facts, node, "what it adds to the channels is computed")
        fill = float(args["value"] or 0.0)
        const = source.const
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

    def demand(self, demand: Needs, node: fx.Node) -> None:
        read = demand.facts.flows[node].reads[0]
        assert read.source is not None
        need = demand.needed(node)
        if not (need & (read.source >= 0)).any():  # there must be something to pad
            first = np.arange(len(need)) == np.flatnonzero(read.source >= 0)[0]
            demand.extend(node, need | first, "shape", "constants need a tensor to be added to")
        super().demand(demand, node)

    def rewrite(self, rewriter: Builder, node: fx.Node) -> Held:
        args = arguments(node)
        value, x = rewriter.facts.value(node), first_tensor(node)
        source = rewriter.facts.value(x)
        rank = len(value.shape)
        pads = self._pads(args, rank)
        held = rewriter.operand(node, 0)
        where = rewriter.positions(x, held.places)
        changed = dict(pads)
        places = held.places
        if bordered := {a for a, p in pads.items() if p != (0, 0)} & set(source.axes):
            if where is None:
                raise rewriter.ragged(node)
            lines = dict(where)
            for axis in bordered:
                held, changed[axis], lines[axis] = self._bordered(
                    rewriter, node, held, axis, numeric(pads[axis])
                )
            views = {a: [-1 if b == a else 1 for b in range(rank)] for a in lines}
            places = value.placed(
                {a: torch.from_numpy(i.copy()).view(views[a]) for a, i in lines.items()}
            )
        widest = max((rank - a for a in changed), default=0)
        flat = [p for a in reversed(range(rank - widest, rank)) for p in changed.get(a, (0, 0))]
        shape = tuple(
            s + (sum(numeric(changed[a])) if a in changed else 0) for a, s in enumerate(held.shape)
        )
        if all(p == 0 for p in flat):
            return rewriter.retag(node, held.node, places, shape)
        first = next(iter(args))
        return rewriter.emit(node, {first: held.node, "pad": flat}, places, shape)

    @staticmethod
    def _bordered(
        rewriter: Builder, node: fx.Node, held: Held, axis: int, pads: tuple[int, int]
    ) -> tuple[Held, tuple[int, int], Ints]:
        """Return the operand without what is cut off along an axis, the constants to put around
        it, and the result's original index at each position."""
        value, x = rewriter.facts.value(node), first_tensor(node)
        lower, size = pads[0], value.shape[axis]
        moved = (rewriter.positions(x, held.places) or {})[axis] + lower
        inside = (moved >= 0) & (moved < size)
        if not inside.any():
            raise rewriter.ragged(node)
        held, moved = rewriter.gather(held, axis, np.flatnonzero(inside)), moved[inside]
        wanted = rewriter.wanted(node, axis)
        before = wanted[wanted < lower]
        after = wanted[wanted >= size - pads[1]] if pads[1] > 0 else wanted[:0]
        return held, (len(before), len(after)), np.concatenate([before, moved, after])


@dataclass(frozen=True, kw_only=True)
class Glu(Row):
    """``a * sigmoid(b)`` for the two halves of an axis: channel i needs channels i of both
    halves."""

    kind = "gate"
    work_kind: str = "pointwise"

    def flow(self, facts: Channels, node: fx.Node) -> Flow:
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

    def rewrite(self, rewriter: Builder, node: fx.Node) -> Held:
        facts = rewriter.facts
        x = first_tensor(node)
        mask = rewriter.required(node, 0) | rewriter.required(node, 1)
        held = rewriter.deliver(x, mask)
        source, value = facts.value(x), facts.value(node)
        axis = arguments(node)["dim"] % len(source.shape)
        half, now = source.shape[axis] // 2, held.shape[axis]
        index = source.index(held.places)
        if axis in index:
            if now % 2:
                raise rewriter.ragged(node)
            pairs = {a: i.tensor_split(2, axis) for a, i in index.items()}
            away = {a: half if a == axis else 0 for a in pairs}
            if not all(torch.equal(one + away[a], two) for a, (one, two) in pairs.items()):
                raise rewriter.ragged(node)
            index = {a: one for a, (one, _) in pairs.items()}
        shape = tuple(s // 2 if a == axis else s for a, s in enumerate(held.shape))
        return rewriter.emit(node, {"self": held.node}, value.placed(index), shape)
