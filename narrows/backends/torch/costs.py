"""Measuring the cost table of PyTorch on this machine, operator by operator, as eager code runs.

Nothing is fused, and every operator pays for being called. What a slice leaves is made contiguous
by the next operator that minds, so a slice costs that copy.
"""

from __future__ import annotations

import platform
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from narrows.backends.measured.grid import Grid
from narrows.backends.measured.layout import Layout
from narrows.backends.tables import Tables, cpu_name
from narrows.backends.torch.eager import EagerTable

TABLES = Tables("torch", Path(__file__).with_name("costs.json"), EagerTable)
WARM, ROUNDS, QUICK_ROUNDS = 2, 14, 6
ALIGN = 16  # channels that oneDNN computes together
EVICTED = 2**22  # numbers of four bytes that are read between runs: more than one core's caches


def calibrate(
    *, quick: bool = False, tell: Callable[[int, int], None] = lambda done, all: None
) -> tuple[EagerTable, bool]:
    """Measure eager PyTorch on this machine, one thread.

    Args:
        quick: Whether to measure few sizes, in seconds; what is left out comes from the table that
            there is, in proportion to what was measured.
        tell: Called with the probes that are done and those that there are.

    Returns:
        The table, and whether it is complete: Ctrl-C ends the measurement, not the table.
    """
    import torch

    from narrows.backends.torch.probes import probes

    wanted = list(probes(quick))
    points: dict[str, dict[tuple[float, ...], float]] = defaultdict(dict)
    left = {name: sum(p.grid == name for p in wanted) for name in {p.grid for p in wanted}}
    complete, overhead, threads = True, TABLES.current().overhead, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            tiny, watch = torch.ones(4), _Watch()
            overhead = watch.microseconds(lambda: torch.neg(tiny), 50) * 1e-6
            for done, probe in enumerate(wanted):
                tell(done, len(wanted))
                us = watch.microseconds(probe.make(), QUICK_ROUNDS if quick else ROUNDS)
                points[probe.grid][probe.place] = us / probe.share
                left[probe.grid] -= 1
            tell(len(wanted), len(wanted))
    except KeyboardInterrupt:
        complete = False
    finally:
        torch.set_num_threads(threads)
    axes = {p.grid: p.names for p in wanted}
    grids = {n: Grid.of(axes[n], found) for n, found in points.items() if not left[n]}
    table = EagerTable(
        name=TABLES.runtime, runtime=TABLES.version(), cpu=cpu_name(), layout=Layout(align=ALIGN),
        overhead=overhead, grids=grids,
        made=f"{'quick' if quick else 'full'} calibration, {platform.system()}, one thread",
    )  # fmt: skip
    return (table if complete and not quick else TABLES.filled(table)), complete


class _Watch:
    """Times calls that find their weights out of the caches, as in a larger model."""

    def __init__(self) -> None:
        self._filler = np.ones(EVICTED, np.float32)

    def microseconds(self, call: Callable[[], Any], rounds: int) -> float:
        """Return the CPU time of one call: of the quicker half, as other work can only add."""
        for _ in range(WARM):
            call()
        spent = []
        for _ in range(rounds):
            self._filler += 1.0
            start = time.thread_time_ns()
            call()
            spent.append(time.thread_time_ns() - start)
        return max(0.1, float(np.mean(sorted(spent)[: (rounds + 1) // 2])) / 1e3)
