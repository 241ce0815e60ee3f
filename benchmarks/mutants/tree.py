"""A temporary copy of the tree, in which one file at a time is changed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
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


def digest(tree: Path, paths: Iterable[Path]) -> str:
    """Return the hash of files: of their names in a tree and their content."""
    made = hashlib.sha256()
    for path in sorted(paths):
        made.update(f"{path.relative_to(tree)}\0".encode())
        made.update(hashlib.sha256(path.read_bytes()).digest())
    return made.hexdigest()[:16]


def sources(tree: Path, *folders: str) -> list[Path]:
    """Return the files of folders of a tree, without what Python compiled."""
    found = (p for folder in folders for p in (tree / folder).rglob("*") if p.is_file())
    return [p for p in found if "__pycache__" not in p.parts]
