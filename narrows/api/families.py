"""`narrows.family`: plans for several budgets out of one search."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from narrows.api import refuse_model
from narrows.errors import PlanUsageError
from narrows.passes.plans.options import Choosing

if TYPE_CHECKING:
    from narrows.ir.program import Program
    from narrows.passes.choosing.allocators.base import Allocator
    from narrows.passes.choosing.repair import Progress
    from narrows.passes.plans.plan import ChannelPlan


def family(
    program: Program,
    *,
    data: Iterable[Any],
    macs: Sequence[float] | None = None,
    params: Sequence[float] | None = None,
    allocator: str | Allocator | None = None,
    outputs: str = "auto",
    constrained: bool = True,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    min_width: int = 1,
    progress: Progress | None = None,
) -> list[ChannelPlan]:
    """Return a plan per budget, each of which keeps a part of what the one before keeps.

    One descent passes every larger budget on its way, so that all of them take little longer than
    the smallest alone. Each is the plan that `plan` makes of its budgets in steps through the
    larger ones. With ``allocator="cacp"`` they are those of one policy, which is trained once and
    asked for each budget; they need not lie within one another.

    >>> plans = narrows.family(program, macs=[0.9, 0.8, 0.7], data=[images], constrained=False)
    >>> small = [narrows.compensate(program, plan, data=[images]) for plan in plans]

    Args:
        program: The program.
        data: Batches of inputs like the real ones, without labels.
        macs: The shares of the multiply-accumulates that may be left, falling.
        params: The same of the weights. With both, each plan meets one of either.
        allocator: ``descent`` or ``cacp``, or one of one's own that has ``family``.
        outputs, constrained, include, exclude, min_width: As for `plan`.
        progress: Called with what is done, how far it is and of how much.

    Raises:
        PlanError: A budget cannot be met; the message says the closest that can.
        UsageError: There is no data or no budget, or the shares do not fall.
    """
    from narrows.passes.plans.choose import make_family

    refuse_model(program, "family")
    given = {"macs": macs, "params": params}
    shares = {name: _shares(name, value) for name, value in given.items() if value is not None}
    if not shares:
        raise PlanUsageError("a family has no budget", hint="macs=[0.9, 0.8, 0.7]")
    if len({len(own) for own in shares.values()}) > 1:
        counts = " and ".join(f"{len(own)} of {name}" for name, own in shares.items())
        raise PlanUsageError(f"each plan has one share of each budget, got {counts}")
    if data is None:
        raise PlanUsageError(
            "a family is found by what the outputs lose on data, and there is none",
            hint="data=[images]",
        )
    common: dict[str, Any] = {
        "data": data, "allocator": allocator, "outputs": outputs, "constrained": constrained,
        "include": include, "exclude": exclude, "min_width": min_width,
    }  # fmt: skip
    rows = zip(*shares.values(), strict=True)
    choosings = [Choosing(**common, **dict(zip(shares, row, strict=True))) for row in rows]
    return make_family(program, choosings, progress)


def _shares(name: str, given: Any) -> list[Any]:
    """Return the shares of a budget; `PlanUsageError` unless they are several that fall."""
    shares = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else []
    try:
        falls = bool(shares) and all(a >= b for a, b in pairwise(shares))
    except TypeError:
        falls = False
    if not falls:
        raise PlanUsageError(
            f"{name} of a family are shares that fall, got {given!r:.60}",
            why="each plan keeps a part of what the one before keeps",
            hint=f"{name}=[0.9, 0.8, 0.7]",
        )
    return shares


__all__ = ["family"]
