"""`Pipeline`: passes in order, with what each of them did.

Start at `Pipeline.run`. What watches the passes is an `Instrument`; `narrows.passes.instruments`
has the usual ones. Timing is built in.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import fx

from narrows.errors import PassError, PassUsageError, UsageError
from narrows.ir.costs import Costs
from narrows.ir.graph import without_collection
from narrows.ir.meta import Meta, shape_of
from narrows.ir.program import Draft, Mark, Note, Program
from narrows.ir.workload import macs as macs_of
from narrows.ir.workload import works_of
from narrows.passes import spelling
from narrows.passes.base import Pass, PassResult
from narrows.passes.catalog import lookup

if TYPE_CHECKING:
    from narrows.passes.plans.plan import ChannelPlan


class Instrument(Protocol):
    """Watches passes; it may raise, and it may write into ``result.measured``.

    Instruments run in the order they are given, so a later one sees what an earlier one measured.
    One that also has ``failed(pass_, program, result, error)`` is told of a pass that raised (its
    ``result`` is ``None``) or whose result an instrument refused.
    """

    def before(self, pass_: Pass, program: Program) -> None:
        """Be told that ``pass_`` is about to run on ``program``."""

    def after(
        self, pass_: Pass, program: Program, result: PassResult, seconds: float
    ) -> Iterable[Note] | None:
        """Be told what ``pass_`` made of ``program``, and how long it took.

        Notes that it returns become notes of the pass, and of the program.
        """


@dataclass(frozen=True)
class PassReport:
    """What one pass did, and the size of the program after it.

    Attributes:
        name: The pass's name; ``capture`` for the program that the pipeline was given.
        spelling: The pass with its options.
        nodes: How many nodes the program has, without those that only name a weight.
        parameters: How many numbers are trained.
        macs: Multiply-accumulates of one sample.
        measured: Relative errors against the reference, by dtype name.
        seconds: How long the pass took, without its instruments.
        changed: Whether it changed anything.
        notes: What it had to say.
    """

    name: str
    spelling: str
    nodes: int
    parameters: int
    macs: int
    measured: dict[str, float]
    seconds: float
    changed: bool
    notes: tuple[Note, ...] = ()

    @property
    def fidelity(self) -> float | None:
        """The error in the program's own precision, or ``None`` where nothing measured it."""
        return next(iter(self.measured.values()), None)

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "name": self.name,
            "spelling": self.spelling,
            "nodes": self.nodes,
            "parameters": self.parameters,
            "macs": self.macs,
            "measured": self.measured,
            "seconds": self.seconds,
            "changed": self.changed,
            "notes": [vars(n) for n in self.notes],
        }


@dataclass(frozen=True)
class PipelineResult:
    """What a pipeline made of a program.

    Attributes:
        program: The final program.
        initial: The size of the program it was given, as a report named ``capture``.
        reports: One report per pass.
        measured: Relative errors of the final program against the ``reference`` that
            `Pipeline.run` was given, by dtype name.
    """

    program: Program
    initial: PassReport
    reports: tuple[PassReport, ...]
    measured: dict[str, float]

    @property
    def notes(self) -> tuple[Note, ...]:
        """The notes of all passes, in order."""
        return tuple(n for r in self.reports for n in r.notes)

    def table(self) -> str:
        """Return the reports as a table, one line a pass."""
        return format_table((self.initial, *self.reports))


@dataclass(frozen=True, init=False)
class Pipeline:
    """Passes that run one after the other.

    ``str(pipeline)`` is its spelling, which `Pipeline.parse` reads back.

    Attributes:
        passes: The passes, in order.
    """

    passes: tuple[Pass, ...]

    def __init__(self, passes: Iterable[Pass] = ()) -> None:
        passes = tuple(passes)
        for pass_ in passes:
            if not isinstance(pass_, Pass):
                raise PassError(
                    f"a pipeline holds passes, got {type(pass_).__name__}",
                    hint='FoldBatchNorm() is a pass; Pipeline.parse("fold-batch-norm") reads text',
                )
        object.__setattr__(self, "passes", passes)

    @staticmethod
    def parse(text: str) -> Pipeline:
        """Return the pipeline that ``text`` spells; see `narrows.passes.spelling` for the grammar.

        `UsageError` for malformed text, an unknown pass or an unknown or ill-typed option.
        """
        return Pipeline(spelling.parse(text, lookup))

    @staticmethod
    def default(
        plan: Any = None, costs: Any = None, batch: int = 1, *, fold: bool | None = None
    ) -> Pipeline:
        """Return the usual pipeline: prune the channels of ``plan``, drop what is dead.

        Args:
            plan: A `ChannelPlan`, the path of a saved one, or ``None`` to remove only what is dead
                or constant anyway.
            costs: The cost table of a target, or its path: reads and widths are then chosen for
                that target. Without it the program is the smallest one.
            batch: The number of examples to choose them for.
            fold: Whether batch norms become part of the layers before them, which ends training; by
                default where there are costs. Lowering folds them in any case.
        """
        from narrows.passes.align_channels import AlignChannels
        from narrows.passes.choose_kernels import ChooseKernels
        from narrows.passes.eliminate_dead import EliminateDead
        from narrows.passes.fold_batch_norm import FoldBatchNorm
        from narrows.passes.legalize_reads import LegalizeReads
        from narrows.passes.prune_channels import PruneChannels
        from narrows.passes.reorder_channels import ReorderChannels

        first: tuple[Pass, ...] = (PruneChannels(plan=plan, order=True),)
        last: tuple[Pass, ...] = ()
        if costs is not None:
            reads = LegalizeReads(costs=costs, batch=batch)
            first = (PruneChannels(plan=plan), reads, AlignChannels(), ReorderChannels())
            if not isinstance(costs, Costs) or costs.has_spellings:
                last = (ChooseKernels(costs=costs, batch=batch),)
        folds = (FoldBatchNorm(),) if (costs is not None if fold is None else fold) else ()
        return Pipeline((*first, *folds, EliminateDead(), *last))

    def __str__(self) -> str:
        return ", ".join(str(p) for p in self.passes)

    def run(
        self,
        program: Program,
        instruments: Sequence[Instrument] = (),
        reference: Program | None = None,
    ) -> PipelineResult:
        """Run the passes in order and return the final program with a report per pass.

        The program it is given stays as it is; of a draft, a copy is taken. The final one names the
        passes in ``history`` and holds their notes.

        Args:
            program: The program to rewrite.
            instruments: What watches; see `narrows.passes.instruments`.
            reference: A program that the final one is compared with once, on the examples. Each
                pass has its own reference, which the `Numerics` instrument uses; this one spans
                them all.

        Raises:
            PassError: A pass needs another before it; the message lists all that is unmet.
        """
        if not isinstance(program, Program):
            raise PassError(
                f"passes run on a Program, got {type(program).__name__}",
                hint="narrows.capture(model, inputs) makes one",
            )
        self.check_order(program.history)
        program = program.copy().seal() if isinstance(program, Draft) else program
        initial = report("capture", "capture", program, PassResult(program, False), 0.0)
        reports = []
        with without_collection():
            for pass_ in self.passes:
                result, seconds = _run_one(pass_, program, instruments)
                reports.append(report(pass_.name, str(pass_), result.program, result, seconds))
                program = result.program
        measured = {}
        if reference is not None:
            from narrows.passes.instruments import measure

            measured = measure(program, reference)
        return PipelineResult(program, initial, tuple(reports), measured)

    def check_order(self, history: Iterable[str] = ()) -> None:
        """Raise `PassError` with every pass that needs another one before it.

        Args:
            history: Spellings of the passes that ran before this pipeline.
        """
        seen = {h.partition("{")[0] for h in history}
        unmet = []
        for pass_ in self.passes:
            unmet += [
                f"{pass_.name} needs {need} before it"
                for need in pass_.requires
                if need not in seen
            ]
            seen.add(pass_.name)
        if unmet:
            raise PassUsageError(
                "the pipeline's order is wrong",
                where=str(self),
                why="; ".join(unmet),
                hint="put the missing passes in front",
            )


def pipeline_for(
    plan: ChannelPlan | str | os.PathLike[str] | None,
    pipeline: Pipeline | str | None,
    costs: Costs | None = None,
    batch: int = 1,
    fold: bool | None = None,
) -> Pipeline:
    """Return the pipeline that a plan, a target's costs and a pipeline argument ask for together.

    A pipeline that is given takes the plan into its ``prune-channels`` pass if that has none, and
    the costs where a pass takes them; a plan that no pass would use is a `UsageError`, not silence.
    """
    if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
        raise UsageError(f"batch is a whole number of at least 1, got {batch!r}")
    if pipeline is None:
        return Pipeline.default(plan, costs, batch, fold=fold)
    passes = Pipeline.parse(pipeline) if isinstance(pipeline, str) else pipeline
    if not isinstance(passes, Pipeline):
        kind = type(pipeline).__name__
        raise PassUsageError(f"pipeline takes a Pipeline or its spelling, got {kind}")
    filled: dict[str, Any] = {} if costs is None else {"costs": costs, "batch": batch}
    passes = Pipeline(
        dataclasses.replace(p, **filled) if getattr(p, "costs", ...) is None else p
        for p in passes.passes
    )
    if plan is None:
        return passes
    takers = [p for p in passes.passes if getattr(p, "plan", ...) is None]
    if not takers:
        raise UsageError(
            "the plan would not be used",
            where=str(passes),
            why="no pass of the pipeline takes a plan, or each has one of its own",
            hint="add prune-channels to the pipeline",
        )
    given: Any = plan
    return Pipeline(dataclasses.replace(p, plan=given) if p in takers else p for p in passes.passes)


def _run_one(
    pass_: Pass, program: Program, instruments: Sequence[Instrument]
) -> tuple[PassResult, float]:
    """Run one pass under its instruments and record it in the program."""
    result = None
    try:
        for instrument in instruments:
            instrument.before(pass_, program)
        start = time.perf_counter()
        returned = pass_.run(program)
        seconds = time.perf_counter() - start
        if not isinstance(returned, PassResult):
            raise PassError(
                f"{pass_.name} returned {type(returned).__name__}, not a PassResult",
                hint="end run() with `return PassResult(program, changed, notes)`",
            )
        made = returned.program.replace(
            history=(*program.history, str(pass_)),
            notes=(*program.notes, *returned.notes),
            marks=marks_of(program, returned.program, returned.remarks),
        )
        result = dataclasses.replace(returned, program=made, measured=dict(returned.measured))
        for instrument in instruments:
            said = instrument.after(pass_, program, result, seconds)
            result = _noted(result, said or ())
    except Exception as error:
        for instrument in instruments:
            failed = getattr(instrument, "failed", None)
            if failed is not None:
                with contextlib.suppress(Exception):  # the pass's own error is the one to see
                    failed(pass_, program, result, error)
        raise
    return result, seconds


def _noted(result: PassResult, said: Iterable[Note]) -> PassResult:
    """Return a result with what an instrument said of it."""
    notes = tuple(said)
    if not notes:
        return result
    program = result.program.replace(notes=(*result.program.notes, *notes))
    return dataclasses.replace(result, program=program, notes=(*result.notes, *notes))


def marks_of(old: Program, new: Program, remarks: Mapping[str, str]) -> dict[str, Mark]:
    """Return what a pass that made ``new`` of ``old`` did to each node, by name."""
    if new.graph is old.graph:  # new weights only, or nothing at all
        return {}
    marks: dict[str, Mark] = {}
    before = {node.name: (shape_of(node), _weights(node)) for node in old.graph.nodes}
    refitted: set[fx.Node] = set()
    for node in new.graph.nodes:
        shape = shape_of(node)
        known = node.name in before
        was, weights = before[node.name] if known else (shape, [])
        changed = was if was != shape else None
        if node.op == "get_attr":
            if changed or not known:
                refitted.update(node.users)
        elif node.name in remarks:
            marks[node.name] = Mark(changed, remarks[node.name])
        elif node.op == "call_function":
            if not known:
                marks[node.name] = Mark(remark="new")
            elif changed:
                marks[node.name] = Mark(changed)
            elif node in refitted or weights != _weights(node):
                marks[node.name] = Mark(remark="other weights")
    return marks


def _weights(node: fx.Node) -> list[str]:
    return [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]


def macs(program: Program) -> dict[str, int]:
    """Return the multiply-accumulates of every node for one sample, by node name.

    With a free batch axis the example's batch is divided out; with a fixed one the whole batch
    counts.
    """
    batch = 1
    if program.dynamic_batch:
        sizes = [shape_of(n)[0] for n in program.placeholders if 0 in Meta(n).dynamic]
        batch = sizes[0] if sizes else 1
    works = works_of(program)
    calls = (n for n in program.graph.nodes if n.op == "call_function")
    return {n.name: macs_of(n, works) // batch for n in calls}


def report(
    name: str, spelling: str, program: Program, result: PassResult, seconds: float
) -> PassReport:
    """Return the report of one pass."""
    return PassReport(
        name=name,
        spelling=spelling,
        nodes=sum(n.op != "get_attr" for n in program.graph.nodes),
        parameters=program.parameter_count,
        macs=sum(macs(program).values()),
        measured=result.measured,
        seconds=seconds,
        changed=result.changed,
        notes=result.notes,
    )


def format_table(reports: Iterable[PassReport]) -> str:
    """Return reports as aligned text: pass, nodes, parameters, MACs, error, time, notes."""
    rows = [("pass", "nodes", "params", "MACs", "error", "time", "notes")]
    for entry in reports:
        error = "-" if entry.fidelity is None else f"{entry.fidelity:.1e}"
        took = "-" if entry.name == "capture" else f"{entry.seconds:.2f} s"
        size = format_count(entry.parameters), format_count(entry.macs)
        rows.append(
            (entry.name, str(entry.nodes), *size, error, took, str(len(entry.notes) or "-"))
        )
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    lines = []
    for name, *cells in rows:
        right = (c.rjust(w) for c, w in zip(cells, widths[1:], strict=True))
        lines.append("  ".join([name.ljust(widths[0]), *right]).rstrip())
    return "\n".join(lines) + "\n"


def format_count(count: int) -> str:
    """Return a count in three digits or so: ``40.8 M``."""
    value, units = float(count), ("", " k", " M", " G", " T")
    for unit in units:
        if value < 999.5 or unit == units[-1]:
            return f"{count}" if not unit else f"{value:.3g}{unit}"
        value /= 1000
    raise AssertionError


__all__ = [
    "Instrument",
    "PassReport",
    "Pipeline",
    "PipelineResult",
    "format_table",
    "macs",
]
