"""Commands that are cut off at random moments: nothing is lost, nothing half, nothing left over.

    python -m benchmarks.interrupts [--kills 150] [--seconds 60] [--only kills full ...] [--json F]

* ``kills``: every long command, ended by SIGKILL or SIGINT at a moment drawn from its usual time.
  What it replaces is then the older one or the newer, whole; a reconstruction goes on from its
  checkpoint and ends with the plan that it has without a break.
* ``full``: the same commands with files cut off at ever more bytes, as on a disk that is full
  (`RLIMIT_FSIZE`; on a small tmpfs with ``--tmpfs FOLDER``).
* ``memory``: the same with ever more address space (``ulimit -v``).
* ``writers``: three processes that replace one artifact, and a reader that loads and runs it.
* ``threads``: threads of one process that compile, save, load and run at once.

Each run is a fork of a process that has everything imported already, so that the moments fall into
the work. Linux and macOS.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import pkgutil
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import narrows
from benchmarks.machine import table, write
from narrows.cli import main as command
from narrows.cli.dumps import open_dump
from narrows.ir.cost import CostTable
from narrows.passes.plans.plan import ChannelPlan
from narrows.passes.quant.plan import QuantPlan

NETS = """
import torch
from torch import nn


def net():
    torch.manual_seed(0)
    widths = [3, 16, 32, 32]
    layers = []
    for i, o in zip(widths, widths[1:]):
        layers += [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 64, 10))
"""
MODEL = ("net.py:net", "-i", "f32[2,3,8,8]")
X = np.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8).astype(np.float32)


# ------------------------------------------------------------------ what is run


@dataclass(frozen=True)
class Job:
    """A command, and what it leaves.

    Attributes:
        name: What it is called.
        words: The two command lines that replace what the other one wrote.
        state: Returns what there is now, read as its readers read it; raises if that is not whole.
        output: The names of what it writes.
    """

    name: str
    words: tuple[tuple[str, ...], tuple[str, ...]]
    state: Callable[[], Any]
    output: tuple[str, ...]


def artifact(name: str = "out", *, dump: bool = False, trust: bool = False) -> Any:
    """Return the identity of an artifact that runs."""
    found = narrows.load(name, trust=trust)
    found.run(X[:1] if trust else X, threads=1)
    if dump:
        made, _held = open_dump(name)
        made.snapshot()
    return found.identity


def quantized() -> Any:
    """Return what ``quantize`` left: an artifact, and the plan, which is written after it."""
    plan = Path("q.json")
    return artifact(), QuantPlan.load(plan).to_json() if plan.exists() else None


def jobs() -> list[Job]:
    """Return the commands; the current folder holds the model and its data."""
    quantize = ("quantize", *MODEL, "--data", "x.npy", "-o", "out", "--save-plan", "q.json")
    learn = ("quantize", *MODEL, "--data", "x.npy", "-o", "out", "--method", "rapq")
    pruned = ("compile", *MODEL, "-o", "out")
    plan = ("plan", *MODEL, "-o", "plan.json")
    return [
        Job("plan", ((*plan, "--ratio", "0.3"), (*plan, "--ratio", "0.6")),
            lambda: ChannelPlan.load("plan.json").to_json(), ("plan.json",)),
        Job("compile", ((*pruned, "--ratio", "0.3"), (*pruned, "--ratio", "0.6")),
            artifact, ("out",)),
        Job("compile --dump", ((*pruned, "--ratio", "0.3", "--dump"),
                               (*pruned, "--ratio", "0.6", "--dump")),
            lambda: artifact(dump=True), ("out", "out.dump")),
        Job("compile -t c", tuple((*pruned, "-t", "c", "--quantize", "x.npy", "--ratio", r)
                                  for r in ("0.3", "0.6")),  # type: ignore[arg-type]
            lambda: artifact(trust=True), ("out",)),
        Job("quantize", (quantize, (*quantize, "--weight-bits", "6", "--report")),
            quantized, ("out", "out.report", "q.json")),
        Job("rapq", ((*learn, "--budget", "60"), (*learn, "--budget", "60", "--weight-bits", "5")),
            artifact, ("out",)),
        Job("calibrate", (("bench", "--calibrate", "--quick", "-o", "table.json"),) * 2,
            lambda: CostTable.load("table.json").runtime, ("table.json",)),
    ]  # fmt: skip


@dataclass
class Ended:
    """How a run ended: its exit code, or the number of the signal, negated; what it printed."""

    code: int
    text: str
    seconds: float


def run(
    words: tuple[str, ...],
    *,
    end: tuple[int, float] | None = None,
    prepare: Callable[[], None] | None = None,
) -> Ended:
    """Run a command in a fork.

    Args:
        words: The command line.
        end: A signal, and after how many seconds it comes.
        prepare: Called in the fork first.
    """
    start = time.perf_counter()
    child = os.fork()
    if child == 0:
        _child(words, prepare)
    status: int | None = None
    if end is not None:
        number, delay = end
        while status is None and time.perf_counter() - start < delay:
            time.sleep(0.002)
            found, ended = os.waitpid(child, os.WNOHANG)
            status = ended if found else None
        if status is None:
            os.kill(child, number)
    if status is None:
        _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return Ended(code, Path("said").read_text(errors="replace"), time.perf_counter() - start)


def _child(words: tuple[str, ...], prepare: Callable[[], None] | None) -> None:
    code = 70
    try:
        said = os.open("said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(said, 1)
        os.dup2(said, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's jobs may ignore it
        if prepare is not None:
            prepare()
        code = command(list(words))
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    except BaseException:
        traceback.print_exc()
    finally:
        gc.collect()  # what the end of a process would let go of
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def listing() -> list[str]:
    """Return what lies in the current folder and among the temporary ones."""
    given = {"net.py", "x.npy", "tmp", "said", "cache", "__pycache__"}
    here = {p.name for p in Path().iterdir()} - given
    return sorted([*here, *(f"tmp/{p.name}" for p in Path("tmp").glob("narrows-*"))])


# ------------------------------------------------------------------ the figures


@dataclass
class Figures:
    """What became of the runs of one command.

    Attributes:
        counts: How many ended how.
        faults: What should not be: lost, half, left over, an error that is none of the family.
    """

    name: str
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return them as JSON values."""
        return {"name": self.name, **self.counts, "faults": self.faults}


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
        parts = [found == s for s in states]
        mixed = isinstance(found, tuple) and all(
            any(a == s[i] for s in states) for i, a in enumerate(found)
        )
        if any(parts):
            figures.counts["newer" if parts[-1] and not parts[0] else "older"] += 1
        elif mixed:  # two files, one after the other
            figures.counts["between"] += 1
        else:
            figures.faults.append("neither the older one nor the newer")
    except Exception as error:
        figures.faults.append(f"not whole: {type(error).__name__}: {error}")
    if "Traceback" in ended.text or "narrows failed" in ended.text:
        figures.faults.append(f"exit code {ended.code}: {ended.text.strip()[-200:]}")
    if spared is not None:
        over = [n for n in listing() if n not in job.output and n not in spared]
        if over:
            figures.faults.append(f"left over: {over}")


def kills(job: Job, count: int, chance: random.Random) -> Figures:
    """Return what became of a command that is ended at random moments."""
    figures = Figures(job.name)
    states, took = prepared(job)
    for number in range(count):
        which = (signal.SIGKILL, signal.SIGINT)[number % 2]
        # Half of the moments fall into the last fifth, where files are written.
        low = 0.8 if chance.random() < 0.5 else 0.0
        # What SIGKILL left is swept by the next run that comes as far as writing.
        before = listing()
        ended = run(job.words[0], end=(which, took * chance.uniform(low, 1.05)))
        figures.counts[{0: "done", 130: "SIGINT", -9: "SIGKILL"}.get(ended.code, "failed")] += 1
        told = which == signal.SIGINT and ended.code != -9
        judge(job, states, ended, figures, before if told else None)
        if number % 10 == 9:
            run(job.words[1])
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
        judge(job, states, ended, figures, [] if ended.code >= 0 else None)
        if ended.code == 0:
            run(job.words[1])
    return figures


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def writers(seconds: float, count: int = 3) -> Figures:
    """Return what a reader saw of an artifact that several processes replace."""
    figures = Figures(f"{count} writers, 1 reader")
    known = {}
    for number in range(count):
        words = ("compile", *MODEL, "-o", f"a{number}", "--ratio", str(0.2 * number + 0.1))
        run(words)
        made = narrows.load(f"a{number}")
        known[made.identity] = made.run(X, threads=1)
    made.save("out")
    children = []
    for number in range(count):
        child = os.fork()
        if child == 0:
            _write_for(seconds, f"a{number}")
        children.append(child)
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop:
        try:
            found = narrows.load("out")
            figures.counts["loads"] += 1
            if figures.counts["loads"] % 5 == 0:
                figures.counts["runs"] += 1
                if not np.array_equal(found.run(X, threads=1), known[found.identity]):
                    figures.faults.append("a mixture ran")
        except Exception as error:
            figures.faults.append(f"{type(error).__name__}: {error}"[:200])
    del found
    for child in children:
        if os.waitpid(child, 0)[1]:
            figures.faults.append("a writer failed")
    figures.counts["saves"] = sum(int(Path(f"a{n}.saves").read_text()) for n in range(count))
    over = [n for n in listing() if not n.startswith(("a", "out"))]
    if over:
        figures.faults.append(f"left over: {over}")
    return figures


def _write_for(seconds: float, name: str) -> None:
    code, saves = 1, 0
    try:
        made, stop = narrows.load(name), time.perf_counter() + seconds
        while time.perf_counter() < stop:
            made.save("out")
            saves += 1
        Path(f"{name}.saves").write_text(str(saves))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def threads(count: int, rounds: int) -> Figures:
    """Return what became of threads that compile, save, load and run at once."""
    figures = Figures(f"{count} threads")
    sys.path.insert(0, str(Path.cwd()))
    model = __import__("net").net().eval()
    plans = [0.1 + 0.1 * i for i in range(count)]
    wanted = [narrows.compile(model, torch.from_numpy(X), {"ratio": r}).run(X) for r in plans]

    def work(number: int) -> None:
        try:
            for _ in range(rounds):
                made = narrows.compile(model, torch.from_numpy(X), {"ratio": plans[number]})
                place = made.save(f"own{number}")
                made.save("shared")
                figures.counts["compiles"] += 1
                narrows.load("shared").run(X)
                if not np.array_equal(narrows.load(place).run(X), wanted[number]):
                    figures.faults.append("another result than alone")
        except Exception as error:
            figures.faults.append(f"{type(error).__name__}: {error}"[:300])

    started = [threading.Thread(target=work, args=(n,)) for n in range(count)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    over = [n for n in listing() if not n.startswith(("own", "shared"))]
    if over:
        figures.faults.append(f"left over: {over}")
    return figures


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


def main() -> None:
    """Run the benchmark."""
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
    write(target, json.loads(json.dumps(results)))


if __name__ == "__main__":
    main()
