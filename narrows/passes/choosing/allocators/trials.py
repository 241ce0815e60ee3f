"""`apart`: how far the outputs of masked programs are from the unpruned one's."""

from __future__ import annotations

from collections.abc import Callable

import torch

from narrows.errors import PlanUsageError
from narrows.passes.choosing.divergence import Divergence
from narrows.passes.choosing.statistics import Batch, counted, examples_of, part, takes_any
from narrows.passes.plans.candidates import Candidates, Widths

EXAMPLES = 64  # are enough to tell plans apart


def apart(candidates: Candidates, name: str) -> Callable[[Widths], float]:
    """Return a function that gives widths the divergence of the masked program, in nats an example.

    Args:
        candidates: What may go, in a setting with data.
        name: Who asks, for the error.

    Raises:
        PlanUsageError: There is no data.
    """
    setting = candidates.setting
    if setting.parts is None:
        raise PlanUsageError(
            f"the allocator {name!r} tries plans on data",
            why="there is none" if setting.choosing.data is None else "there is a criterion",
            hint="data=[images] and no criterion",
        )
    program = setting.program
    batches = _some(candidates, setting.parts)
    with torch.no_grad():
        own = [program.run_flat(list(batch)) for batch in batches]
    divergence = Divergence.of(own[0], setting.choosing.outputs)
    examples = counted(program, batches)

    def far(widths: Widths) -> float:
        masked = candidates.plan(widths, name).masked(program)
        total = 0.0
        with torch.no_grad():
            for outputs, batch in zip(own, batches, strict=True):
                other = masked.run_flat(list(batch))
                total += divergence.between(outputs, other) * examples_of(program, batch)
        return total / examples

    return far


def _some(candidates: Candidates, parts: tuple[Batch, ...]) -> list[Batch]:
    """Return the first of the data."""
    program, result, seen = candidates.setting.program, list[Batch](), 0
    for batch in parts:
        if seen >= EXAMPLES:
            break
        length = examples_of(program, batch)
        some = min(length, EXAMPLES - seen) if takes_any(program) else length
        result.append(part(program, batch, 0, some))
        seen += some
    return result


__all__ = ["apart"]
