"""`Reads`: what each layer reads, channel by channel, and what dies with the last reader.

A *read* is what a layer can be made to do without: one channel of its input. Where one channel of a
coupling is several of the layer's (the places of a flattened map, the channels of a head), the read
is all of them. A *maker* is the other side: the part of a layer that makes one channel. When nobody
reads a channel any more, its makers are gone, and what they cost is saved, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import fx

from narrows.ir.labels import Bools, Ints
from narrows.ir.program import Note, Program
from narrows.ir.structure import Structure, structure_of
from narrows.ir.workload import macs, works_of
from narrows.passes.choosing.products import Product
from narrows.passes.plans.plan import ChannelPlan

Floats = np.ndarray


@dataclass(frozen=True, eq=False)
class Reads:
    """All reads of a program, and who makes what they read.

    Attributes:
        products: The layers, in execution order.
        layer: Per read its layer, by number.
        tie: Per read its coupling, by number; ``channel``: the coupling's channel.
        columns: Per read the layer's input channels that it is.
        free: Per read whether the layer may do without it.
        maker_layer: Per maker its layer, by number.
        rows: Per maker the layer's output channels that it is.
        maker_stays: Per maker whether it is there whatever goes: an output, a barrier, and what is
            read by no layer.
        pairs: Which makers a read needs: reads and makers, ``[2, pairs]``.
        macs: Per layer the multiply-accumulates of an input channel for an output channel.
        notes: Which layers keep all they read, and why.
    """

    products: tuple[Product, ...]
    layer: Ints
    tie: Ints
    channel: Ints
    columns: tuple[Ints, ...]
    free: Bools
    maker_layer: Ints
    rows: tuple[Ints, ...]
    maker_stays: Bools
    pairs: Ints
    macs: Floats
    notes: tuple[Note, ...] = ()

    @cached_property
    def size(self) -> Ints:
        """Per read how many input channels of its layer it is."""
        return np.array([len(c) for c in self.columns], dtype=np.int64)

    @cached_property
    def maker_rows(self) -> Ints:
        """Per maker how many output channels of its layer it is."""
        return np.array([len(r) for r in self.rows], dtype=np.int64)

    @cached_property
    def of_layer(self) -> tuple[Ints, ...]:
        """Per layer its reads."""
        return tuple(np.flatnonzero(self.layer == j) for j in range(len(self.products)))

    @cached_property
    def place(self) -> Ints:
        """Per read its number among the reads of its layer."""
        result = np.zeros(len(self.layer), dtype=np.int64)
        for own in self.of_layer:
            result[own] = np.arange(len(own))
        return result

    def all(self) -> Bools:
        """Return the choice to keep everything."""
        return np.ones(len(self.layer), dtype=bool)

    def left_by(self, plan: ChannelPlan) -> Bools:
        """Return which reads a plan leaves.

        A read is gone whose columns are all masked, or whose makers all are.
        """
        result = np.array([
            _any_of(plan.inputs, self.products[j], columns)
            for j, columns in zip(self.layer, self.columns, strict=True)
        ], dtype=bool)  # fmt: skip
        made = np.array([
            _any_of(plan.outputs, self.products[j], rows)
            for j, rows in zip(self.maker_layer, self.rows, strict=True)
        ], dtype=bool)  # fmt: skip
        reads, makers = self.pairs
        for read in np.setdiff1d(reads, reads[made[makers]]):
            result[read] = False
        return result

    # ------------------------------------------------------------------ costs

    @cached_property
    def parameters(self) -> Floats:
        """Per layer the weights of an input channel for an output channel.

        A weight that several layers share counts once, a part of it for each.
        """
        uses = Counter(p.layer.weight for p in self.products)
        each = [p.taps / p.groups / uses[p.layer.weight] for p in self.products]
        return np.array(each, dtype=np.float64)

    @cached_property
    def _fixed(self) -> Floats:
        """Per layer the inputs of all that it makes where that does not change, else 0."""
        return np.array([p.groups if p.depthwise else 0 for p in self.products], dtype=np.float64)

    def readers(self, there: Bools) -> Ints:
        """Return per maker how many reads of it are there."""
        count = np.zeros(len(self.maker_layer), dtype=np.int64)
        reads, makers = self.pairs
        np.add.at(count, makers, there[reads])
        return count

    def widths(self, there: Bools) -> tuple[Floats, Floats]:
        """Return how many channels every layer reads, and how many it makes."""
        n = len(self.products)
        live = (self.readers(there) > 0) | self.maker_stays
        read = np.bincount(self.layer[there], self.size[there], n)
        made = np.bincount(self.maker_layer[live], self.maker_rows[live], n)
        return np.where(self._fixed > 0, self._fixed, read), made

    def cost(self, there: Bools, each: Floats) -> float:
        """Return what all layers cost.

        Args:
            there: Per read whether it is there.
            each: Per layer the cost of one input channel for one output channel: `macs`.
        """
        read, made = self.widths(there)
        return float((read * made * each).sum())

    def whole(self, each: Floats) -> float:
        """Return what all layers cost as they are, what nobody reads included."""
        full = [p.layer.inputs * p.layer.outputs for p in self.products]
        return float((np.array(full) * each).sum())

    def saved(self, there: Bools, each: Floats) -> Floats:
        """Return per read what its removal saves.

        It is the layer's own share, and all of what makes the channel where no one else reads it.
        """
        own, makers = self._shares(there, each)
        reads, made = self.pairs
        last = there[reads] & (self.readers(there)[made] == 1) & ~self.maker_stays[made]
        result = own.copy()
        np.add.at(result, reads[last], makers[made[last]])
        return result

    def saved_together(self, there: Bools, each: Floats, group: Ints) -> Floats:
        """Return what the removal of every group of reads saves, all readers of a channel in one.

        Args:
            there: Per read whether it is there.
            each: Per layer the cost of one input channel for one output channel.
            group: Per read its group.
        """
        own, makers = self._shares(there, each)
        known = there & (group >= 0)
        result = np.bincount(group[known], own[known], int(group.max(initial=-1)) + 1)
        reads, made = self.pairs
        whose = np.full(len(self.maker_layer), -1, dtype=np.int64)
        whose[made] = group[reads]
        dies = (whose >= 0) & ~self.maker_stays & (self.readers(there) > 0)
        np.add.at(result, whose[dies], makers[dies])
        return result

    def _shares(self, there: Bools, each: Floats) -> tuple[Floats, Floats]:
        """Return the cost of every read for its layer, and of every maker for its own."""
        read, made = self.widths(there)
        own = self.size * (made * each)[self.layer]
        return own, self.maker_rows * (read * each)[self.maker_layer]


def reads_of(program: Program) -> Reads:
    """Return the reads of a program, found once."""
    return program.memo("reads", lambda: _Found(program).reads())


class _Found:
    """Finds the reads and the makers of a program."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.structure: Structure = structure_of(program)
        order = {node: i for i, node in enumerate(program.graph.nodes)}
        layers = sorted(
            (layer for found in self.structure.layers.values() for layer in found),
            key=lambda layer: order[layer.node],
        )
        self.products = tuple(p for p in map(Product.of, layers) if p is not None)
        self.number = {p.layer.node: i for i, p in enumerate(self.products)}
        self.along: dict[tuple[str, int, str], list[tuple[int, Ints]]] = {}
        for tie, coupling in enumerate(self.structure.ties):
            # A weight that is used twice is a member twice.
            members = {(m.weight, m.axis, m.role): m.positions for m in coupling.members}
            for key, positions in members.items():
                self.along.setdefault(key, []).append((tie, positions))

    def reads(self) -> Reads:
        """Return what there is."""
        read = [(j, *found) for j, p in enumerate(self.products) for found in self._side(p, "in")]
        made = [(j, *found) for j, p in enumerate(self.products) for found in self._side(p, "out")]
        at = {(j, tie, channel): i for i, (j, tie, channel, _) in enumerate(read)}
        readers = [self._readers(p.layer.node) for p in self.products]
        pairs = [
            (at[j, tie, channel], i)
            for i, (number, tie, channel, _) in enumerate(made)
            for j in readers[number]
            if (j, tie, channel) in at
        ]
        free = [self._is_free(self.products[j], tie) for j, tie, _, _ in read]
        # What no layer reads may be read by something else: queries and keys are by attention.
        known = {i for _, i in pairs}
        stays = [
            bool(self.structure.ties[tie].barrier) or i not in known
            for i, (_, tie, _, _) in enumerate(made)
        ]
        works = works_of(self.program)
        full = [(p.layer.node, p.layer.inputs * p.layer.outputs) for p in self.products]
        return Reads(
            products=self.products,
            layer=_ints(r[0] for r in read),
            tie=_ints(r[1] for r in read),
            channel=_ints(r[2] for r in read),
            columns=tuple(r[3] for r in read),
            free=np.array(free, dtype=bool),
            maker_layer=_ints(m[0] for m in made),
            rows=tuple(m[3] for m in made),
            maker_stays=np.array(stays, dtype=bool),
            pairs=np.array(pairs, dtype=np.int64).reshape(-1, 2).T,
            macs=np.array([macs(n, works) / n_full for n, n_full in full]),
            notes=tuple(self._notes()),
        )

    def _side(self, product: Product, role: str) -> Iterator[tuple[int, int, Ints]]:
        """Yield the couplings' channels along a side of a layer, each with the layer's channels."""
        if role == "in" and product.depthwise:
            return
        layer, side = product.layer, "inputs" if role == "in" else "outputs"
        for tie, positions in self.along.get((layer.weight, layer.axis(side), role), ()):
            for channel, columns in enumerate(layer.channels(side, positions)):
                yield tie, channel, columns

    def _is_free(self, product: Product, tie: int) -> bool:
        """Whether it saves anything that a layer does without channels of a coupling.

        Where one has to stay whole, all read all of it.
        """
        return not self._is_shared(product) and not self.structure.ties[tie].barrier

    def _is_shared(self, product: Product) -> bool:
        return len(self.program.users_of(product.layer.weight)) > 1

    def _notes(self) -> Iterator[Note]:
        for product in self.products:
            if self._is_shared(product):
                text = f"{product.layer.weight!r} is used in several places: it keeps all it reads"
                yield Note(product.layer.node.name, "shared weight", text)

    def _readers(self, node: fx.Node) -> set[int]:
        """Return the layers that a tensor reaches without passing through another one's sum."""
        found: set[int] = set()
        seen, todo = {node}, [node]
        while todo:
            for user in todo.pop().users:
                number = self.number.get(user)
                if number is not None and not self.products[number].depthwise:
                    found.add(number)
                elif user not in seen:
                    seen.add(user)
                    todo.append(user)
        return found


def _any_of(keeps: Mapping[str, tuple[int, ...]], product: Product, channels: Ints) -> bool:
    """Whether some channels of a layer, or one of them, are kept."""
    keep = keeps.get(product.layer.weight)
    return keep is None or bool(np.isin(channels, keep).any())


def _ints(values: Iterable[int]) -> Ints:
    return np.array(list(values), dtype=np.int64)


__all__ = ["Floats", "Reads", "reads_of"]
