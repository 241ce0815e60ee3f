"""`apart`: how far the outputs of masked programs are from the unpruned one's."""

from __future__ import annotations

from collections.abc import Callable

from narrows.errors import PlanUsageError
from narrows.passes.choosing.judged import Judged
from narrows.passes.choosing.statistics import first
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
    batches = first(program, setting.parts, EXAMPLES)
    judged = Judged.of(program, batches, setting.choosing.outputs)
    return lambda widths: judged.far(candidates.plan(widths, name).masked(program))


__all__ = ["apart"]
