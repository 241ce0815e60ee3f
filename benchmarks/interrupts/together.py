"""Processes and threads that replace and read one artifact at once."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from pathlib import Path

import numpy as np
import torch

import narrows
from benchmarks.interrupts.forks import Figures, listing, run
from benchmarks.interrupts.jobs import MODEL, X


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
