"""What the cost table says a form could cost at best: no copies, every op at its best width."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from narrows.ir.program import Program

COST = "narrows.ir.cost"
COPIES = ("gather", "slice", "concat")
STEPS = (4, 8, 16)


def bound(pruned: Program, original: Program, runtime: str) -> dict[str, float] | None:
    """Return the predicted seconds of the original, and of the pruned model at its bound.

    The widths of ``pruned`` are the live channels. The copies that it has and the original has not
    cost nothing here, and every op may have any larger width that is cheaper. ``None`` without a
    cost table.
    """
    if importlib.util.find_spec(COST) is None:
        return None
    cost = importlib.import_module(COST)
    table = cost.CostTable.default(runtime)
    whole = dict(table.predict(original))
    best = 0.0
    for name, seconds in table.predict(pruned):
        work = cost.work_of(pruned.node(name))
        if work is not None and work.kind in COPIES and name not in whole:
            continue
        best += seconds if work is None or not seconds else seconds * gain(table, work)
    return {"original": sum(whole.values()), "bound": best}


def gain(table: Any, work: Any) -> float:
    """Return the cost of an op at the cheapest width of its size or above, over that at its own."""
    own = table.seconds(work)
    if not own:
        return 1.0
    up = {(i, o) for i in ups(work.inputs) for o in ups(work.outputs)}
    tied = work.kind == "depthwise"  # inputs and outputs are the same channels
    costs = [
        table.seconds(work.resized(inputs=i, outputs=i if tied else o))
        for i, o in up
        if not tied or i == o
    ]
    return min([own, *costs]) / own


def ups(width: int) -> set[int]:
    """Return a width and the next multiples of usual steps."""
    return {width, *(-(-width // step) * step for step in STEPS)}
