"""Where the times of candidates are kept, and how."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from narrows.errors import ArtifactError
from narrows.files.reading import read_json
from narrows.files.writing import write_text


def folder() -> Path:
    """Return the folder: ``tvm`` in $NARROWS_CACHE, else in narrows' part of the user's caches."""
    own = os.environ.get("NARROWS_CACHE")
    if own:
        return Path(own) / "tvm"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "narrows" / "tvm"


class Kept:
    """JSON objects by text, each in a file of its own.

    Attributes:
        folder: Where they are; nothing is kept if it is ``None``.
        suffix: How the files' names end.
    """

    def __init__(self, folder: Path | None, suffix: str = ".json") -> None:
        self.folder, self.suffix = folder, suffix

    def _path(self, key: str) -> Path | None:
        if self.folder is None:
            return None
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}{self.suffix}"

    def read(self, key: str) -> dict[str, Any]:
        """Return what was written under a key; nothing where there is none, or no JSON."""
        path = self._path(key)
        if path is None:
            return {}
        try:
            found = read_json(path)
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def write(self, key: str, value: dict[str, Any]) -> None:
        """Keep a value under a key."""
        path = self._path(key)
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(json.dumps(value), path)
        except (OSError, ArtifactError) as error:  # the next run measures it again
            self.folder = None
            print(f"times are not kept: {error}", file=sys.stderr, flush=True)
