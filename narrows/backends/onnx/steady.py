"""`Quiet`: tells a quiet moment from a busy one, on a machine that others use as well.

Another thread on the same core, or on its twin, slows a thread down without taking CPU time from
it. A small piece of work that always takes the same time shows it: `Quiet.run` does that work
before and after a run, and says by how much it was slowed. Between runs it reads through more than
the caches of one core hold, so that a run finds its weights where a larger model has them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np

from narrows.backends.onnx.probes import Bench, random_feeds

WORTH = 1.08  # a run counts as quiet if it was slowed by less
EVICTED = 2**22  # numbers of four bytes that are read between runs
PATIENCE = 6  # how many runs are made for one that is wanted, while none is quiet


class Quiet:
    """A yardstick, and what it has shown so far.

    Args:
        seconds: For how long to wait for quiet moments; afterwards every run has to do.

    Attributes:
        best: The shortest time the yardstick took, in seconds.
    """

    def __init__(self, seconds: float = float("inf")) -> None:
        self.best = float("inf")
        self._end = time.perf_counter() + seconds
        self._filler = np.ones(EVICTED, np.float32)
        for _ in range(5):
            self.yardstick()

    @cached_property
    def _session(self) -> tuple[Any, dict[str, Any]]:
        import onnxruntime

        bench = Bench()
        bench.use(bench.conv(bench.blocks(1, 64, (14, 14)), 64, (3, 3)))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(bench.model(), options, ["CPUExecutionProvider"])
        return session, random_feeds(session)

    def yardstick(self) -> float:
        """Do the small work and return its seconds, wall time."""
        session, feeds = self._session
        start = time.perf_counter()
        session.run(None, feeds)
        took = time.perf_counter() - start
        self.best = min(self.best, took)
        return took

    def run(self, work: Callable[[], Any]) -> tuple[float, float]:
        """Do some work; return its CPU seconds, and by what factor it seems to have been slowed."""
        before = self.yardstick()
        self._filler += 1.0
        wall, cpu = time.perf_counter(), time.thread_time()
        work()
        spent, passed = time.thread_time() - cpu, time.perf_counter() - wall
        after = self.yardstick()
        interrupted = max(1.0, passed / max(spent, 1e-9) - 0.02)
        return spent, max(before, after) / self.best * interrupted

    def runs(self, work: Callable[[], Any], wanted: int) -> list[tuple[float, float]]:
        """Repeat some work until enough runs were quiet, or patience ends."""
        found: list[tuple[float, float]] = []
        quiet = 0
        while quiet < wanted:
            patience = PATIENCE if time.perf_counter() < self._end else 1
            if len(found) >= wanted * patience:
                break
            found.append(self.run(work))
            quiet += found[-1][1] < WORTH
        return found


def quietest(slowed: list[float], wanted: int) -> set[int]:
    """Return which of some runs were slowed least."""
    return set(sorted(range(len(slowed)), key=slowed.__getitem__)[:wanted])
