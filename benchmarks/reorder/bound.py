"""What the cost table says a form could cost at best: no copies, every op at its best width."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.reorder.copies import moves
from benchmarks.reorder.forms import TARGETS
from narrows.backends.base import make_target, target_names
from narrows.ir.program import Program

STEPS = (4, 8, 16)  # channels
SHOWN = 12  # nodes


def bound(made: Program, pruned: Program, original: Program, runtime: str) -> dict[str, Any] | None:
    """Return the predicted seconds of the original, of a form ``made``, and of the bound.

    ``pruned`` has live channels only. For the bound, the copies that it has and the original has
    not cost nothing, nor do changes of layout that the original has not, what the runtime fuses in
    the original is fused and takes its share of the time, and every op may have any larger width
    that is cheaper. ``lost`` has the nodes at which the form loses most, with their seconds in the
    form and at the bound. ``None`` without a cost table.
    """
    table = load_table(runtime)
    if table is None:
        return None
    whole = {op.node: op for op in table.account(original, 1)}
    copies = {node.name for node in moves(pruned)} - whole.keys()
    parts = {}
    for op in table.account(pruned, 1):
        if op.node in copies or op.work is None:
            continue
        before = whole.get(op.node)
        layout = before.layout if before is not None else 0.0
        if before is not None and before.form in ("fused", "none"):
            parts[op.node] = inside(before, op)
        else:
            parts[op.node] = cheapest(table, op) + layout
    costs = {op.node: op.total for op in table.account(made, 1)}
    lost = sorted(costs, key=lambda node: parts.get(node, 0.0) - costs[node])[:SHOWN]
    return {
        "original": sum(op.total for op in whole.values()),
        "made": sum(costs.values()),
        "bound": sum(parts.values()),
        "lost": {node: [costs[node], parts.get(node, 0.0)] for node in lost},
    }


def load_table(runtime: str) -> Any:
    """Return the cost table of a runtime, or ``None`` if there is none."""
    target = TARGETS[runtime]
    return make_target(target).costs() if target in target_names() else None


def inside(before: Any, op: Any) -> float:
    """Return the cost of an op that is fused in the original: there, by the elements it has."""
    if before.work is None or not before.work.elements:
        return 0.0
    return before.seconds * min(1.0, op.work.elements / before.work.elements)


def cheapest(table: Any, op: Any) -> float:
    """Return the cost of an op at the best width of its size or above."""
    return min(op.seconds, *(table.seconds(work, alone=True) for work in wider(op.work)))


def wider(work: Any) -> Iterator[Any]:
    """Yield an op at its own and at slightly larger widths."""
    for inputs in ups(work.inputs):
        for outputs in ups(work.outputs):
            yield work.resized(inputs=inputs, outputs=outputs)


def ups(width: int) -> list[int]:
    """Return a width and the next multiples of usual steps."""
    return sorted({width, *(-(-width // step) * step for step in STEPS)})
