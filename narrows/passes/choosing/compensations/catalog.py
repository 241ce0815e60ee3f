"""Which compensations there are: those of narrows, and those that packages add.

A package adds its own through the entry point group ``narrows.compensations``::

    [project.entry-points."narrows.compensations"]
    shrink = "mypackage.shrink:Shrink"
"""

from __future__ import annotations

from typing import Any

from narrows.errors import PlanError, PlanUsageError
from narrows.passes.choosing.catalogs import Catalog
from narrows.passes.choosing.compensations.base import Compensation, LayerWise, Whole
from narrows.registry import Registry

ROOM = "narrows.passes.choosing.compensations"
BUILTIN = {
    "least-squares": f"{ROOM}.least_squares:LeastSquares",
    "symmetric": f"{ROOM}.least_squares:Symmetric",
    "moments": f"{ROOM}.moments:Moments",
    "mean": f"{ROOM}.moments:Mean",
    "udfc": f"{ROOM}.udfc:Udfc",
    "fold": f"{ROOM}.folding:Fold",
    "blocks": f"{ROOM}.blocks:Blocks",
    "distill": f"{ROOM}.distill:Distill",
}

COMPENSATIONS = Catalog(
    Registry("compensation", "narrows.compensations", BUILTIN, PlanError, PlanUsageError)
)


def find(method: Any) -> Compensation:
    """Return a compensation from its spelling, ``distill{seconds=60}``, or itself."""
    if isinstance(method, str):
        return COMPENSATIONS.made(method)
    if isinstance(method, LayerWise | Whole) and not isinstance(method, type):
        return method
    raise PlanUsageError(
        f"a compensation is a name, or an object with name, and solve or made; got {method!r:.60}",
        hint="method='least-squares'; narrows compensations lists them",
    )


def needs_data(method: Compensation) -> bool:
    """Return whether a compensation goes by data."""
    return isinstance(method, LayerWise) or method.needs_data


__all__ = ["COMPENSATIONS", "find", "needs_data"]
