"""The cost table of ONNX Runtime: measured on this machine, else the one that narrows ships.

`current` is what a target answers with. `calibrate` measures; it keeps what it has on Ctrl-C. A
table measured here lies under the user's cache folder, one file per version of the runtime,
processor and number of threads, and is written whole or not at all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import os
import platform
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from narrows.errors import NarrowsError
from narrows.ir.cost import CostTable

if TYPE_CHECKING:
    from narrows.backends.onnx.calibrate import Times
    from narrows.ir.grid import Grid
    from narrows.ir.work import Work

RUNTIME = "onnxruntime"
SHIPPED = Path(__file__).with_name("costs.json")
ROUNDS, QUICK_ROUNDS = 8, 6
PATIENT, QUICK_PATIENT = 120.0, 10.0  # seconds to wait for quiet moments on a busy machine
DISAGREE = 1.25  # a time that exceeds another measurement of it by this factor was disturbed
SWEEPS = 2  # a full calibration goes through all sizes twice, so that a bad moment spoils no point


def cache_folder() -> Path:
    """Return where tables are kept: $NARROWS_CACHE, else narrows under the user's caches."""
    own = os.environ.get("NARROWS_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "narrows"


def cpu_name() -> str:
    """Return the processor's name and what of it decides the kernels that run."""
    facts: dict[str, str] = {}
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        for line in text.splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    name = facts.get("model name") or platform.processor() or platform.machine()
    kind = "/".join(facts[key] for key in ("cpu family", "model") if facts.get(key))
    flags = facts.get("flags", "").split()
    wide = next((f for f in ("avx512f", "avx2", "avx") if f in flags), "")
    return " ".join(part for part in (name, kind, wide) if part)


def runtime_version() -> str:
    """Return the installed version of ONNX Runtime, or nothing."""
    try:
        return importlib.metadata.version(RUNTIME)
    except importlib.metadata.PackageNotFoundError:
        return ""


def cache_path(threads: int = 1) -> Path:
    """Return the file that this machine's table has."""
    key = f"{runtime_version()}|{cpu_name()}|{threads}"
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    return cache_folder() / f"{RUNTIME}-{digest}.json"


def current(threads: int = 1) -> CostTable:
    """Return the table measured on this machine, else the shipped one."""
    return _read(cache_path(threads), threads) or shipped()


def cached(threads: int = 1) -> CostTable | None:
    """Return the table measured on this machine, or ``None``; one that cannot be read is none."""
    return _read(cache_path(threads), threads)


def _read(path: Path, threads: int) -> CostTable | None:
    try:
        stamp = path.stat().st_mtime_ns
    except OSError:
        return None
    table = _load(path, stamp)
    if table is None or (table.runtime, table.cpu) != (runtime_version(), cpu_name()):
        return None
    return table if table.threads == threads else None


@cache
def _load(path: Path, stamp: int) -> CostTable | None:
    try:
        return CostTable.load(path)
    except NarrowsError:
        return None


@cache
def shipped() -> CostTable:
    """Return the table that comes with narrows; its ``made`` says where it was measured."""
    return CostTable.load(SHIPPED)


def keep(table: CostTable, path: Path | None = None) -> Path:
    """Write a table to the cache, or to ``path``, and return the file."""
    path = path or cache_path(table.threads)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=path.name, dir=path.parent)
    os.close(handle)
    try:
        table.save(Path(name))
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
    return path


# ---------------------------------------------------------------------- measuring


def calibrate(
    *, quick: bool = False, tell: Callable[[int, int], None] = lambda done, all: None
) -> tuple[CostTable, bool]:
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
                        times[name][sizes] = _agreed(us, times[name].get(sizes, us))
    except KeyboardInterrupt:
        complete = False
    grids = measuring.grids(times, axes_of(list(times)))
    table = CostTable(
        name=RUNTIME,
        runtime=runtime_version(),
        cpu=cpu_name(),
        layout=layout,
        overhead=own * 1e-6,
        grids=grids,
        made=f"{'quick' if quick else 'full'} calibration, {platform.system()}, one thread",
    )
    return (table if complete and not quick else _filled(table)), complete


def _agreed(one: float, other: float) -> float:
    """Return the mean of two measurements of one time; the smaller where they disagree."""
    low, high = sorted((one, other))
    return low if high > DISAGREE * low else (low + high) / 2


def measure_works(
    table: CostTable,
    works: Sequence[Work],
    *,
    tell: Callable[[int, int], None] = lambda done, all: None,
) -> tuple[CostTable, bool]:
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


def _filled(table: CostTable) -> CostTable:
    """Return a table with what it lacks taken from the one that there is, scaled to this machine.

    A grid with fewer points than the known one gives way to it, at the scale of its own points; one
    that was not measured has the mean scale of all.
    """
    known = current()
    if known.layout.block != table.layout.block:
        return table
    scales = {
        name: float(np.exp(np.mean(np.log(_ratios(grid, known.grids[name])))))
        for name, grid in table.grids.items()
        if name in known.grids and _ratios(grid, known.grids[name])
    }
    overall = float(np.exp(np.mean(np.log(list(scales.values()))))) if scales else 1.0
    grids = {
        name: grid.scaled(scales.get(name, overall))
        for name, grid in known.grids.items()
        if name not in table.grids or table.grids[name].us.size < grid.us.size
    }
    return dataclasses.replace(table, grids={**table.grids, **grids})


def _ratios(measured: Grid, known: Grid) -> list[float]:
    """Return by how much the measured points of a grid exceed what another says of them."""
    if [n for n, _ in measured.axes] != [n for n, _ in known.axes]:
        return []
    names = [n for n, _ in measured.axes]
    places = product(*(p for _, p in measured.axes))
    return [
        float(us) / known.at(dict(zip(names, place, strict=True)))
        for us, place in zip(measured.us.flatten(), places, strict=True)
    ]
