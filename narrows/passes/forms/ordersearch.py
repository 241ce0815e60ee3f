"""Which sets to give up so that the rest can be intervals of one order, for the least weight.

What stands in the way is a *conflict*: sets of which not all can be intervals. To keep a family is
to give up at least one set of each conflict, so a choice is a hitting set and its bounds are those
of hitting sets: conflicts that each set pays for at most once, up to its weight. Conflicts of
three sets are all found at once. Any three of many unrelated sets are in conflict, so the bound is
not drawn from triples but from *cliques*: of sets of which every three are in conflict, all but two
go. Larger conflicts, those of Tucker, "A structure theorem for the consecutive 1's property"
(1972), are found through the tree, as far as the effort goes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from narrows.passes.forms.pqtree import Node, PQTree

__all__ = ["Search", "conflicting_triples"]

_TRIPLES = 64  # sets among which conflicts of three are looked for: a table of their third power
_TABLE = 2  # entries of that table for the price of a look
_EXCHANGES = 3  # the local exchange gets one part in so many of the effort


class _Conflict(NamedTuple):
    """A proof that some weight is lost: of ``sets`` (bits), ``need`` go, at ``price`` each."""

    sets: int
    need: int
    price: int


class _State(NamedTuple):
    """A node of the search: what is kept, what is lost, and what is still open."""

    root: Node
    kept: tuple[int, ...]
    lost: int
    weight: int
    open: tuple[int, ...]


class Search:
    """Finds the sets to keep.

    Args:
        atoms: The number of elements that the sets are over.
        masks: The sets, bit i for element i.
        weights: What each is worth, not ascending.
    """

    def __init__(self, atoms: int, masks: Sequence[int], weights: Sequence[int]) -> None:
        self.atoms, self.masks, self.weights = atoms, masks, weights
        self._tree = PQTree(atoms)
        self._start = self._tree.root
        self._limit = 0

    @property
    def looks(self) -> int:
        """What the search took so far: see `PQTree.looks`."""
        return self._tree.looks

    def best(self, served: Sequence[int], effort: int) -> tuple[list[int], int]:
        """Return the sets to keep, and a lower bound of the weight that any choice loses.

        The bound is the weight lost when the choice is proven best.

        Args:
            served: Sets that an order at hand serves: they go only for more weight.
            effort: Looks after which the search stops.
        """
        everything = range(len(self.masks))
        lost, kept = self._greedy([*served, *everything])
        if not lost:
            return kept, 0
        self._limit = effort
        conflicts, ranking = self._conflicts()
        bound = sum(conflict.need * conflict.price for conflict in conflicts)
        for order in (everything, ranking):
            if lost > bound and self.looks < effort:
                lost, kept = min((lost, kept), self._greedy(order), key=lambda found: found[0])
        self._limit = self.looks + (effort - self.looks) // _EXCHANGES
        lost, kept = self._exchange(lost, kept, bound)
        self._limit = effort
        if lost > bound:
            lost, kept, ended = self._branch_and_bound(lost, kept, conflicts)
            bound = lost if ended else bound
        return kept, bound

    def _greedy(self, order: Iterable[int]) -> tuple[int, list[int]]:
        """Keep each set in turn that can be kept; return the weight lost, and the sets kept."""
        self._tree.root = self._start
        lost, kept = 0, []
        for i in dict.fromkeys(order):
            if self._tree.reduce(self.masks[i]):
                kept.append(i)
            else:
                lost += self.weights[i]
        return lost, kept

    def _exchange(self, lost: int, kept: list[int], bound: int) -> tuple[int, list[int]]:
        """Take a lost set in first, then what can be kept beside it, as long as that gains."""
        gained = True
        while gained:
            gained = False
            for i in sorted(set(range(len(self.masks))) - set(kept)):
                if lost <= bound or self.looks >= self._limit:
                    return lost, kept
                trial = self._greedy([i, *sorted(kept), *range(len(self.masks))])
                if trial[0] < lost:
                    (lost, kept), gained = trial, True
                    break
        return lost, kept

    def _branch_and_bound(
        self, lost: int, kept: list[int], conflicts: Sequence[_Conflict]
    ) -> tuple[int, list[int], bool]:
        """Search all choices that could beat one at hand; say whether the search came to its end.

        The heaviest open set is kept first, then given up. A set that does not fit beside those
        kept is lost at once, and a branch whose conflicts cost too much is left.
        """
        stack = [_State(self._start, (), 0, 0, tuple(range(len(self.masks))))]
        while stack:
            if self.looks >= self._limit:
                return lost, kept, False
            state = stack.pop()
            still = sum(
                price * max(0, need - (sets & state.lost).bit_count())
                for sets, need, price in conflicts
            )
            self._tree.looks += len(conflicts)
            if state.weight + still >= lost:
                continue
            if not state.open:
                lost, kept = state.weight, list(state.kept)
                continue
            first, *rest = state.open
            weight = state.weight + self.weights[first]
            stack.append(state._replace(lost=state.lost | 1 << first, weight=weight, open=(*rest,)))
            stack.append(self._beside(state, first, rest))
        return lost, kept, True

    def _beside(self, state: _State, first: int, rest: Sequence[int]) -> _State:
        """Return the state that keeps an open set and loses those that no longer fit."""
        self._tree.root = state.root
        self._tree.reduce(self.masks[first])
        root, lost, weight, fitting = self._tree.root, state.lost, state.weight, []
        for i in rest:
            if self._tree.reduce(self.masks[i]):
                fitting.append(i)
            else:
                lost, weight = lost | 1 << i, weight + self.weights[i]
            self._tree.root = root
        return _State(root, (*state.kept, first), lost, weight, tuple(fitting))

    def _conflicts(self) -> tuple[list[_Conflict], list[int]]:
        """Find conflicts, each charged to its sets out of what is left of their weights.

        Returns:
            The conflicts; and the sets, those first that it would be dearest to give up: what has
            weight left, then what was used up last.
        """
        left = list(self.weights)
        used: list[int] = []
        found: list[_Conflict] = []

        def charge(sets: list[int], need: int) -> None:
            price = min(left[i] for i in sets)
            found.append(_Conflict(sum(1 << i for i in sets), need, price))
            for i in sets:
                left[i] -= price
                if not left[i]:
                    used.append(i)

        # From the lightest on: the heaviest may be such as must not go, and pay for nothing.
        for end in range(len(left), 0, -_TRIPLES):
            tried = range(max(0, end - _TRIPLES), end)
            if self.looks >= self._limit:
                break
            self._tree.looks += len(tried) ** 3 // _TABLE
            triples = _Triples([self.masks[i] for i in tried], self.atoms)
            triples.drop([n for n, i in enumerate(tried) if not left[i]])
            while clique := triples.clique():
                charge([tried[n] for n in clique], len(clique) - 2)
                triples.drop([n for n in clique if not left[tried[n]]])
        while self.looks < self._limit and (sets := self._minimal(left)):
            charge(sets, 1)
        return found, [i for i, weight in enumerate(left) if weight] + used[::-1]

    def _minimal(self, left: Sequence[int]) -> list[int]:
        """Return a minimal conflict among the sets with weight left; empty if there is none.

        The set at which a family first fails belongs to a conflict in that family. With it in
        front the family fails earlier, at the next one of the conflict, until those in front fail
        alone.
        """
        family = [i for i, weight in enumerate(left) if weight]
        conflict: list[int] = []
        while True:
            self._tree.root = self._start
            if not self._tree.reduce_all(self.masks[i] for i in conflict):
                return sorted(conflict)
            fails = next(
                (n for n, i in enumerate(family) if not self._tree.reduce(self.masks[i])), None
            )
            if fails is None:
                return []
            conflict.append(family[fails])
            family = family[:fails]


def conflicting_triples(masks: Sequence[int], atoms: int) -> np.ndarray:
    """Return which three sets cannot all be intervals, ``[sets, sets, sets]``, booleans.

    There are two ways (of Tucker's matrices, those with three rows): each two share an element that
    the third lacks; or all three share one, and each has one of its own.
    """
    size = -(-atoms // 8)
    packed = np.array([list(mask.to_bytes(size, "little")) for mask in masks], dtype=np.uint8)
    inside = np.unpackbits(packed, axis=1, bitorder="little", count=atoms)
    shared, paired, single = np.zeros((3, *[len(masks)] * 3), dtype=bool)
    for i, row in enumerate(inside):
        # Counts of elements of set i: in both, in one but not the other, in none of two others.
        here = inside[:, row > 0].astype(np.float32)
        shared[i] = here @ here.T > 0
        paired[i] = here @ (1 - here).T > 0
        single[i] = (1 - here) @ (1 - here).T > 0
    cycle = paired & paired.transpose(2, 0, 1) & paired.transpose(0, 2, 1)
    star = shared & single & single.transpose(1, 0, 2) & single.transpose(1, 2, 0)
    return cycle | star


class _Triples:
    """Which three of some sets are in conflict, as sets are used up.

    Args:
        masks: The sets, the heaviest first, at most 64 of them; bit i for element i.
        atoms: The number of elements.
    """

    def __init__(self, masks: Sequence[int], atoms: int) -> None:
        conflicts = conflicting_triples(masks, atoms)
        # How many sets are in conflict with each two; none with one that is used up.
        self._degrees = conflicts.sum(axis=2, dtype=np.int16)
        self._conflicts = conflicts
        packed = np.zeros((*conflicts.shape[:2], _TRIPLES // 8), dtype=np.uint8)
        packed[..., : -(-len(masks) // 8)] = np.packbits(conflicts, axis=2, bitorder="little")
        # Per two sets those in conflict with both, as bits.
        self._beside = packed.view("<u8")[..., 0].tolist()
        self._live = (1 << len(masks)) - 1

    def drop(self, sets: Sequence[int]) -> None:
        """Look at some sets no more."""
        for i in sets:
            self._live &= ~(1 << i)
            self._degrees -= self._conflicts[:, :, i]
        self._degrees[sets] = self._degrees[:, sets] = 0

    def clique(self) -> list[int]:
        """Return the first sets found of which every three are in conflict, or nothing."""
        first, second = divmod(int(self._degrees.argmax()), len(self._degrees))
        if self._degrees[first, second] <= 0:
            return []
        clique = [first, second]
        fitting = self._beside[first][second] & self._live
        while fitting:
            member = (fitting & -fitting).bit_length() - 1  # the heaviest, as sets come by weight
            for other in clique:
                fitting &= self._beside[other][member]
            clique.append(member)
        return clique
