"""Measuring the cost table of integers in ONNX Runtime on this machine; Ctrl-C keeps what there
is."""

from __future__ import annotations

import platform
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from narrows.backends.measured.grid import Grid
from narrows.backends.measured.layout import Layout
from narrows.backends.onnx.costs import SWEEPS, agreed
from narrows.backends.onnx.int8.table import Int8Table
from narrows.backends.tables import Tables, cpu_name

if TYPE_CHECKING:
    from narrows.backends.onnx.calibrate import Times
    from narrows.backends.onnx.int8.spelled import Capture, Lower
    from narrows.ir.program import Program

TABLES = Tables("onnxruntime", Path(__file__).with_name("costs.json"), Int8Table, "int8")
ROUNDS, QUICK_ROUNDS = 6, 4
PATIENT, QUICK_PATIENT = 120.0, 10.0  # seconds to wait for quiet moments on a busy machine

# What is done where codes are rounded, and so takes nothing behind a convolution.
FUSED = ("relu", "relu6", "hardtanh", "clamp", "clamp_min")

Tell = Callable[[int, int], None]


def calibrate(
    *, capture: Capture, lower: Lower, quick: bool = False, tell: Tell = lambda done, all: None
) -> tuple[Int8Table, bool]:
    """Measure what operators of integer programs take in ONNX Runtime on this machine.

    Args:
        capture: Captures a module on inputs.
        lower: Returns the artifact of a program in integers.
        quick: Whether to measure few sizes; what is left out comes from the table that there is,
            in proportion to what was measured.
        tell: Called with the parts that are done and those that there are.

    Returns:
        The table, and whether it is complete: Ctrl-C ends the measurement, not the table.
    """
    from narrows.backends.onnx import calibrate as measuring
    from narrows.backends.onnx.int8 import probes, spelled
    from narrows.backends.onnx.steady import Quiet

    quiet = Quiet(QUICK_PATIENT if quick else PATIENT)
    own, bias = measuring.find_overhead(quiet)
    rounds = QUICK_ROUNDS if quick else ROUNDS
    packed = list(measuring.pack(probes.jobs(quick)))
    sweeps = 1 if quick else SWEEPS
    total = sweeps * (len(packed) + spelled.count(quick))
    times: Times = defaultdict(dict)
    complete, how = True, {"rounds": rounds, "bias": bias, "quiet": quiet}

    def parts() -> Iterator[Times]:
        for _ in range(sweeps):
            yield from spelled.points(capture, lower, quick, **how)
            for group in packed:
                yield measuring.measure(group, rounds, bias, quiet, probes.ByteBench())

    try:
        for done, part in enumerate(parts(), start=1):
            for name, found in part.items():
                for sizes, us in found.items():
                    times[name][sizes] = agreed(us, times[name].get(sizes, us))
            tell(done, total)
    except KeyboardInterrupt:
        complete = False
    grids = {name: Grid.of(probes.axes_of(name), found) for name, found in times.items()}
    table = Int8Table(
        name=TABLES.name,
        runtime=TABLES.version(),
        cpu=cpu_name(),
        layout=Layout(block=probes.BLOCK, align=probes.ALIGN, fused=FUSED),
        overhead=own * 1e-6,
        grids=grids,
        made=f"{'quick' if quick else 'full'} calibration, {platform.system()}, one thread",
    )
    return (table if complete and not quick else TABLES.filled(table)), complete


def measure_program(
    table: Int8Table, program: Program, *, lower: Lower, tell: Tell = lambda done, all: None
) -> tuple[Int8Table, bool]:
    """Return a table with exactly a program's works measured, and whether they are."""
    from narrows.backends.onnx import calibrate as measuring
    from narrows.backends.onnx.int8.spelled import observed
    from narrows.backends.onnx.steady import Quiet

    quiet = Quiet(PATIENT)
    try:
        _, bias = measuring.find_overhead(quiet)
        found = observed(program, lower(program), rounds=ROUNDS, bias=bias, quiet=quiet)
    except KeyboardInterrupt:
        return table, False
    tell(1, 1)
    return table.with_works({work: us * 1e-6 for work, us in found.items()}), True
