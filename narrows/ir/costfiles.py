"""Costs from a file: its ``name`` says whose they are, and a registry which class reads them.

A package adds the costs of its own runtime through an entry point, under the name in its files::

    [project.entry-points."narrows.costs"]
    my-runtime = "mypackage.costs:MyCosts"

The class is a `narrows.ir.costs.Costs` and has a class method ``from_json``, which takes the file's
JSON values and raises `UsageError` for what it cannot read.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from narrows.errors import UsageError, suggest

if TYPE_CHECKING:
    from narrows.ir.costs import Costs

# Those of narrows's own backends, as "module:Class"; the package puts them here.
BUILTIN: dict[str, str] = {}


def load_costs(path: str | os.PathLike[str]) -> Costs:
    """Return the costs in a file; `UsageError` if it holds none, or nobody reads them."""
    from narrows.registry import Registry

    data = read(path)
    name = data.get("name") if isinstance(data, dict) else None
    if not isinstance(name, str):
        raise UsageError("this is no cost table", where=str(path), why="it has no name")
    readers = Registry("class of costs", "narrows.costs", BUILTIN, UsageError)
    known = readers.providers()
    if name not in known:
        raise UsageError(
            f"no class reads the costs of {name!r}",
            where=str(path),
            why=f"known are {', '.join(sorted(known))}",
            hint=suggest(name, known),
        )
    return readers.load(name).from_json(data)


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
