"""`Judged`: a network's own outputs on data, which those of changed ones are held to.

Beside it what else says how good a network is: a person's function, and which data to judge by.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from narrows.errors import PlanError, PlanUsageError, UsageError, users_code
from narrows.ir.program import Program
from narrows.passes.choosing.divergence import Divergence, refuse_nan_outputs
from narrows.passes.choosing.statistics import PIECE, Batch, counted, examples_of, pieces


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
        for made in own:
            refuse_nan_outputs(program, made)
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


def worth(evaluate: Callable[[Any], float], program: Program) -> float:
    """Return what a person's function says a program is worth; `UsageError` unless a number,
    `PlanError` where it fails."""
    with users_code("evaluate failed", PlanError):
        given = evaluate(program)
    try:
        value = float(given)
    except (TypeError, ValueError) as cause:
        raise UsageError(
            "evaluate did not return a number", why=f"{type(cause).__name__}: {cause}"
        ) from cause
    if not math.isfinite(value):
        raise UsageError(f"evaluate returned {value}", why="plans are compared by it")
    return value


def apart(program: Program, batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Return data to go by, and a quarter to see on what was lost, or won.

    On what it was solved for a network is better than it is.

    Raises:
        PlanUsageError: There is one example, or one batch that cannot be cut.
    """
    size = max(1, counted(program, batches) // 8)
    parts = pieces(program, batches, min(size, PIECE))
    taught, held = [p for i, p in enumerate(parts) if i % 4], list(parts[::4])
    if not taught or not held:
        raise PlanUsageError(
            "there is too little data to see what is lost",
            why="a quarter of it decides that, and nothing may be solved for by it",
            hint="data=[images], some hundred of them",
        )
    return taught, held


__all__ = ["Judged", "apart", "worth"]
