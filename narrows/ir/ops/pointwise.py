"""Operators that act element by element: activations, arithmetic, and per-channel scale and
shift."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.fx.node import map_arg

from narrows.ir.held import Held
from narrows.ir.labels import Bools, Ints, Value, broadcast, merge, some, unknown
from narrows.ir.meta import Meta, shape_of
from narrows.ir.ops.args import arguments, is_tensor, with_argument
from narrows.ir.ops.constants import as_array, constants_of, per_label
from narrows.ir.ops.flow import Flow, Read
from narrows.ir.ops.protocols import Builder, Channels, Needs
from narrows.ir.ops.row import Row, Shared, WeightAxis, labels_along


@dataclass(frozen=True, kw_only=True)
class Pointwise(Row):
    """``y = f(a, b, ...)`` element by element, with broadcasting.

    Attributes:
        absorbs: Whether a zero in any operand makes the result zero (a product).
        partial: Whether it is infinite or undefined for some finite inputs, so that even a channel
            that only fills a place must hold what the model computes.
    """

    kind = "pointwise"
    passes_on = True
    broadcasts = True
    work_kind: str = "pointwise"
    any_width: bool = True
    absorbs: bool = False
    partial: bool = False

    def flow(self, facts: Channels, node: fx.Node) -> Flow:
        shape = shape_of(node)
        operands = [n for n in _tensors(node) if not facts.is_free(n)]
        values = [facts.value(n) for n in operands]
        labels, count, sources = merge(values, len(shape))
        value = Value(shape, labels, count, unknown(count))
        value.const = self._constants(facts, node, value, operands, sources)
        return Flow(value, tuple(Read(n, s) for n, s in zip(operands, sources, strict=True)))

    def _constants(
        self, facts: Channels, node: fx.Node, value: Value, operands: list[fx.Node], sources: Any
    ) -> np.ndarray:
        known = [facts.value(n).const[s] for n, s in zip(operands, sources, strict=True)]
        bound = dict(zip(operands, known, strict=True))
        loose = [n for n in _tensors(node) if facts.is_free(n)]
        some = any(not np.isnan(k).all() for k in known)
        if not some and not (self.absorbs and loose):
            return unknown(value.count)
        for n in loose:
            bound[n] = constants_of(facts.data(n), value)
        stack = np.stack(list(bound.values()))
        complete = ~np.isnan(stack).any(0)
        result = unknown(value.count)
        if complete.any():
            tensors = {n: _typed(v[complete], Meta(n).dtype) for n, v in bound.items()}
            tensors.update({n: facts.data(n) for n in loose if shape_of(n) == ()})
            args, kwargs = map_arg(
                (node.args, node.kwargs), lambda n: tensors[n] if n in tensors else Meta(n).size
            )
            # These are numbers in a row, which no order of axes in memory fits.
            args, kwargs = with_argument(node.target, args, kwargs, "memory_format", None)
            with torch.no_grad():
                computed = node.target(*args, **kwargs)  # type: ignore[operator]
            result[complete] = computed.to(torch.float64).numpy()
        if self.absorbs:
            result[(stack == 0).any(0)] = 0.0
        return result

    def input_axis(self, node: fx.Node, operand: fx.Node) -> int | str | None:
        return "same"

    def weight_axes(self, facts: Channels, node: fx.Node) -> Iterator[WeightAxis]:
        value = facts.value(node)
        rank = len(value.shape)
        for n in dict.fromkeys(_tensors(node)):
            if n.op != "get_attr" or len(value.axes) != 1:
                continue
            (axis,) = value.axes
            own = axis - (rank - len(shape_of(n)))
            if own >= 0 and shape_of(n)[own] > 1:
                yield WeightAxis(n, own, "with", node, labels_along(value, axis)[0].numpy())

    def demand(self, demand: Needs, node: fx.Node) -> None:
        skipped = demand.constant_operands(node)
        need, valued = demand.needed(node), demand.valued(node)
        const = demand.facts.value(node).const
        for slot, read in enumerate(demand.facts.flows[node].reads):
            if slot in skipped:
                continue
            assert read.source is not None
            source = demand.facts.value(read.operand)
            weighs = valued
            if self.absorbs:  # whatever meets a zero only fills a place
                weighs = valued & ~((const == 0) & (source.const[read.source] != 0))
            mask = read.reached(need, source.count)
            demand.require(
                node, slot, mask, mask if self.partial else read.reached(weighs, source.count)
            )
            meets = weighs if len(_tensors(node)) > 1 else weighs & np.isnan(const)
            lost = read.reached(meets, source.count) & source.known()
            if some(lost):
                demand.note(node, "merge", "they are constants that meet others", lost)

    def rewrite(self, rewriter: Builder, node: fx.Node) -> Held:
        held, places, shape = rewriter.aligned(node)
        replaced: dict[fx.Node, fx.Node] = {}
        for slot, read in enumerate(rewriter.facts.flows[node].reads):
            replaced[read.operand] = held[slot]
        for n in _tensors(node):
            if rewriter.facts.is_free(n):
                replaced[n] = rewriter.sliced_free(node, n, places)
                shape = broadcast((shape, shape_of(replaced[n])))
        return rewriter.emit_mapped(node, replaced, places, shape)


def _tensors(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if is_tensor(n)]


def _typed(values: np.ndarray, dtype: torch.dtype | None) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if dtype is None or dtype.is_floating_point:
        return tensor
    return tensor.to(dtype)


@dataclass(frozen=True, kw_only=True)
class PerChannel(Row):
    """An element-wise operator with one parameter per channel of an axis: BatchNorm, PReLU.

    Attributes:
        parameters: The arguments that hold one number per channel.
        axis: The channel axis of the input.
        centered: Whether the operator subtracts the channel's own mean (InstanceNorm), so that a
            constant channel becomes its bias.
    """

    kind = "per-channel"
    passes_on = True
    work_kind: str = "scale"
    any_width: bool = True
    parameters: tuple[str, ...]
    axis: int = 1
    centered: bool = False

    def flow(self, facts: Channels, node: fx.Node) -> Flow:
        args = arguments(node)
        x = next(iter(args.values()))
        source = facts.value(x)
        shape = shape_of(node)
        read = (Read(x, np.arange(source.count)),)
        if any(is_tensor(args[p]) and not facts.is_free(args[p]) for p in self.parameters):
            return Flow(Value(shape, source.labels, source.count, unknown(source.count)), read,
                        barrier="its parameters are computed, not weights")  # fmt: skip
        value = Value(shape, source.labels, source.count, unknown(source.count))
        if set(source.axes) - {self.axis}:  # several channels share a parameter
            return Flow(value, read, facts=np.zeros(source.count, dtype=bool))
        along = labels_along(source, self.axis)[0].expand(source.shape[self.axis]).numpy()
        gain: Any = args.get(self.gain)
        dead = as_array(facts.data(gain)) == 0 if is_tensor(gain) else np.zeros(1, dtype=bool)
        silent = np.zeros(source.count, dtype=bool)
        if dead.any():  # what comes in does not matter
            silent[:] = True
            silent[along[~dead]] = False
        if dead.any() or source.known().any():
            value.const = self._constants(facts, node, args, source, along, dead)
        return Flow(value, read, facts=silent)

    def parameter_axis(self, axis: int, rank: int, parameter_rank: int) -> int | None:
        return 0 if axis == self.axis else None

    def demand(self, demand: Needs, node: fx.Node) -> None:
        silent = demand.facts.flows[node].facts
        need, valued = demand.needed(node), demand.valued(node)
        demand.require(node, 0, need, valued & ~silent)

    def _constants(
        self,
        facts: Channels,
        node: fx.Node,
        args: dict[str, Any],
        source: Value,
        along: Ints,
        dead: Bools,
    ) -> np.ndarray:
        inputs = source.const[along]
        done = dead | ~np.isnan(inputs)
        result = np.full(len(along), np.nan)
        if not done.any():
            return unknown(source.count)
        if self.centered and args["use_input_stats"]:
            bias: Any = args.get("bias")
            result[done] = facts.data(bias).double().numpy()[done] if is_tensor(bias) else 0.0
            return per_label(along, source.count, result)
        data = np.where(np.isnan(inputs), 0.0, inputs)[done]
        cast: dict[str, Any] = {}
        for p in self.parameters:
            if is_tensor(args[p]):
                full = facts.data(args[p]).double()
                cast[p] = full if full.numel() == 1 else full[torch.from_numpy(done)]
        first = next(iter(args))
        call = {**args, **cast, first: torch.from_numpy(data)[None]}
        with torch.no_grad():
            result[done] = node.target(*call.values())[0].numpy()  # type: ignore[operator]
        return per_label(along, source.count, result)

    def input_axis(self, node: fx.Node, operand: fx.Node) -> int | str | None:
        return self.axis if operand is next(iter(arguments(node).values())) else None

    def weight_axes(self, facts: Channels, node: fx.Node) -> Iterator[WeightAxis]:
        args = arguments(node)
        value = facts.value(node)
        if value.tensor.shape[self.axis] == 1 and value.count > 1:
            return
        along = labels_along(value, self.axis)[0].expand(value.shape[self.axis]).numpy()
        for p in self.parameters:
            n = args[p]
            if is_tensor(n) and n.op == "get_attr" and shape_of(n)[0] == len(along):
                yield WeightAxis(n, 0, "with", node, along)

    def shared(self, facts: Channels, node: fx.Node) -> Shared | None:
        value = facts.value(node)
        if value.tensor.shape[self.axis] == 1 or len(value.axes) == 1:
            return None
        lines = labels_along(value, self.axis).numpy()
        sets = np.tile(np.arange(lines.shape[1]), len(lines))
        return Shared(node, lines.flatten(), sets, "they share its parameters")

    def rewrite(self, rewriter: Builder, node: fx.Node) -> Held:
        args = arguments(node)
        held = rewriter.operand(node, 0)
        where = rewriter.positions(node, held.places)
        index = where.get(self.axis) if where else None
        if rewriter.narrowed(node, held.places) and where is None:
            raise rewriter.ragged(node)
        changes: dict[str, Any] = {next(iter(args)): held.node}
        for p in self.parameters:
            if is_tensor(args[p]):
                wide = shape_of(args[p])[0] > 1
                changes[p] = rewriter.weight(
                    args[p], {0: index} if index is not None and wide else {}
                )
        return rewriter.emit(node, changes, held.places, held.shape)
