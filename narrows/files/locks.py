"""Who uses a file or a folder: whoever does holds a lock, and what nobody holds is left over.

A lock ends with the process that holds it, however that ends. So what a killed writer left behind
can be told from what a living one is at, without a clock.
"""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

# Where a file system knows no locks, what was not touched for so long, in seconds, is left over.
LEFT_OVER = 3600.0


def open_held(path: str | os.PathLike[str]) -> int | None:
    """Return a descriptor that keeps others from taking a file or folder for left over.

    ``None`` where the system cannot: then nothing is kept, and age decides. `OSError` if there is
    no such path.
    """
    if fcntl is None:
        os.stat(path)
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError:  # it may be entered, not listed
        os.stat(path)
        return None
    hold(descriptor)
    return descriptor


def hold(descriptor: int) -> None:
    """Take a shared lock on what is open, where the file system has locks."""
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    except OSError:
        return


def is_at(descriptor: int, path: str | os.PathLike[str]) -> bool:
    """Whether a path names what is open, still."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except (OSError, ValueError):
        return False


def where_is(descriptor: int) -> Path | None:
    """Return where something open is by now; ``None`` where the system does not tell."""
    if hasattr(fcntl, "F_GETPATH"):  # macOS
        found = fcntl.fcntl(descriptor, fcntl.F_GETPATH, bytes(1024))  # type: ignore[attr-defined]
        return Path(os.fsdecode(found.rstrip(b"\0")))
    try:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
    except OSError:
        return None
    return path if is_at(descriptor, path) else None


def is_left_over(path: Path, age: float = LEFT_OVER) -> int | None:
    """Return an open descriptor if nobody holds a file or folder, else ``None``.

    As long as it is open, nobody else takes the path for left over either.

    Args:
        path: The file or folder.
        age: Without locks, for how long it was not touched, in seconds.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        if _is_free(descriptor, age) and is_at(descriptor, path):
            return descriptor
    except OSError:
        pass
    os.close(descriptor)
    return None


def _is_free(descriptor: int, age: float) -> bool:
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
        else:
            return True
    return time.time() - os.fstat(descriptor).st_mtime >= age


def claim(path: Path) -> int | None:
    """Return a descriptor that keeps others from claiming a folder; `OSError` if somebody has it.

    ``None`` where the system or the file system cannot.
    """
    if fcntl is None:
        return None
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        return None
    return descriptor
