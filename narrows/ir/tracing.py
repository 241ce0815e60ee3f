"""`alone`: what torch traces with, it traces with one thread at a time."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# torch.export and torch.onnx patch Python's modules and keep fake tensors for the whole process.
_TRACING = threading.RLock()


def alone(call: Callable[P, T]) -> Callable[P, T]:
    """Return a function that waits until no other thread is in one of its kind."""

    @functools.wraps(call)
    def waiting(*args: P.args, **kwargs: P.kwargs) -> T:
        with _TRACING:
            return call(*args, **kwargs)

    return waiting


__all__ = ["alone"]
