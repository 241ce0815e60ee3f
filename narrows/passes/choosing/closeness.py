"""`Closeness`: how like a network's own outputs are those of what was made of it, on some data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from narrows.ir.program import Note, Program
from narrows.passes.choosing.divergence import Divergence, refuse_nan_outputs
from narrows.passes.choosing.statistics import Batch, examples_of


@dataclass(frozen=True)
class Closeness:
    """How like they are.

    Attributes:
        far: The divergence, mean over examples.
        same: The share of examples that are given the same class, of the output where it is least;
            ``None`` without classes.
        chance: Whether an output is no better than always to name the class that the network's own
            names most often, which takes no network.
    """

    far: float
    same: float | None
    chance: bool

    def notes(self, program: Program, made: str) -> list[Note]:
        """Return what is to be said of a network at chance.

        Args:
            program: The program.
            made: What was done to it.
        """
        if not self.chance:
            return []
        return [Note(program.name, "chance", f"the {made} network is at chance: it knows nothing")]


def closeness(
    base: Program, others: Sequence[Program], batches: Sequence[Batch], outputs: str
) -> tuple[list[Closeness], int]:
    """Return how like the outputs of some programs are, and the number of examples.

    Args:
        base: The unpruned program.
        others: What was made of it.
        batches: Flat inputs, batch by batch; no outputs are held but those of one.
        outputs: How outputs are compared: ``logits``, ``values`` or ``auto``.
    """
    far, count, divergence = [0.0 for _ in others], 0, None
    agree: list[dict[int, float]] = [{} for _ in others]  # per output with classes
    classes: dict[int, Any] = {}
    with torch.no_grad():
        for batch in batches:
            own = base.run_flat(list(batch))
            refuse_nan_outputs(base, own)
            divergence = divergence or Divergence.of(own, outputs)
            examples = examples_of(base, batch)
            count += examples
            for i, other in enumerate(others):
                found: list[Any] = other.run_flat(list(batch))
                far[i] += divergence.between(own, found) * examples
                for n, (same, shares) in enumerate(divergence.agreements(own, found)):
                    agree[i][n] = agree[i].get(n, 0.0) + same * examples
                    if not i:
                        classes[n] = classes.get(n, 0.0) + shares * examples
    result = []
    for total, shares in zip(far, agree, strict=True):
        least = min(shares.values()) / count if shares else None
        chance = any(same <= float(classes[n].max()) * (1 + 1e-9) for n, same in shares.items())
        result.append(Closeness(total / count, least, chance))
    return result, count


__all__ = ["Closeness", "closeness"]
