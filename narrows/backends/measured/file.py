"""A cost table as JSON: one grid a line, times in microseconds, and read with suspicion."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from narrows.backends.measured.grid import Grid
from narrows.backends.measured.layout import Layout
from narrows.errors import UsageError
from narrows.files.reading import Count, fit
from narrows.files.writing import write_text
from narrows.ir import costfiles
from narrows.ir.work import Work

FORMAT = 1

FIELDS = [field.name for field in dataclasses.fields(Work)]

Microseconds = Annotated[float, msgspec.Meta(gt=0, le=1e12)]


class TimeFile(msgspec.Struct):
    """How long an exact work takes."""

    us: Microseconds


class CostFile(msgspec.Struct):
    """What the file of a table holds."""

    format: Literal[FORMAT]  # type: ignore[valid-type]
    name: str
    runtime: str
    cpu: str
    layout: Layout
    overhead: Annotated[float, msgspec.Meta(ge=0, le=1e12)]
    grids: dict[str, Any]
    works: list[list[Any]]
    threads: Count
    made: str


def encode(table: Any) -> dict[str, Any]:
    """Return a `CostTable` as JSON values."""
    return {
        "format": FORMAT,
        "name": table.name,
        "runtime": table.runtime,
        "cpu": table.cpu,
        "threads": table.threads,
        "made": table.made,
        "layout": dataclasses.asdict(table.layout),
        "overhead": round(table.overhead * 1e6, 3),
        "grids": {name: grid.to_json() for name, grid in sorted(table.grids.items())},
        "works": [
            [*dataclasses.astuple(w), float(f"{s * 1e6:.4g}")] for w, s in table.works.items()
        ],
    }


def decode(data: Any) -> dict[str, Any]:
    """Return the fields of a table from JSON values; `UsageError` if they are not one."""
    try:
        made = fit(data, CostFile)
        if min(made.layout.block, made.layout.align, made.layout.sets) < 1:
            raise ValueError("layout: blocks, widths and sets are 1 or more")
        return {
            "name": made.name,
            "runtime": made.runtime,
            "cpu": made.cpu,
            "layout": made.layout,
            "overhead": made.overhead * 1e-6,
            "grids": {name: Grid.from_json(grid) for name, grid in made.grids.items()},
            "works": dict(map(_work, made.works)),
            "threads": made.threads,
            "made": made.made,
        }
    except ValueError as error:
        raise UsageError("this is no cost table", why=str(error)) from error


def _work(row: list[Any]) -> tuple[Work, float]:
    if len(row) != len(FIELDS) + 1:
        raise ValueError(f"works: a row has {len(FIELDS) + 1} entries, not {len(row)}")
    work = fit(dict(zip(FIELDS, row, strict=False)), Work)
    return work, fit({"us": row[-1]}, TimeFile).us * 1e-6


def write(table: Any, path: str | os.PathLike[str]) -> Path:
    """Write a table and return its path; see `narrows.files.writing`."""
    data = encode(table)
    grids, works = data.pop("grids"), data.pop("works")
    lines = [f" {json.dumps(n)}: {json.dumps(g)}" for n, g in grids.items()]
    rows = [f" {json.dumps(w)}" for w in works]
    head = json.dumps(data, indent=1)[:-2]
    text = f'{head},\n "grids": {{\n{_lines(lines)}}},\n "works": [\n{_lines(rows)}]\n}}\n'
    return write_text(text, path, UsageError)


def _lines(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in ",\n".join(lines).splitlines())


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the fields of the table in a file; `UsageError` if there is none."""
    return decode(costfiles.read(path))
