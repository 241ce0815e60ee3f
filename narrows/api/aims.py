"""The cost table that a plan aims by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from narrows.errors import UsageError

if TYPE_CHECKING:
    from narrows.backends.base import Target
    from narrows.ir.cost import CostTable


def costs_to_plan_by(target: str | Target, options: Mapping[str, Any]) -> CostTable:
    """Return the cost table for a latency; `UsageError` where there is no use for one, or none."""
    from narrows.backends import costs_of

    if options.get("latency") is None and options.get("ratio") is None:
        raise UsageError(
            "a plan has a target only if it has a latency or a ratio",
            hint="plan(program, latency=0.8, target=...), or leave out the target",
        )
    if options.get("costs") is not None:
        raise UsageError("target and costs exclude each other", why="a target has its own costs")
    costs = costs_of(target)
    if costs is None:
        name = target if isinstance(target, str) else target.name
        raise UsageError(
            f"the target {name!r} has no cost table",
            why="a latency is predicted by one",
            hint="plan with a ratio, or give a table as costs=CostTable.load(path)",
        )
    return costs
