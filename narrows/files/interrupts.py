"""Ctrl-C at a moment when it would leave something behind waits until the moment is over."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Let Ctrl-C wait for the end of the block.

    It is for a few quick steps that belong together: a folder is made and noted, a folder is
    removed. Python raises `KeyboardInterrupt` between any two of them, and what one has made the
    next would not know of. Only the main thread is interrupted, so in others nothing happens here.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    came: list[tuple[Any, ...]] = []
    signal.signal(signal.SIGINT, lambda *told: came.append(told))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            os.kill(os.getpid(), signal.SIGINT)


def surely(step: Callable[[], None]) -> None:
    """Take a last step in any case: if Ctrl-C came before it had begun, it is taken all the same.

    Args:
        step: What is done, in a block of `uninterrupted`. It may be done twice.
    """
    try:
        step()
    except KeyboardInterrupt:
        step()
        raise


__all__ = ["surely", "uninterrupted"]
