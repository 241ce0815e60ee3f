"""Choosing what to keep: from masks, from zeros in the weights, and by a criterion.

Start at `make_plan`. Three plans are made and merged: what is given, what is zero anyway
(`narrows.passes.plans.zeros`), and what matters least: down to a count by a criterion
(`narrows.passes.plans.rank`), or within budgets by an allocator
(`narrows.passes.choosing.allocators`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from narrows.errors import PlanError, PlanUsageError, suggest
from narrows.executors.base import Executor
from narrows.ir.costfiles import load_costs
from narrows.ir.costs import Costs
from narrows.ir.program import Note, Program
from narrows.ir.structure.computed import settled
from narrows.ir.structure.layers import SIDES, layers_of
from narrows.passes.choosing.allocators import catalog as allocators
from narrows.passes.choosing.allocators.base import Allocator
from narrows.passes.choosing.budgets import catalog as budgets
from narrows.passes.choosing.budgets.base import Budget, Goal, Lost, Part, Summed
from narrows.passes.choosing.criteria.base import Remembered
from narrows.passes.choosing.criteria.catalog import find, measures
from narrows.passes.choosing.evidence import informed
from narrows.passes.choosing.prepare import prepared
from narrows.passes.choosing.reads import reads_of
from narrows.passes.choosing.repair import Progress
from narrows.passes.choosing.tolerance import tolerated
from narrows.passes.plans.options import Choosing
from narrows.passes.plans.plan import ChannelPlan, refuse_nan
from narrows.passes.plans.rank import Options, Sides, hardly, ranked
from narrows.passes.plans.setting import Clock, Setting
from narrows.passes.plans.take_back import take_back
from narrows.passes.plans.within import refuse_no_loss, refuse_no_share
from narrows.passes.plans.zeros import zeros_in
from narrows.passes.quant.batches import CHOOSING, kept

CHOICES: dict[str, Sides] = {"input": ("inputs",), "output": ("outputs",), "both": SIDES}


def make_plan(
    program: Program,
    keep_inputs: Mapping[str, Any] | None,
    keep_outputs: Mapping[str, Any] | None,
    choosing: Choosing,
    progress: Progress | None = None,
    clock: Clock | None = None,
    executor: Executor | None = None,
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
        executor: Where plans are tried that do not hang on one another.

    Raises:
        PlanUsageError: A weight, glob, criterion, budget or allocator is unknown, or the costs are
            no cost table.
        PlanError: A weight holds NaN, there is no layer, the ratio finds nothing that could be
            removed, or a budget cannot be met.
    """
    program = settled(program)
    setting = setting_of(program, keep_inputs, keep_outputs, choosing, progress, clock)
    setting = replace(setting, executor=executor)
    if executor is not None and not choosing.budgets:
        raise PlanUsageError("executor has no effect without a budget", hint="macs=0.7")
    plan, options, costs = setting.plan, setting.options, setting.costs
    if choosing.budgets:
        made = _within(setting)
        made = made.with_notes(*_extremes(program, made, goals_of(choosing, layers_of(program))))
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
    goals = goals_of(choosing, layers)
    judged = any(isinstance(goal.budget, Lost) for goal in goals)
    if judged and choosing.data is not None:
        choosing = replace(choosing, data=kept(choosing.data, CHOOSING))  # read more than once
    if choosing.zeros:
        plan |= zeros_in(program, layers)
    criterion = find(choosing.criterion)
    ratios = _ratios(choosing.ratio, layers)
    include, exclude = (_globs(getattr(choosing, n), layers, n) for n in ("include", "exclude"))
    options = Options(
        Remembered(criterion), ratios, include, exclude, choosing.min_width, choosing.scope
    )
    setting = Setting(program, given, plan, options, choosing, costs, clock, progress)
    for goal in goals:
        if (error := goal.budget.lacking(setting)) is not None:
            raise error
    if (choosing.ratio is None and not choosing.budgets) or choosing.by_losses:
        return setting
    informed = Remembered(_informed(program, criterion, choosing, judged))
    return replace(setting, options=replace(options, criterion=informed))


def make_family(
    program: Program, choosings: Sequence[Choosing], progress: Progress | None = None
) -> list[ChannelPlan]:
    """Return plans for several budgets, of one allocator that finds them together.

    Args:
        program: The program.
        choosings: Per plan the options, which differ in the shares of their budgets.
        progress: Told what is done, how far it is and of how much.
    """
    program = settled(program)
    first = replace(choosings[0], data=kept(choosings[0].data, CHOOSING))  # read more than once
    setting = setting_of(program, None, None, first, progress)
    layers = layers_of(program)
    allocator = allocators.find(first.allocator or "descent")
    made = allocator.family(setting, [goals_of(choosing, layers) for choosing in choosings])
    return [plan.with_notes(*hardly(program, plan, setting.options)) for plan in made]


def _within(setting: Setting) -> ChannelPlan:
    """Return the plan within budgets."""
    choosing, costs = setting.choosing, setting.costs
    layers = layers_of(setting.program)
    goals = goals_of(choosing, layers)
    lost = [isinstance(goal.budget, Lost) for goal in goals]
    driver = budgets.find("macs" if costs is None else "latency")
    if costs is not None and not all(lost) and not any(goal.budget.timed for goal in goals):
        what = f"costs have no effect with {' and '.join(choosing.budgets)}"
        raise PlanUsageError(what, hint="latency=0.8")
    named = choosing.allocator
    counted = [g for g in goals if not isinstance(g.budget, Lost)] or [Goal(driver, 1.0)]
    allocator = (
        allocators.usual(choosing, costs, counted) if named is None else allocators.find(named)
    )
    _refuse_groups(choosing, allocator, layers)
    if setting.executor is not None and not allocator.parallel:
        raise PlanUsageError(
            f"executor has no effect with the allocator {allocator.name!r}",
            why="what it tries hangs on what it tried before",
            hint="allocator='reward'",
        )
    if any(lost):
        _refuse_split(driver, choosing)
        return tolerated(setting, allocator, goals, driver)
    return allocator.plan(setting, goals)


def _extremes(program: Program, plan: ChannelPlan, goals: Sequence[Goal]) -> Iterator[Note]:
    """Yield that budgets leave everything, or nothing at all of what one of them counts."""
    if not plan.removed:
        asked = " and ".join(goal.label for goal in goals)
        yield Note(program.name, "idle", f"the plan removes nothing: {asked} leaves everything")
        return
    reads = reads_of(prepared(program))
    there = reads.left_by(plan)
    for goal in goals:
        counts = goal.budget if isinstance(goal.budget, Summed) else budgets.find("macs")
        if isinstance(counts, Summed) and not reads.cost(there, counts.each(reads)):
            whose = "its layers" if isinstance(counts, Part) else "all layers"
            text = f"nothing is left of the {counts.unit} ({goal.label}): {whose} are constants"
            yield Note(program.name, "nothing", text)


def _informed(program: Program, criterion: Any, choosing: Choosing, judged: bool) -> Any:
    """Return the criterion with what it needs to see of data; an error for data without effect.

    Args:
        program: The program.
        criterion: The criterion.
        choosing: The options.
        judged: Whether plans are looked at by the data anyway.
    """
    if measures(criterion):
        sides = SIDES if choosing.constrained else CHOICES[choosing.side or "input"]
        return informed(program, criterion, choosing.data, choosing.loss, sides, choosing.outputs)
    given = {
        "data": choosing.data is not None and not judged, "loss": choosing.loss is not None,
        "outputs": choosing.outputs != "auto" and not judged,
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
    """Return the cost table to choose by, if there is one."""
    costs = choosing.costs
    if isinstance(costs, str | os.PathLike):
        costs = load_costs(costs)
    if costs is not None and not isinstance(costs, Costs):
        raise PlanUsageError(
            f"costs is a cost table (Costs) or its path, got {type(costs).__name__}"
        )
    return costs


# ------------------------------------------------------------------ budgets


def goals_of(choosing: Choosing, layers: Mapping[str, Any]) -> list[Goal]:
    """Return what the budgets ask for; `PlanUsageError` for one that is unknown, or asks for what
    there is not."""
    found = []
    for name, given in choosing.budgets.items():
        budget = budgets.find(name)
        _refuse_split(budget, choosing)
        if isinstance(budget, Lost):
            refuse_no_loss(name, given, budget.most)
        else:
            refuse_no_share(name, given)
        same: dict[frozenset[str], str] = {}
        for group, share in given.items() if isinstance(given, Mapping) else [("", given)]:
            one = budget if not group else _part(budget, group, choosing.groups or {}, layers)
            if isinstance(one, Part):
                _refuse_twice(one, same, layers)
            found.append(Goal(one, float(share)))
    return found


def _refuse_split(budget: Budget, choosing: Choosing) -> None:
    """Raise where layers are to choose for themselves, and a budget is one of whole couplings."""
    if [*choosing.budgets] == [budget.name] == ["latency"] and _is_loosened(choosing):
        return
    if budget.coupled and not choosing.constrained:
        raise PlanUsageError(
            f"a budget of {budget.name} takes whole couplings",
            why="layers that choose for themselves make copies, which cost time",
            hint="leave out constrained=False; a latency of the cost table alone loosens couplings",
        )


def _is_loosened(choosing: Choosing) -> bool:
    """Whether a plan of whole couplings is gone on from (`narrows.passes.plans.loosening`)."""
    by_table = choosing.costs is not None and not choosing.by_losses
    return by_table and choosing.allocator in (None, "ladder")


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


def _refuse_twice(part: Part, same: dict[frozenset[str], str], layers: Mapping[str, Any]) -> None:
    """Raise for a second limit of the very same layers; the groups so far are added to."""
    own = frozenset(n for n in layers if any(fnmatchcase(n, glob) for glob in part.globs))
    if own in same:
        raise PlanUsageError(
            f"{part.budget.name} is given twice for the same layers: for {same[own]!r} "
            f"and for {part.group!r}",
            hint="leave one of them out",
        )
    same[own] = part.group


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
