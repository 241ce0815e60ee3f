"""Latency of prepared forms, in turns in one process, one thread, by CPU time."""

from __future__ import annotations

import ctypes
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.reorder.case import Case
from benchmarks.reorder.prepare import OPENERS, in_a_line

SAMPLE = 0.02  # seconds that one sample takes at least
LEAST = 5  # rounds, however long they take
TRIM_THRESHOLD, MMAP_MAX = -1, -4  # of malloc.h

Rounds = dict[str, list[float]]


def time_forms(
    case: Case, folders: Mapping[str, Path], runtime: str, batch: int, rounds: int, budget: float
) -> dict[str, Any]:
    """Return the CPU seconds of one inference per form and round.

    A round runs every form once, each round beginning with another one. It stops early when the
    budget of wall seconds is spent.
    """
    inputs = case.inputs(batch)
    if runtime == "eager":
        keep_memory()
    if runtime == "onnx":
        inputs = tuple(x.numpy() for x in inputs)
    runs: dict[str, Callable[[], Any]] = {}
    failures = {}
    for form, folder in folders.items():
        try:
            run = OPENERS[runtime](folder)
            run(*inputs)
            runs[form] = lambda run=run: run(*inputs)
        except Exception as error:
            failures[form] = in_a_line(error)
    return {"rounds": interleaved(runs, rounds, budget), "failures": failures}


def keep_memory() -> None:
    """Have the C library keep what is freed, for the rest of the process; of glibc alone.

    Eager code takes and frees a tensor per operator. What goes back to the system in between costs
    page faults, more or less of them by what else the process holds, so that the same form twice in
    a process can differ.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(TRIM_THRESHOLD, 2**31 - 1)
        mallopt(MMAP_MAX, 0)


def interleaved(runs: Mapping[str, Callable[[], Any]], rounds: int, budget: float) -> Rounds:
    """Return the CPU seconds of one call per function and round."""
    counts = {form: math.ceil(SAMPLE / max(sample(run, 1), 1e-6)) for form, run in runs.items()}
    order = list(runs)
    found: Rounds = {form: [] for form in order}
    end = time.perf_counter() + budget
    for turn in range(rounds):
        if turn >= LEAST and time.perf_counter() > end:
            break
        for form in order:
            found[form].append(sample(runs[form], counts[form]))
        order = [*order[1:], order[0]]
    return found


def sample(run: Callable[[], Any], count: int) -> float:
    """Return the CPU seconds of one call, over several calls."""
    start = time.thread_time()
    for _ in range(count):
        run()
    return (time.thread_time() - start) / count


def ratio(rounds: Rounds, form: str, base: str) -> float | None:
    """Return the median over rounds of a form's time over another one's, if both ran."""
    pairs = zip(rounds.get(form, ()), rounds.get(base, ()), strict=False)
    found = [a / b for a, b in pairs]
    return statistics.median(found) if found else None


def spread(rounds: Rounds, form: str, base: str) -> tuple[float, float] | None:
    """Return the quartiles of the ratios of the rounds."""
    found: Sequence[float] = [
        a / b for a, b in zip(rounds.get(form, ()), rounds.get(base, ()), strict=False)
    ]
    if len(found) < 2:
        return None
    low, _, high = statistics.quantiles(found, n=4)
    return low, high
