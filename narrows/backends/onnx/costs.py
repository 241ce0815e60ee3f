"""Measuring the cost table of ONNX Runtime on this machine; Ctrl-C keeps what there is."""

from __future__ import annotations

import platform
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from narrows.backends.measured.grid import Grid
from narrows.backends.onnx.staircase import StairTable
from narrows.backends.tables import Tables, cpu_name

if TYPE_CHECKING:
    from narrows.backends.onnx.calibrate import Times
    from narrows.ir.work import Work

TABLES = Tables("onnxruntime", Path(__file__).with_name("costs.json"), StairTable)
ROUNDS, QUICK_ROUNDS = 8, 6
PATIENT, QUICK_PATIENT = 120.0, 10.0  # seconds to wait for quiet moments on a busy machine
DISAGREE = 1.25  # a time that exceeds another measurement of it by this factor was disturbed
SWEEPS = 2  # a full calibration goes through all sizes twice, so that a bad moment spoils no point


def calibrate(
    *, quick: bool = False, tell: Callable[[int, int], None] = lambda done, all: None
) -> tuple[StairTable, bool]:
    """Measure ONNX Runtime on this machine.

    Args:
        quick: Whether to measure few sizes, in seconds; what is left out comes from the table that
            there is, in proportion to what was measured.
        tell: Called with the parts that are done and those that there are.

    Returns:
        The table, and whether it is complete: Ctrl-C ends the measurement, not the table.
    """
    from narrows.backends.onnx import calibrate as measuring
    from narrows.backends.onnx.steady import Quiet
    from narrows.backends.onnx.sweep import axes_of

    quiet = Quiet(QUICK_PATIENT if quick else PATIENT)
    layout = measuring.find_layout()
    own, bias = measuring.find_overhead(quiet)
    times: Times = defaultdict(dict)
    complete = True
    rounds, sweeps = (QUICK_ROUNDS, 1) if quick else (ROUNDS, SWEEPS)
    try:
        for number in range(sweeps):
            parts = measuring.sweep(
                layout,
                quick=quick,
                rounds=rounds,
                bias=bias,
                quiet=quiet,
                tell=lambda done, all, n=number: tell(done + n * all, sweeps * all),
            )
            for part in parts:
                for name, points in part.items():
                    for sizes, us in points.items():
                        times[name][sizes] = agreed(us, times[name].get(sizes, us))
    except KeyboardInterrupt:
        complete = False
    axes = axes_of(list(times))
    grids = {name: Grid.of(axes[name], points) for name, points in times.items()}
    table = StairTable(
        name=TABLES.runtime,
        runtime=TABLES.version(),
        cpu=cpu_name(),
        layout=layout,
        overhead=own * 1e-6,
        grids=grids,
        made=f"{'quick' if quick else 'full'} calibration, {platform.system()}, one thread",
    )
    return (table if complete and not quick else TABLES.filled(table)), complete


def agreed(one: float, other: float) -> float:
    """Return the mean of two measurements of one time; the smaller where they disagree."""
    low, high = sorted((one, other))
    return low if high > DISAGREE * low else (low + high) / 2


def measure_works(
    table: StairTable,
    works: Sequence[Work],
    *,
    tell: Callable[[int, int], None] = lambda done, all: None,
) -> tuple[StairTable, bool]:
    """Return a table with exactly these works measured, and whether all of them are."""
    from narrows.backends.onnx import calibrate as measuring
    from narrows.backends.onnx.steady import Quiet

    quiet = Quiet(PATIENT)
    _, bias = measuring.find_overhead(quiet)
    found: dict[Work, float] = {}
    try:
        for part in measuring.measure_works(
            works, rounds=ROUNDS, bias=bias, quiet=quiet, tell=tell
        ):
            found.update(part)
    except KeyboardInterrupt:
        return table.with_works(found), False
    return table.with_works(found), True
