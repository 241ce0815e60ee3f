"""The one way to write a file: it is whole or as it was, and nothing but a file is replaced.

A file is written beside its place, forced to the disk and renamed into its place. A link is
followed, and a file that stands there keeps its mode and its owner. What is no file (a device, a
pipe) is written to as a shell does, and ``-`` is standard output.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from narrows.errors import ArtifactError, NarrowsError
from narrows.files.interrupts import uninterrupted
from narrows.files.locks import LEFT_OVER, hold, is_at, is_left_over

STDOUT = "-"

# What is being written: ".plan.json.0f1e2d3c.part", or ".new" and ".old" for folders.
STEM = 48  # characters of the name that it keeps: a name may have 255 bytes
MARK = r"[0-9a-f]{8}"

# Descriptors that children do not get, and bytes as they are on Windows.
PLAIN = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)

# What a file system says that cannot force the entries of a folder to the disk.
UNKNOWN = {errno.EINVAL, errno.ENOTSUP, errno.EBADF}


def as_path(path: Any, what: str, error: type[NarrowsError] = ArtifactError) -> Path:
    """Return a path; an error that says ``what`` it should be the path of if it cannot be one."""
    if not isinstance(path, str | os.PathLike):
        raise error(f"{what} is a path, got {type(path).__name__}")
    text = os.fspath(path)
    if not isinstance(text, str) or "\0" in text:
        raise error(f"{what} cannot be {text!r:.60}", why="no path holds a zero byte")
    return Path(text)


def write_text(
    text: str, path: str | os.PathLike[str], error: type[NarrowsError] = ArtifactError
) -> Path:
    """Write a text file and return its path; see `replacing`."""
    with replacing(path, error) as file:
        file.write(text.encode("utf-8", "backslashreplace"))
    return Path(path)


@contextlib.contextmanager
def replacing(
    path: str | os.PathLike[str], error: type[NarrowsError] = ArtifactError
) -> Iterator[IO[bytes]]:
    """Yield a file that takes its place when the block ends; an error in it leaves all as it was.

    Args:
        path: Where it goes; ``-`` is standard output.
        error: The class of the error if it cannot be written.
    """
    place = as_path(path, "the file to write", error)
    try:
        with _opened(place) as file:
            yield file
    except BrokenPipeError:
        raise
    except OSError as cause:
        raise error(f"cannot write {place}", why=_reason(cause)) from cause


def _reason(cause: OSError) -> str:
    """Return why something cannot be written, in the system's words or in ours."""
    if cause.errno is None or not cause.strerror:
        return str(cause)
    return cause.strerror


def _opened(path: Path) -> contextlib.AbstractContextManager[IO[bytes]]:
    """Return what writes to a path, by what is there."""
    if str(path) == STDOUT:
        return _standard_output()
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return _beside(Path(os.path.realpath(path)), None)
    if _is_standard_output(there):
        return _standard_output()
    if stat.S_ISDIR(there.st_mode):
        raise IsADirectoryError("it is a folder")
    if stat.S_ISBLK(there.st_mode):
        raise OSError("it is a block device, and would be overwritten")
    if not stat.S_ISREG(there.st_mode):
        return _through(path)
    if not os.access(path, os.W_OK):
        raise PermissionError("it is read-only")
    return _beside(Path(os.path.realpath(path)), there)


def _is_standard_output(there: os.stat_result) -> bool:
    """Whether a file is what the shell sends our output to: ``-o /dev/stdout > file``."""
    try:
        return stat.S_ISREG(there.st_mode) and os.path.samestat(there, os.fstat(1))
    except OSError:
        return False


@contextlib.contextmanager
def _standard_output() -> Iterator[IO[bytes]]:
    held = io.BytesIO()
    yield held
    sys.stdout.write(held.getvalue().decode("utf-8", "surrogateescape"))
    sys.stdout.flush()


@contextlib.contextmanager
def _through(path: Path) -> Iterator[IO[bytes]]:
    """Yield a device or a pipe; one that nobody reads from is an error, not a wait."""
    descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    os.set_blocking(descriptor, True)
    with open(descriptor, "wb") as file:
        yield file


@contextlib.contextmanager
def _beside(target: Path, there: os.stat_result | None) -> Iterator[IO[bytes]]:
    """Yield a new file in the target's folder, and put it into its place."""
    sweep(target)
    mode = 0o666 if there is None else stat.S_IMODE(there.st_mode)
    part = None
    try:
        with uninterrupted():
            part, descriptor = _part_of(target, mode)
        with open(descriptor, "wb") as file:
            if there is not None:
                become(descriptor, there)
            yield file
            file.flush()
            os.fsync(descriptor)
            if os.name == "nt":  # an open file cannot be renamed there
                file.close()
            os.replace(part, target)
        sync(target.parent)
    finally:
        with contextlib.suppress(OSError):
            if part is not None:
                part.unlink(missing_ok=True)


def _part_of(target: Path, mode: int) -> tuple[Path, int]:
    """Return a new file beside a target, and its descriptor, which holds it."""
    while True:
        part = mark(target, "part")
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | PLAIN, mode)
        hold(descriptor)
        if is_at(descriptor, part):  # nobody took it for left over before it was held
            return part, descriptor
        os.close(descriptor)


def become(descriptor: int, there: os.stat_result) -> None:
    """Give what is open the owner, where that is allowed, and the mode of what it replaces."""
    own = os.fstat(descriptor)
    if (own.st_uid, own.st_gid) != (there.st_uid, there.st_gid) and hasattr(os, "fchown"):
        with contextlib.suppress(OSError):
            os.fchown(descriptor, there.st_uid, there.st_gid)
    if hasattr(os, "fchmod"):
        os.fchmod(descriptor, stat.S_IMODE(there.st_mode))


# ------------------------------------------------------------------ what is being written


def mark(target: Path, suffix: str) -> Path:
    """Return a hidden path beside a target, for what is about to take its place."""
    return target.with_name(f".{target.name[:STEM]}.{secrets.token_hex(4)}.{suffix}")


def marked(target: Path) -> list[Path]:
    """Return what stands beside a target and was to take its place, or made way for it."""
    pattern = re.compile(rf"\.{re.escape(target.name[:STEM])}\.{MARK}\.(part|new|old)")
    try:
        with os.scandir(target.parent) as entries:
            return [Path(e.path) for e in entries if pattern.fullmatch(e.name)]
    except OSError:
        return []


def sweep(target: Path) -> None:
    """Remove what writers that were killed left beside a target.

    Where they left nothing at the target itself, the older one that made way is put back.
    """
    for path in marked(target):
        if path.suffix == ".old" and not os.path.lexists(target):
            _put_back(path, target)
        else:
            remove_left_over(path)


def _put_back(old: Path, target: Path) -> None:
    descriptor = is_left_over(old, LEFT_OVER)
    if descriptor is None:
        return
    with contextlib.suppress(OSError):
        os.rename(old, target)
    os.close(descriptor)


def remove_left_over(path: Path, age: float = LEFT_OVER) -> bool:
    """Remove a file or a folder unless somebody holds it; return whether it is gone."""
    descriptor = is_left_over(path, age)
    if descriptor is None:
        return not os.path.lexists(path)
    try:
        if path.is_dir():
            remove_folder(path)
        else:
            path.unlink(missing_ok=True)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return not os.path.lexists(path)


def remove_folder(path: Path) -> None:
    """Remove a folder with all that is in it, as far as that is allowed."""
    with contextlib.suppress(OSError):
        os.chmod(path, 0o700)
    shutil.rmtree(path, ignore_errors=True)


def sync(path: Path) -> None:
    """Force a file, or the entries of a folder, to the disk."""
    if path.is_dir() and os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNKNOWN or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
