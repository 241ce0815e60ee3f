"""A folder that is replaced as one thing: there is the older one or the newer, whole, at any time.

A new folder is written beside its place and changes places with what stands there, in one step
where the system has one (Linux, macOS). Whoever reads a folder holds it (`Held`): what was replaced
meanwhile stays until it is let go of, so that nobody reads half of one and half of the other.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

from narrows.errors import ArtifactError, NarrowsError
from narrows.files.interrupts import surely, uninterrupted
from narrows.files.locks import claim, is_at, open_held, where_is
from narrows.files.writing import (
    become,
    mark,
    marked,
    remove_folder,
    remove_left_over,
    sweep,
    sync,
)

T = TypeVar("T")

TRIES = 1000  # renamings that another writer may forestall

# Where two renamings replace a folder, a reader waits so long for the second, in seconds.
GAP, STEP = 1.0, 0.005

SCRATCH = "narrows-scratch-"  # how temporary folders begin


# ------------------------------------------------------------------ reading


class Held:
    """A folder that stays as it is for whoever reads it, even if it is replaced.

    Attributes:
        folder: Where it was when it was opened.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._descriptor = _held(folder)
        if self._descriptor is not None:
            weakref.finalize(self, _let_go, self._descriptor, folder)

    @property
    def path(self) -> Path:
        """Where it is by now; `ArtifactError` if it was removed."""
        if self._descriptor is None or is_at(self._descriptor, self.folder):
            return self.folder
        found = where_is(self._descriptor)
        if found is None:
            raise ArtifactError(
                f"{self.folder} was replaced or removed since it was opened", hint="open it again"
            )
        return found

    def read(self, reader: Callable[[Path], T]) -> T:
        """Return what a function reads from the folder; it is called again if the folder moved."""
        for _ in range(TRIES):
            path = self.path
            try:
                found = reader(path)
            except NarrowsError:
                if self.path == path:
                    raise
                continue
            if self.path == path:
                return found
        raise ArtifactError(f"{self.folder} is replaced over and over", hint="open it again")


def _held(folder: Path) -> int | None:
    """Return a descriptor of the folder that is there now, held; `OSError` if there is none."""
    deadline = time.monotonic() + GAP
    while True:
        try:
            descriptor = open_held(folder)
        except FileNotFoundError:
            # A writer without a step for it has taken the older one away, and brings the newer.
            place = Path(os.path.realpath(folder))
            if time.monotonic() > deadline:  # or it was killed between the two
                sweep(place)
            if not (place.exists() or marked(place)):
                raise
            time.sleep(STEP)
            continue
        if descriptor is None or is_at(descriptor, folder):
            return descriptor
        os.close(descriptor)  # it was replaced before it was held


def _let_go(descriptor: int, folder: Path) -> None:
    """Close a folder; one that was replaced meanwhile is not needed any more."""
    replaced = not is_at(descriptor, folder)
    os.close(descriptor)
    if replaced:
        sweep(Path(os.path.realpath(folder)))


# ------------------------------------------------------------------ writing


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a new folder that takes the place of ``target`` when the block ends.

    Whatever ends the block early, an error or Ctrl-C, leaves ``target`` as it was. An older folder
    hands on its mode and its owner. `OSError` if the target cannot be written.
    """
    target = Path(os.path.realpath(target))
    sweep(target)
    fresh = descriptor = None
    try:
        with uninterrupted():
            fresh, descriptor = _new_folder(lambda: mark(target, "new"))
        yield fresh
        if descriptor is not None:
            with contextlib.suppress(FileNotFoundError):
                become(descriptor, target.stat())
        sync(fresh)
        _put(fresh, target)
        sync(target.parent)
    finally:
        surely(lambda: _clear(fresh, descriptor))
        if descriptor is not None:
            os.close(descriptor)
        sweep(target)


def _clear(fresh: Path | None, descriptor: int | None) -> None:
    """Remove what stands where a new folder was made."""
    with uninterrupted():
        if fresh is None:
            return
        if descriptor is None or is_at(descriptor, fresh):  # it did not come into its place
            remove_folder(fresh)
        else:  # what is there now is the older one
            remove_left_over(fresh, age=0.0)


def _new_folder(name: Callable[[], Path]) -> tuple[Path, int | None]:
    """Return a new folder and the descriptor that holds it, where the system has such."""
    while True:
        fresh = name()
        fresh.mkdir()
        try:
            descriptor = open_held(fresh)
        except FileNotFoundError:
            continue  # somebody took it for left over before it was held
        if descriptor is None or is_at(descriptor, fresh):
            return fresh, descriptor
        os.close(descriptor)


def _put(fresh: Path, target: Path) -> None:
    """Rename a folder over another one, which then stands where the first did, or is gone."""
    for _ in range(TRIES):
        try:
            os.rename(fresh, target)  # over nothing, or over an empty folder
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EACCES):
                raise
            if not target.is_dir():
                raise
        with contextlib.suppress(FileNotFoundError):  # another writer took it away
            if not exchange(fresh, target):
                _make_way(fresh, target)
            return
    raise OSError(f"{target} is replaced over and over")


def exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one step; ``False`` where the system cannot."""
    call = _exchanger()
    if call is None:
        return False
    if call(os.fsencode(one), os.fsencode(other)) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):  # the file system does not know it
        return False
    raise OSError(code, os.strerror(code), str(other))


def _exchanger() -> Callable[[bytes, bytes], int] | None:
    """Return the system's call that exchanges two paths, or ``None``."""
    try:
        library = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "linux":
            here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
            rename = library.renameat2
            return lambda one, other: rename(here, one, here, other, swap)
        if sys.platform == "darwin":
            rename = library.renamex_np
            return lambda one, other: rename(one, other, 2)  # RENAME_SWAP
    except (OSError, TypeError, AttributeError):
        pass
    return None


def _make_way(fresh: Path, target: Path) -> None:
    """Replace a folder by two renamings; whatever comes between puts the older one back."""
    old = mark(target, "old")
    held = open_held(target)  # nobody puts it back, or away, before this is over
    try:
        os.rename(target, old)
        try:
            os.rename(fresh, target)
        except BaseException:
            if not target.exists():
                os.rename(old, target)
            raise
    finally:
        if held is not None:
            os.close(held)
    remove_left_over(old, age=0.0)


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[Path]:
    """Yield a folder that no other process writes to meanwhile, or another one beside it."""
    descriptor = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = claim(folder)
        while descriptor is not None and not is_at(descriptor, folder):  # it was just removed
            os.close(descriptor)
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = claim(folder)
    except BlockingIOError:
        folder = folder.with_name(f"{folder.name}.{os.urandom(4).hex()}")
    except OSError:
        pass  # whoever writes there says why not
    try:
        yield folder
    finally:
        if descriptor is not None:
            os.close(descriptor)


# ------------------------------------------------------------------ temporary ones


def scratch() -> Path:
    """Return a new temporary folder; `drop` removes it, and so does the next call if nobody did.

    It is held until then, so that what a killed process left behind is told from it.
    """
    try:
        top = Path(tempfile.gettempdir())
    except FileNotFoundError as cause:  # it found none that can be written to
        raise ArtifactError(
            "there is no folder for temporary files",
            why=str(cause),
            hint="make room, or let TMPDIR name a folder that has some",
        ) from cause
    for path in top.glob(f"{SCRATCH}????????"):
        _drop_left_over(path)

    def name() -> Path:
        return top / f"{SCRATCH}{os.urandom(4).hex()}"

    with uninterrupted():
        path, descriptor = _new_folder(name)
        os.chmod(path, stat.S_IRWXU)
        if descriptor is not None:
            _SCRATCH[path] = descriptor
    return path


_SCRATCH: dict[Path, int] = {}  # the temporary folders of this process, and what holds them


def drop(path: Path) -> None:
    """Remove a temporary folder."""
    with uninterrupted():
        remove_folder(path)
        descriptor = _SCRATCH.pop(path, None)
        if descriptor is not None:
            os.close(descriptor)


@contextlib.contextmanager
def temporary() -> Iterator[Path]:
    """Yield a temporary folder that is gone when the block ends; `ArtifactError` on a full disk."""
    with with_room():
        path = None
        try:
            with uninterrupted():
                path = scratch()
            yield path
        finally:
            if path is not None:
                surely(partial(drop, path))


@contextlib.contextmanager
def with_room() -> Iterator[None]:
    """Tell what does not fit on the disk as such: `ArtifactError`."""
    try:
        yield
    except OSError as cause:
        if not is_full(cause):
            raise
        raise ArtifactError(
            "there is no room for files, such as temporary ones",
            why=str(cause),
            hint="make room, or let TMPDIR name a folder that has some",
        ) from cause


def is_full(error: OSError) -> bool:
    """Whether a disk, a quota or a limit on files leaves no room."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _drop_left_over(path: Path) -> None:
    """Remove a temporary folder of a process of the same user that ended without doing so."""
    try:
        mine = path.lstat().st_uid == os.getuid()
    except (OSError, AttributeError):
        return
    if mine:
        remove_left_over(path)


__all__ = [
    "Held",
    "claimed",
    "drop",
    "exchange",
    "is_full",
    "replacing",
    "scratch",
    "temporary",
    "with_room",
]
