"""The contest at the end of a compile: the forms predicted to be fastest are run, and the winner
ships.

A cost table predicts a form's time to some per cent, on the machine and in the numbers that it was
measured for. So the best few by it, and always the unpruned form and that of the common mask, are
made, tried on the target's runtime here and timed in turns. What wins is then compiled, checked and
lowered like any form; the others leave their times in the manifest.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from narrows.backends import timing
from narrows.errors import NarrowsError, UsageError
from narrows.ir.graph import without_collection
from narrows.ir.meta import shape_of
from narrows.ir.program import Program, Pruning
from narrows.passes.forms.families import orders
from narrows.passes.forms.padding import padded
from narrows.passes.legalize_reads import LegalizeReads, table_of
from narrows.passes.pipeline import Instrument, Pipeline, PipelineResult
from narrows.passes.pruning.form import emit
from narrows.passes.pruning.rivals import UNPRUNED, Rival, rivals

if TYPE_CHECKING:
    from narrows.backends.base import Target, Track
    from narrows.backends.timing import Trial

BEST = 3  # forms that are tried for their prediction's sake
MAKING = 0.7  # seconds on the processor after which none are made but those that always take part
SECONDS = 0.25  # of timing
LATE = "left out, as making the others took long enough"
LEVEL = (
    0.01  # of a time: what is nearer to the fastest is level with it, and the prediction decides
)
# What the passes begin with that choose a form.
FIRST = ("prune-channels", "legalize-reads", "align-channels", "reorder-channels")
LARGEST = 1 << 28  # bytes of weights up to which forms are made to be timed

Quantize = Callable[[Program], Program]


@dataclass(frozen=True)
class Entry:
    """A form in a contest.

    Attributes:
        name: Its name (`narrows.passes.pruning.rivals`).
        predicted: The seconds that the cost table has for it.
        measured: The median of its seconds; ``None`` where it was not timed.
        turns: How often it was timed.
        failed: Why it was not timed.
        same_as: The form that is the same program, if one was timed in its place.
    """

    name: str
    predicted: float
    measured: float | None = None
    turns: int = 0
    failed: str = ""
    same_as: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values, times in milliseconds."""
        shown: dict[str, Any] = {"form": self.name, "predicted_ms": _ms(self.predicted)}
        if self.measured is not None:
            shown |= {"measured_ms": _ms(self.measured), "turns": self.turns}
        shown |= {k: v for k in ("failed", "same_as") if (v := getattr(self, k))}
        return shown


@dataclass(frozen=True)
class Contest:
    """What a contest came to.

    Attributes:
        winner: The name of the form that ships.
        entries: The forms, in the order of their predictions.
        batch: The number of examples.
        integers: Whether integer programs were timed.
        why: Why nothing was timed, and the prediction stands.
        seconds: How long it took, all in all.
    """

    winner: str
    entries: tuple[Entry, ...] = ()
    batch: int = 1
    integers: bool = False
    why: str = ""
    seconds: float = 0.0

    def entry(self, name: str) -> Entry | None:
        """Return a form's entry, or that of the form that is the same program."""
        found = next((e for e in self.entries if e.name == name), None)
        return self.entry(found.same_as) if found is not None and found.same_as else found

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        if self.why:
            return {"winner": self.winner, "why": self.why}
        return {
            "winner": self.winner,
            "batch": self.batch,
            "numbers": "integers" if self.integers else "floats",
            "forms": [e.to_json() for e in self.entries],
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True)
class Ran:
    """What passes made of a program.

    Attributes:
        result: The program that ships, with a report per pass.
        passes: The passes that make it: those that were given, or with the winner's form.
        contest: The contest that its form won; ``None`` where the passes choose no form: they know
            no costs, or nothing is pruned.
    """

    result: PipelineResult
    passes: Pipeline
    contest: Contest | None


def run(
    program: Program,
    passes: Pipeline,
    target: Target,
    instruments: Sequence[Instrument] = (),
    *,
    asked: bool | None = None,
    quantize: Quantize | None = None,
) -> Ran:
    """Return what passes make of a program, in the form that wins a contest.

    The contest is held once channels are gone, so that forms are found and ranked once, for it and
    for the passes that follow.

    Args:
        program: The captured program.
        passes: The passes that make the form that is predicted to be fastest.
        target: The target.
        instruments: What watches the passes.
        asked: Whether there is to be a contest; where there can be one unless given.
        quantize: Makes integers of a form, if it is integers that ship.
    """
    if asked is False or not _chooses(passes):
        if asked:
            raise UsageError(
                "a contest would have no effect",
                why="the passes do not choose among forms by a target's costs",
                hint="compile for a target that has a cost table, as onnx has",
            )
        return Ran(passes.run(program, instruments), passes, None)
    head = Pipeline(passes.passes[:1]).run(program, instruments)
    with without_collection():
        chosen, contest = _Ring(head.program, passes, target, quantize).decide(asked)
    rest = Pipeline(chosen.passes[1:]).run(head.program, instruments)
    reports = (*head.reports, *rest.reports)
    return Ran(PipelineResult(rest.program, head.initial, reports, {}), chosen, contest)


def _chooses(passes: Pipeline) -> bool:
    """Whether the passes prune, choose a form by costs that nobody named, and order it."""
    first = passes.passes[: len(FIRST)]
    if tuple(p.name for p in first) != FIRST:
        return False
    chooser: Any = first[1]
    return chooser.costs is not None and not chooser.form


@dataclass(frozen=True)
class _Ring:
    """Where one contest takes place.

    Attributes:
        program: What `prune-channels` made.
        passes: As for `run`.
        target: As for `run`.
        quantize: As for `run`.
    """

    program: Program
    passes: Pipeline
    target: Target
    quantize: Quantize | None

    def decide(self, asked: bool | None) -> tuple[Pipeline, Contest | None]:
        """Return the passes that make the form to ship, and the contest that it won."""
        costs = table_of(self.chooser.costs, self.chooser.name)
        assert costs is not None
        pruning = Pruning.of(self.program)
        if pruning.untouched and padded(pruning, costs) is None:
            return self.passes, None
        ranked = rivals(pruning, costs, self.chooser.batch, fill=self.chooser.fill)
        size = sum(t.nbytes for t in pruning.program.weights.values())
        if size > LARGEST:
            return self._predicted(
                ranked, f"the weights are {size:,} bytes, too large to try", asked
            )
        start = time.perf_counter()
        track = self.target.track()
        if track is None:
            return self._predicted(ranked, self.target.untimed, asked)
        with track as trial:
            entries = self._timed(contenders(ranked), trial)
        timed = [e for e in entries if e.measured is not None]
        if not timed:
            return self._predicted(ranked, f"no form runs: {entries[0].failed}", asked)
        best = min(e.measured for e in timed if e.measured is not None) * (1 + LEVEL)
        winner = next(e for e in timed if e.measured is not None and e.measured <= best)
        took = time.perf_counter() - start
        integers = self.quantize is not None
        result = Contest(winner.name, tuple(entries), self.chooser.batch, integers, "", took)
        return self.with_form(winner.name), result

    def _predicted(
        self, ranked: Sequence[Rival], why: str, asked: bool | None
    ) -> tuple[Pipeline, Contest]:
        if asked:
            raise UsageError("there can be no contest of forms", why=why, hint="leave it out")
        return self.passes, Contest(ranked[0].name, why=why)

    @property
    def chooser(self) -> LegalizeReads:
        """The pass that chooses a form."""
        found: Any = self.passes.passes[1]
        return found

    def with_form(self, name: str) -> Pipeline:
        """Return the passes that take one form."""
        passes = list(self.passes.passes)
        passes[1] = dataclasses.replace(self.chooser, form=name)
        return Pipeline(passes)

    def _timed(self, ranked: Sequence[Rival], trial: Track) -> list[Entry]:
        """Return the forms with their times, in the order in which they are given."""
        trials: dict[str, Trial] = {}
        entries: dict[str, Entry] = {}
        known: dict[Any, str] = {}
        always, start = standing(ranked), timing.CLOCK()
        for rival in sorted(ranked, key=lambda r: r.name not in always):
            entry = Entry(rival.name, rival.seconds)
            if rival.name not in always and timing.CLOCK() - start > MAKING:
                entries[rival.name] = dataclasses.replace(entry, failed=LATE)
                continue
            made = self._made(rival)
            twin = known.setdefault(_likeness(made), rival.name)
            if twin != rival.name:
                entries[rival.name] = dataclasses.replace(entry, same_as=twin)
                continue
            entries[rival.name] = entry
            try:
                whole = made if self.quantize is None else self.quantize(made)
                trials[rival.name] = trial(whole, self.chooser.batch)
            except NarrowsError as error:
                entries[rival.name] = dataclasses.replace(entry, failed=error.what)
        try:
            times = timing.race(trials, SECONDS) if trials else {}
        except NarrowsError as error:  # the runtime broke down, and with it what it said before
            return [dataclasses.replace(entries[r.name], failed=error.what) for r in ranked]
        for name, turns in times.items():
            middle = statistics.median(turns)
            entries[name] = dataclasses.replace(entries[name], measured=middle, turns=len(turns))
        return [entries[rival.name] for rival in ranked]

    def _made(self, rival: Rival) -> Program:
        """Return the program that the passes make of a form; it is the stages' own."""
        whole = rival.whole
        order = orders(whole)[0] if rival.name != UNPRUNED else {}
        if order:
            whole = whole.choose(dataclasses.replace(whole.choices, order=order))
        form = whole.program if rival.name == UNPRUNED else emit(whole)
        for last in self.passes.passes[len(FIRST) :]:
            form = last.run(form).program
        return form


def contenders(ranked: Sequence[Rival]) -> list[Rival]:
    """Return who takes part: the best by prediction, the unpruned form and the common mask's best.

    They are in the order of their predictions.
    """
    always = standing(ranked)
    return [r for i, r in enumerate(ranked) if i < BEST or r.name in always]


def standing(ranked: Sequence[Rival]) -> set[str]:
    """Return the names of those that are timed whatever is predicted, and the first one's."""
    common = [r.name for r in ranked if r.name.startswith("common")]
    return {ranked[0].name, UNPRUNED, *common[:1]}


def _likeness(program: Program) -> Any:
    """Return what is equal for programs that take the same time: operators, wiring, shapes."""
    return tuple(
        (n.name, str(n.target), shape_of(n), tuple(o.name for o in n.all_input_nodes))
        for n in program.graph.nodes
    )


def _ms(seconds: float) -> float:
    return float(f"{seconds * 1e3:.4g}")


__all__ = ["Contest", "Entry", "Ran", "contenders", "run"]
