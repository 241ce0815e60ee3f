"""`Registry`: things of one kind by name, those of narrows and those that other packages add.

A package adds its own through an entry point in the registry's group::

    [project.entry-points."narrows.passes"]
    merge-heads = "mypackage.merge_heads:MergeHeads"

Each is named as ``"module:attribute"`` and imported when it is used.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from narrows.errors import NarrowsError, UsageError, suggest


@dataclass(frozen=True)
class Registry:
    """Things of one kind by name.

    Attributes:
        kind: What they are, in errors: ``pass``.
        group: The group of entry points that adds to them.
        builtin: Name -> ``"module:attribute"`` of those that narrows has itself.
        error: What is raised where an entry point is wrong.
        unknown: What is raised where there is nothing of a name.
    """

    kind: str
    group: str
    builtin: Mapping[str, str]
    error: type[NarrowsError]
    unknown: type[NarrowsError] = UsageError

    def providers(self) -> dict[str, str]:
        """Return ``name -> "module:attribute"`` of everything that is known.

        Two providers of one name are an error that names both: which of them is used must not
        depend on the order of installation.
        """
        found = dict(self.builtin)
        for entry in installed(self.group):
            other = found.get(entry.name)
            if other is not None and other != entry.value:
                raise self.error(
                    f"two packages provide the {self.kind} {entry.name!r}",
                    why=f"{other} and {entry.value} both claim the name",
                    hint="uninstall one of them",
                )
            found[entry.name] = entry.value
        return found

    def load(self, name: object) -> Any:
        """Return what a name stands for, imported; an error with a suggestion if unknown."""
        known = self.providers()
        if not isinstance(name, str) or name not in known:
            raise self.unknown(
                f"there is no {self.kind} {name!r}",
                why=f"known are {', '.join(sorted(known))}",
                hint=suggest(str(name), known),
            )
        provider = known[name]
        module, _, attribute = provider.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except Exception as cause:  # importing runs the package's code, which may raise anything
            raise self.error(
                f"cannot import the {self.kind} {name!r} from {provider}: {cause}"
            ) from cause

    def load_class(self, name: str) -> Any:
        """Return the class that a name stands for; its own ``name`` has to be the same."""
        found = self.load(name)
        called = getattr(found, "name", None)
        if called != name:
            provider = self.providers()[name]
            raise self.error(f"the {self.kind} {name!r} of {provider} calls itself {called!r}")
        return found


def installed(group: str) -> tuple[metadata.EntryPoint, ...]:
    """Return the entry points of a group of all that is installed.

    To read what is installed takes milliseconds, and every compile asks several times, so it is
    read again only where another folder is searched for packages, or one came or went in one.
    """
    return _read(group, tuple((place, _changed(place)) for place in sys.path))


@functools.lru_cache
def _read(group: str, places: tuple[tuple[str, int], ...]) -> tuple[metadata.EntryPoint, ...]:
    del places  # they are what the answer depends on
    return tuple(metadata.entry_points(group=group))


def _changed(place: str) -> int:
    """Return when a folder's list of files last changed, in nanoseconds; 0 where there is none."""
    try:
        return os.stat(place or os.curdir).st_mtime_ns
    except OSError:
        return 0
