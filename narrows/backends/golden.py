"""Made-up inputs that are the same everywhere, and digests of what comes out of them.

An integer artifact keeps the digests of the interpreter's outputs, so that ``narrows check`` can
tell on any machine, without torch, whether its runtime computes the same bits.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from narrows.errors import ArtifactError

if TYPE_CHECKING:
    from narrows.backends.artifact import TensorSpec

BATCHES = (1, 3)

MOST = 1 << 28  # elements of an input that is made up


def draw(specs: Sequence[TensorSpec], batch: int) -> dict[str, np.ndarray]:
    """Return an input per spec: normal numbers, or zeros where they are whole; sizes that are free
    take ``batch``."""

    def sizes(shape: tuple[int | str, ...]) -> list[int]:
        return [batch if isinstance(s, str) else s for s in shape]

    if any(math.prod(sizes(s.shape)) > MOST for s in specs):
        raise ArtifactError("inputs of its sizes are too large to make up")
    generator = np.random.default_rng(0)
    try:
        return {
            s.name: generator.standard_normal(sizes(s.shape)).astype(s.dtype)
            if s.dtype.startswith("float")
            else np.zeros(sizes(s.shape), s.dtype)
            for s in specs
        }
    except (MemoryError, ValueError, TypeError) as error:
        raise ArtifactError("inputs of its sizes cannot be made up", why=str(error)) from error


def digests(arrays: Iterable[np.ndarray]) -> list[str]:
    """Return a SHA-256 of the type, the shape and the bytes of every array."""
    found = []
    for array in arrays:
        hashed = hashlib.sha256(f"{array.dtype.name} {list(array.shape)} ".encode())
        hashed.update(np.ascontiguousarray(array).tobytes())
        found.append(hashed.hexdigest())
    return found
