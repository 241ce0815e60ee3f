"""Widths of the most worth within a number of seconds.

What a coupling keeps is worth the logarithm of the share of its values, times their sum. Its first
channels are worth what their values say, its last ones ever more: the sum of scores alone would
squeeze single couplings to next to nothing, and the network with them. Where values are measured
losses, which add up, their sum is what it is worth, and a branch that another path goes around may
lose everything (`narrows.ir.structure.branches`).

Time is a staircase in every width, so widths move between *stops*, the multiples of the target's
step. `WidthSearch.within` goes down from full widths, each time by the move that loses the least
worth per second saved, looking several stops ahead; then it goes up again where the seconds that
are left allow it. Only couplings that share an operator with the one that moved are looked at
again. Nothing depends on the order of a set or on time: the same input gives the same widths.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from narrows.passes.plans.latency_model import LatencyModel, Widths

STOPS = 64  # at most, of one coupling
AHEAD = 8  # stops that are looked at beyond the present one
GAIN = 1e-9  # seconds; less saves nothing
TINY = 1e-12  # the share that nothing counts as


@dataclass(frozen=True)
class Choice:
    """A coupling of which channels may go.

    Attributes:
        coupling: Its number in the model.
        values: The worth of each channel, at least 0.
        least: How many channels must stay.
        additive: Whether the worth of several channels is the sum of theirs.
        whole: Whether all may go where the search's ``open_without`` says so.
    """

    coupling: int
    values: np.ndarray
    least: int
    additive: bool = False
    whole: bool = False

    def kept(self, width: int) -> np.ndarray:
        """Return the ``width`` channels that are worth the most, sorted."""
        return np.sort(np.argsort(-self.values, kind="stable")[:width])


def sum_of(values: np.ndarray) -> np.ndarray:
    """Return what the highest 0, 1, 2 ... values are worth, at most 0: less what is lost."""
    return np.concatenate([[0.0], np.cumsum(-np.sort(-values))]) - values.sum()


def worth_of(values: np.ndarray) -> np.ndarray:
    """Return what the highest 0, 1, 2 ... values are worth: ``sum * log(kept / sum)``."""
    kept = np.concatenate([[0.0], np.cumsum(-np.sort(-values))])
    if kept[-1] <= 0:
        return kept
    return kept[-1] * np.log(np.maximum(kept / kept[-1], TINY))


# Per second, the worth lost (down) or won (up), and the width to go to; the lowest key goes first.
Move = tuple[float, int]


class WidthSearch:
    """Looks for widths; see the module."""

    def __init__(
        self,
        model: LatencyModel,
        choices: Sequence[Choice],
        open_without: Callable[[frozenset[int]], bool] = lambda gone: not gone,
    ) -> None:
        """Prepare a search.

        Args:
            model: The seconds.
            choices: What may go.
            open_without: Whether the network goes on without some couplings of the model.
        """
        self.model, self.choices, self.open_without = model, choices, open_without
        self.worth = [(sum_of if c.additive else worth_of)(c.values) for c in choices]
        self.stops = [self._stops(c) for c in choices]
        self.near = self._neighbours()

    def _stops(self, choice: Choice) -> list[int]:
        """Return the widths that a coupling may have, ascending."""
        full, step = len(choice.values), self.model.steps[choice.coupling]
        step *= -(-full // (step * STOPS))
        inside = [w for w in range(step, full, step) if w >= choice.least]
        least = self.model.costs.least_step
        small = [w for w in range(least, min(step, full), least) if w >= choice.least]
        none = [0] if choice.whole else []
        return sorted({choice.least, *none, *small, *inside, full})

    def _neighbours(self) -> list[list[int]]:
        """Return per choice the choices that share an operator with it, itself included."""
        own = [[number for number, *_ in self.model.nodes[c.coupling]] for c in self.choices]
        users: dict[int, list[int]] = {}
        for i, numbers in enumerate(own):
            for number in numbers:
                users.setdefault(number, []).append(i)
        return [sorted({i, *(j for n in own[i] for j in users[n])}) for i in range(len(own))]

    # ------------------------------------------------------------------ the search

    def within(self, seconds: float) -> list[int]:
        """Return widths, one per coupling of the model, that cost at most so many seconds.

        Where that cannot be, they are the cheapest that were found.
        """
        found = self._descend(seconds)
        self._ascend(found, seconds)
        return found.widths

    def value(self, widths: Sequence[int]) -> float:
        """Return the worth of what is kept, at most 0."""
        pairs = zip(self.worth, self.choices, strict=True)
        return float(sum(w[widths[c.coupling]] for w, c in pairs))

    def _descend(self, seconds: float) -> Widths:
        """Return widths that were made smaller until they cost at most ``seconds``.

        A move that saves more than is still needed would end the search, but two smaller ones may
        lose less. So it is kept in mind as an end, and the search goes on without it, until that
        has lost as much as the best end.
        """
        now, best, end = self.model.full(), -math.inf, None
        latest = [self._down(i, now) for i in range(len(self.choices))]
        queue = _queue(latest)
        while queue and now.total > seconds and self.value(now.widths) > best:
            move, i = heapq.heappop(queue)
            if move is not latest[i]:
                continue
            if not self._is_open(i, move[1], now):  # another branch has gone since
                latest[i] = found = self._down(i, now)
                if found is not None:
                    heapq.heappush(queue, (found, i))
                continue
            if now.total + self._change(i, move[1], now) > seconds:
                self._go(i, move[1], now)
                moved, most = self.near[i], math.inf
            else:
                ended = self._ended(i, move[1], now, seconds)
                value = self.value(ended.widths)
                if value > best:
                    best, end = value, ended
                moved, most = [i], now.total - seconds
            for j in moved:
                found = latest[j] = self._down(j, now, most)
                if found is not None:
                    heapq.heappush(queue, (found, j))
        return now if end is None else end

    def _ascend(self, now: Widths, seconds: float) -> None:
        """Make widths larger as far as ``seconds`` allow it."""
        latest = [self._up(i, now, seconds) for i in range(len(self.choices))]
        queue = _queue(latest)
        while queue:
            move, i = heapq.heappop(queue)
            if move is not latest[i]:
                continue
            moved = [i]  # where the move no longer fits, a smaller one may
            if now.total + self._change(i, move[1], now) <= seconds:
                self._go(i, move[1], now)
                moved = self.near[i]
            for j in moved:
                found = latest[j] = self._up(j, now, seconds)
                if found is not None:
                    heapq.heappush(queue, (found, j))

    # ------------------------------------------------------------------ moves

    def _down(self, i: int, now: Widths, most: float = math.inf) -> Move | None:
        """Return the smaller width that loses the least worth per second; ``None`` if none.

        It saves less than ``most`` seconds.
        """
        wide = now.widths[self.choices[i].coupling]
        below = self.stops[i][: bisect_left(self.stops[i], wide)]
        moves = []
        for width in {*below[-AHEAD:], *below[:2]}:
            if not self._is_open(i, width, now):
                continue
            saved = -self._change(i, width, now)
            if GAIN < saved < most:
                moves.append(((self.worth[i][wide] - self.worth[i][width]) / saved, width))
        return min(moves, default=None)

    def _ended(self, i: int, width: int, now: Widths, seconds: float) -> Widths:
        """Return widths with one choice as wide as ``seconds`` allow: ``width``, if not more."""
        wide = now.widths[self.choices[i].coupling]
        above = [w for w in self.stops[i] if width < w < wide]
        fitting = (w for w in reversed(above) if now.total + self._change(i, w, now) <= seconds)
        ended = now.copy()
        self._go(i, next(fitting, width), ended)
        return ended

    def _up(self, i: int, now: Widths, seconds: float) -> Move | None:
        """Return the larger width of the most worth per second within ``seconds``, or ``None``."""
        narrow = now.widths[self.choices[i].coupling]
        above = self.stops[i][bisect_right(self.stops[i], narrow) :]
        moves = []
        for width in above[:AHEAD]:
            cost = self._change(i, width, now)
            won = self.worth[i][width] - self.worth[i][narrow]
            if won > 0 and now.total + cost <= seconds:
                moves.append((-won / max(cost, GAIN), -width))
        best = min(moves, default=None)  # of equals the wider one
        return None if best is None else (best[0], -best[1])

    def _is_open(self, i: int, width: int, now: Widths) -> bool:
        """Whether the network goes on with a choice that wide."""
        if width:
            return True
        gone = {c.coupling for c in self.choices if not now.widths[c.coupling]}
        return self.open_without(frozenset(gone | {self.choices[i].coupling}))

    def _change(self, i: int, width: int, now: Widths) -> float:
        return self.model.change(now, self.choices[i].coupling, width)

    def _go(self, i: int, width: int, now: Widths) -> None:
        self.model.go(now, self.choices[i].coupling, width)


def _queue(moves: Sequence[Move | None]) -> list[tuple[Move, int]]:
    """Return the moves that there are with their numbers, as a heap."""
    queue = [(move, i) for i, move in enumerate(moves) if move is not None]
    heapq.heapify(queue)
    return queue


__all__ = ["Choice", "WidthSearch"]
