"""Generated networks through all of narrows: is anything wrong, and what is refused?

    python -m benchmarks.fuzz --graphs 10000 --seed 0 [--jobs 2] [--quantized 0.1]
    python -m benchmarks.fuzz --graphs 500 --seconds 600 --log fuzz.jsonl   # the same again goes on
    python -m benchmarks.fuzz --repro '{"steps": [["repeated", 0, 1]], ...}'

Every network gets masks of several kinds and is rewritten for no target, for ONNX Runtime's costs
and for PyTorch's; a share of them becomes integers, run in ONNX Runtime and, where it can be, in C.
What is compared with what stands in `benchmarks.fuzz.judge`. The work is done in processes of their
own, and each network has a time limit, so that a crash or a hang is a line of the result. The seed
decides everything.

Printed are the counts of right, wrong, caught by narrows' own checks, raw exceptions and refusals
with their reasons, and for what must not be a line that repeats it, made smaller where there is
time. The exit code is 1 if anything is wrong, caught or raw. Ctrl-C prints what is there.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.fuzz.apart import Outcome, outcomes
from benchmarks.fuzz.graphs import FORMS, NOTHING, Graph, Mask, from_line, to_line
from benchmarks.fuzz.judge import CAUGHT, OUTSIDE, RAW, REFUSED, RIGHT, WRONG, Finding, judge
from benchmarks.fuzz.shrink import shrunk, trouble
from benchmarks.machine import fingerprint, table, write

Task = tuple[Graph, int]
# How many networks a process tries: what PyTorch learns at a first capture serves those after it.
SHARE = 25

CODE = ("narrows", "benchmarks/fuzz", "tests/networks")  # what findings depend on


def work(task: Task) -> Iterator[Finding]:
    """Yield the findings on one network."""
    graph, masks = task
    yield from judge(graph, graph.masks(masks))


def warm() -> None:
    """Import what every process would, and hold it still, so that the processes share it."""
    import onnx
    import onnxruntime

    del onnx, onnxruntime
    graph = Graph(0, (("conv", 0, 1),))
    found = list(judge(graph, [Mask(NOTHING), Mask("both")]))
    if any(f.verdict != RIGHT for f in found):
        raise SystemExit(f"the simplest network fails: {found}")
    gc.collect()
    gc.freeze()


def findings_of(outcome: Outcome) -> list[Finding]:
    """Return what was found, a crash or a hang included."""
    found = list(outcome.found)
    if outcome.failure:
        last = found[-1] if found else Finding(RIGHT, "capture", Mask(NOTHING))
        found.append(Finding(RAW, f"after {last.stage}", last.mask, outcome.failure))
    return found


# ------------------------------------------------------------------ the log


class Log:
    """Findings by seed, one line each, in a file if one is named; what is in it is not redone.

    Every line names the code that found it. Findings of other code stop the run, unless they may be
    mixed.
    """

    def __init__(self, path: str | None, options: dict[str, Any], mixed: bool = False) -> None:
        self.path = None if path is None else Path(path)
        self.found: dict[int, list[Finding]] = {}
        self.codes: dict[int, str] = {}
        self.code = fingerprint(CODE)
        if self.path is None:
            return
        if self.path.exists():
            self._read(self.path, options)
            self._refuse_others(mixed)
        else:
            self.path.write_text(json.dumps({"options": options}) + "\n", encoding="utf-8")

    def _read(self, path: Path, options: dict[str, Any]) -> None:
        text = path.read_text(encoding="utf-8")
        if not text.endswith("\n"):  # the run was killed while it wrote
            with path.open("a", encoding="utf-8") as file:
                file.write("\n")
        first, *lines = text.splitlines()
        if json.loads(first)["options"] != options:
            raise SystemExit(f"{path} is of a run with other options: {first}")
        for line in lines:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            found = [Finding(**{**f, "mask": Mask(**f["mask"])}) for f in entry["found"]]
            self.found[entry["seed"]] = found
            self.codes[entry["seed"]] = entry.get("code", "unknown")

    def _refuse_others(self, mixed: bool) -> None:
        counts = Counter(code for code in self.codes.values() if code != self.code)
        if counts and not mixed:
            of = ", ".join(f"{count} graphs by {code}" for code, count in counts.most_common())
            raise SystemExit(
                f"{self.path} holds findings of other code than this, {self.code}: {of}. "
                "Name another log, or say --mixed to keep them and go on"
            )

    def add(self, seed: int, found: list[Finding], seconds: float) -> None:
        """Keep the findings of a seed."""
        self.found[seed], self.codes[seed] = found, self.code
        if self.path is not None:
            entry = {
                "seed": seed,
                "code": self.code,
                "seconds": round(seconds, 2),
                "found": [asdict(f) for f in found],
            }
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")


# ------------------------------------------------------------------ the run


class Progress:
    """One line that says how far it is; every half minute where it is no terminal."""

    def __init__(self, total: int) -> None:
        self.total, self.start, self.said = total, time.perf_counter(), 0.0

    def __call__(self, done: int, counts: Counter[str]) -> None:
        now, terminal = time.perf_counter(), sys.stderr.isatty()
        if not terminal and now - self.said < 30:
            return
        self.said = now
        bad = counts[WRONG], counts[CAUGHT], counts[RAW]
        text = (
            f"{done} of {self.total} graphs, {counts.total():,} claims: {bad[0]} wrong, "
            f"{bad[1]} caught, {bad[2]} raw; {now - self.start:.0f} s"
        )
        print(f"\r{text}" if terminal else text, end="" if terminal else "\n", file=sys.stderr)
        sys.stderr.flush()


def run(options: argparse.Namespace, log: Log) -> None:
    """Try every seed that is not in the log, for as long as there is time."""
    end = time.perf_counter() + (options.seconds or float("inf"))
    seeds = range(options.seed, options.seed + options.graphs)
    counts = Counter(f.verdict for found in log.found.values() for f in found)
    progress = Progress(options.graphs)

    def tasks() -> Iterator[Task]:
        for seed in seeds:
            if time.perf_counter() < end and seed not in log.found:
                yield Graph.drawn(seed, options.quantized), options.masks

    for outcome in outcomes(work, tasks(), options.jobs, options.limit, SHARE):
        found = findings_of(outcome)
        log.add(outcome.task[0].seed, found, outcome.seconds)
        counts.update(f.verdict for f in found)
        progress(len(log.found), counts)


# ------------------------------------------------------------------ the report


def summary(found: dict[int, list[Finding]]) -> str:
    """Return a line with the counts."""
    counts = Counter(f.verdict for one in found.values() for f in one)
    claims = sum(counts.values()) - counts[OUTSIDE]
    return (
        f"{len(found):,} graphs, {claims:,} claims: {counts[RIGHT]:,} right, "
        f"{counts[WRONG]} wrong, {counts[CAUGHT]} caught by narrows itself, "
        f"{counts[RAW]} raw exceptions, {counts[REFUSED]} refused; {counts[OUTSIDE]} not promised"
    )


def report(found: dict[int, list[Finding]], codes: dict[int, str]) -> str:
    """Return the counts, of each code where there are several, and the refusals by reason."""
    flat = [f for one in found.values() for f in one]
    lines = [summary(found)]
    kinds = list(dict.fromkeys(codes[seed] for seed in found))
    for code in kinds if len(kinds) > 1 else ():
        lines.append(f"by {code}: {summary({s: f for s, f in found.items() if codes[s] == code})}")
    stages = Counter((f.stage, f.verdict) for f in flat)
    names = list(dict.fromkeys(f.stage for f in flat))
    header = ["claim", RIGHT, WRONG, CAUGHT, RAW, REFUSED, OUTSIDE]
    rows = [[name, *(str(stages[name, v]) for v in header[1:])] for name in names]
    lines += ["", table(header, rows)]
    reasons = Counter((f.verdict, f.stage, f.reason) for f in flat if f.verdict != RIGHT)
    shares = Counter(f.stage for f in flat)
    rows = [
        [verdict, stage, str(count), f"{100 * count / shares[stage]:.1f}", reason]
        for (verdict, stage, reason), count in reasons.most_common()
        if verdict in (REFUSED, OUTSIDE)
    ]
    if rows:
        lines += ["", table(["verdict", "claim", "count", "% of its claims", "reason"], rows)]
    return "\n".join(lines)


def kinds_of_trouble(found: dict[int, list[Finding]]) -> dict[tuple[str, ...], list[Any]]:
    """Return the seeds and findings that must not be, by stage and reason."""
    kinds: dict[tuple[str, ...], list[Any]] = {}
    for seed in sorted(found):
        for finding in found[seed]:
            if trouble(finding):
                form = "form" if finding.stage in FORMS else finding.stage
                kinds.setdefault((finding.verdict, form, finding.reason), []).append(
                    (seed, finding)
                )
    return kinds


def troubles(found: dict[int, list[Finding]], options: argparse.Namespace) -> Iterator[str]:
    """Yield a line per kind of trouble, with one network that has it, made smaller."""
    kinds = kinds_of_trouble(found)
    end = time.perf_counter() + options.shrink
    for (verdict, stage, reason), cases in sorted(kinds.items(), key=lambda k: -len(k[1])):
        seeds = list(dict.fromkeys(seed for seed, _ in cases))
        shown = ", ".join(map(str, seeds[:6])) + (" ..." if len(seeds) > 6 else "")
        yield f"\n{verdict} at {stage}, {len(cases)} times (seeds {shown}): {reason}"
        seed, finding = min(cases, key=lambda c: len(Graph.drawn(c[0]).steps))
        graph = Graph.drawn(seed, options.quantized)
        left = end - time.perf_counter()
        if left > 0 and not finding.stage.startswith("after"):
            graph, finding = shrunk(graph, finding, options.limit, end)
        yield f"  {finding.text}"
        line = to_line(graph, finding.mask, finding.stage)
        yield f"  python -m benchmarks.fuzz --repro '{line}'"


def repeat(text: str) -> int:
    """Show one case: its program, its masks, and what is found."""
    import narrows

    graph, mask, form = from_line(text)
    module = graph.build()
    print(module)
    program = narrows.capture(module, (graph.images(2, 0),))
    print(program)
    plan = mask.plan(program)
    if plan is not None:
        print(f"keep_inputs={dict(plan.inputs)}\nkeep_outputs={dict(plan.outputs)}")
    masks = [mask] if mask.kind == NOTHING else [Mask(NOTHING), mask]
    found = list(judge(graph, masks, [form] if form in FORMS else FORMS))
    for finding in found:
        at = f"{finding.mask.kind} {finding.mask.seed}"
        print(f"{finding.verdict:8} {finding.stage:8} {at:18} {finding.text}")
    return int(any(map(trouble, found)))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fuzz", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--graphs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="that of the first graph")
    parser.add_argument("--masks", type=int, default=4, help="per graph, beside none at all")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--quantized", type=float, default=0.1, help="the share made of integers")
    parser.add_argument("--seconds", type=float, help="start no more graphs after so long")
    parser.add_argument("--limit", type=float, default=180, help="processor seconds of a graph")
    parser.add_argument(
        "--shrink", type=float, default=300, help="seconds to make failures smaller in"
    )
    parser.add_argument("--log", help="findings, a line per graph; a run goes on where it ended")
    parser.add_argument("--mixed", action="store_true", help="a log may hold other code's findings")
    parser.add_argument("--json", help="also write the counts here")
    parser.add_argument("--repro", metavar="LINE", help="show one case, as printed")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run, and report."""
    options = parse(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.repro:
        return repeat(options.repro)
    warm()
    log = Log(options.log, {"masks": options.masks, "quantized": options.quantized}, options.mixed)
    try:
        run(options, log)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    seeds = range(options.seed, options.seed + options.graphs)
    found = {seed: log.found[seed] for seed in seeds if seed in log.found}
    print(report(found, log.codes))
    try:
        for line in troubles(found, options):
            print(line, flush=True)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    counts = Counter(f"{f.stage} {f.verdict}" for one in found.values() for f in one)
    write(options.json, dict(counts))
    return int(any(trouble(f) for one in found.values() for f in one))


if __name__ == "__main__":
    sys.exit(main())
