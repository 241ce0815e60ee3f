"""`sensed`: every change tried, by whatever executor; what is known already is not tried again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from narrows.errors import PlanUsageError
from narrows.executors.base import Executor
from narrows.ir.program import Program
from narrows.ir.structure.computed import settled
from narrows.passes.choosing.compensations.base import Compensation
from narrows.passes.choosing.compensations.catalog import find
from narrows.passes.choosing.repair import Progress
from narrows.passes.choosing.solved import checkpoint
from narrows.passes.choosing.statistics import counted, pieces, split
from narrows.passes.plans.plan import fingerprint
from narrows.passes.quant.batches import CHOOSING, batches
from narrows.passes.sensing.changes import Changes
from narrows.passes.sensing.jobs import Job, Untouched, context_of
from narrows.passes.sensing.options import Sensing
from narrows.passes.sensing.store import Store
from narrows.passes.sensing.table import Row, Sensitivity
from narrows.passes.sensing.trial import Found, Trial
from narrows.version import VERSION


def sensed(
    program: Program,
    data: Sequence[Any],
    options: Sensing,
    evaluate: Callable[[Any], float] | None,
    executor: Executor,
    cache: Path | None,
    progress: Progress | None = None,
) -> Sensitivity:
    """Return what a network's outputs lose to one change at a time; see `narrows.sense`.

    Args:
        program: The network.
        data: Batches of inputs without labels.
        options: Which changes are tried.
        evaluate: What a program is worth, beside how far its outputs are.
        executor: Where they are tried.
        cache: A folder in which what was measured is kept, and looked for.
        progress: Told what is done, how far it is and of how much.
    """
    program = settled(program)
    flat = [*batches(program, data, "sensing", CHOOSING)]
    method = None if options.repair is None else find(options.repair)
    solved, measured = ([], flat) if method is None else split(program, flat)
    solved, measured = ([_own(b) for b in pieces(program, part)] for part in (solved, measured))
    changes = Changes.of(program, data, options)
    trial = Trial(
        program, changes.prepared, measured, solved, method, options.outputs, evaluate,
        None if executor.alone else 1,
    )  # fmt: skip
    context = ""  # nothing outlives the run, in which all jobs have the same
    if cache is not None:
        _refuse_clocked(method)
        context = context_of(
            program, measured, solved, outputs=options.outputs, repair=method, evaluate=evaluate
        )
    jobs = [Job.of(context, change) for change, _ in changes.rows]
    whole = Job.of(context, Untouched())
    found = _found(
        [*([] if evaluate is None else [whole]), *jobs], trial, executor, cache, progress
    )
    rows = (_known(row, found[job.key]) for job, (_, row) in zip(jobs, changes.rows, strict=True))
    criterion = options.criterion if options.ratios else ""
    return Sensitivity(
        program.name, fingerprint(program), checkpoint(program),
        criterion if isinstance(criterion, str) else getattr(criterion, "name", "function"),
        "" if method is None else method.name, counted(program, measured), tuple(rows),
        None if evaluate is None else found[whole.key].figure, changes.skipped, VERSION,
    )  # fmt: skip


def _refuse_clocked(method: Compensation | None) -> None:
    """Raise `PlanUsageError` for a method that finds more on a faster machine."""
    if method is not None and getattr(method, "clocked", False):
        raise PlanUsageError(
            f"results with the repair {method.name} cannot be kept for a later run",
            why="it ends by the clock, so what it finds hangs on how busy the machine is",
            hint="leave out cache; or say how many steps it takes, not how many seconds",
        )


def _found(
    jobs: Sequence[Job],
    trial: Trial,
    executor: Executor,
    cache: Path | None,
    progress: Progress | None,
) -> dict[str, Found]:
    """Return what is measured of every job, by its key; each is kept as soon as it is there."""
    store = Store(cache)
    unique = {job.key: job for job in jobs}
    found = store.known(unique)
    left = [job for key, job in unique.items() if key not in found]
    tell = progress or (lambda what, done, total: None)
    tell("sensing", len(found), len(unique))
    for number, result in executor.run(trial, left):
        key = left[number].key
        store.keep(key, result)
        found[key] = result
        tell("sensing", len(found), len(unique))
    return found


def _known(row: Row, found: Found) -> Row:
    return replace(row, divergence=found.divergence, agreement=found.agreement, figure=found.figure)


def _own(batch: Sequence[Any]) -> list[Any]:
    """Return a batch with memory of its own, not a view of a larger one: it may be sent."""
    return [v.detach().clone() if hasattr(v, "detach") else v for v in batch]


__all__ = ["sensed"]
