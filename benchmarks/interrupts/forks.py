"""Commands run in forks of a process that has everything imported, and what became of them."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from narrows.cli import main as command

F_SETPIPE_SZ = getattr(fcntl, "F_SETPIPE_SZ", 1031)
ROOM = 1 << 20  # bytes that a command may say before it waits to be read


@dataclass
class Ended:
    """How a run ended: its exit code, or the number of the signal, negated; what it printed."""

    code: int
    text: str
    seconds: float


def run(
    words: tuple[str, ...],
    *,
    end: tuple[int, float] | None = None,
    prepare: Callable[[], None] | None = None,
) -> Ended:
    """Run a command in a fork.

    Args:
        words: The command line.
        end: A signal, and after how many seconds it comes.
        prepare: Called in the fork first.
    """
    start = time.perf_counter()
    # A pipe, not a file: what a command says must come through on a full disk, too.
    ours, theirs = os.pipe()
    with contextlib.suppress(OSError):  # macOS has pipes of 64 KiB
        fcntl.fcntl(theirs, F_SETPIPE_SZ, ROOM)
    child = os.fork()
    if child == 0:
        _child(words, prepare, theirs)
    os.close(theirs)
    status: int | None = None
    if end is not None:
        number, delay = end
        while status is None and time.perf_counter() - start < delay:
            time.sleep(0.002)
            found, ended = os.waitpid(child, os.WNOHANG)
            status = ended if found else None
        if status is None:
            os.kill(child, number)
    if status is None:
        _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    with os.fdopen(ours, "rb") as said:
        text = said.read().decode(errors="replace")
    return Ended(code, text, time.perf_counter() - start)


def _child(words: tuple[str, ...], prepare: Callable[[], None] | None, said: int) -> None:
    code = 70
    try:
        os.dup2(said, 1)
        os.dup2(said, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's jobs may ignore it
        if prepare is not None:
            prepare()
        code = command(list(words))
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    except KeyboardInterrupt as late:
        tail = late.__traceback__
        if tail is None or tail.tb_next is not None:
            traceback.print_exc()
        else:  # it came once the command had returned, which is no part of narrows
            code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            gc.collect()  # what the end of a process would let go of
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def listing() -> list[str]:
    """Return what lies in the current folder and among the temporary ones."""
    given = {"net.py", "x.npy", "tmp", "cache", "__pycache__"}
    here = {p.name for p in Path().iterdir()} - given
    return sorted([*here, *(f"tmp/{p.name}" for p in Path("tmp").glob("narrows-*"))])


# ------------------------------------------------------------------ the figures


@dataclass
class Figures:
    """What became of the runs of one command.

    Attributes:
        counts: How many ended how.
        faults: What should not be: lost, half, left over, an error that is none of the family.
    """

    name: str
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return them as JSON values."""
        return {"name": self.name, **self.counts, "faults": self.faults}
