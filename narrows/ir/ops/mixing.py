"""Operators that mix positions: pooling and resizing over space, norms, softmax and sums over
channels.

Over an axis without channels they pass channels on. Over the channel axis every result depends on
every channel of its group, so none of a group can go while one is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from narrows.ir.held import Held
from narrows.ir.labels import Bools, Value, unknown
from narrows.ir.meta import shape_of
from narrows.ir.ops.args import arguments, first_tensor, is_tensor
from narrows.ir.ops.barrier import barrier_flow
from narrows.ir.ops.flow import Flow, Read
from narrows.ir.ops.protocols import Builder, Channels, Needs
from narrows.ir.ops.row import Row, Shared, WeightAxis, labels_along


def constant(args: dict[str, Any]) -> str:
    """A constant channel stays that constant."""
    return "same"


def zero_only(args: dict[str, Any]) -> str:
    """Only a zero channel stays what it is."""
    return "zero"


def never(args: dict[str, Any]) -> str:
    """A constant channel becomes something else."""
    return "none"


@dataclass(frozen=True, kw_only=True)
class Spatial(Row):
    """An operator over axes that hold no channels: pooling, resizing, softmax over positions.

    Attributes:
        trailing: How many trailing axes it works on, or 0 to read them from ``dims``.
        dims: The argument that names the axes; without either it works on all of them.
        constants: From the arguments, whether a constant channel stays ``same``, only a ``zero``
            one does, or ``none``.
    """

    kind = "spatial"
    passes_on = True
    work_kind: str = "pool"
    any_width: bool = True
    trailing: int = 0
    dims: str = ""
    constants: Callable[[dict[str, Any]], str] = constant

    def axes(self, node: fx.Node, rank: int) -> set[int]:
        """Return the axes it works on."""
        if self.trailing:
            return set(range(rank - self.trailing, rank))
        dims = arguments(node)[self.dims] if self.dims else None
        dims = (
            range(rank) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
        )
        return {d % max(rank, 1) for d in dims}

    def flow(self, facts: Channels, node: fx.Node) -> Flow:
        x = first_tensor(node)
        if any(is_tensor(n) and n is not x for n in node.all_input_nodes):
            return barrier_flow(facts, node, "an operand beside the input is a tensor")
        source = facts.value(x)
        if self.axes(node, len(source.shape)) & set(source.axes):
            return self.across(facts, node, x, source)
        rule = self.constants(arguments(node))
        const = unknown(source.count)
        if rule == "same":
            const = source.const
        elif rule == "zero":
            const = np.where(source.const == 0, 0.0, np.nan)
        value = Value(shape_of(node), source.labels, source.count, const)
        return Flow(value, (Read(x, np.arange(source.count)),))

    def across(self, facts: Channels, node: fx.Node, x: fx.Node, source: Value) -> Flow:
        """Return the flow when the axes worked on hold channels."""
        return barrier_flow(facts, node, "it mixes channels")

    def input_axis(self, node: fx.Node, operand: fx.Node) -> int | str | None:
        return "same"

    def rewrite(self, rewriter: Builder, node: fx.Node) -> Held:
        if rewriter.facts.flows[node].barrier:
            return rewriter.whole(node)
        held = rewriter.operand(node, 0)
        old, new = shape_of(first_tensor(node)), shape_of(node)
        moving = self.axes(node, len(old))
        shape = tuple(new[a] if a in moving else s for a, s in enumerate(held.shape))
        return rewriter.emit(node, {next(iter(arguments(node))): held.node}, held.places, shape)


@dataclass(frozen=True, kw_only=True)
class Mixing(Spatial):
    """An operator whose result keeps the shape and mixes whatever lies on its axes: softmax,
    LayerNorm.

    Attributes:
        parameters: Arguments with one number per position of the mixed axes.
        shape_arg: The argument that spells the mixed axes' sizes (LayerNorm), or an empty string.
        ordered: Whether the order on the axis matters (cumsum).
    """

    kind = "mixing"
    passes_on = False
    work_kind: str = "norm"
    any_width: bool = False
    parameters: tuple[str, ...] = ()
    shape_arg: str = ""
    ordered: bool = False

    def axes(self, node: fx.Node, rank: int) -> set[int]:
        if self.shape_arg:
            return set(range(rank - len(arguments(node)[self.shape_arg]), rank))
        return super().axes(node, rank)

    def flow(self, facts: Channels, node: fx.Node) -> Flow:
        x, args = first_tensor(node), arguments(node)
        if any(is_tensor(args[p]) and not facts.is_free(args[p]) for p in self.parameters):
            return barrier_flow(facts, node, "its parameters are computed, not weights")
        source = facts.value(x)
        mixed = self.axes(node, len(source.shape)) & set(source.axes)
        if mixed:
            return self.across(facts, node, x, source)
        const = unknown(source.count)
        if not self.parameters and self.constants(args) == "same":
            const = source.const
        return Flow(
            Value(shape_of(node), source.labels, source.count, const),
            (Read(x, np.arange(source.count)),),
        )

    def across(self, facts: Channels, node: fx.Node, x: fx.Node, source: Value) -> Flow:
        axes = sorted(self.axes(node, len(source.shape)) & set(source.axes))
        group = source.tensor.movedim(axes, list(range(-len(axes), 0)))
        flat = group.reshape(*group.shape[: -len(axes)], -1)
        rows = flat.reshape(-1, flat.shape[-1])
        const = self._shifted(facts, node, source)
        value = Value(shape_of(node), source.labels, source.count, const)
        reads = (Read(x, np.arange(source.count)),)
        return Flow(value, reads, facts=rows.numpy())

    def _shifted(self, facts: Channels, node: fx.Node, source: Value) -> np.ndarray:
        # A zero gain leaves the bias alone, whatever the statistics are.
        from narrows.ir.ops.constants import constants_of

        args = arguments(node)
        if "weight" not in self.parameters or not is_tensor(args["weight"]):
            return unknown(source.count)
        gain = constants_of(facts.data(args["weight"]), source)
        bias: Any = args.get("bias")
        shift = (
            constants_of(facts.data(bias), source) if is_tensor(bias) else np.zeros(source.count)
        )
        return np.where(gain == 0, shift, np.nan)

    def shared(self, facts: Channels, node: fx.Node) -> Shared | None:
        rows = facts.flows[node].facts
        if rows is None:
            return None
        sets = np.repeat(np.arange(len(rows)), rows.shape[1])
        return Shared(
            first_tensor(node), rows.flatten(), sets, "it needs every channel it normalises over"
        )

    def weight_axes(self, facts: Channels, node: fx.Node) -> Iterator[WeightAxis]:
        value, args = facts.value(node), arguments(node)
        if len(value.axes) != 1:
            return
        (axis,) = value.axes
        for p in self.parameters:
            n = args[p]
            own = axis - (len(value.shape) - len(shape_of(n))) if is_tensor(n) else -1
            if own >= 0 and n.op == "get_attr" and shape_of(n)[own] > 1:
                yield WeightAxis(n, own, "with", node, labels_along(value, axis)[0].numpy())

    def demand(self, demand: Needs, node: fx.Node) -> None:
        flow = demand.facts.flows[node]
        if flow.facts is None:
            return super().demand(demand, node)
        need = demand.needed(node)
        mask = need
        while True:  # a label may lie in several rows
            touched = flow.facts[mask[flow.facts].any(1)]
            grown = mask.copy()
            grown[touched] = True
            if np.array_equal(grown, mask):
                break
            mask = grown
        extra = mask & ~need
        if extra.any():
            demand.note(
                node, "statistics", "a norm or softmax over the channels needs all of them", extra
            )
        demand.extend(node, mask, "", "")
        valued = np.zeros(len(need), dtype=bool)
        valued[flow.facts[demand.valued(node)[flow.facts].any(1)]] = True
        demand.require(node, 0, mask, valued)
        return None

    def rewrite(self, rewriter: Builder, node: fx.Node) -> Held:
        flow = rewriter.facts.flows[node]
        if flow.barrier:
            return rewriter.whole(node)
        held = rewriter.operand(node, 0, exact=flow.facts is not None)
        args = arguments(node)
        value = rewriter.facts.value(node)
        if flow.facts is not None:
            axes = sorted(self.axes(node, len(value.shape)) & set(value.axes))
            moved = self.ordered and rewriter.narrowed(node, held.places)
            if moved or not _intact(value.places, held.places, axes):
                raise rewriter.ragged(node)
        where = rewriter.positions(node, held.places)
        changes: dict[str, Any] = {next(iter(args)): held.node}
        rank = len(held.shape)
        for p in self.parameters:
            if is_tensor(args[p]):
                changes[p] = self._parameter(rewriter, node, args[p], where, rank)
        if self.shape_arg:
            count = len(args[self.shape_arg])
            changes[self.shape_arg] = list(held.shape[rank - count :])
        return rewriter.emit(node, changes, held.places, held.shape)

    @staticmethod
    def _parameter(rewriter: Builder, node: fx.Node, weight: fx.Node, where: Any, rank: int) -> Any:
        if where is None:
            if rewriter.narrowed(node, rewriter.held(first_tensor(node)).places):
                raise rewriter.ragged(node)
            return rewriter.weight(weight, {})
        own = rank - len(shape_of(weight))
        index = {a - own: i for a, i in where.items() if a >= own and shape_of(weight)[a - own] > 1}
        return rewriter.weight(weight, index)


def _intact(old: Tensor, new: Tensor, axes: list[int]) -> bool:
    """Whether what mixes in the new tensor is, row by row, what mixed in the old one."""
    before, after = (
        t.movedim(axes, list(range(-len(axes), 0))).flatten(-len(axes)).flatten(0, -2).sort(1)[0]
        for t in (old, new)
    )
    known = {row.tobytes() for row in before.numpy()}
    return all(row.tobytes() in known for row in after.numpy())


@dataclass(frozen=True, kw_only=True)
class GroupNorm(Row):
    """``group_norm``: statistics over groups of channels, so whole groups stay or go."""

    kind = "mixing"
    work_kind: str = "norm"

    def flow(self, facts: Channels, node: fx.Node) -> Flow:
        args = arguments(node)
        x = args["input"]
        source = facts.value(x)
        if any(is_tensor(args[p]) and not facts.is_free(args[p]) for p in ("weight", "bias")):
            return barrier_flow(facts, node, "its parameters are computed, not weights")
        if set(source.axes) - {1}:
            return barrier_flow(facts, node, "channels lie on an axis it averages over")
        along = labels_along(source, 1)[0].expand(source.shape[1]).numpy()
        group = np.arange(len(along)) // (len(along) // args["num_groups"])
        value = Value(shape_of(node), source.labels, source.count, unknown(source.count))
        return Flow(value, (Read(x, np.arange(source.count)),), facts=(along, group))

    def shared(self, facts: Channels, node: fx.Node) -> Shared | None:
        if facts.flows[node].barrier:
            return None
        along, group = facts.flows[node].facts
        return Shared(arguments(node)["input"], along, group, "its statistics need every channel")

    def parameter_axis(self, axis: int, rank: int, parameter_rank: int) -> int | None:
        return 0 if axis == 1 else None

    def input_axis(self, node: fx.Node, operand: fx.Node) -> int | str | None:
        return 1

    def weight_axes(self, facts: Channels, node: fx.Node) -> Iterator[WeightAxis]:
        args = arguments(node)
        if facts.flows[node].barrier:
            return
        along, _ = facts.flows[node].facts
        for p in ("weight", "bias"):
            if is_tensor(args[p]) and args[p].op == "get_attr":
                yield WeightAxis(args[p], 0, "with", node, along)

    def demand(self, demand: Needs, node: fx.Node) -> None:
        along, group = demand.facts.flows[node].facts
        need = demand.needed(node)
        mask = self._closed(need, along, group)
        if (mask & ~need).any():
            demand.note(
                node,
                "statistics",
                "a norm over a group of channels needs all of them",
                mask & ~need,
            )
        demand.extend(node, mask, "", "")
        valued = np.zeros(len(need), dtype=bool)
        weighs = np.zeros(int(group.max()) + 1, dtype=bool)
        weighs[group[demand.valued(node)[along]]] = True
        valued[along[weighs[group]]] = True
        demand.require(node, 0, mask, valued)

    @staticmethod
    def _closed(need: Bools, along: np.ndarray, group: np.ndarray) -> Bools:
        mask = need.copy()
        while True:
            groups = np.zeros(int(group.max()) + 1, dtype=bool)
            groups[group[mask[along]]] = True
            grown = mask.copy()
            grown[along[groups[group]]] = True
            if np.array_equal(grown, mask):
                return mask
            mask = grown

    def rewrite(self, rewriter: Builder, node: fx.Node) -> Held:
        args = arguments(node)
        along, group = rewriter.facts.flows[node].facts
        held = rewriter.operand(node, 0, exact=True)
        where = rewriter.positions(node, held.places)
        index = where.get(1) if where else None
        changes: dict[str, Any] = {"input": held.node}
        if index is not None:
            kept = group[index]
            size = len(along) // args["num_groups"]
            starts = kept.reshape(-1, size) if len(kept) % size == 0 else None
            if (
                starts is None
                or (starts != starts[:, :1]).any()
                or len(np.unique(starts[:, 0])) != len(starts)
            ):
                raise rewriter.ragged(node)
            changes["num_groups"] = len(starts)
        elif rewriter.narrowed(node, held.places):
            raise rewriter.ragged(node)
        for p in ("weight", "bias"):
            if is_tensor(args[p]):
                changes[p] = rewriter.weight(args[p], {} if index is None else {0: index})
        return rewriter.emit(node, changes, held.places, held.shape)


@dataclass(frozen=True, kw_only=True)
class Reduce(Spatial):
    """A sum, mean or extremum over axes; over the channel axis it reads every channel.

    Attributes:
        skips_zeros: Whether a zero channel may simply be left out (a sum).
        numbers: Whether its result says which element it is (``argmax``), so that over the channel
            axis none may go.
    """

    kind = "reduction"
    work_kind: str = "reduce"
    skips_zeros: bool = False
    numbers: bool = False
    keep: str = "keepdim"

    def flow(self, facts: Channels, node: fx.Node) -> Flow:
        flow = super().flow(facts, node)
        if flow.barrier or flow.facts is not None:
            return flow
        source = facts.value(first_tensor(node))
        tensor = self._cut(node, source.tensor)
        return Flow(Value(shape_of(node), tensor, source.count, flow.value.const), flow.reads)

    def _cut(self, node: fx.Node, labels: Tensor) -> Tensor:
        if arguments(node).get(self.keep, False):
            return labels
        kept = [a for a in range(labels.dim()) if a not in self.axes(node, labels.dim())]
        return labels.reshape([labels.shape[a] for a in kept])

    def across(self, facts: Channels, node: fx.Node, x: fx.Node, source: Value) -> Flow:
        if self.numbers:
            return barrier_flow(facts, node, "its result is the number of a channel")
        axes = sorted(self.axes(node, len(source.shape)) & set(source.axes))
        tensor = source.tensor.movedim(axes, list(range(-len(axes), 0)))
        rows = tensor.reshape(*tensor.shape[: -len(axes)], -1)
        flat = rows.reshape(-1, rows.shape[-1])
        classes, index = torch.unique(flat, dim=0, return_inverse=True)
        shape = [1 if a in axes else s for a, s in enumerate(source.tensor.shape)]
        labels = self._cut(node, index.view(shape))
        count, width = classes.shape
        pairs = (np.repeat(np.arange(count), width), classes.flatten().numpy())
        known = source.const[classes.numpy()]
        rule = self.constants(arguments(node))
        same = (known == known[:, :1]).all(1) & (rule == "same")
        const = np.where(same, known[:, 0], np.nan)
        if rule == "zero":
            const[(known == 0).all(1)] = 0.0
        value = Value(shape_of(node), labels, count, const)
        return Flow(value, (Read(x, pairs=pairs, couples=False),), facts=classes.numpy())

    def shared(self, facts: Channels, node: fx.Node) -> Shared | None:
        pairs = facts.flows[node].reads[0].pairs
        if pairs is None:
            return None
        out, inp = pairs
        return Shared(
            first_tensor(node), inp, out, "" if self.skips_zeros else "it reduces over the channels"
        )

    def demand(self, demand: Needs, node: fx.Node) -> None:
        flow = demand.facts.flows[node]
        if flow.facts is None or not self.skips_zeros:
            return super().demand(demand, node)
        source = demand.facts.value(flow.reads[0].operand)
        # A place may be skipped where every needed sum has a zero there, so that all stay equally
        # long.
        needed = flow.facts[demand.needed(node)]
        kept = (source.const[needed] != 0).any(0)
        kept[0] |= not kept.any()
        wanted = np.zeros(source.count, dtype=bool)
        wanted[needed[:, kept]] = True
        valued = np.zeros(source.count, dtype=bool)
        valued[flow.facts[demand.valued(node)]] = True
        demand.require(node, 0, wanted, valued)
        return None

    def rewrite(self, rewriter: Builder, node: fx.Node) -> Held:
        flow = rewriter.facts.flows[node]
        if flow.barrier:
            return rewriter.whole(node)
        held = rewriter.operand(node, 0, exact=flow.facts is not None)
        changes = {next(iter(arguments(node))): held.node}
        rank = len(held.shape)
        axes = self.axes(node, rank)
        keep = arguments(node).get(self.keep, False)
        if keep:
            shape = tuple(1 if a in axes else s for a, s in enumerate(held.shape))
        else:
            shape = tuple(s for a, s in enumerate(held.shape) if a not in axes)
        if flow.facts is None:
            return rewriter.emit(node, changes, self._cut(node, held.places), shape)
        source = rewriter.facts.value(first_tensor(node))
        over = axes & set(source.axes)
        if not self.skips_zeros and any(held.shape[a] != source.shape[a] for a in over):
            raise rewriter.ragged(node)
        index = {a: i for a, i in source.index(held.places).items() if a not in over}
        if any(i.shape[a] > 1 for i in index.values() for a in over):
            raise rewriter.ragged(node)  # what it sums belongs to different results
        order = [a for a in range(rank) if keep or a not in axes]
        places = rewriter.facts.value(node).placed(
            {order.index(a): self._cut(node, i) for a, i in index.items()}
        )
        return rewriter.emit(node, changes, places, shape)
