"""Choosing what to keep: from masks, from zeros in the weights, and by a criterion.

Start at `make_plan`. Three plans are made and merged: what is given, what is zero anyway
(`narrows.passes.plans.zeros`), and what matters least: down to a count by a criterion
(`narrows.passes.plans.rank`), or within budgets by an allocator
(`narrows.passes.choosing.allocators`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from narrows.errors import PlanError, PlanUsageError, suggest
from narrows.ir.costfiles import load_costs
from narrows.ir.costs import Costs
from narrows.ir.program import Note, Program
from narrows.ir.structure.layers import SIDES, layers_of
from narrows.passes.choosing.allocators import catalog as allocators
from narrows.passes.choosing.allocators.base import Allocator
from narrows.passes.choosing.allocators.descent import descended
from narrows.passes.choosing.budgets import catalog as budgets
from narrows.passes.choosing.budgets.base import Goal, Part, Summed
from narrows.passes.choosing.criteria.base import Remembered
from narrows.passes.choosing.criteria.catalog import find, measures
from narrows.passes.choosing.evidence import informed
from narrows.passes.choosing.repair import Progress
from narrows.passes.plans.options import Choosing
from narrows.passes.plans.plan import ChannelPlan, refuse_nan
from narrows.passes.plans.rank import Options, Sides, hardly, ranked
from narrows.passes.plans.setting import Clock, Setting
from narrows.passes.plans.take_back import take_back
from narrows.passes.plans.zeros import zeros_in

CHOICES: dict[str, Sides] = {"input": ("inputs",), "output": ("outputs",), "both": SIDES}


def make_plan(
    program: Program,
    keep_inputs: Mapping[str, Any] | None,
    keep_outputs: Mapping[str, Any] | None,
    choosing: Choosing,
    progress: Progress | None = None,
    clock: Clock | None = None,
) -> ChannelPlan:
    """Return a plan of the program's channels.

    Args:
        program: The program.
        keep_inputs: Explicit masks by weight; see `ChannelPlan.given`. The criterion leaves a side
            of a weight alone that has one.
        keep_outputs: The same for outputs.
        choosing: How the others are chosen.
        progress: Told what is done, how far it is and of how much.
        clock: What runs a program on the target.

    Raises:
        PlanUsageError: A weight, glob, criterion, budget or allocator is unknown, or the costs are
            no cost table.
        PlanError: A weight holds NaN, there is no layer, the ratio finds nothing that could be
            removed, or a budget cannot be met.
    """
    setting = setting_of(program, keep_inputs, keep_outputs, choosing, progress, clock)
    plan, options, costs = setting.plan, setting.options, setting.costs
    if choosing.budgets:
        made = _within(setting)
    elif choosing.ratio is None:
        if not plan.removed:
            why = "the plan removes nothing: no masks, no zeros, no ratio"
            plan = plan.with_notes(Note(program.name, "idle", why))
        return plan
    else:
        sides = None if choosing.constrained else CHOICES[choosing.side or "input"]
        made = ranked(program, setting.given, plan, options, sides)
        if costs is not None:
            made = take_back(program, made, costs, choosing.batch or 1)
    return made.with_notes(*hardly(program, made, options))


def setting_of(
    program: Program,
    keep_inputs: Mapping[str, Any] | None,
    keep_outputs: Mapping[str, Any] | None,
    choosing: Choosing,
    progress: Progress | None = None,
    clock: Clock | None = None,
) -> Setting:
    """Return what a plan is made for; the arguments and errors are those of `make_plan`."""
    costs = _costs(choosing)
    refuse_nan(program)
    plan = given = ChannelPlan.given(program, keep_inputs, keep_outputs)
    layers = layers_of(program)
    if choosing.zeros:
        plan |= zeros_in(program, layers)
    criterion = find(choosing.criterion)
    ratios = _ratios(choosing.ratio, layers)
    include, exclude = (_globs(getattr(choosing, n), layers, n) for n in ("include", "exclude"))
    if (choosing.ratio is not None or choosing.budgets) and not choosing.by_losses:
        criterion = _informed(program, criterion, choosing)
    options = Options(
        Remembered(criterion), ratios, include, exclude, choosing.min_width, choosing.scope
    )
    return Setting(program, given, plan, options, choosing, costs, clock, progress)


def make_family(
    program: Program, choosings: Sequence[Choosing], progress: Progress | None = None
) -> list[ChannelPlan]:
    """Return the plans of one descent, each within the one before.

    Args:
        program: The program.
        choosings: Per plan the options, which differ in the shares of their budgets.
        progress: Told what is done, how far it is and of how much.
    """
    setting = setting_of(program, None, None, choosings[0], progress)
    layers = layers_of(program)
    made = descended(setting, [goals_of(choosing, layers) for choosing in choosings])
    return [plan.with_notes(*hardly(program, plan, setting.options)) for plan in made]


def _within(setting: Setting) -> ChannelPlan:
    """Return the plan within budgets."""
    choosing, costs = setting.choosing, setting.costs
    layers = layers_of(setting.program)
    goals = goals_of(choosing, layers)
    if costs is not None and not any(goal.budget.timed for goal in goals):
        what = f"costs have no effect with {' and '.join(choosing.budgets)}"
        raise PlanUsageError(what, hint="latency=0.8")
    named = choosing.allocator
    allocator = (
        allocators.usual(choosing, costs, goals) if named is None else allocators.find(named)
    )
    _refuse_groups(choosing, allocator, layers)
    return allocator.plan(setting, goals)


def _informed(program: Program, criterion: Any, choosing: Choosing) -> Any:
    """Return the criterion with what it needs to see of data; an error for data without effect."""
    if measures(criterion):
        sides = SIDES if choosing.constrained else CHOICES[choosing.side or "input"]
        return informed(program, criterion, choosing.data, choosing.loss, sides, choosing.outputs)
    given = {
        "data": choosing.data is not None, "loss": choosing.loss is not None,
        "outputs": choosing.outputs != "auto",
    }  # fmt: skip
    for name, idle in given.items():
        if idle:
            raise PlanUsageError(
                f"{name} has no effect with the criterion {criterion.name}",
                why="it scores by the weights alone",
                hint="narrows criteria lists what each needs",
            )
    return criterion


def _costs(choosing: Choosing) -> Costs | None:
    """Return the cost table to choose by; `PlanUsageError` where a latency has none."""
    costs = choosing.costs
    if isinstance(costs, str | os.PathLike):
        costs = load_costs(costs)
    if costs is not None and not isinstance(costs, Costs):
        raise PlanUsageError(
            f"costs is a cost table (Costs) or its path, got {type(costs).__name__}"
        )
    if costs is None and choosing.latency is not None:
        raise PlanUsageError(
            "a latency is one of a target, and none is named",
            hint='narrows.plan(program, latency=0.8, target="onnx")',
        )
    return costs


# ------------------------------------------------------------------ budgets


def goals_of(choosing: Choosing, layers: Mapping[str, Any]) -> list[Goal]:
    """Return what the budgets ask for; `PlanUsageError` for one that is unknown or no share."""
    found = []
    for name, given in choosing.budgets.items():
        budget = budgets.find(name)
        if isinstance(given, Mapping) and not given:
            raise PlanUsageError(
                f"{name} says of no layers what may be left",
                hint=f"{name}=0.7, or {name}={{'layer4.*': 0.7}}",
            )
        if budget.coupled and not choosing.constrained:
            raise PlanUsageError(
                f"{name} takes whole couplings",
                why="layers that choose for themselves make copies, which cost time",
                hint="leave out constrained=False",
            )
        for group, share in given.items() if isinstance(given, Mapping) else [("", given)]:
            number = isinstance(share, int | float) and not isinstance(share, bool)
            if not number or not 0 < share <= 1:
                raise PlanUsageError(
                    f"a budget is a share above 0 and up to 1, got {share!r}",
                    where=name,
                    why="it is relative to the unpruned program's",
                )
            one = budget if not group else _part(budget, group, choosing.groups or {}, layers)
            found.append(Goal(one, float(share)))
    return found


def _refuse_groups(choosing: Choosing, allocator: Allocator, layers: Mapping[str, Any]) -> None:
    """Raise for a group of no layers, and one that neither a budget nor the allocator asks for."""
    for name, globs in (choosing.groups or {}).items():
        _globs(globs, layers, f"the group {name!r}")
    used = {g for v in choosing.budgets.values() if isinstance(v, Mapping) for g in v}
    idle = [g for g in choosing.groups or () if g not in used and not allocator.groups]
    if idle:
        raise PlanUsageError(
            f"the group {idle[0]!r} has no effect",
            why="no budget names it",
            hint=f"macs={{{idle[0]!r}: 0.7}}, or allocator='thresholds'",
        )


def _part(budget: Any, group: str, groups: Mapping[str, Any], layers: Mapping[str, Any]) -> Part:
    """Return a budget of a group of layers alone."""
    if not isinstance(budget, Summed):
        raise PlanUsageError(
            f"{budget.name} is one of the whole program",
            where=group,
            why="only a sum over layers can be one of some of them",
            hint="macs, or params",
        )
    globs = _globs(groups.get(group, group), layers, f"the group {group!r}")
    return Part(budget, group, globs)


# ------------------------------------------------------------------ options


def _ratios(ratio: Any, layers: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    if ratio is None:
        return ()
    if not layers:
        raise PlanError(
            "a ratio has nothing to take channels from",
            why="the program has no layer with a weight: no convolution, linear layer or product",
        )
    given = ratio if isinstance(ratio, Mapping) else {"*": ratio}
    _globs(tuple(given), layers, "ratio")
    return tuple((glob, float(value)) for glob, value in given.items())


def _globs(globs: str | Sequence[str], layers: Mapping[str, Any], option: str) -> tuple[str, ...]:
    """Return globs as a tuple; one that matches no layer's weight is a `PlanUsageError`."""
    if not isinstance(globs, Iterable):
        raise PlanUsageError(f"{option} takes globs on weight names, got {globs!r:.40}")
    globs = (globs,) if isinstance(globs, str) else tuple(globs)
    for glob in globs:
        if not isinstance(glob, str):
            raise PlanUsageError(f"{option} takes globs on weight names, got {glob!r:.40}")
        if not any(fnmatchcase(name, glob) for name in layers):
            raise PlanUsageError(
                f"{option}: {glob!r} matches no weight of a layer",
                hint=_nearest(glob, layers) or f"the layers' weights are {_some(layers)}",
            )
    return globs


def _nearest(glob: str, names: Iterable[str]) -> str:
    """Return a suggestion: a name, or where a whole module was meant, a glob of one."""
    if not glob.endswith(".*"):
        return suggest(glob, names)
    parts = [name.split(".") for name in names]
    globs = (".".join([*p[:n], "*"]) for p in parts for n in range(1, len(p)))
    return suggest(glob, dict.fromkeys(globs))


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
