"""Choosing what to keep: from masks, from zeros in the weights, and by a criterion.

Start at `make_plan`. Three plans are made and merged: what is given, what is zero anyway
(`narrows.passes.plans.zeros`), and what a criterion finds to matter least, down to a count
(`narrows.passes.plans.rank`) or to a latency (`narrows.passes.plans.latency`).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from narrows.errors import PlanError, PlanUsageError, suggest, unknown_option
from narrows.ir.cost import CostTable
from narrows.ir.program import Note, Program
from narrows.passes.plans import criteria
from narrows.passes.plans.criteria import Criterion
from narrows.passes.plans.latency import Aim, aimed
from narrows.passes.plans.plan import ChannelPlan, refuse_nan
from narrows.passes.plans.rank import Options, Ranking, Sides, hardly
from narrows.passes.plans.take_back import take_back
from narrows.passes.plans.uses import SIDES, uses_of
from narrows.passes.plans.zeros import zeros_in

Ratio = float | Mapping[str, float]

CHOICES: dict[str, Sides] = {"input": ("inputs",), "output": ("outputs",), "both": SIDES}


def make_plan(
    program: Program,
    keep_inputs: Mapping[str, Any] | None = None,
    keep_outputs: Mapping[str, Any] | None = None,
    *,
    zeros: bool = True,
    criterion: str | Criterion | criteria.Score = "l1",
    ratio: Ratio | None = None,
    latency: float | None = None,
    costs: CostTable | None = None,
    batch: int | None = None,
    constrained: bool = True,
    side: str | None = None,
    scope: str = "local",
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    min_width: int = 1,
) -> ChannelPlan:
    """Return a plan of the program's channels.

    Args:
        program: The program.
        keep_inputs: Explicit masks by weight; see `ChannelPlan.given`. The criterion leaves a side
            of a weight alone that has one.
        keep_outputs: The same for outputs.
        zeros: Whether to take channels whose weights are zero, and such whose contribution is zero
            already. They change nothing that the program computes.
        criterion: ``l1``, ``l2``, a `Criterion`, or a function ``(program, use, side) -> scores``.
        ratio: The share of channels to remove, 0 to 1, rounded down; or one per glob on weight
            names, of which the first that matches counts: ``{"layer4.*": 0.7, "*": 0.5}``.
        latency: In place of a ratio the share of the unpruned program's latency to stay within,
            above 0 and up to 1, both as ``costs`` predict them. Whole couplings lose channels, so
            that as much score mass stays as can; see `narrows.passes.plans.latency`.
        costs: The cost table of the target that the latency is one of. With a ratio, channels are
            kept after all that the target has a place for anyway
            (`narrows.passes.plans.take_back.take_back`).
        batch: The number of examples that the costs are asked for; 1 by default.
        constrained: Whether to remove whole couplings, by the sum of a channel's scores in every
            weight that makes or reads it, averaged over those weights, so that no tensor has to be
            copied. Else every layer is ranked for itself.
        side: Unconstrained only: ``input`` (the default), ``output`` or ``both``. The model's own
            inputs and outputs are left alone.
        scope: ``local`` takes the ratio from every coupling or layer; ``global`` ranks the channels
            of all of them together, or of all that one glob gives its ratio, their scores divided
            by the mean of their coupling or layer.
        include: Globs on weight names: only layers of these names; constrained, only couplings that
            one of these weights makes.
        exclude: Globs on weight names: no layer, and no coupling with a layer, of these names.
        min_width: How many channels to leave at least.

    Raises:
        PlanUsageError: A weight, glob or criterion is unknown, or an option is out of range.
        PlanError: A weight holds NaN, there is no layer, the ratio finds nothing that could be
            removed, or the latency cannot be reached.
    """
    aim = _aim(latency, costs, batch, ratio)
    refuse_nan(program)
    plan = given = ChannelPlan.given(program, keep_inputs, keep_outputs)
    uses = uses_of(program)
    if zeros:
        plan |= zeros_in(program, uses)
    options = Options(
        criteria.find(criterion), _ratios(ratio, uses), _globs(include, uses, "include"),
        _globs(exclude, uses, "exclude"), _min_width(min_width), _scope(scope),
    )  # fmt: skip
    sides = _sides(side, constrained)
    if aim is not None:
        _refuse_free(options, constrained)
        made = aimed(program, uses, given, plan, options, aim)
        return made.with_notes(*hardly(program, made, options))
    if ratio is None:
        _refuse_idle(options, side)
        if not plan.removed:
            why = "the plan removes nothing: no masks, no zeros, no ratio"
            plan = plan.with_notes(Note(program.name, "idle", why))
        return plan
    chooser = Ranking(program, uses, given, plan, options)
    candidates = chooser.coupled(program.couplings()) if constrained else chooser.single(sides)
    plan |= chooser.chosen(candidates, "constrained" if constrained else "unconstrained")
    made = plan if costs is None else take_back(program, plan, costs, batch or 1)
    return made.with_notes(*hardly(program, made, options))


def refuse_unknown(options: Iterable[str]) -> None:
    """Raise `UsageError` for options that `narrows.plan` has not."""
    known = [*list(inspect.signature(make_plan).parameters)[1:], "target"]
    for name in options:
        if name not in known:
            raise unknown_option("plan", name, known)


# ------------------------------------------------------------------ options


def _ratios(ratio: Any, uses: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    if ratio is None:
        return ()
    if not uses:
        raise PlanError(
            "a ratio has nothing to take channels from",
            why="the program has no layer with a weight: no convolution, linear layer or product",
        )
    given = ratio if isinstance(ratio, Mapping) else {"*": ratio}
    for glob, value in given.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value <= 1:
            raise PlanUsageError(f"a ratio is a share from 0 to 1, got {value!r}", where=repr(glob))
    _globs(tuple(given), uses, "ratio")
    return tuple((glob, float(value)) for glob, value in given.items())


def _aim(latency: Any, costs: Any, batch: Any, ratio: Any) -> Aim | None:
    """Return what to aim at, checked; ``None`` without a latency."""
    for name, value in (("costs", costs), ("batch", batch)):
        if value is not None and latency is None and ratio is None:
            why = f"{name} has no effect without a latency or a ratio"
            raise PlanUsageError(why, hint="latency=0.8")
    if costs is not None and not isinstance(costs, CostTable):
        raise PlanUsageError(f"costs is a CostTable, got {type(costs).__name__}")
    batch = 1 if batch is None else batch
    if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
        raise PlanUsageError(f"batch is a whole number of at least 1, got {batch!r}")
    if latency is None:
        return None
    if ratio is not None:
        raise PlanUsageError(
            "ratio and latency exclude each other",
            why="a ratio says how many channels go, a latency lets the costs say so",
            hint="leave one of them out",
        )
    number = isinstance(latency, int | float) and not isinstance(latency, bool)
    if not number or not 0 < latency <= 1:
        why = "it is relative to the unpruned program's"
        raise PlanUsageError(f"a latency is above 0 and up to 1, got {latency!r}", why=why)
    if costs is None:
        raise PlanUsageError(
            "a latency is one of a target, and none is named",
            hint='narrows.plan(program, latency=0.8, target="onnx")',
        )
    return Aim(float(latency), costs, batch)


def _refuse_free(options: Options, constrained: bool) -> None:
    """Raise `PlanUsageError` for an option that a plan for a latency cannot heed."""
    if not constrained:
        raise PlanUsageError(
            "a latency takes whole couplings",
            why="layers that choose for themselves make copies, which cost time",
            hint="leave out constrained=False",
        )
    if options.scope == "global":
        why = "a latency compares the channels of all couplings anyway"
        raise PlanUsageError("scope has no effect with a latency", why=why)


def _globs(globs: str | Sequence[str], uses: Mapping[str, Any], option: str) -> tuple[str, ...]:
    """Return globs as a tuple; one that matches no layer's weight is a `PlanUsageError`."""
    if not isinstance(globs, Iterable):
        raise PlanUsageError(f"{option} takes globs on weight names, got {globs!r:.40}")
    globs = (globs,) if isinstance(globs, str) else tuple(globs)
    for glob in globs:
        if not isinstance(glob, str):
            raise PlanUsageError(f"{option} takes globs on weight names, got {glob!r:.40}")
        if not any(fnmatchcase(name, glob) for name in uses):
            raise PlanUsageError(
                f"{option}: {glob!r} matches no weight of a layer",
                hint=_nearest(glob, uses) or f"the layers' weights are {_some(uses)}",
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


def _min_width(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise PlanUsageError(f"min_width is a whole number of at least 1, got {value!r}")
    return value


def _scope(value: str) -> str:
    if value not in ("local", "global"):
        raise PlanUsageError(f"scope is 'local' or 'global', got {value!r}")
    return value


def _sides(side: str | None, constrained: bool) -> Sides:
    if side is not None and side not in CHOICES:
        raise PlanUsageError(f"side is one of {', '.join(CHOICES)}, got {side!r}")
    if side is not None and constrained:
        raise PlanUsageError(
            f"side={side!r} has no effect",
            why="a coupling goes with all that makes and reads it",
            hint="constrained=False ranks one side of each layer",
        )
    return CHOICES[side or "input"]


def _refuse_idle(options: Options, side: str | None) -> None:
    """Raise `PlanUsageError` for an option that does nothing without a ratio."""
    given = {
        "include": options.include, "exclude": options.exclude, "side": side,
        "scope": options.scope == "global", "min_width": options.min_width > 1,
    }  # fmt: skip
    for name, value in given.items():
        if value:
            why = f"{name} has no effect without a ratio or a latency"
            raise PlanUsageError(why, hint="ratio=0.5")
