"""Made-up inputs that are the same everywhere, and digests of what comes out of them.

An integer artifact keeps the digests of the interpreter's outputs, so that ``narrows check`` can
tell on any machine, without torch, whether its runtime computes the same bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from narrows.backends.artifact import TensorSpec
    from narrows.ir.program import Program

BATCHES = (1, 3)


def draw(specs: Sequence[TensorSpec], batch: int) -> dict[str, np.ndarray]:
    """Return an input per spec: normal numbers, or zeros where they are whole; sizes that are free
    take ``batch``."""

    def sizes(shape: tuple[int | str, ...]) -> list[int]:
        return [batch if isinstance(s, str) else s for s in shape]

    generator = np.random.default_rng(0)
    return {
        s.name: generator.standard_normal(sizes(s.shape)).astype(s.dtype)
        if s.dtype.startswith("float")
        else np.zeros(sizes(s.shape), s.dtype)
        for s in specs
    }


def digests(arrays: Iterable[np.ndarray]) -> list[str]:
    """Return a SHA-256 of the type, the shape and the bytes of every array."""
    found = []
    for array in arrays:
        hashed = hashlib.sha256(f"{array.dtype.name} {list(array.shape)} ".encode())
        hashed.update(np.ascontiguousarray(array).tobytes())
        found.append(hashed.hexdigest())
    return found


def keep(manifest: dict[str, Any], program: Program, specs: Sequence[TensorSpec]) -> None:
    """Enter digests of what the interpreter gives on made-up inputs into a manifest.

    Where the artifact's inputs have a free axis there are some per size of `BATCHES`, else the same
    for each.
    """
    import torch

    shown = manifest["structure"]["output_leaves"]
    free = any(isinstance(size, str) for spec in specs for size in spec.shape)
    kept: dict[str, list[str]] = {}
    for batch in BATCHES if free else BATCHES[:1]:
        arrays = draw(specs, batch)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        feed = [
            tensors.get(n.name, e)
            for n, e in zip(program.placeholders, program.examples, strict=True)
        ]
        with torch.no_grad():
            results = program.run_flat(feed)
        by_tensor = {
            leaf["tensor"]: r for leaf, r in zip(shown, results, strict=True) if "tensor" in leaf
        }
        kept[str(batch)] = digests(by_tensor[i].numpy() for i in sorted(by_tensor))
    first = kept[str(BATCHES[0])]
    manifest["golden"] = {str(batch): kept.get(str(batch), first) for batch in BATCHES}
