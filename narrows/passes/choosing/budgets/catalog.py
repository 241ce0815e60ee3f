"""Every budget by name, as ``"module:Class"``: one is imported when it is used.

A package adds its own through the entry point group ``narrows.budgets``::

    [project.entry-points."narrows.budgets"]
    energy = "mypackage.energy:Energy"
"""

from __future__ import annotations

from typing import Any

from narrows.errors import PlanError, PlanUsageError
from narrows.passes.choosing.budgets.base import Budget
from narrows.passes.choosing.catalogs import Catalog
from narrows.registry import Registry

ROOM = "narrows.passes.choosing.budgets"
BUILTIN: dict[str, str] = {
    "macs": f"{ROOM}.macs:Macs",
    "params": f"{ROOM}.params:Params",
    "channels": f"{ROOM}.channels:Channels",
    "memory": f"{ROOM}.memory:Memory",
    "latency": f"{ROOM}.latency:Latency",
    "measured": f"{ROOM}.measured:Measured",
    "accuracy_drop": f"{ROOM}.accuracy_drop:AccuracyDrop",
    "divergence": f"{ROOM}.divergence:FarOutputs",
}

BUDGETS = Catalog(Registry("budget", "narrows.budgets", BUILTIN, PlanError, PlanUsageError))


def find(budget: Any) -> Budget:
    """Return a budget from its spelling, or itself; `PlanUsageError` with a suggestion."""
    return BUDGETS.one(budget, Budget)


__all__ = ["BUDGETS", "find"]
