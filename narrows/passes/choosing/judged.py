"""`Judged`: a network's own outputs on data, which those of changed ones are held to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from narrows.ir.program import Program
from narrows.passes.choosing.divergence import Divergence
from narrows.passes.choosing.statistics import Batch, counted, examples_of


@dataclass(frozen=True)
class Judged:
    """How far a network's outputs are from the unpruned one's on some batches.

    Attributes:
        batches: Flat inputs, batch by batch.
        own: What the unpruned network makes of them.
        divergence: How outputs are compared.
        examples: How many examples there are.
    """

    batches: Sequence[Batch]
    own: list[list[Any]]
    divergence: Divergence
    examples: int

    @staticmethod
    def of(program: Program, batches: Sequence[Batch], outputs: str) -> Judged:
        """Return it with what the unpruned program makes of the batches."""
        with torch.no_grad():
            own = [program.run_flat(list(batch)) for batch in batches]
        return Judged(batches, own, Divergence.of(own[0], outputs), counted(program, batches))

    def far(self, program: Program, weights: Mapping[str, Tensor] | None = None) -> float:
        """Return the divergence, mean over examples, of a program with some other weights."""
        return self.compared(program, weights)[0]

    def compared(
        self, program: Program, weights: Mapping[str, Tensor] | None = None
    ) -> tuple[float, float | None]:
        """Return the divergence, mean over examples, and the share of examples of the same class.

        The second is of the output where it is least, and `None` without classes.
        """
        given = None if weights is None else {**program.weights, **weights}
        far, same = 0.0, 0.0
        with torch.no_grad():
            for batch, own in zip(self.batches, self.own, strict=True):
                made = program.run_flat(list(batch), given)
                examples = examples_of(program, batch)
                far += self.divergence.between(own, made) * examples
                same += (self.divergence.agreement(own, made) or 0.0) * examples
        shared = same / self.examples if any(self.divergence.logits) else None
        return far / self.examples, shared


__all__ = ["Judged"]
