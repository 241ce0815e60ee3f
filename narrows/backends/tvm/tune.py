"""Timing candidates: a few schedules per kernel, each built and run in a guarded child.

What is found is kept per kernel in the user's cache, so that it serves other models too, and so
that a run that was interrupted goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import select
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import tirx

from narrows.backends.tvm.devices import Machine
from narrows.backends.tvm.schedules import Choice, scheduled

# What a schedule does with a choice changed when this number did: old times are not used then.
GENERATION = 1

PATIENCE = 10.0  # seconds that one candidate may take to build and run

ROUNDS = 5
SHORTEST = 0.003  # seconds: a shorter kernel is run several times a round

Found = dict[str, tuple[tirx.PrimFunc, list[Choice]]]


class Tuner:
    """Chooses among the candidates of kernels by their times.

    Attributes:
        best: The choice per kernel that was timed, now or before.
    """

    def __init__(
        self,
        target: tvm.target.Target,
        machine: Machine,
        options: Mapping[str, Any],
        tell: Callable[[str], None],
    ) -> None:
        self.target, self.machine, self.tell = target, machine, tell
        self.seconds = float(options.get("tune", 0))
        self.folder = Path(options["cache"]) if options.get("cache") else None
        self.best: dict[str, Choice] = {}

    def tune(self, kernels: Found) -> dict[str, Choice]:
        """Return the best choice per kernel, of those that were timed.

        Args:
            kernels: Per name the kernel and its candidates.
        """
        if not self.seconds:
            return {}
        end = time.monotonic() + self.seconds
        open_ = {}
        for name, (function, found) in kernels.items():
            if len(found) < 2:
                continue
            times = self._read(function)
            if set(times) >= {_spell(c) for c in found}:
                self._choose(name, found, times)
            else:
                open_[name] = (function, found, times)
        order = sorted(open_, key=lambda n: -_work(open_[n][0]))
        for number, name in enumerate(order, 1):
            function, found, times = open_[name]
            left = end - time.monotonic()
            if left <= 0:
                self.tell(f"tuning: out of time after {number - 1} of {len(order)} kernels")
                break
            self.tell(f"tuning {number}/{len(order)}: {name}, {len(found)} candidates")
            times |= self._time(function, [c for c in found if _spell(c) not in times], left)
            self._write(function, times)
            self._choose(name, found, times)
        return self.best

    def _choose(self, name: str, found: list[Choice], times: Mapping[str, float | None]) -> None:
        timed = [(t, i) for i, c in enumerate(found) if (t := times.get(_spell(c))) is not None]
        if timed:
            self.best[name] = found[min(timed)[1]]

    # ------------------------------------------------------------------ the cache

    def _path(self, function: tirx.PrimFunc) -> Path | None:
        if self.folder is None:
            return None
        text = f"{GENERATION}|{tvm.__version__}|{self.target}|{function.script()}"
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"

    def _read(self, function: tirx.PrimFunc) -> dict[str, float | None]:
        path = self._path(function)
        if path is None:
            return {}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self, function: tirx.PrimFunc, times: Mapping[str, float | None]) -> None:
        path = self._path(function)
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{secrets.token_hex(4)}")
        fresh.write_text(json.dumps(times), encoding="utf-8")
        fresh.rename(path)

    # ------------------------------------------------------------------ timing

    def _time(
        self, function: tirx.PrimFunc, candidates: list[Choice], left: float
    ) -> dict[str, float | None]:
        """Return seconds per candidate; ``None`` for one that failed or took too long."""
        times: dict[str, float | None] = {}
        waiting = list(candidates)
        end = time.monotonic() + left
        while waiting and time.monotonic() < end:
            done = self._in_child(function, waiting, end)
            times |= {_spell(c): t for c, t in zip(waiting, done, strict=False)}
            waiting = waiting[len(done) :]
            if waiting and time.monotonic() < end:  # the one at which the child ended
                times[_spell(waiting.pop(0))] = None
        return times

    def _in_child(
        self, function: tirx.PrimFunc, candidates: list[Choice], end: float
    ) -> list[float | None]:
        """Return the times of candidates up to the one that ends the child, if any does."""
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(read)
                self._measure(function, candidates, write)
            finally:
                os._exit(0)
        os.close(write)
        done: list[float | None] = []
        buffer = b""
        try:
            while len(done) < len(candidates):
                patience = min(PATIENCE, max(0.1, end - time.monotonic()))
                ready, _, _ = select.select([read], [], [], patience)
                chunk = os.read(read, 4096) if ready else b""
                if not chunk:
                    break
                buffer += chunk
                *lines, buffer = buffer.split(b"\n")
                done += [float(line) if line != b"-" else None for line in lines]
        finally:
            os.close(read)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        return done

    def _measure(self, function: tirx.PrimFunc, candidates: list[Choice], write: int) -> None:
        arguments = _operands(function)
        for candidate in candidates:
            made = scheduled(function, candidate, self.machine)
            line = "-"
            if made is not None:
                line = repr(_timed(made, arguments, self.target))
            os.write(write, f"{line}\n".encode())


def _spell(choice: Choice) -> str:
    return " ".join(map(str, choice.to_json()))


def _work(function: tirx.PrimFunc) -> int:
    """Return how many bytes a kernel reads and writes, by which the largest come first."""
    return sum(int(np.prod(shape)) for shape, _ in _buffers(function))


def _buffers(function: tirx.PrimFunc) -> list[tuple[tuple[int, ...], str]]:
    return [(tuple(int(s) for s in p.shape), str(p.dtype)) for p in function.params]


def _operands(function: tirx.PrimFunc) -> list[Any]:
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


def _timed(function: tirx.PrimFunc, arguments: list[Any], target: tvm.target.Target) -> float:
    """Return the least CPU seconds of a call, of several rounds."""
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    run = tvm.compile(module, target=target)["main"]
    start = time.perf_counter()
    run(*arguments)
    run(*arguments)
    repeats = max(1, round(SHORTEST / max((time.perf_counter() - start) / 2, 1e-7)))
    rounds = []
    for _ in range(ROUNDS):
        start = time.thread_time()
        for _ in range(repeats):
            run(*arguments)
        rounds.append((time.thread_time() - start) / repeats)
    return min(rounds)
