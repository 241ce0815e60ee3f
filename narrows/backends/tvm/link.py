"""Linking: objects become a shared library where the device's linker is there."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

LIBRARY = "model.so"


def find_linker(names: Sequence[str]) -> str:
    """Return the first of the programs that is there, or an empty string."""
    return next((path for name in names if (path := shutil.which(name))), "")


class Linker:
    """What TVM calls with its object files.

    Attributes:
        command: The linker; empty to keep the objects.
        files: The names of what was written, beside the library's place.
    """

    object_format = "o"  # which files TVM writes for it

    def __init__(self, command: str) -> None:
        self.command = command
        self.files: list[str] = []

    def __call__(self, output: str, objects: Sequence[str], **_: object) -> None:
        """Link object files, or copy them beside ``output``."""
        target = Path(output)
        paths = [Path(o) for o in objects]
        if not self.command:
            for i, path in enumerate(paths):
                name = f"{target.stem}_{i}{path.suffix}"
                shutil.copyfile(path, target.with_name(name))
                self.files.append(name)
            return
        words = [self.command, "-shared", "-fPIC", "-o", str(target), *map(str, paths)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines()
            raise LinkError(f"{self.command} failed: {said[-1] if said else done.returncode}")
        self.files.append(target.name)


class LinkError(Exception):
    """The linker failed."""
