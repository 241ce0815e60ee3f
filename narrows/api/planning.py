"""What `narrows.plan` does: its target's costs, and options given as a dict."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from narrows.api.stopwatch import Stopwatch
from narrows.errors import UsageError
from narrows.options import from_json
from narrows.passes.plans.options import Choosing

if TYPE_CHECKING:
    from narrows.backends.base import Target
    from narrows.executors.base import Executor
    from narrows.ir.costs import Costs
    from narrows.ir.program import Program
    from narrows.passes.choosing.repair import Progress
    from narrows.passes.plans.plan import ChannelPlan
    from narrows.passes.plans.within import Within

MASKS = ("keep_inputs", "keep_outputs")  # what a plan is given beside options and a target


def planned(
    program: Program,
    masks: Mapping[str, Any],
    choosing: Choosing,
    target: str | Target | None = None,
    progress: Progress | None = None,
    executor: str | Executor | None = None,
    jobs: int | None = None,
    integers: bool = False,
) -> ChannelPlan:
    """Return a plan.

    Args:
        program: The program.
        masks: ``keep_inputs`` and ``keep_outputs``, as for `narrows.plan`.
        choosing: The options.
        target: The target whose costs count.
        progress: Told what is done, how far it is and of how much.
        executor: Where plans are tried that do not hang on one another.
        jobs: How many at once.
        integers: Whether its costs are those of programs in integers.
    """
    from narrows.executors.catalog import find
    from narrows.passes.plans.choose import make_plan

    runs = None if executor is None and jobs is None else find(executor, jobs)
    choosing, clock = equipped(program, choosing, target, integers)
    idle = choosing.costs is None and choosing.latency is None and clock is None
    if choosing.batch is not None and idle:
        raise UsageError("batch has no effect without costs", hint='target="onnx"')
    given = masks.get(MASKS[0]), masks.get(MASKS[1])
    return make_plan(program, *given, choosing, progress, clock, runs)


def equipped(
    program: Program, choosing: Choosing, target: str | Target | None, integers: bool = False
) -> tuple[Choosing, Stopwatch | None]:
    """Return options with a target's costs, and what times programs on it; as for `planned`."""
    if target is None:
        return choosing, None
    choosing = dataclasses.replace(choosing, costs=costs_to_plan_by(target, choosing, integers))
    return choosing, Stopwatch(program, target, choosing.batch or 1)


def counted(
    program: Program, asked: Within, target: Target, small: Program, integers: bool = False
) -> str:
    """Return how much of each budget a program uses which was made of another, in words.

    Args:
        program: The program.
        asked: The budgets; those of what is lost count nothing in a program.
        target: The target, for budgets that are ones of a target.
        small: What passes made of the program.
        integers: Whether it is quantized next.
    """
    from narrows.ir.structure.layers import layers_of
    from narrows.passes.choosing.budgets.base import Lost
    from narrows.passes.choosing.budgets.catalog import find
    from narrows.passes.plans.choose import goals_of, setting_of

    costs = {n: v for n, v in asked.budgets.items() if not isinstance(find(n), Lost)}
    if not costs:
        return ""
    choosing = Choosing(limits=costs, groups=asked.groups)
    choosing, clock = equipped(program, choosing, target if timed(choosing) else None, integers)
    setting = setting_of(program, None, None, choosing, None, clock)
    goals = goals_of(choosing, layers_of(program))
    return ", ".join(goal.told(setting, small) for goal in goals)


def plan_for(
    program: Program,
    given: Mapping[str, Any],
    target: str | Target | None,
    integers: bool = False,
) -> ChannelPlan:
    """Return the plan of arguments as a dict, which are for ``target`` unless they name another,
    and for what its operators cost in integers if the program will be in them."""
    from narrows.backends import costs_of

    choosing = from_json(Choosing, given, "plan", (*MASKS, "target"))
    named = given.get("target")
    if named is None and choosing.costs is None:
        aims, ranks = bool(timed(choosing)), choosing.ratio is not None
        if target is not None and (aims or (ranks and costs_of(target, integers) is not None)):
            named = target
    return planned(program, given, choosing, named, integers=integers)


def timed(choosing: Choosing) -> list[str]:
    """Return the budgets that are ones of a target."""
    from narrows.passes.choosing.budgets.catalog import find

    return [name for name in choosing.budgets if find(name).timed]


def _by_loss_alone(choosing: Choosing) -> bool:
    """Whether nothing but what may be lost says how small a program has to be."""
    from narrows.passes.choosing.budgets.base import Lost
    from narrows.passes.choosing.budgets.catalog import find

    return bool(choosing.budgets) and all(isinstance(find(n), Lost) for n in choosing.budgets)


def costs_to_plan_by(
    target: str | Target, choosing: Choosing, integers: bool = False
) -> Costs | None:
    """Return the cost table of a target; `UsageError` where there is no use for one, or none.

    A latency that is measured needs none.
    """
    from narrows.backends import costs_of

    aims = timed(choosing)
    falls = _by_loss_alone(choosing)
    if not aims and choosing.ratio is None and not falls:
        raise UsageError(
            "a plan has a target only if it has a latency or a ratio",
            hint="plan(program, latency=0.8, target=...), or leave out the target",
        )
    if choosing.costs is not None:
        raise UsageError("target and costs exclude each other", why="a target has its own costs")
    costs = costs_of(target, integers)
    if costs is None and (choosing.ratio is not None or "latency" in aims or falls):
        name = target if isinstance(target, str) else target.name
        aim = "a ratio without a target, or" if "latency" not in aims else "a ratio, or"
        raise UsageError(
            f"the target {name!r} has no cost table",
            why="a plan for a target goes by one",
            hint=f"plan with {aim} give costs: a Costs, or the path of a saved table",
        )
    return costs
