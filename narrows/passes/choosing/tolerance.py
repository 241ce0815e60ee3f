"""`tolerated`: the smallest plan whose loss a person accepts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from narrows.errors import PlanError, UsageError, users_code
from narrows.ir.program import Note, Program
from narrows.passes.choosing.judged import Judged
from narrows.passes.choosing.prepare import prepared
from narrows.passes.choosing.repair import Progress
from narrows.passes.choosing.search import Chosen, Search
from narrows.passes.choosing.statistics import PIECE, Batch, counted, pieces
from narrows.passes.plans.plan import ChannelPlan
from narrows.passes.quant.batches import CHOOSING, batches

STEP = 0.1  # of the multiply-accumulates, per round
HALVINGS = 2  # of the last step, which was too much


def tolerated(
    program: Program,
    data: Sequence[Any],
    drop: float,
    *,
    evaluate: Callable[[Any], float] | None = None,
    constrained: bool = False,
    outputs: str = "auto",
    progress: Progress | None = None,
) -> ChannelPlan:
    """Return the plan with the fewest multiply-accumulates that loses no more than so much.

    Args:
        program: The program as captured.
        data: Batches of inputs without labels.
        drop: How many points may be lost.
        evaluate: What a program is worth, in points, called with the unpruned program and with
            repaired ones; without it, how many percent of a quarter of the data are given the same
            class. That quarter is kept out of the search: on what it was solved for a network is
            better than it is.
        constrained: Whether channels go from all that read them at once.
        outputs: How outputs are compared: ``logits``, ``values`` or ``auto``.
        progress: Told what is done, how far it is and of how much.

    Raises:
        PlanError: The first step loses more.
        UsageError: The outputs are no logits and there is no function, or it gives no number.
    """
    given = [*batches(program, data, "choosing", CHOOSING)]
    held: list[Batch] = []
    if evaluate is None:
        given, held = apart(prepared(program), given)
    search = Search(
        program, given, {"macs": lambda reads: reads.macs}, constrained=constrained,
        outputs=outputs, progress=progress,
    )  # fmt: skip
    value = _agreement(search, held, outputs) if evaluate is None else _checked(evaluate)
    full = value(search.base)
    best: Chosen | None = None
    share, step = 1.0, STEP
    halvings = 0
    told = [(1.0, full)]
    while share - step > step / 2:
        before = search.state
        found = search.down(share - step)
        points = value(found.program)
        told.append((found.curve[-1][0], points))
        if progress is not None:
            progress(f"{told[-1][0]:.3f} of the macs: {points:.4g} of {full:.4g}", 1, 1)
        if full - points <= drop:
            stuck = found.curve[-1][0] > share - step / 2  # no layer has more to give
            best, share = found, found.curve[-1][0]
            if stuck:
                break
            continue
        if halvings == HALVINGS:
            break
        search.state = before
        halvings, step = halvings + 1, step / 2
    if best is None:
        raise PlanError(
            f"a drop of {drop:g} points is more than met by {1 - told[-1][0]:.0%} of the "
            f"multiply-accumulates: {full - told[-1][1]:.3g} points are lost",
            hint="a larger drop, more data, or constrained=False",
        )
    made = ChannelPlan.given(program, best.keep_inputs(), None, f"drop {drop:g}")
    text = ", ".join(f"{left:.3f}: {points:.4g}" for left, points in sorted(told, reverse=True))
    note = Note(program.name, "curve", f"share of the multiply-accumulates left: points: {text}")
    return made.with_notes(note, *best.reads.notes)


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


def _checked(evaluate: Callable[[Any], float]) -> Callable[[Program], float]:
    return lambda program: worth(evaluate, program)


def _agreement(search: Search, held: Sequence[Batch], outputs: str) -> Callable[[Program], float]:
    """Return how many percent of the data a program gives the class that the unpruned one does."""
    judged = Judged.of(search.base, held, outputs)
    if not any(judged.divergence.logits):
        raise UsageError(
            "a drop needs something to be measured by",
            why="the outputs are no logits, whose largest could be compared",
            hint="evaluate=function, macs=0.7, or outputs='logits'",
        )
    return lambda program: 100 * (judged.compared(program)[1] or 0.0)


def apart(program: Program, batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Return data to go by, and a quarter to see on what was lost, or won."""
    size = max(1, counted(program, batches) // 8)
    parts = pieces(program, batches, min(size, PIECE))
    return [p for i, p in enumerate(parts) if i % 4], list(parts[::4])


__all__ = ["apart", "tolerated", "worth"]
