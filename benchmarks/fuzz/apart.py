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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
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
    """One task in a process of its own, and of its own group, so that a compiler goes with it."""

    def __init__(self, work: Callable[[Any], Iterable[Any]], task: Any, limit: float) -> None:
        context = multiprocessing.get_context("fork")
        self.pipe, other = context.Pipe(duplex=False)
        args = (work, task, other, limit)
        self.process = context.Process(target=_serve, args=args, daemon=True)
        self.start, self.limit = time.perf_counter(), limit
        self.process.start()
        other.close()
        self.outcome = Outcome(task)

    @property
    def left(self) -> float:
        """How many seconds it has left."""
        return self.start + PATIENCE * self.limit - time.perf_counter()

    def take(self) -> bool:
        """Take what has arrived; return whether the task has ended."""
        outcome = self.outcome
        try:
            while self.pipe.poll():
                item = self.pipe.recv()
                if isinstance(item, tuple) and item[:1] == (DONE,):
                    return self.end(item[1])
                outcome.found.append(item)
        except (EOFError, OSError):
            self.process.join(5)
            return self.end(_ending(self.process.exitcode, self.limit))
        return self.end(_ending(None, self.limit)) if self.left <= 0 else False

    def end(self, failure: str) -> bool:
        """End the process and say how."""
        self.outcome.failure = failure
        self.outcome.seconds = time.perf_counter() - self.start
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self.process.pid is not None and os.getpgid(self.process.pid) == self.process.pid:
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.pipe.close()
        return True


def outcomes(
    work: Callable[[Any], Iterable[Any]], tasks: Iterable[Any], jobs: int, limit: float
) -> Iterator[Outcome]:
    """Yield the outcome of every task, as they end.

    Args:
        work: Takes a task and yields what it finds.
        tasks: Taken one by one, as processes get free.
        jobs: How many processes there are at a time.
        limit: Seconds of processor time that a task gets.
    """
    waiting, running = iter(tasks), list[Child]()
    try:
        while True:
            while len(running) < jobs and (task := next(waiting, DONE)) is not DONE:
                running.append(Child(work, task, limit))
            if not running:
                return
            wait([c.pipe for c in running], max(0.0, min(c.left for c in running)))
            ended = [c for c in running if c.take()]
            running = [c for c in running if c not in ended]
            yield from (c.outcome for c in ended)
    finally:
        for child in running:
            child.end("stopped")


def _serve(work: Callable[[Any], Iterable[Any]], task: Any, pipe: Connection, limit: float) -> None:
    os.setpgrp()
    seconds = math.ceil(time.process_time() + limit)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    silent = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silent, stream)
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
