"""Timing candidates: a few schedules per kernel, each built and run in a guarded child.

What is found is kept per kernel in the user's cache, so that it serves other models too, and so
that a run that was interrupted goes on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tvm
from tvm import tirx

from narrows.backends.tvm import timing
from narrows.backends.tvm.cache import Kept
from narrows.backends.tvm.devices import Machine
from narrows.backends.tvm.schedules import Choice, scheduled

# What a schedule does with a choice changed when this number did: old times are not used then.
GENERATION = 2

Found = dict[str, tuple[tirx.PrimFunc, list[Choice]]]


class Tuner:
    """Chooses among the candidates of kernels by their times.

    Attributes:
        best: The choice per kernel that was timed, now or before.
        times: The CPU seconds of the best choice.
    """

    def __init__(
        self,
        target: tvm.target.Target,
        machine: Machine,
        options: Mapping[str, Any],
        tell: Callable[[str], None],
    ) -> None:
        self.target, self.machine, self.tell = target, machine, tell
        self.seconds = float(options.get("tune", 0))
        self.kept = Kept(Path(options["cache"]) if options.get("cache") else None)
        # A search asks for all times: it spends its own by them.
        self.fewest = 1 if options.get("search", "rules") != "rules" else 2
        self.best: dict[str, Choice] = {}
        self.times: dict[str, float] = {}

    def tune(self, kernels: Found) -> dict[str, Choice]:
        """Return the best choice per kernel, of those that were timed.

        Args:
            kernels: Per name the kernel and its candidates.
        """
        if not self.seconds:
            return {}
        end = time.monotonic() + self.seconds
        open_ = {}
        for name, (function, found) in kernels.items():
            if len(found) < self.fewest:
                continue
            times = self.kept.read(self._key(function))
            if set(times) >= {spell(c) for c in found}:
                self._choose(name, found, times)
            else:
                open_[name] = (function, found, times)
        order = sorted(open_, key=lambda n: -timing.size_of(open_[n][0]))
        for number, name in enumerate(order, 1):
            function, found, times = open_[name]
            if time.monotonic() >= end:
                self.tell(f"tuning: out of time after {number - 1} of {len(order)} kernels")
                break
            self.tell(f"tuning {number}/{len(order)}: {name}, {len(found)} candidates")
            times |= self._time(function, [c for c in found if spell(c) not in times], end)
            self.kept.write(self._key(function), times)
            self._choose(name, found, times)
        return self.best

    def _choose(self, name: str, found: list[Choice], times: Mapping[str, float | None]) -> None:
        timed = [(t, i) for i, c in enumerate(found) if (t := times.get(spell(c))) is not None]
        if timed:
            self.times[name], place = min(timed)
            self.best[name] = found[place]

    def _key(self, function: tirx.PrimFunc) -> str:
        return f"{GENERATION}|{tvm.__version__}|{self.target}|{function.script()}"

    def _time(
        self, function: tirx.PrimFunc, candidates: list[Choice], end: float
    ) -> dict[str, float | None]:
        """Return seconds per candidate; ``None`` for one that failed or took too long."""

        def start() -> timing.Measure:
            arguments = timing.operands(function)

            def measure(candidate: Choice) -> float | None:
                made = scheduled(function, candidate, self.machine)
                return None if made is None else timing.timed(made, arguments, self.target)

            return measure

        times = timing.attempts(candidates, start, end)
        return {spell(c): t for c, t in zip(candidates, times, strict=False)}


def spell(choice: Choice) -> str:
    """Return a choice as the key of its time."""
    return " ".join(map(str, choice.to_json()))
