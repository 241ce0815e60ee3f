"""What a file from outside may be: bounded in size and depth, and of a schema that is stated.

A reader states its schema as types: `msgspec.Struct` classes, dataclasses, plain types. What does
not fit is a `ValueError` that says where; the caller says of which file, in its own error class.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

T = TypeVar("T")

LIMIT = 64 << 20  # bytes of a file, where its reader does not say
DEPTH = 200  # levels of lists and tables in one another

# Whole numbers that are counts or sizes, and places in what fits in memory.
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
# Powers of two that a float holds.
Exponent = Annotated[int, msgspec.Meta(ge=-1000, le=1000)]

# A JSON text without what is not a bracket: whole strings (the last may lack its end), the rest.
NO_BRACKETS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[^"\[\]{}]+', re.S)


def read_json(path: Path, limit: int = LIMIT) -> Any:
    """Return the JSON values of a file; `OSError` or `ValueError` if that cannot be read."""
    return parse_json(read_text(path, limit))


def read_text(path: Path, limit: int = LIMIT) -> str:
    """Return the text of a file of at most ``limit`` bytes."""
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except MemoryError:
        raise ValueError("it does not fit in memory") from None
    if len(data) > limit:
        raise ValueError(f"it has more than {limit:,} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError("it is not text") from error


def parse_json(text: str) -> Any:
    """Return the values of a JSON text; `ValueError` if it is none, or nests too deeply."""
    try:
        steps = (1 if bracket in "[{" else -1 for bracket in NO_BRACKETS.sub("", text))
        if max(itertools.accumulate(steps), default=0) > DEPTH:
            raise ValueError(f"it nests more than {DEPTH} levels deep")
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error}") from error
    except MemoryError:
        raise ValueError("it does not fit in memory") from None


def fit(data: Any, schema: type[T]) -> T:
    """Return JSON values as what a schema says; `ValueError` names the first that is not so."""
    try:
        return msgspec.convert(data, schema)
    except msgspec.ValidationError as error:
        what, _, where = str(error).replace("`", "").partition(" - at ")
        place = where.removeprefix("$").lstrip(".")
        raise ValueError(f"{place}: {_lower(what)}" if place else _lower(what)) from None


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
