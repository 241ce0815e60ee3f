"""Every criterion by name, as ``"module:Class"``: one is imported when it is used.

A package adds its own through the entry point group ``narrows.criteria``::

    [project.entry-points."narrows.criteria"]
    entropy = "mypackage.entropy:Entropy"
"""

from __future__ import annotations

from typing import Any

from narrows.errors import PlanError, PlanUsageError
from narrows.passes.choosing.catalogs import Catalog
from narrows.passes.choosing.criteria.base import Criterion, Function
from narrows.registry import Registry

ROOM = "narrows.passes.choosing.criteria"
BUILTIN: dict[str, str] = {
    "l1": f"{ROOM}.magnitude:L1",
    "l2": f"{ROOM}.magnitude:L2",
    "random": f"{ROOM}.chance:Random",
    "lamp": f"{ROOM}.lamp:Lamp",
    "fpgm": f"{ROOM}.fpgm:Fpgm",
    "bn-scale": f"{ROOM}.bn_scale:BnScale",
    "adapruner": f"{ROOM}.adapruner:AdaPruner",
    "udfc": f"{ROOM}.udfc:Udfc",
    "mean-activation": f"{ROOM}.activity:MeanActivation",
    "variance": f"{ROOM}.activity:Variance",
    "apoz": f"{ROOM}.apoz:Apoz",
    "hrank": f"{ROOM}.hrank:HRank",
    "wanda": f"{ROOM}.wanda:Wanda",
    "obc": f"{ROOM}.obc:Obc",
    "lasso": f"{ROOM}.lasso:Lasso",
    "taylor": f"{ROOM}.effects:Taylor",
    "gauss-newton": f"{ROOM}.effects:GaussNewton",
    "diversity": f"{ROOM}.effects:Diversity",
    "fisher": f"{ROOM}.fisher:Fisher",
}

CRITERIA = Catalog(Registry("criterion", "narrows.criteria", BUILTIN, PlanError, PlanUsageError))


def find(criterion: Any) -> Any:
    """Return a criterion from its spelling, a function, or itself; `PlanError` with a suggestion.

    Args:
        criterion: ``l1``, ``random{seed=3}``, an object with ``name`` and ``score``, one with
            ``name``, ``measure`` and ``weigh``, or a function ``(program, layer, side) -> scores``.
    """
    if isinstance(criterion, str):
        return CRITERIA.made(criterion)
    if isinstance(criterion, Criterion) or measures(criterion):
        return criterion
    if callable(criterion):
        return Function(getattr(criterion, "__name__", "function"), criterion)
    raise PlanUsageError(
        "a criterion is a name, an object with name and score, or a function; "
        f"got {criterion!r:.60}"
    )


def measures(criterion: Any) -> bool:
    """Return whether a criterion scores by what layers see of data."""
    return all(hasattr(criterion, part) for part in ("name", "measure", "weigh"))
