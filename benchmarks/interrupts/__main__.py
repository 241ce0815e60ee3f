"""Commands that are cut off at random moments: nothing is lost, nothing half, nothing left over.

    python -m benchmarks.interrupts [--kills 150] [--seconds 60] [--only kills full ...] [--json F]

* ``kills``: every long command, ended by SIGKILL or SIGINT at a moment drawn from its usual time.
  What it replaces is then the older one or the newer, whole; a reconstruction goes on from its
  checkpoint and ends with the plan that it has without a break.
* ``full``: the same commands with files cut off at ever more bytes (`RLIMIT_FSIZE`), where the
  system refuses to write as it does on a full disk.
* ``memory``: the same with ever more address space (``ulimit -v``).
* ``writers``: three processes that replace one artifact, and a reader that loads and runs it.
* ``threads``: threads of one process that compile, save, load and run at once.

Each run is a fork of a process that has everything imported already, so that the moments fall into
the work. Linux and macOS.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import narrows
from benchmarks.interrupts.forks import Ended, Figures, listing, run
from benchmarks.interrupts.jobs import MODEL, NETS, Job, jobs
from benchmarks.interrupts.together import threads, writers
from benchmarks.machine import table, write
from narrows.passes.quant.plan import QuantPlan


def prepared(job: Job) -> tuple[list[Any], float]:
    """Return the two states that a command leaves, the first of which is there, and its time."""
    states, took = [], 0.0
    for words in reversed(job.words):
        ended = run(words)
        if ended.code:
            raise RuntimeError(f"{' '.join(words)}: {ended.text}")
        states.append(job.state())
        took = max(took, ended.seconds)
    return states, took


def judge(
    job: Job, states: list[Any], ended: Ended, figures: Figures, spared: list[str] | None
) -> None:
    """Hold what a run left to what it may leave: of names, those that it found there, or any."""
    try:
        found = job.state()
        alike = [found == s for s in states]
        parts = list(enumerate(found)) if isinstance(found, tuple) else [(0, found)]
        foreign = [n for n, part in parts if all(part != _part(s, n) for s in states)]
        if any(alike):
            figures.counts["newer" if alike[-1] and not alike[0] else "older"] += 1
        elif not foreign:  # two files, one after the other
            figures.counts["between"] += 1
        else:
            figures.faults.append(f"neither the older one nor the newer: parts {foreign}")
    except Exception as error:
        figures.faults.append(f"not whole: {type(error).__name__}: {error}")
    if "Traceback" in ended.text or "narrows failed" in ended.text:
        figures.faults.append(f"exit code {ended.code}: {ended.text.strip()[-200:]}")
    if spared is not None:
        over = [n for n in listing() if n not in job.output and n not in spared]
        if over:
            figures.faults.append(f"left over: {over}")


def _part(state: Any, number: int) -> Any:
    return state[number] if isinstance(state, tuple) else state


def kills(job: Job, count: int, chance: random.Random) -> Figures:
    """Return what became of a command that is ended at random moments."""
    figures = Figures(job.name)
    states, took = prepared(job)
    try:
        for number in range(count):
            which = (signal.SIGKILL, signal.SIGINT)[number % 2]
            # Half of the moments fall into the last fifth, where files are written.
            low = 0.8 if chance.random() < 0.5 else 0.0
            # What SIGKILL left is swept by the next run that comes as far as writing.
            before = listing()
            ended = run(job.words[0], end=(which, took * chance.uniform(low, 1.05)))
            figures.counts[{0: "done", 130: "SIGINT", -9: "SIGKILL"}.get(ended.code, "failed")] += 1
            if ended.code not in (0, 130, -9):
                figures.faults.append(f"exit code {ended.code}: {ended.text.strip()[-200:]}")
            told = which == signal.SIGINT and ended.code != -9
            judge(job, states, ended, figures, before if told else None)
            if number % 10 == 9:
                run(job.words[1])
    except KeyboardInterrupt:
        print(f"interrupted: {sum(figures.counts.values())} of {count} runs", flush=True)
    last = run(job.words[0])
    if last.code or job.state() != states[-1]:
        figures.faults.append(f"the last run is not as it was: {last.text[-200:]}")
    over = [n for n in listing() if n not in job.output]
    if over:
        figures.faults.append(f"left over in the end: {over}")
    return figures


def resumed(count: int, chance: random.Random) -> Figures:
    """Return what became of a reconstruction that is killed again and again, and goes on."""
    figures = Figures("rapq --checkpoint")
    words = ("quantize", *MODEL, "--data", "x.npy", "-o", "out", "--method", "rapq",
             "--budget", "60", "--save-plan", "q.json")  # fmt: skip
    whole = run(words)
    wanted = QuantPlan.load("q.json").to_json()
    while sum(figures.counts.values()) < count:
        Path("state.pt").unlink(missing_ok=True)
        for attempt in range(5):
            which = (signal.SIGKILL, signal.SIGINT)[attempt % 2]
            end = (which, whole.seconds * chance.uniform(0.2, 0.9))
            ended = run((*words, "--checkpoint", "state.pt"), end=end)
            figures.counts[{0: "done", 130: "SIGINT", -9: "SIGKILL"}.get(ended.code, "failed")] += 1
            if "Traceback" in ended.text or ended.code not in (0, 130, -9):
                figures.faults.append(ended.text[-200:])
        last = run((*words, "--checkpoint", "state.pt"))
        if last.code or QuantPlan.load("q.json").to_json() != wanted:
            figures.faults.append(f"another plan than without a break: {last.text[-200:]}")
    over = [n for n in listing() if n not in ("out", "q.json", "state.pt")]
    if over:
        figures.faults.append(f"left over in the end: {over}")
    return figures


def limited(job: Job, kind: str, limits: list[int]) -> Figures:
    """Return what became of a command under ever wider limits of a resource."""
    figures = Figures(job.name)
    states, _ = prepared(job)
    for limit in limits:

        def prepare(limit: int = limit) -> None:
            number = resource.RLIMIT_FSIZE if kind == "full" else resource.RLIMIT_AS
            held = 0 if kind == "full" else _address_space()
            resource.setrlimit(number, (held + limit, held + limit))

        ended = run(job.words[0], prepare=prepare)
        figures.counts[{0: "done", 1: "refused"}.get(ended.code, "ended otherwise")] += 1
        if ended.code not in (0, 1) and kind == "full":
            figures.faults.append(f"exit code {ended.code}: {ended.text.strip()[-200:]}")
        judge(job, states, ended, figures, [] if ended.code >= 0 else None)
        if ended.code == 0:
            run(job.words[1])
    return figures


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


# ------------------------------------------------------------------ the command


def import_all() -> None:
    """Import what the commands import, so that a fork need not."""
    for name in ("onnxruntime", "onnxscript", "onnxsim", "torch.onnx", "torch.export"):
        importlib.import_module(name)
    for module in pkgutil.walk_packages(narrows.__path__, "narrows."):
        if ".tvm" not in module.name and not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def fresh(top: Path) -> None:
    """Work in a new folder that holds the model, its data and a place for temporary files."""
    place = Path(tempfile.mkdtemp(dir=top))
    os.chdir(place)
    Path("net.py").write_text(NETS)
    generator = np.random.default_rng(0)
    np.save("x.npy", generator.standard_normal((16, 3, 8, 8)).astype(np.float32))
    Path("tmp").mkdir()
    os.environ.update(TMPDIR=str(place / "tmp"), NARROWS_CACHE=str(place / "cache"))
    tempfile.tempdir = None


PARTS = ("kills", "full", "memory", "writers", "threads")
FULL = [0, 100, 1_000, 2_000, 4_000, 8_000, 16_000, 40_000, 100_000, 400_000]
MEMORY = [1 << 20, 8 << 20, 32 << 20, 64 << 20, 128 << 20, 256 << 20, 512 << 20, 1 << 30, 2 << 30]


def measure(options: argparse.Namespace, top: Path) -> list[dict[str, Any]]:
    """Return the figures of the parts that were asked for."""
    chance = random.Random(options.seed)
    results: list[dict[str, Any]] = []

    def keep(part: str, work: Callable[[], Figures]) -> None:
        fresh(top)
        start = time.perf_counter()
        figures = work()
        results.append({"part": part, **figures.to_json()})
        print(f"{part}: {figures.name}: {dict(figures.counts)}, {len(figures.faults)} faults, "
              f"{time.perf_counter() - start:.0f} s", flush=True)  # fmt: skip
        for fault, times in Counter(figures.faults).most_common(5):
            print(f"  {times}x {fault}", flush=True)

    known = [job for job in jobs() if not options.jobs or job.name in options.jobs]
    if "kills" in options.only:
        share = max(1, options.kills // (len(known) + 1))
        for job in known:
            keep("kills", lambda job=job: kills(job, share, chance))
        if not options.jobs:
            keep("kills", lambda: resumed(share, chance))
    for part, limits in (("full", FULL), ("memory", MEMORY)):
        for job in known if part in options.only else ():
            if job.name not in ("rapq", "calibrate"):
                keep(part, lambda job=job, p=part, ls=limits: limited(job, p, ls))
    if "writers" in options.only:
        keep("writers", lambda: writers(options.seconds))
    if "threads" in options.only:
        keep("threads", lambda: threads(4, 3))
    return results


def main() -> int:
    """Run the benchmark; 1 if there was a fault."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=150, help="how many runs are cut off in all")
    parser.add_argument("--seconds", type=float, default=60, help="how long the writers write")
    parser.add_argument("--only", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--jobs", nargs="*", default=[], help="only commands of these names")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tmpfs", help="a folder to work in, in place of a temporary one")
    parser.add_argument("--json", help="where the results go")
    options = parser.parse_args()
    torch.set_num_threads(1)
    import_all()
    top = Path(tempfile.mkdtemp(dir=options.tmpfs)).resolve()
    target = None if options.json is None else str(Path(options.json).absolute())
    try:
        results = measure(options, top)
    finally:
        os.chdir("/")
        shutil.rmtree(top, ignore_errors=True)
    rows = [[r["part"], r["name"], ", ".join(f"{k} {v}" for k, v in r.items()
             if isinstance(v, int)), str(len(r["faults"]))] for r in results]  # fmt: skip
    print(table(["part", "command", "how it ended", "faults"], rows))
    write(target, results)
    return int(any(r["faults"] for r in results))


if __name__ == "__main__":
    sys.exit(main())
