"""Which compensations there are: those of narrows, and those that packages add."""

from __future__ import annotations

from typing import Any

from narrows.errors import PlanUsageError, UsageError
from narrows.passes.choosing.compensations.base import Compensation
from narrows.registry import Registry

HERE = "narrows.passes.choosing.compensations"

COMPENSATIONS = Registry(
    "compensation",
    "narrows.compensations",
    {
        "least-squares": f"{HERE}.least_squares:LEAST_SQUARES",
        "symmetric": f"{HERE}.least_squares:SYMMETRIC",
        "moments": f"{HERE}.moments:MOMENTS",
        "mean": f"{HERE}.moments:MEAN",
    },
    UsageError,
    PlanUsageError,
)


def find(method: Any) -> Compensation:
    """Return a compensation from its name, or itself."""
    if isinstance(method, Compensation):
        return method
    return COMPENSATIONS.load(method)


__all__ = ["COMPENSATIONS", "find"]
