"""Costs from a file: its ``name`` says whose they are, and `READERS` which class reads them."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from narrows.errors import UsageError, suggest

if TYPE_CHECKING:
    from narrows.ir.costs import Costs

# The ``name`` in a file -> "module:Class" of a `Costs` that has a class method ``from_json``, which
# takes the file's JSON values. The package puts those of its own backends here.
READERS: dict[str, str] = {}


def load_costs(path: str | os.PathLike[str]) -> Costs:
    """Return the costs in a file; `UsageError` if it holds none, or nobody reads them."""
    data = read(path)
    name = data.get("name") if isinstance(data, dict) else None
    if not isinstance(name, str):
        raise UsageError("this is no cost table", where=str(path), why="it has no name")
    if name not in READERS:
        raise UsageError(
            f"no class reads the costs of {name!r}",
            where=str(path),
            why=f"known are {', '.join(sorted(READERS))}",
            hint=suggest(name, READERS),
        )
    module, _, attribute = READERS[name].partition(":")
    return getattr(importlib.import_module(module), attribute).from_json(data)


def read(path: str | os.PathLike[str]) -> Any:
    """Return the JSON values of a file of costs; `UsageError` if it cannot be read."""
    from narrows.files.reading import read_json
    from narrows.files.writing import as_path

    place = as_path(path, "a cost table", UsageError)
    try:
        return read_json(place)
    except (OSError, ValueError) as error:
        raise UsageError(
            "the cost table cannot be read", where=str(path), why=str(error)
        ) from error
