"""One order of the channels of a tensor, in which its readers find their channels side by side.

A reader that wants some of the channels reads a slice where they are an interval, and needs a copy
where they are not. Whether one order serves all readers is the consecutive-ones problem, which
`consecutive` decides exactly with the PQ-tree of Booth & Lueker (1976). Where none does,
`choose_order` looks for the order that serves the readers of the greatest weight. UPSCALE (arXiv
2307.08771) reorders channels for the same end; here the choice is exact wherever the search ends
within its effort, and comes with a proven bound where it does not.

What decides is the number of readers. Channels that the same sets contain are one *atom*, so the
search costs the same for 64 channels as for 4096. And a family of sets falls apart: sets *overlap*
when they meet and neither contains the other, and a family has an order if and only if each
connected component of its overlaps has one, because the sets of another component see all of it as
one channel, or lie within one atom of it. So components are searched one by one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from narrows.errors import PassError
from narrows.ir.labels import Ints, is_count, some
from narrows.passes.forms.ordersearch import Search
from narrows.passes.forms.pqtree import PQTree

__all__ = ["EFFORT", "Order", "Reader", "choose_order", "consecutive", "runs_needed"]

# Looks at children of the tree (`PQTree.looks`).
EFFORT = 1_000_000

_WORD = 64  # sets that are told apart at once: the bits of a number
_ROWS = 256  # sets that are written out at once, a byte for each atom


@dataclass(frozen=True)
class Reader:
    """A consumer of some of the channels.

    Attributes:
        channels: What it reads, in any order; an array, or any collection of whole numbers.
        weight: What is saved when an order serves it: finite, not negative, in any unit.
        prefix: It wants its channels to come first, and not only side by side. A residual stream
            whose later readers want fewer channels shrinks by prefix.
    """

    channels: Collection[int] | Ints
    weight: float = 1.0
    prefix: bool = False


@dataclass(frozen=True)
class Order:
    """An order of channels, and how good it is.

    Attributes:
        channels: The order, a permutation of the universe.
        satisfied: Whether it serves each reader, in the order they were given.
        cost: The weight of the readers that it does not serve.
        bound: No order costs less; equal to `cost` when `exact`.
        exact: Whether the order is proven to cost the least.
        effort: What the search took, in the unit of `EFFORT`.
    """

    channels: tuple[int, ...]
    satisfied: tuple[bool, ...]
    cost: float
    bound: float
    exact: bool
    effort: int

    @property
    def gap(self) -> float:
        """The weight that a better order could still save, at most."""
        return self.cost - self.bound


def runs_needed(order: Sequence[int], channels: Iterable[int]) -> int:
    """Return the number of maximal runs that ``channels`` fall into: a read is so many slices.

    Raises:
        PassError: A channel is not in the order.
    """
    places = _Universe(order).places(channels)
    return bool(len(places)) + int((np.diff(places) > 1).sum())


def consecutive(universe: Sequence[int], sets: Iterable[Collection[int]]) -> tuple[int, ...] | None:
    """Return an order of ``universe`` in which every set is an interval, ``None`` if none is.

    Of all such orders it is the one nearest to ``universe`` by the sum of squared displacements, so
    ``universe`` itself where it will do. Where there is one, n channels and m sets take O(n m) in
    whole-array operations to group into at most 2 m + 1 atoms, and O(m min(n, m)) after that.

    Raises:
        PassError: A channel stands twice in ``universe``, or a set has one that is not in it.
    """
    known = _Universe(universe)
    order, _ = _arranged(np.arange(len(universe)), [known.places(channels) for channels in sets])
    return None if order is None else tuple(known.channels[order].tolist())


def choose_order(
    universe: Sequence[int] | Ints,
    readers: Iterable[Reader],
    *,
    together: Iterable[Collection[int]] = (),
    effort: int = EFFORT,
) -> Order:
    """Choose an order of ``universe`` that leaves the least weight of ``readers`` unserved.

    Exact when all readers can be served, and otherwise when branch and bound ends within the
    effort or a lower bound meets what was found: `Order.exact` says so. Otherwise the order is a
    heuristic's, and `Order.bound` a proof of how far from the best it is at most. Of the orders
    that serve the readers it settles on, it is the nearest to ``universe``; readers that
    ``universe`` serves are given up only for more weight. The same arguments give the same order
    on every machine.

    Args:
        universe: The channels, in the order they have now.
        readers: Those to serve.
        together: Sets that must be intervals, whatever it costs: the operands of a concat, the
            groups of a convolution. They may be nested.
        effort: Looks at the tree after which the search stops. What is done once in any case, with
            a few reductions per reader, is not cut short.

    Raises:
        PassError: No order keeps ``together``; a channel is twice in ``universe``, or one of a
            reader is not in it; or a weight is negative or not finite.
    """
    readers = tuple(readers)
    problem = _Problem(_Universe(universe), readers, together)
    bound, order = 0, problem.order(range(len(problem.sets)))
    if order is None:
        kept, bound = problem.solve(effort)
        order = problem.order(kept)
    if order is None:
        raise PassError("readers served component by component are not served together")
    satisfied = problem.served(order)
    lost = [reader.weight for reader, served in zip(readers, satisfied, strict=True) if not served]
    cost = math.fsum(lost)
    exact = problem.scaled(lost) <= bound
    return Order(
        channels=problem.channels(order),
        satisfied=satisfied,
        cost=cost,
        bound=cost if exact else bound / problem.scale,
        exact=exact,
        effort=problem.looks,
    )


class _Problem:
    """The sets that a choice is about, as ascending columns, and their weights as integers.

    Every float is a whole multiple of some power of two, so weights are scaled to integers without
    loss and a bound is a proof, not a rounding. A set that must be kept weighs more than all
    readers together: no best choice loses one, and the search need not tell them apart.

    When a reader wants a prefix, an artificial channel comes first, in column 0. That it stands at
    an end is a set too, of all the other channels; a prefix is then an interval that contains it.
    """

    def __init__(
        self,
        universe: _Universe,
        readers: tuple[Reader, ...],
        together: Iterable[Collection[int]],
    ) -> None:
        self.universe = universe
        self.scale = max((_ratio(reader)[1] for reader in readers), default=1)
        self.anchored = int(any(reader.prefix for reader in readers))
        self.width = len(universe.channels) + self.anchored

        must = [self._columns(channels) for channels in together]
        must += [self._columns(universe.channels)] if self.anchored else []
        sets = {columns.tobytes(): columns for columns in must if self._binds(columns)}
        self.musts = len(sets)
        self.wants = [self._columns(reader.channels, reader.prefix) for reader in readers]
        wanted: dict[bytes, int] = {}
        for reader, columns in zip(readers, self.wants, strict=True):
            key = columns.tobytes()
            if reader.weight and self._binds(columns) and (key not in sets or key in wanted):
                wanted[key] = wanted.get(key, 0) + self.scaled([reader.weight])
                sets[key] = columns
        self.sets = list(sets.values())
        every = 1 + sum(wanted.values())
        self.weights = [every] * self.musts + list(wanted.values())
        self.looks = 0

    def scaled(self, weights: Iterable[float]) -> int:
        """Return the sum of weights, in units of the scale."""
        ratios = (float(weight).as_integer_ratio() for weight in weights)
        return sum(above * (self.scale // below) for above, below in ratios)

    def channels(self, order: Ints) -> tuple[int, ...]:
        """Return the channels of columns in order."""
        return tuple(self.universe.channels[order[self.anchored :] - self.anchored].tolist())

    def order(self, kept: Iterable[int]) -> Ints | None:
        """Return the columns in the order nearest to theirs that makes the kept sets intervals.

        ``None`` when there is no such order.
        """
        # Far enough in front, the artificial channel turns the whole order its way round.
        places = np.arange(self.width)
        places[: self.anchored] = -(self.width**2)
        order, looks = _arranged(places, [self.sets[i] for i in kept])
        self.looks += looks
        return order

    def served(self, order: Ints) -> tuple[bool, ...]:
        """Return whether an order of the columns serves each reader."""
        sizes = np.array([len(columns) for columns in self.wants], dtype=np.int64)
        serves = np.ones(len(sizes), dtype=bool)
        reads = np.flatnonzero(sizes)
        if len(reads):
            place = np.empty(self.width, dtype=np.int64)
            place[order] = np.arange(self.width)
            found = place[np.concatenate(self.wants)]
            starts = np.cumsum(sizes[reads]) - sizes[reads]
            spans = np.maximum.reduceat(found, starts) - np.minimum.reduceat(found, starts)
            serves[reads] = spans < sizes[reads]
        return tuple(serves.tolist())

    def solve(self, effort: int) -> tuple[list[int], int]:
        """Return the sets to keep, and a lower bound of the weight that any choice loses."""
        masks, atom, first = _atoms(self.sets, self.width)
        possible = self._possible(masks, len(first))
        bound = sum(self.weights) - sum(self.weights[i] for i in possible)
        one = np.zeros(self.width, dtype=bool)  # a column of each atom
        one[first] = True
        atoms = [atom[columns[one[columns]]] for columns in self.sets]
        # What a small component leaves of its share goes to the larger ones.
        parts = sorted(_overlapping([atoms[i] for i in possible], len(first)), key=len)
        kept: list[int] = []
        for number, part in enumerate(parts):
            members = sorted((possible[i] for i in part), key=lambda i: (-self.weights[i], i))
            if len(members) < 3:  # two sets are never in conflict
                kept += members
                continue
            masks, _, own = _atoms([atoms[i] for i in members], len(first))
            search = Search(len(own), masks, [self.weights[i] for i in members])
            at_hand = (i < self.musts or _is_run(self.sets[i]) for i in members)
            served = [n for n, serves in enumerate(at_hand) if serves]
            share = max(0, effort - self.looks) // (len(parts) - number)
            chosen, least = search.best(served, share)
            kept += [members[n] for n in chosen]
            bound += least
            self.looks += search.looks
        return sorted(kept), bound

    def _possible(self, masks: Sequence[int], atoms: int) -> list[int]:
        """Return the sets that must be kept, and those that can be kept beside them."""
        tree = PQTree(atoms)
        if not tree.reduce_all(masks[: self.musts]):
            size = len(self.universe.channels)
            raise PassError(
                "the sets that must stay together cannot all be intervals of one order",
                why=f"{self.musts} sets over {size} channels overlap in conflict",
                hint="give blocks that are disjoint or nested, as those of a concat are",
            )
        root, possible = tree.root, list(range(self.musts))
        for i in range(self.musts, len(masks)):
            possible += [i] if tree.reduce(masks[i]) else []
            tree.root = root
        self.looks += tree.looks
        return possible

    def _columns(self, channels: Iterable[int] | Ints, prefix: bool = False) -> Ints:
        columns = self.universe.places(channels) + self.anchored
        return np.concatenate([[0], columns]) if prefix else columns

    def _binds(self, columns: Ints) -> bool:
        """Return whether a set is an interval in some orders only."""
        return 1 < len(columns) < self.width


class _Universe:
    """Channels to order, and where each of them stands.

    Attributes:
        channels: The channels.
    """

    def __init__(self, channels: Iterable[int] | Ints) -> None:
        self.channels = _numbers(channels)
        self._counts = is_count(self.channels)
        self._by_number = np.argsort(self.channels, kind="stable")
        self._ascending = self.channels[self._by_number]
        twice = self._by_number[1:][np.diff(self._ascending) == 0]
        if len(twice):
            raise PassError(
                f"channel {self.channels[min(twice)]} stands twice in the order",
                why="an order has each once",
            )

    def places(self, channels: Iterable[int] | Ints) -> Ints:
        """Return where some of the channels stand, ascending, each once."""
        places = numbers = _numbers(channels)
        size = len(self.channels)
        if self._counts:
            known = (numbers >= 0) & (numbers < size)
        else:
            at = np.searchsorted(self._ascending, numbers)
            known = np.append(self._ascending, 0)[at] == numbers
            known &= at < size
            places = np.append(self._by_number, 0)[at]
        if some(~known):
            raise PassError(
                f"channel {numbers[~known].min()} is not one of the {size} channels to order",
                hint="give readers and sets the channel numbers of the universe",
            )
        return np.unique(places) if some(places[1:] <= places[:-1]) else places


def _numbers(channels: Iterable[int] | Ints) -> Ints:
    if isinstance(channels, np.ndarray):
        return channels
    return np.fromiter(channels, dtype=np.int64)


def _ratio(reader: Reader) -> tuple[int, int]:
    """Return a reader's weight as a fraction, once it is known to be one."""
    if not (math.isfinite(reader.weight) and reader.weight >= 0):
        raise PassError(
            f"the weight {reader.weight} of a reader is not a finite number from zero up",
            where=f"the reader of {len(reader.channels)} channels",
        )
    return float(reader.weight).as_integer_ratio()


def _is_run(places: Ints) -> bool:
    """Return whether ascending places have no gap."""
    return len(places) == 0 or bool(places[-1] - places[0] == len(places) - 1)


def _atoms(sets: Sequence[Ints], width: int) -> tuple[list[int], Ints, Ints]:
    """Group columns that the same sets contain.

    Args:
        sets: Columns, each set's ascending.
        width: The number of columns.

    Returns:
        Each set as the bits of an integer, bit i for atom i; the atom of each column; and the
        first column of each atom, ascending.
    """
    atom, count = np.zeros(width, dtype=np.int64), 1
    for some_sets in _by(_WORD, sets):
        inside, low = _written(some_sets)
        bits = np.zeros((inside.shape[1], _WORD // 8), dtype=np.uint8)
        bits[:, : -(-len(some_sets) // 8)] = np.packbits(inside, axis=0).T
        words = bits.view(np.uint64)[:, 0]
        touched = np.flatnonzero(words)
        parts, number = np.unique(words[touched], return_inverse=True)
        touched += low
        if count > 1:  # some columns are told apart already
            number += atom[touched] * len(parts)
            parts, number = np.unique(number, return_inverse=True)
        atom[touched] = count + number
        count += len(parts)
    _, first, number = np.unique(atom, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    atom, first = rank[number], np.sort(first)
    masks: list[int] = []
    for some_sets in _by(_ROWS, sets):
        inside, low = _written([atom[columns] for columns in some_sets])
        bits = np.packbits(inside, axis=1, bitorder="little")
        masks += [int.from_bytes(row.tobytes(), "little") << low for row in bits]
    return masks, atom, first


def _written(sets: Sequence[Ints]) -> tuple[np.ndarray, int]:
    """Return sets as booleans, ``[sets, numbers]``, and the number that the first column is for."""
    numbers = np.concatenate(sets)
    low, high = (int(numbers.min()), int(numbers.max())) if len(numbers) else (0, 0)
    inside = np.zeros((len(sets), high + 1 - low), dtype=bool)
    inside[np.repeat(np.arange(len(sets)), [len(own) for own in sets]), numbers - low] = True
    return inside, low


def _by(count: int, sets: Sequence[Ints]) -> Iterator[Sequence[Ints]]:
    return (sets[start : start + count] for start in range(0, len(sets), count))


def _arranged(places: Ints, sets: Sequence[Ints]) -> tuple[Ints | None, int]:
    """Put columns in an order in which every set is an interval, as near to theirs as can be.

    Args:
        places: Where each column stands now, ascending.
        sets: Columns, each set's ascending.

    Returns:
        The columns in order, or ``None`` if there is none; and the looks it took.
    """
    if not sets or not len(places):
        return np.arange(len(places)), 0
    masks, atom, first = _atoms(sets, len(places))
    tree = PQTree(len(first))
    if not tree.reduce_all(masks):
        return None, tree.looks
    by_atom = np.argsort(atom, kind="stable")
    ends = np.cumsum(np.bincount(atom))[:-1]
    own = [part.tolist() for part in np.split(places[by_atom], ends)]
    nearest = tree.nearest_order(own, set(masks))
    return np.searchsorted(places, nearest), tree.looks


def _overlapping(sets: Sequence[Ints], width: int) -> list[list[int]]:
    """Return the connected components of the overlaps of some sets of columns.

    Most sets share no column with most others, so each is looked at beside those that do; and of a
    column only the sets that have no component yet are kept.
    """
    sizes = np.array([len(columns) for columns in sets])
    columns = np.concatenate(sets)
    by_column = np.argsort(columns, kind="stable")
    ends = np.cumsum(np.bincount(columns, minlength=width))[:-1]
    holders = np.split(np.repeat(np.arange(len(sets)), sizes)[by_column], ends)
    components: list[list[int]] = []
    left = np.ones(len(sets), dtype=bool)
    for start in range(len(sets)):
        if not left[start]:
            continue
        left[start] = False
        component = [start]
        for member in component:
            met = []
            for column in sets[member].tolist():
                if len(holders[column]):
                    holders[column] = holders[column][left[holders[column]]]
                    met.append(holders[column])
            if not met:
                continue
            others, common = np.unique(np.concatenate(met), return_counts=True)
            near = others[common < np.minimum(sizes[member], sizes[others])]
            left[near] = False
            component.extend(near.tolist())
        components.append(component)
    return components
