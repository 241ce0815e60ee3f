"""A channel plan as JSON: written whole or not at all, and read with suspicion.

One weight a line, so that plans can be read and compared. A file says its format and the version of
that; a version newer than `VERSION` is refused, not guessed at.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from narrows.errors import NarrowsError, PlanError, PlanUsageError
from narrows.ir.program import Note

if TYPE_CHECKING:
    from narrows.passes.plans.plan import ChannelPlan

FORMAT = "narrows-plan"
VERSION = 1

NOTE_KEYS = {"where": str, "reason": str, "message": str, "channels": int, "source": str}


def encode(plan: ChannelPlan) -> dict[str, Any]:
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
        raise PlanError(f"{what} is damaged", why=f"its version is {version!r}")
    if version > newest:
        raise PlanError(
            f"{what} is of a newer narrows",
            why=f"narrows {data.get('narrows', '?')} wrote version {version} of the format, "
            f"this one reads up to {newest}",
            hint="upgrade narrows",
        )


def decode(data: Any, what: str) -> dict[str, Any]:
    """Return the fields of a plan from JSON values; `PlanError` naming ``what`` if they are not."""
    hint = "plans are written by ChannelPlan.save and `narrows plan`"
    check_header(data, what, "a channel plan", FORMAT, VERSION, hint)
    reader = _Reader(data, what)
    widths = reader.lists("widths")
    for name, pair in widths.items():
        if len(pair) != 2:
            raise reader.error(f"widths[{name!r}] has {len(pair)} entries, not 2")
    keeps = {side: reader.lists(side) for side in ("inputs", "outputs")}
    for side, by_weight in keeps.items():
        for name, keep in by_weight.items():
            if any(a >= b for a, b in pairwise(keep)):
                raise reader.error(f"{side}[{name!r}] is not sorted, or names a channel twice")
            width = widths[name][side == "outputs"] if name in widths else None
            if width is not None and keep and keep[-1] >= width:
                raise reader.error(f"{side}[{name!r}] names channel {keep[-1]} of {width}")
    return {
        **keeps, "widths": widths, "reasons": reader.texts("reasons"), "notes": reader.notes(),
        "narrows": reader.text("narrows"), "fingerprint": reader.text("fingerprint"),
    }  # fmt: skip


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


class _Reader:
    """Takes the parts of a plan, each with the type it must have."""

    def __init__(self, data: dict[str, Any], what: str) -> None:
        self.data, self.what = data, what

    def error(self, why: str) -> PlanError:
        return PlanError(f"{self.what} is damaged", why=why)

    def table(self, key: str) -> dict[str, Any]:
        value = self.data.get(key)
        if not isinstance(value, dict):
            raise self.error(f"it has no table {key!r}")
        return value

    def lists(self, key: str) -> dict[str, Any]:
        table = self.table(key)
        for name, value in table.items():
            if not isinstance(value, list) or not all(map(_is_count, value)):
                raise self.error(f"{key}[{name!r}] is not a list of channels")
        return {name: tuple(value) for name, value in table.items()}

    def text(self, key: str) -> str:
        value = self.data.get(key)
        if not isinstance(value, str):
            raise self.error(f"it has no text {key!r}")
        return value

    def texts(self, key: str) -> dict[str, str]:
        table = self.table(key)
        if not all(isinstance(v, str) for v in table.values()):
            raise self.error(f"{key!r} holds something that is not a text")
        return dict(table)

    def notes(self) -> tuple[Note, ...]:
        value = self.data.get("notes")
        if not isinstance(value, list) or not all(isinstance(v, dict) for v in value):
            raise self.error("it has no list 'notes'")
        for note in value:
            if note.keys() != NOTE_KEYS.keys() or any(
                not isinstance(note[k], kind) for k, kind in NOTE_KEYS.items()
            ):
                raise self.error("one of its notes is malformed")
        return tuple(Note(**note) for note in value)


# ------------------------------------------------------------------ files


def dump(plan: ChannelPlan) -> str:
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


def write(plan: ChannelPlan, path: Path) -> Path:
    """Write a plan and return its path."""
    return write_text(dump(plan), path)


def write_text(text: str, path: Path, error: type[NarrowsError] = PlanError) -> Path:
    """Write a file beside its place and rename it into it, so there is the whole file or none."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    except OSError as cause:
        raise error(f"cannot write {path}", why=str(cause.strerror)) from cause
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
    return path


def read(path: Path) -> dict[str, Any]:
    """Return the fields of the plan in a file."""
    return decode(read_json(path, "a channel plan"), str(path))


def read_json(path: Path, kind: str) -> Any:
    """Return the JSON values of a plan's file; `PlanError` if it holds none."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise PlanUsageError(f"cannot read the plan {path}", why=str(error.strerror)) from error
    except UnicodeDecodeError as error:
        raise PlanError(f"{path} is not {kind}", why="it is not text") from error
    try:
        return json.loads(text)
    except ValueError as error:
        raise PlanError(f"{path} is not {kind}", why=f"it is not JSON: {error}") from error
