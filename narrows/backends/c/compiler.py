"""The system's C compiler: which one there is, and how the files of an artifact are built."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from narrows.errors import ArtifactError

NAMES = ("cc", "gcc", "clang")
MISSING = f"there is no C compiler: none of {', '.join(NAMES)}, and CC is not set"
HINT = "install gcc or clang (on Debian: apt-get install gcc), or set CC"

# What every compiler here takes; the code has to pass without a warning.
STRICT = ("-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror")
FAST, PLAIN = ("-O3", "-march=native"), ("-O0", "-DNARROWS_LANES=1")

LIMIT = 600  # seconds that a compiler may take


def find_compiler() -> list[str]:
    """Return the command of the system's C compiler, ``$CC`` first; empty if there is none."""
    chosen = shlex.split(os.environ.get("CC", ""))
    if chosen:
        return chosen if shutil.which(chosen[0]) else []
    return next(([path] for name in NAMES if (path := shutil.which(name))), [])


def build(sources: Sequence[Path], output: Path, flags: Sequence[str]) -> None:
    """Compile and link C files into a program.

    Raises:
        ArtifactError: There is no compiler, or it refuses the files.
    """
    command = find_compiler()
    if not command:
        raise ArtifactError("the C code cannot be compiled", why=MISSING, hint=HINT)
    line = [*command, *STRICT, *flags, "-o", str(output), *map(str, sources)]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=LIMIT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ArtifactError(f"{command[0]} does not run", why=str(error), hint=HINT) from error
    if done.returncode:
        told = next((s for s in done.stderr.splitlines() if "error" in s), done.stderr.strip())
        raise ArtifactError(f"{command[0]} refuses the C code", why=told, hint=shlex.join(line))


def compiles(flags: Sequence[str], folder: Path) -> bool:
    """Whether the compiler here knows some flags."""
    source = folder / "flags.c"
    source.write_text("int main(void) { return 0; }\n", encoding="utf-8")
    try:
        build([source], folder / "flags", flags)
    except ArtifactError:
        return False
    return True
