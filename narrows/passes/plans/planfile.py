"""A channel plan as JSON: written whole or not at all, and read with suspicion.

One weight a line, so that plans can be read and compared. A file says its format and the version of
that; a version newer than `VERSION` is refused, not guessed at.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from narrows.errors import PlanError, PlanUsageError
from narrows.files.reading import LIMIT, Count, fit, read_json
from narrows.files.writing import write_text
from narrows.ir.program import Note

FORMAT = "narrows-plan"
VERSION = 1


def encode(plan: Any) -> dict[str, Any]:
    """Return a plan as JSON values."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "narrows": plan.narrows,
        "fingerprint": plan.fingerprint,
        "widths": {name: list(widths) for name, widths in plan.widths.items()},
        "inputs": {name: list(keep) for name, keep in plan.inputs.items()},
        "outputs": {name: list(keep) for name, keep in plan.outputs.items()},
        "reasons": dict(plan.reasons),
        "notes": [vars(note) for note in plan.notes],
    }


def check_header(data: Any, what: str, kind: str, form: str, newest: int, hint: str) -> None:
    """Raise `PlanError` unless JSON values are a plan of a kind, in a version that is known.

    Args:
        data: The values.
        what: Where they are from.
        kind: What they should be, ``a channel plan``.
        form: The format's name; ``newest``: its latest version.
        hint: Who writes such plans.
    """
    if not isinstance(data, dict) or data.get("format") != form:
        raise PlanError(f"{what} is not {kind}", why=f'it lacks "format": "{form}"', hint=hint)
    version = data.get("version")
    if not isinstance(version, int) or isinstance(version, bool):
        raise PlanError(f"{what} is damaged", why=f"its version is {version!r:.40}")
    if version > newest:
        raise PlanError(
            f"{what} is of a newer narrows",
            why=f"narrows {data.get('narrows', '?')!s:.20} wrote version {version} of the format, "
            f"this one reads up to {newest}",
            hint="upgrade narrows",
        )


class ChannelFile(msgspec.Struct):
    """What the file of a channel plan holds, besides its header."""

    narrows: str
    fingerprint: str
    widths: dict[str, tuple[Count, Count]]
    inputs: dict[str, tuple[Count, ...]]
    outputs: dict[str, tuple[Count, ...]]
    reasons: dict[str, str]
    notes: tuple[Note, ...]


def decode(data: Any, what: str) -> dict[str, Any]:
    """Return the fields of a plan from JSON values; `PlanError` naming ``what`` if they are not."""
    hint = "plans are written by ChannelPlan.save and `narrows plan`"
    check_header(data, what, "a channel plan", FORMAT, VERSION, hint)
    try:
        made = fit(data, ChannelFile)
        for side in ("inputs", "outputs"):
            _check_keeps(side, getattr(made, side), made.widths)
    except ValueError as error:
        raise PlanError(f"{what} is damaged", why=str(error)) from error
    return msgspec.structs.asdict(made)


def _check_keeps(
    side: str, keeps: Mapping[str, Sequence[int]], widths: Mapping[str, Sequence[int]]
) -> None:
    for name, keep in keeps.items():
        if any(a >= b for a, b in pairwise(keep)):
            raise ValueError(f"{side}[{name!r}] is not sorted, or names a channel twice")
        width = widths[name][side == "outputs"] if name in widths else None
        if width is not None and keep and keep[-1] >= width:
            raise ValueError(f"{side}[{name!r}] names channel {keep[-1]} of {width}")


# ------------------------------------------------------------------ files


def dump(plan: Any) -> str:
    """Return a plan as text, one weight a line."""
    return layout(encode(plan))


def layout(data: dict[str, Any]) -> str:
    """Return JSON values as text, one entry of a table a line."""
    return "{\n" + ",\n".join(_lines(data)) + "\n}\n"


def _lines(data: dict[str, Any]) -> Iterator[str]:
    for key, value in data.items():
        if isinstance(value, dict) and value:
            inner = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            yield f" {json.dumps(key)}: {{\n{inner}\n }}"
        elif isinstance(value, list) and value:
            inner = ",\n".join(f"  {json.dumps(v)}" for v in value)
            yield f" {json.dumps(key)}: [\n{inner}\n ]"
        else:
            yield f" {json.dumps(key)}: {json.dumps(value)}"


def write(plan: Any, path: str | os.PathLike[str]) -> Path:
    """Write a plan and return its path; see `narrows.files.writing`."""
    return write_text(dump(plan), path, PlanError)


def read(path: Path) -> dict[str, Any]:
    """Return the fields of the plan in a file."""
    return decode(read_plan(path, "a channel plan"), str(path))


def read_plan(path: Path, kind: str, limit: int = LIMIT) -> Any:
    """Return the JSON values of a plan's file; `PlanError` if it holds none."""
    try:
        return read_json(path, limit)
    except OSError as error:
        raise PlanUsageError(f"cannot read the plan {path}", why=str(error.strerror)) from error
    except ValueError as error:
        raise PlanError(f"{path} is not {kind}", why=str(error)) from error
