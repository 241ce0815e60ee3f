"""Times kernels in guarded children: one that crashes or hangs costs itself and nothing else."""

from __future__ import annotations

import json
import os
import select
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import tirx

PATIENCE = 10.0  # seconds that one candidate may take to build and run

ROUNDS = 5
SHORTEST = 0.003  # seconds: a shorter kernel is run several times a round

Measure = Callable[[Any], Any]


def attempts(
    items: Sequence[Any], start: Callable[[], Measure], end: float, patience: float | None = None
) -> list[Any]:
    """Return what is measured of each item, in a child; ``None`` for one that ends the child.

    Args:
        items: The items.
        start: Called in the child, returns what is called with each item there, and returns JSON
            data.
        end: The `time.monotonic` at which to stop; items that are left then have no result.
        patience: Seconds that one item may take; `PATIENCE` if it is not said.
    """
    results: list[Any] = []
    while len(results) < len(items) and time.monotonic() < end:
        results += _in_child(items[len(results) :], start, end, patience or PATIENCE)
        if len(results) < len(items) and time.monotonic() < end:
            results.append(None)  # the one at which the child ended
    return results


def _in_child(
    items: Sequence[Any], start: Callable[[], Measure], end: float, patience: float
) -> list[Any]:
    """Return the results up to the item that ends the child, if any does."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            measure = start()
            for item in items:
                _write(write, f"{json.dumps(measure(item))}\n".encode())
        finally:
            os._exit(0)
    os.close(write)
    done: list[Any] = []
    buffer = b""
    try:
        while len(done) < len(items):
            left = min(patience, max(0.1, end - time.monotonic()))
            ready, _, _ = select.select([read], [], [], left)
            chunk = os.read(read, 1 << 16) if ready else b""
            if not chunk:
                break
            buffer += chunk
            *lines, buffer = buffer.split(b"\n")
            done += [json.loads(line) for line in lines]
    finally:
        os.close(read)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return done


def _write(pipe: int, data: bytes) -> None:
    while data:
        data = data[os.write(pipe, data) :]


# ---------------------------------------------------------------------- kernels


def size_of(function: tirx.PrimFunc) -> int:
    """Return how many numbers a kernel reads and writes."""
    return sum(int(np.prod(shape)) for shape, _ in _buffers(function))


def _buffers(function: tirx.PrimFunc) -> list[tuple[tuple[int, ...], str]]:
    return [(tuple(int(s) for s in p.shape), str(p.dtype)) for p in function.params]


def operands(function: tirx.PrimFunc) -> list[Any]:
    """Return tensors that a kernel may be called with, its results among them."""
    generator = np.random.default_rng(0)
    arrays = [_filled(generator, shape, dtype) for shape, dtype in _buffers(function)]
    return [tvm.runtime.tensor(a, tvm.cpu()) for a in arrays]


def _filled(generator: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Return numbers that a kernel may be given: whole ones may be places, or divisors."""
    if np.dtype(dtype).itemsize == 1:
        return generator.integers(0, 100, shape).astype(dtype)
    if np.dtype(dtype).kind in "iu":
        return np.ones(shape, dtype)
    return generator.random(shape).astype(dtype)


def _built(function: tirx.PrimFunc, target: tvm.target.Target) -> Callable[..., None]:
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    return tvm.compile(module, target=target)["main"]


def _repeats(run: Callable[..., None], arguments: list[Any]) -> int:
    """Return how often a kernel runs in a round, by its second run; the first meets new pages."""
    run(*arguments)
    start = time.thread_time()
    run(*arguments)
    return max(1, round(SHORTEST / max(time.thread_time() - start, 1e-7)))


def _round(run: Callable[..., None], arguments: list[Any], repeats: int) -> float:
    """Return the CPU seconds of a call."""
    start = time.thread_time()
    for _ in range(repeats):
        run(*arguments)
    return (time.thread_time() - start) / repeats


def timed(function: tirx.PrimFunc, arguments: list[Any], target: tvm.target.Target) -> float:
    """Return the least CPU seconds of a call, of several rounds."""
    run = _built(function, target)
    repeats = _repeats(run, arguments)
    return min(_round(run, arguments, repeats) for _ in range(ROUNDS))


def compared(
    functions: tuple[tirx.PrimFunc, tirx.PrimFunc], target: tvm.target.Target, tolerance: float
) -> float | None:
    """Return the median ratio of the CPU times of two schedules of one kernel, in turns.

    Args:
        functions: The two; the first one's time is divided by the second one's.
        target: What they are built for.
        tolerance: How far results may lie apart, relative to the largest number.

    Returns:
        The ratio; ``None`` where the results differ.
    """
    arguments = [operands(function) for function in functions]
    runs = [_built(function, target) for function in functions]
    repeats = min(map(_repeats, runs, arguments))
    for one, other in zip(*([a.numpy() for a in found] for found in arguments), strict=True):
        # Whole numbers have to be equal.
        limit = tolerance * float(np.abs(other).max(initial=0)) if other.dtype.kind == "f" else 0
        apart = np.abs(one.astype(np.float64) - other.astype(np.float64)).max(initial=0)
        if not apart <= limit:
            return None
    ratios = []
    for _ in range(2 * ROUNDS + 1):
        one, other = (_round(r, a, repeats) for r, a in zip(runs, arguments, strict=True))
        ratios.append(one / max(other, 1e-9))
    return statistics.median(ratios)
