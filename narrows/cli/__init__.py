"""The command line: a thin front over `narrows.api`.

`main` runs one command. A command is a function of `narrows.cli.commands` or `narrows.cli.inspect`;
it
prints, and returns the exit code: 0 for done, 1 for a finding or a failure, 2 for wrong usage, 130
for Ctrl-C. Results go to standard output, everything else to standard error.
"""

from __future__ import annotations

import _thread
import contextlib
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from narrows.errors import NarrowsError, UsageError
from narrows.files.folders import is_full
from narrows.files.quoting import block

OK, FINDING, USAGE, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: The arguments after the program's name; those of the process unless given.
    """
    arguments = None
    try:
        from narrows.cli.parser import parse

        with _interruptible():
            arguments = parse(sys.argv[1:] if argv is None else argv)
            return arguments.run(arguments)
    except SystemExit as exit_:  # argparse has printed its usage, or the help that was asked for
        return exit_.code if isinstance(exit_.code, int) else USAGE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except NarrowsError as error:
        return _fail(arguments, error, str(error))
    except Exception as error:
        return _fail(arguments, error, _mistake(error))


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let no Ctrl-C get lost: Python drops one that falls into the end of some object's life.

    One that would come again when the command has ended is let go.
    """
    told = sys.unraisablehook
    coming: list[threading.Timer] = []

    def hook(lost: Any) -> None:
        if lost.exc_type is not KeyboardInterrupt:
            told(lost)
            return
        again = threading.Timer(0.01, _interrupt)  # when that end is over
        again.daemon = True
        coming.append(again)
        again.start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = told
        for again in coming:
            again.cancel()


def _interrupt() -> None:
    """Interrupt the main thread, also where it waits in the system for something."""
    main = threading.main_thread().ident
    if hasattr(signal, "pthread_kill") and main is not None:
        signal.pthread_kill(main, signal.SIGINT)
    else:  # Windows
        _thread.interrupt_main()


def _mistake(error: Exception) -> str:
    """Return what to say of an error that is none of the family."""
    if _lacks_memory(error):
        return (
            f"there is not enough memory: {error or type(error).__name__}\n"
            "  try: a smaller batch, less data at once, or a machine with more"
        )
    if isinstance(error, OSError) and is_full(error):
        return f"there is no room for what is written: {error}\n  try: make room, and again"
    return (
        f"narrows failed: {type(error).__name__}: {error}\n"
        f"  because this is a mistake in narrows or in a pass or model that it ran\n"
        f"  try: --traceback shows where"
    )


def _lacks_memory(error: Exception) -> bool:
    """Whether an error says, in the words of Python, C++ or torch, that memory is too small."""
    said = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and any(s in said for s in ("bad_alloc", "not enough memory", "can't allocate memory"))
    )


def _fail(arguments: object, error: Exception, message: str) -> int:
    """Print an error as text, and as JSON where that was asked for; return the exit code."""
    with contextlib.suppress(OSError):  # where it is printed to may be full, too
        if getattr(arguments, "traceback", False):
            traceback.print_exception(error, file=sys.stderr)
        else:
            print(block(message), file=sys.stderr)
        if getattr(arguments, "json", False):
            parts = {k: getattr(error, k, "") for k in ("what", "where", "why", "hint")}
            parts["what"] = parts["what"] or str(error)
            print(json.dumps({"error": {"kind": type(error).__name__, **parts}}))
    return USAGE if isinstance(error, UsageError) else FINDING
