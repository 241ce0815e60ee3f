"""Where the times of candidates are kept."""

from __future__ import annotations

import os
from pathlib import Path


def folder() -> Path:
    """Return the folder: ``tvm`` in $NARROWS_CACHE, else in narrows' part of the user's caches."""
    own = os.environ.get("NARROWS_CACHE")
    if own:
        return Path(own) / "tvm"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "narrows" / "tvm"
