"""Every allocator by name, as ``"module:Class"``: one is imported when it is used.

A package adds its own through the entry point group ``narrows.allocators``::

    [project.entry-points."narrows.allocators"]
    annealed = "mypackage.annealed:Annealed"
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from narrows.errors import PlanError, PlanUsageError
from narrows.ir.costs import Costs
from narrows.passes.choosing.allocators.base import Allocator
from narrows.passes.choosing.budgets.base import Goal, Summed
from narrows.passes.choosing.catalogs import Catalog
from narrows.passes.plans.options import Choosing
from narrows.registry import Registry

ROOM = "narrows.passes.choosing.allocators"
BUILTIN: dict[str, str] = {
    "cacp": f"{ROOM}.cacp:Cacp",
    "descent": f"{ROOM}.descent:Descent",
    "ladder": f"{ROOM}.ladder:Ladder",
    "global": f"{ROOM}.overall:Global",
    "thresholds": f"{ROOM}.thresholds:Thresholds",
    "uniform": f"{ROOM}.uniform:Uniform",
    "bisection": f"{ROOM}.bisection:Bisection",
    "knapsack": f"{ROOM}.knapsack:Knapsack",
    "pagcp": f"{ROOM}.pagcp:Pagcp",
    "precropping": f"{ROOM}.precropping:PreCropping",
    "reward": f"{ROOM}.reward:Reward",
    "spdy": f"{ROOM}.spdy:Spdy",
}

ALLOCATORS = Catalog(
    Registry("allocator", "narrows.allocators", BUILTIN, PlanError, PlanUsageError)
)


def find(allocator: Any) -> Allocator:
    """Return an allocator from its spelling, or itself; `PlanUsageError` with a suggestion."""
    return ALLOCATORS.one(allocator, Allocator)


def usual(choosing: Choosing, costs: Costs | None, goals: Sequence[Goal]) -> Allocator:
    """Return the allocator for options that name none."""
    budget = goals[0].budget
    tabled = costs is not None and budget.name == "measured" and not getattr(budget, "samples", 0)
    if len(goals) == 1 and (budget.name == "latency" or tabled):
        return find("ladder")
    summed = all(isinstance(goal.budget, Summed) for goal in goals)
    return find("descent" if summed and choosing.by_losses else "global")


__all__ = ["ALLOCATORS", "find", "usual"]
