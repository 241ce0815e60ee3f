"""`narrows.sense`: what the outputs lose to one change at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from narrows.errors import UsageError
from narrows.executors.catalog import find
from narrows.files.writing import as_path
from narrows.options import gather, takes
from narrows.passes.sensing.options import RATIOS, Sensing

if TYPE_CHECKING:
    from narrows.executors.base import Executor
    from narrows.ir.program import Program
    from narrows.passes.choosing.compensations.base import Compensation
    from narrows.passes.choosing.criteria.base import Criterion, Measuring, Score
    from narrows.passes.choosing.repair import Progress
    from narrows.passes.sensing.table import Sensitivity


@takes(Sensing)
def sense(
    program: Program,
    *,
    data: Iterable[Any],
    ratios: Iterable[float] = RATIOS,
    criterion: str | Criterion | Measuring | Score = "l1",
    constrained: bool = True,
    repair: str | Compensation | None = None,
    bits: Iterable[int] = (),
    outputs: str = "auto",
    evaluate: Callable[[Any], float] | None = None,
    executor: str | Executor | None = None,
    jobs: int | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """Return how sensitive a network is: what its outputs lose to one change at a time.

    Nothing is trained, and no label is read. Every change is a job of its own.

    >>> found = narrows.sense(program, data=[images], ratios=(0.25, 0.5), bits=(4,))
    >>> print(found)
    >>> found = narrows.sense(program, data=[images], jobs=4, cache="sensed")

    Args:
        program: A captured program.
        data: Batches of inputs like the real ones, each a tuple of inputs, a dict by name, or one
            tensor.
        ratios, ...: The options, those of `narrows.passes.sensing.options.Sensing`.
        evaluate: A function that is given a program, which is called as the model is, and returns
            what it is worth; for every change. For other processes it has to be one of a module.
        executor: Where jobs run: ``here``, ``processes``, ``ray``, or an `Executor`.
        jobs: How many run at once, what the executor has it unless given; several run in
            processes unless there is an executor.
        cache: A folder in which every result is kept as soon as it is there. The same call goes on
            from it, and one with more ratios or bits measures those alone. The function
            ``evaluate`` is known by its code and what it is made with, not by what it calls.
        progress: Called with what is done, how far it is and of how much.

    Raises:
        UsageError: There is no data, an argument is out of range, ``evaluate`` gives no number, or
            there is a ``cache`` and it or ``repair`` would not be known again in a later run.
        PlanError: Nothing of the network can be changed, or ``evaluate`` fails.
        ExecutorError: A job was lost time and again.
    """
    from narrows.api import refuse_model
    from narrows.passes.quant.batches import CHOOSING, kept
    from narrows.passes.sensing.run import sensed

    options = gather(Sensing, locals())
    chosen = find(executor, jobs)
    refuse_model(program, "sense")
    if evaluate is not None and not callable(evaluate):
        raise UsageError(f"evaluate is a function of a program, got {evaluate!r:.60}")
    folder = None if cache is None else as_path(cache, "the folder for results", UsageError)
    return sensed(program, kept(data, CHOOSING), options, evaluate, chosen, folder, progress)


__all__ = ["sense"]
