"""Plans that aim at a latency: as much score mass as a number of seconds can hold.

Every layer that sums over channels has a score mass of 1 (`narrows.passes.plans.mass`), and a
channel is worth the sum of its shares in the layers that read it. Whole couplings lose channels,
those that are worth the least first. How many each one loses is found with a quick model of the
seconds (`narrows.passes.plans.latency_model`, `narrows.passes.plans.latency_search`), so that much
mass stays and no coupling is left with next to none. Pruning is then really done, and the
latency predicted for their result corrects the model, until it is within `SLACK` below the one that
was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from narrows.errors import UnreachableError
from narrows.ir.costs import Costs
from narrows.ir.graph import without_collection
from narrows.ir.program import Note, Program
from narrows.ir.structure import structure_of
from narrows.ir.structure.branches import Branches
from narrows.passes.choosing.criteria.base import comparable
from narrows.passes.plans.homing import ROUNDING, homed
from narrows.passes.plans.latency_model import LatencyModel
from narrows.passes.plans.latency_search import Choice, WidthSearch
from narrows.passes.plans.loosening import Loosening, loosened
from narrows.passes.plans.mass import kept_mass, shares, summing
from narrows.passes.plans.plan import ChannelPlan
from narrows.passes.plans.rank import Candidate, Options, Part, Ranking
from narrows.passes.pruning.form import emit
from narrows.passes.pruning.stages import fastest, order

SLACK = 0.01  # how much less than asked for is near enough


@dataclass(frozen=True)
class Aim:
    """What a plan is to reach.

    Attributes:
        share: The latency over that of the unpruned program.
        costs: The target's cost table.
        batch: The number of examples.
        clock: The time of a program over the unpruned one's where it really runs; what the costs
            predict is taken for it without one.
        slack: How much less than asked for is near enough.
    """

    share: float
    costs: Costs
    batch: int = 1
    clock: Callable[[Program], float] | None = None
    slack: float = SLACK

    def seconds(self, program: Program) -> float:
        """Return the predicted latency of a program."""
        return sum(s for _, s in self.costs.predict(program, self.batch))

    def truth(self, program: Program, whole: float) -> float:
        """Return the latency of a pruned program, where the unpruned one's is ``whole``."""
        return self.seconds(program) if self.clock is None else whole * self.clock(program)

    def formed(self, program: Program, plan: ChannelPlan) -> Program:
        """Return what the stages of pruning make of a plan."""
        with without_collection():
            made = fastest(program, plan, self.costs, self.batch)
            return emit(order(made).pruning)


def aimed(
    program: Program,
    given: ChannelPlan,
    plan: ChannelPlan,
    options: Options,
    aim: Aim,
    *,
    coupled: bool = True,
) -> ChannelPlan:
    """Return a plan whose program takes at most a share of the unpruned program's latency.

    Args:
        program: The program.
        given: Explicit masks; the couplings that they touch are left alone.
        plan: These and what is zero anyway.
        options: The criterion and which couplings may lose channels.
        aim: The latency.
        coupled: Whether all layers that read a coupling read the same of it; else each chooses for
            itself where that keeps more (`narrows.passes.plans.loosening`).

    Raises:
        PlanError: No coupling may lose channels, or the latency cannot be reached; the message says
            which one can.
    """
    structure = structure_of(program)
    ranking = ByShare(program, structure.layers, given, plan, options)
    candidates = ranking.coupled(structure.ties)
    number = {id(c): i for i, c in enumerate(structure.ties)}
    ties = [number[id(c.coupling)] for c in candidates]
    additive = getattr(options.criterion, "additive", False)
    branches = Branches(program, ties if additive and options.min_width == 1 else ())
    choices = [
        Choice(tie, c.scores, options.min_width, additive, tie in branches.readers)
        for tie, c in zip(ties, candidates, strict=True)
    ]
    if aim.share < 1:
        ranking.refuse_none(candidates)
    model = LatencyModel(program, structure, aim.costs, aim.batch)
    trials = Trials(aim, ranking, candidates, WidthSearch(model, choices, branches.open_without))
    best = trials.run()
    if not coupled:
        steps = [model.steps[tie] for tie in ties]
        most = trials.whole * aim.share * (1 + ROUNDING)
        made = Loosening(
            program, ranking, candidates, steps, trials.really, most, len(summing(program))
        )
        loose, seconds = loosened(made, best.plan, best.seconds)
        best = replace(best, plan=loose, seconds=seconds)
    return best.plan.with_notes(*_notes(program, best, trials, options))


class ByShare(Ranking):
    """Ranks channels by their shares of the score mass."""

    def ahead(self, values: np.ndarray, gone: np.ndarray) -> np.ndarray:
        """Return what channels are worth, nothing where they are gone anyway."""
        return np.where(gone, 0.0, values)

    def weigh(self, parts: Sequence[Part]) -> np.ndarray:
        """Return what each channel is worth: its shares in all layers that sum over it.

        Scores that compare as they are count as they are.

        Where no layer does, as in the factors of attention, it is worth its shares in what makes
        it. A weight that several layers share counts once.
        """
        reading = [p for p in parts if p.side == "inputs" and p.use.sums]
        once = {(p.use.weight, p.side, p.own.tobytes()): p for p in reading or parts}
        worth = np.zeros(len(parts[0].own))
        as_it_is = comparable(self.options.criterion)
        for part in once.values():
            given = self.scores(part)
            worth += (given if as_it_is else shares(given))[part.own].sum(1)
        return worth


# ---------------------------------------------------------------------- trials


@dataclass(frozen=True)
class Trial:
    """Widths that were tried.

    Attributes:
        widths: Per coupling of the model.
        plan: The plan that gives them.
        seconds: The latency predicted for what the passes make of it.
    """

    widths: tuple[int, ...]
    plan: ChannelPlan
    seconds: float


@dataclass
class Trials:
    """Finds the seconds of the model that come out as the latency that is asked for.

    Attributes:
        aim: The latency.
        ranking: What makes plans.
        candidates: The couplings that may lose channels, in the order of the search's choices.
        search: What finds widths by the model.
        whole: The seconds of the unpruned program.
    """

    aim: Aim
    ranking: ByShare
    candidates: Sequence[Candidate]
    search: WidthSearch
    whole: float = field(init=False)
    _tried: dict[tuple[int, ...], Trial] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.whole = self.aim.seconds(self.ranking.program)

    def run(self) -> Trial:
        """Return the trial of the most worth within the latency; `PlanError` if there is none."""
        wanted = self.whole * self.aim.share
        if self.aim.share == 1 or self.ranking.plan.removed:  # it may be reached already
            whole = self.tried(2 * self.whole)
            if whole.seconds <= wanted * (1 + ROUNDING):
                return whole
        found = homed(
            lambda factor: self.tried(factor * wanted), lambda trial: trial.seconds / wanted,
            1 - self.aim.slack, 2 * self.whole / wanted,
        )  # fmt: skip
        fitting = [trial for trial in found if trial.seconds <= wanted * (1 + ROUNDING)]
        return max(fitting, key=self._worth) if fitting else self._least(wanted * (1 + ROUNDING))

    def _worth(self, trial: Trial) -> float:
        return self.search.value(trial.widths)

    def _least(self, wanted: float) -> Trial:
        """Return the cheapest trial; `PlanError` if it costs more than is asked for."""
        for budget in (0.0, 2 * self.whole):
            self.tried(budget)
        least = min(self._tried.values(), key=lambda t: t.seconds)
        if least.seconds <= wanted:
            return least
        by = "by the costs of" if self.aim.clock is None else "measured on"
        why = f"{by} {self.aim.costs.name} the least is {least.seconds / self.whole:.3f}"
        skipped = "; ".join(self.ranking.skipped[:3])
        raise UnreachableError(
            f"a latency of {self.aim.share:g} cannot be reached",
            where=self.ranking.program.name,
            why=why + (f"; what stays whole: {skipped}" if skipped else ""),
            hint="ask for more, or leave out include, exclude or min_width",
        )

    def tried(self, budget: float) -> Trial:
        """Return the trial of what the search finds for some seconds of the model."""
        widths = tuple(self.search.within(budget))
        if widths not in self._tried:
            plan = self.ranking.plan | self._plan(widths)
            self._tried[widths] = Trial(widths, plan, self.really(plan))
        return self._tried[widths]

    def _plan(self, widths: Sequence[int]) -> ChannelPlan:
        gone = []
        for choice in self.search.choices:
            every = np.arange(len(choice.values))
            gone.append(np.setdiff1d(every, choice.kept(widths[choice.coupling])))
        label = f"{self.ranking.options.criterion.name} latency {self.aim.share:g}"
        names = {p.use.weight for c in self.candidates for p in c.parts}
        return self.ranking.plan_of(self.candidates, gone, dict.fromkeys(names, label))

    def really(self, plan: ChannelPlan) -> float:
        """Return the latency of what the stages of pruning make of a plan."""
        return self.aim.truth(self.aim.formed(self.ranking.program, plan), self.whole)


def _notes(program: Program, best: Trial, trials: Trials, options: Options) -> list[Note]:
    whole, now = trials.whole, best.seconds
    mass = kept_mass(program, best.plan, options.criterion)
    predicted = (
        f"{1e3 * now:.4g} ms predicted, {now / whole:.3f} of the unpruned {1e3 * whole:.4g} ms"
    )
    measured = f"{now / whole:.3f} of the unpruned latency, measured"
    said = (
        f"{predicted if trials.aim.clock is None else measured}, "
        f"on {trials.aim.costs.name}, batch {trials.aim.batch}; {mass:.3f} of the score mass kept"
    )
    notes = [Note(program.name, "latency", said)]
    if not best.plan.removed:
        why = "the plan removes nothing: the program is as fast already"
        notes.append(Note(program.name, "idle", why))
    return notes


__all__ = ["Aim", "aimed"]
