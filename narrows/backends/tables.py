"""Where the cost tables of a runtime are: measured on this machine, else the one narrows ships.

A table measured here lies under the user's cache folder, one file per runtime, version, processor
and number of threads, and is written whole or not at all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from narrows.errors import NarrowsError, UsageError

if TYPE_CHECKING:
    from narrows.backends.measured.grid import Grid
    from narrows.backends.measured.table import CostTable

T = TypeVar("T", bound="CostTable")


@dataclass(frozen=True)
class Tables(Generic[T]):
    """The cost tables of one runtime.

    Attributes:
        runtime: The package that runs programs.
        file: The table that comes with narrows.
        kind: The class of the tables.
        numbers: What programs compute in, where that is not floating-point: ``int8``.
    """

    runtime: str
    file: Path
    kind: type[T]
    numbers: str = ""

    @property
    def name(self) -> str:
        """What its tables are called: ``onnxruntime``, ``onnxruntime-int8``."""
        return f"{self.runtime}-{self.numbers}" if self.numbers else self.runtime

    def version(self) -> str:
        """Return the installed version of the runtime, or nothing."""
        try:
            return importlib.metadata.version(self.runtime)
        except importlib.metadata.PackageNotFoundError:
            return ""

    def path(self, threads: int = 1) -> Path:
        """Return the file that this machine's table has."""
        key = f"{self.version()}|{cpu_name()}|{threads}"
        digest = hashlib.sha256(key.encode()).hexdigest()[:16]
        return cache_folder() / f"{self.name}-{digest}.json"

    def current(self, threads: int = 1) -> T:
        """Return the table measured on this machine, else the shipped one."""
        return self.cached(threads) or self.shipped()

    def cached(self, threads: int = 1) -> T | None:
        """Return the table measured on this machine, or ``None``; one that is damaged is none."""
        path = self.path(threads)
        try:
            stamp = path.stat().st_mtime_ns
        except OSError:
            return None
        table = _load(self.kind, path, stamp)
        if table is None or (table.runtime, table.cpu) != (self.version(), cpu_name()):
            return None
        return table if table.threads == threads else None

    def shipped(self) -> T:
        """Return the table that comes with narrows; its ``made`` says where it was measured."""
        return _shipped(self.kind, self.file)

    def keep(self, table: T, path: Path | None = None) -> Path:
        """Write a table to the cache, or to ``path``, and return the file."""
        path = path or self.path(table.threads)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot write {path}", why=str(error.strerror)) from error
        return table.save(path)

    def filled(self, table: T) -> T:
        """Return a table with what it lacks taken from the one that there is, scaled to it.

        A grid with fewer points than the known one gives way to it, at the scale of its own points;
        one that was not measured has the mean scale of all.
        """
        known = self.current()
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


@cache
def _load(kind: type[CostTable], path: Path, stamp: int) -> Any:
    try:
        return kind.load(path)
    except NarrowsError:
        return None


@cache
def _shipped(kind: type[CostTable], path: Path) -> Any:
    return kind.load(path)


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
