"""Which channels are kept: plans, how they are chosen, and the program they mean."""

from __future__ import annotations

from typing import Any

from narrows.ir.views import VIEWS


def _shrink(*args: Any) -> Any:
    from narrows.passes.plans.state import shrink

    return shrink(*args)


def _restore(*args: Any) -> Any:
    from narrows.passes.plans.state import restore

    return restore(*args)


VIEWS.update(shrink=_shrink, restore=_restore)
