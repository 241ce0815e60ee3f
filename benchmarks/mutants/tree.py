"""A temporary copy of the tree, in which one file at a time is changed."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from benchmarks.machine import ROOT

COPIED = ("narrows", "tests", "benchmarks", "docs", "pyproject.toml", "README.md")


@contextlib.contextmanager
def copied() -> Iterator[Path]:
    """Yield a copy of the tree; it is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as place:
        tree = Path(place) / "tree"
        tree.mkdir()
        (Path(place) / "tmp").mkdir()
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(
                    source, tree / name, ignore=shutil.ignore_patterns("__pycache__", ".*")
                )
            else:
                shutil.copy2(source, tree / name)
        yield tree


@contextlib.contextmanager
def changed(tree: Path, name: str, text: bytes) -> Iterator[None]:
    """Give a file of the tree another text.

    Python trusts a compiled file by its source's size and time in seconds. So the changed file is
    of a time that no other has, and the original gets its own back.
    """
    path = tree / name
    before, status = path.read_bytes(), path.stat()
    changed.turn += 1  # type: ignore[attr-defined]
    try:
        path.write_bytes(text)
        later = int(status.st_mtime) + 1000 + changed.turn  # type: ignore[attr-defined]
        os.utime(path, (later, later))
        yield
    finally:
        path.write_bytes(before)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


changed.turn = 0  # type: ignore[attr-defined]


@cache
def text_of(file: str) -> str:
    """Return the text of a file of the tree, as it was when it was first asked for."""
    return (ROOT / file).read_text(encoding="utf-8")
