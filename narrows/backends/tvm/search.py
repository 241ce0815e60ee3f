"""TVM's own search for schedules, MetaSchedule, beside our own rules.

The kernels that take most of the time are searched first, each for a share of the time as large as
its share of the network's. What is found replaces what the rules made where it is faster, in turns.

Only the proposals are MetaSchedule's. They come from a guarded child, which gets what was tried
before and makes one batch; candidates are timed as those of the rules are. (Its own builder would
take longer to start its processes than it gives them; its own runner waits without a limit.)
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import tvm
from tvm import s_tir, tirx

from narrows.backends.tvm import timing
from narrows.backends.tvm.cache import Kept
from narrows.backends.tvm.kernels import COLUMNS, DOT
from narrows.backends.tvm.schedules.loops import Kernel

# Changes when records that were kept before mean something else.
GENERATION = 1

BATCH = 16  # candidates between two looks at what was found
POPULATION = 64
GENERATIONS = 4
THINKING = 60.0  # seconds that a batch of proposals may take

# A kernel whose best candidate takes so many times as long as ours after two batches is left.
HOPELESS = 2.0

LEAST = 10.0  # seconds: a smaller share of the time may end before the first batch does
REMEMBERED = 192  # the best candidates of a kernel, from which a search goes on

# Two orders of a sum of 32-bit numbers are closer than that; a wrong schedule is not.
TOLERANCE = 1e-4

# Loading TVM's instructions for tensors takes half a minute; none is used here.
INSTRUCTIONS = "tvm.s_tir.tensor_intrin"


@dataclass
class Record:
    """What is known of a kernel; kept between runs.

    Attributes:
        seconds: How long it was searched.
        tried: How many candidates were timed.
        best: Pairs of CPU seconds and the steps of a schedule, as JSON data, the fastest first.
        ratio: The best one's time by that of the rules' schedule, in turns; ``None`` where that
            was not compared or the results differ.
        against: What the ratio is about.
    """

    seconds: float = 0.0
    tried: int = 0
    best: list[tuple[float, Any]] = field(default_factory=list)
    ratio: float | None = None
    against: str = ""


@dataclass(frozen=True)
class Work:
    """A kernel to search.

    Attributes:
        function: The kernel.
        made: The kernel with the rules' schedule.
        choice: The rules' choice, spelled.
        seconds: The CPU seconds of a call with it.
        calls: How often the network calls it.
    """

    function: tirx.PrimFunc
    made: tirx.PrimFunc
    choice: str
    seconds: float
    calls: int


def cost_model() -> str:
    """Return which of MetaSchedule's models ranks its candidates here: ``xgb`` or ``random``."""
    return "xgb" if importlib.util.find_spec("xgboost") else "random"


class Search:
    """Searches kernels.

    Attributes:
        found: The schedules that are faster than the rules', by kernel.
        failed: Why kernels got no proposals, by kernel.
        tried: How many candidates were timed, now and before.
    """

    def __init__(
        self,
        target: tvm.target.Target,
        seconds: float,
        cache: Kept,
        tell: Callable[[str], None],
    ) -> None:
        self.target, self.seconds, self.tell = target, seconds, tell
        self.kept = Kept(cache.folder, ".search.json")
        self.model = cost_model()
        self.found: dict[str, tirx.PrimFunc] = {}
        self.failed: dict[str, str] = {}
        self.tried = 0

    def run(self, kernels: Mapping[str, Work], end: float) -> None:
        """Search kernels until ``end``, a `time.monotonic`; see `found`."""
        open_ = {name: work for name, work in kernels.items() if not has_instruction(work.function)}
        weights = {name: work.seconds * work.calls for name, work in open_.items()}
        if weights and self.model == "random":
            self.tell("search: xgboost is not installed: candidates are drawn at random")
        order = sorted(weights, key=lambda n: -weights[n])
        chosen = _worth([weights[name] for name in order], self.seconds)
        pool, rest = self.seconds, sum(weights[name] for name in order[:chosen])
        late = False
        for number, name in enumerate(order, 1):
            work, share = open_[name], 0.0
            if number <= chosen:
                share = pool * weights[name] / max(rest, 1e-12)
                if not late and time.monotonic() >= end:
                    late = True  # what was found before is used nevertheless
                    self.tell(f"search: out of time after {number - 1} of {chosen} kernels")
            key = f"{GENERATION}|{tvm.__version__}|{self.target}|{work.function.script()}"
            record = _read(self.kept.read(key))
            place = f"search {number}/{chosen}: {name}"
            self._search(name, work, record, key, share, end, place)
            self.tried += record.tried
            self._decide(name, work, record, key)
            # What a kernel leaves goes to those after it.
            pool, rest = max(0.0, pool - record.seconds), rest - weights[name]

    def report(self) -> dict[str, Any]:
        """Return what was done, as JSON data."""
        return {
            "model": self.model,
            "tried": self.tried,
            "faster": sorted(self.found),
            "failed": self.failed,
        }

    def _search(
        self, name: str, work: Work, record: Record, key: str, share: float, end: float, place: str
    ) -> None:
        """Try batches of candidates until the kernel's share of the time is spent."""
        while record.seconds < share and (now := time.monotonic()) < end:
            if record.tried >= 2 * BATCH and not _promising(record, work):
                return
            against = f", best {record.best[0][0] / work.seconds:.2f} x" if record.best else ""
            self.tell(f"{place}, {record.tried} tried{against}")
            proposals = self._propose(work.function, record, end)
            if isinstance(proposals, str):
                self.tell(f"{place}: {proposals}")
                if not record.tried:
                    self.failed[name] = proposals
                return
            until = min(end, time.monotonic() + share - record.seconds)
            times = self._time(work.function, proposals, until)
            pairs = [(t, p) for t, p in zip(times, proposals, strict=False) if t is not None]
            record.best = sorted([*record.best, *pairs], key=lambda pair: pair[0])[:REMEMBERED]
            record.tried += len(times)
            record.seconds += time.monotonic() - now
            self.kept.write(key, vars(record))

    def _propose(self, function: tirx.PrimFunc, record: Record, end: float) -> list[Any] | str:
        """Return a batch of schedules as JSON data, or why there is none."""

        def start() -> timing.Measure:
            return lambda seed: _proposed(function, self.target, record, self.model, seed)

        made = timing.attempts([record.tried + 1], start, end, THINKING)
        if not made:
            return []  # out of time
        if made[0] is None:
            return "MetaSchedule crashed or hung"
        return made[0] or "MetaSchedule proposes nothing new"

    def _time(self, function: tirx.PrimFunc, proposals: list[Any], end: float) -> list[Any]:
        def start() -> timing.Measure:
            arguments = timing.operands(function)
            return lambda p: timing.timed(applied(function, p), arguments, self.target)

        return timing.attempts(proposals, start, end)

    def _decide(self, name: str, work: Work, record: Record, key: str) -> None:
        """Compare the best candidate with the rules' schedule, and take the faster one."""
        if not record.best:
            return
        seconds, steps = record.best[0]
        against = f"{work.choice} {seconds!r}"
        if record.against != against:
            pair = (applied(work.function, steps), work.made)

            def start() -> timing.Measure:
                return lambda pair: timing.compared(pair, self.target, TOLERANCE)

            # There is always time for that: without it the search was for nothing.
            end = time.monotonic() + 2 * timing.PATIENCE
            (record.ratio,) = timing.attempts([pair], start, end) or [None]
            record.against = against
            self.kept.write(key, vars(record))
        if record.ratio is not None and record.ratio < 1:
            self.found[name] = applied(work.function, steps)


def _worth(weights: list[float], seconds: float) -> int:
    """Return how many kernels are searched, of falling weights: as many as get `LEAST` each."""
    whole, count = 0.0, 0
    for number, weight in enumerate(weights, 1):
        whole += weight
        if seconds * weight >= LEAST * whole:
            count = number
    return max(count, min(1, len(weights)))


def _promising(record: Record, work: Work) -> bool:
    return bool(record.best) and record.best[0][0] < HOPELESS * work.seconds


def _read(kept: dict[str, Any]) -> Record:
    if set(kept) != set(vars(Record())):
        return Record()
    return Record(**kept)


def has_instruction(function: tirx.PrimFunc) -> bool:
    """Whether a kernel is written for a dot product of bytes, which MetaSchedule would not use."""
    return Kernel(function).with_role(DOT, COLUMNS) is not None


def applied(function: tirx.PrimFunc, steps: Any) -> tirx.PrimFunc:
    """Return a kernel with the steps of a schedule applied."""
    schedule = s_tir.Schedule(tvm.IRModule({"main": function}))
    s_tir.Trace.apply_json_to_schedule(steps, schedule)
    return schedule.mod["main"]


def _proposed(
    function: tirx.PrimFunc, target: tvm.target.Target, record: Record, model: str, seed: int
) -> list[Any] | str:
    """Return new candidates as JSON data, or why there are none; runs in a child."""
    if sys.modules.get("torch", True) is None:
        del sys.modules["torch"]  # xgboost looks for it, and takes what it finds for a module
    sys.modules.setdefault(INSTRUCTIONS, types.ModuleType(INSTRUCTIONS))
    try:
        context, database, ranked = _prepared(function, target, record, model, seed)
        spaces = context.generate_design_space()
        # Each batch comes from a context of its own, which does not know what was timed before.
        context.pre_tuning(2 * BATCH, 2 * BATCH, spaces, database, ranked)
        candidates = context.generate_measure_candidates() or []
    except Exception as error:  # TVM's own errors share no base
        lines = [line for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {lines[-1].strip() if lines else 'no message'}"
    proposals = [_plain(candidate.sch.trace.as_json()) for candidate in candidates]
    known = [steps for _, steps in record.best]
    return [steps for steps in proposals if steps not in known][:BATCH]


def _prepared(
    function: tirx.PrimFunc, target: tvm.target.Target, record: Record, model: str, seed: int
) -> tuple[Any, Any, Any]:
    """Return a context, a database of what was tried, and a model that knows it."""
    from tvm.s_tir import meta_schedule as ms

    # The plain rules for CPUs: those for a processor with VNNI want an instruction that the LLVM
    # of this TVM refuses.
    space = ms.space_generator.PostOrderApply(
        sch_rules="llvm", postprocs="llvm", mutator_probs="llvm"
    )
    strategy = ms.search_strategy.EvolutionarySearch(
        population_size=POPULATION,
        init_measured_ratio=0.5,
        init_min_unmeasured=POPULATION // 8,
        genetic_num_iters=GENERATIONS if model == "xgb" else 1,
    )
    context = ms.TuneContext(
        mod=function,
        target=_with_cores(target),
        space_generator=space,
        search_strategy=strategy,
        num_threads=1,
        rand_state=seed,
    )
    database = ms.database.MemoryDatabase()
    workload = database.commit_workload(context.mod)
    information = ms.arg_info.ArgInfo.from_entry_func(context.mod)
    tried, results = [], []
    for seconds, steps in record.best:
        schedule = s_tir.Schedule(context.mod)
        s_tir.Trace.apply_json_to_schedule(steps, schedule)
        row = ms.database.TuningRecord(
            schedule.trace, workload, [seconds], context.target, information
        )
        database.commit_tuning_record(row)
        tried.append(ms.search_strategy.MeasureCandidate(schedule, information))
        results.append(ms.runner.RunnerResult([seconds], None))
    if model == "random" or not tried:
        return context, database, ms.cost_model.RandomModel(seed=seed)
    ranked = ms.cost_model.XGBModel(num_warmup_samples=0, num_tuning_cores=1, verbose_eval=0)
    ranked.update(context, tried, results)
    return context, database, ranked


def _with_cores(target: tvm.target.Target) -> tvm.target.Target:
    """Return the target with its number of cores, into as many parts of which loops are split."""
    cores = {"num-cores": os.cpu_count() or 1}
    return tvm.target.Target({"kind": target.kind.name, **_plain(target.attrs), **cores})


def _plain(value: Any) -> Any:
    """Return JSON data of TVM's numbers, lists and maps."""
    if isinstance(value, (tirx.IntImm, tirx.FloatImm)):
        return value.value
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return str(value)
    if hasattr(value, "items"):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value]
