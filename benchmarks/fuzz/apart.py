"""Work in forked processes with a time limit: what crashes or hangs is a result, not the end.

The limit is of processor time, so that a busy machine makes no failures; one that sleeps ends after
`PATIENCE` times as long.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing.connection import Connection, wait
from typing import Any

DONE = "done"
PATIENCE = 10


@dataclass
class Outcome:
    """What came of one task.

    Attributes:
        task: The task.
        found: What the work yielded, up to where it ended.
        failure: How it ended, if not by itself.
        seconds: How long it took.
    """

    task: Any
    found: list[Any] = field(default_factory=list)
    failure: str = ""
    seconds: float = 0.0


class Child:
    """Tasks one after another in a process of its own, and of its own group with what it starts.

    Attributes:
        tasks: Those that have not ended; the first is at work.
        pipe: Where it says what it finds.
    """

    def __init__(
        self, work: Callable[[Any], Iterable[Any]], tasks: Sequence[Any], limit: float
    ) -> None:
        context = multiprocessing.get_context("fork")
        self.pipe, other = context.Pipe(duplex=False)
        self.tasks, self.limit = list(tasks), limit
        args = (work, self.tasks, other, limit)
        self.process = context.Process(target=_serve, args=args, daemon=True)
        self.process.start()
        other.close()
        self._begin()

    def _begin(self) -> None:
        self.start = time.perf_counter()
        self.outcome = Outcome(self.tasks[0])

    @property
    def left(self) -> float:
        """How many seconds the task at work has left."""
        return self.start + PATIENCE * self.limit - time.perf_counter()

    def take(self) -> Iterator[Outcome]:
        """Yield what has ended; where it does not end well, the process ends with it."""
        try:
            while self.tasks and self.pipe.poll():
                item = self.pipe.recv()
                if isinstance(item, tuple) and item[:1] == (DONE,):
                    yield self._ended(item[1])
                else:
                    self.outcome.found.append(item)
        except (EOFError, OSError):
            self.process.join(5)
            yield self._ended(_ending(self.process.exitcode, self.limit))
            self.end()
        else:
            if self.tasks and self.left <= 0:
                self.end()
                yield self._ended(_ending(None, self.limit))

    def _ended(self, failure: str) -> Outcome:
        outcome, self.outcome.failure = self.outcome, failure
        outcome.seconds = time.perf_counter() - self.start
        del self.tasks[0]
        if self.tasks:
            self._begin()
        return outcome

    def end(self) -> None:
        """End the process, and what it has started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self.process.pid is not None and os.getpgid(self.process.pid) == self.process.pid:
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.pipe.close()


def outcomes(
    work: Callable[[Any], Iterable[Any]],
    tasks: Iterable[Any],
    jobs: int,
    limit: float,
    share: int = 1,
) -> Iterator[Outcome]:
    """Yield the outcome of every task, as they end.

    Args:
        work: Takes a task and yields what it finds.
        tasks: Taken as processes get free.
        jobs: How many processes there are at a time.
        limit: Seconds of processor time that a task gets.
        share: How many tasks a process does before it ends: what a process has to learn first,
            such as PyTorch's caches of shapes, is then learnt once for so many. What a task that
            crashes leaves goes to another process.
    """
    waiting, back, running = iter(tasks), list[Any](), list[Child]()

    def some() -> list[Any]:
        taken = [*back[:share], *islice(waiting, max(0, share - len(back)))]
        del back[:share]
        return taken

    try:
        while True:
            while len(running) < jobs and (taken := some()):
                running.append(Child(work, taken, limit))
            if not running:
                return
            wait([c.pipe for c in running], max(0.0, min(c.left for c in running)))
            for child in list(running):
                yield from child.take()
                if not child.tasks or child.pipe.closed:
                    child.end()
                    running.remove(child)
                    back += child.tasks
    finally:
        for child in running:
            child.end()


def _serve(
    work: Callable[[Any], Iterable[Any]], tasks: Sequence[Any], pipe: Connection, limit: float
) -> None:
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    silent = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silent, stream)
    for task in tasks:
        seconds = math.ceil(time.process_time() + limit)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))
        try:
            for item in work(task):
                pipe.send(item)
        except BaseException as error:
            pipe.send((DONE, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"))
        else:
            pipe.send((DONE, ""))


def _ending(code: int | None, limit: float) -> str:
    if code is None or code == -signal.SIGXCPU:
        return f"no end in {limit:.0f} s"
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"the process ended with {signal.Signals(-code).name}"
    return f"the process ended with exit code {code}"
