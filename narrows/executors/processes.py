"""`Processes`: several jobs at once on this machine, each in a process of its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import signal
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, ClassVar

from narrows.executors.base import LIVES, Outcome, Work, at_once, lost, packed

PATIENCE = 5.0  # seconds that a process has to end when it is told to


@dataclass(frozen=True)
class Processes:
    """Runs jobs in processes that are started anew, so that no threads are inherited.

    A process that ends early, because somebody killed it or memory ran out, is replaced, and its
    job begun again.

    Attributes:
        jobs: How many run at once.
    """

    name: ClassVar[str] = "processes"
    alone: ClassVar[bool] = False

    jobs: int = 2

    def __post_init__(self) -> None:
        """Refuse to run nothing at once."""
        at_once(self.jobs)

    def run(self, work: Work, jobs: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Yield the number of every job, and what the work made of it, in the order of their
        ends."""
        if not jobs:
            return
        pool = _Pool(packed(work))
        try:
            yield from pool.run(jobs, min(self.jobs, len(jobs)))
        finally:
            pool.stop()


@dataclass(eq=False)
class _Worker:
    """A process, and the number of the job that it is at."""

    process: Any
    line: Connection
    number: int | None = None

    def take(self, number: int, job: Any) -> None:
        """Begin a job; a process that is gone is noticed where its result is waited for."""
        self.number = number
        with contextlib.suppress(OSError):
            self.line.send(job)

    def outcome(self) -> Outcome | None:
        """Return what became of the job; ``None`` if the process has ended."""
        try:
            return self.line.recv()
        except (EOFError, OSError):
            return None


class _Pool:
    """The processes of one run."""

    def __init__(self, work: bytes) -> None:
        self.work = work
        self.workers: list[_Worker] = []
        self.begin = multiprocessing.get_context("spawn")

    def run(self, jobs: Sequence[Any], count: int) -> Iterator[tuple[int, Any]]:
        """Run all jobs, so many at once."""
        waiting = deque(range(len(jobs)))
        deaths: Counter[int] = Counter()
        while waiting or self.workers:
            while waiting and len(self.workers) < count:
                number = waiting.popleft()
                self.start().take(number, jobs[number])
            ready = wait([worker.line for worker in self.workers])
            for worker in [w for w in self.workers if w.line in ready]:
                number, outcome = worker.number, worker.outcome()
                assert number is not None
                if outcome is None:
                    self.remove(worker)
                    deaths[number] += 1
                    if deaths[number] == LIVES:
                        raise lost(f"ended with the exit code {worker.process.exitcode}")
                    waiting.appendleft(number)
                    continue
                if waiting:  # before anybody looks at the result: the process need not wait
                    following = waiting.popleft()
                    worker.take(following, jobs[following])
                else:
                    self.remove(worker)
                yield number, outcome.get()

    def start(self) -> _Worker:
        """Return a new process."""
        ours, theirs = self.begin.Pipe()
        process = self.begin.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()  # so that ours ends when the process does
        worker = _Worker(process, ours)
        self.workers.append(worker)
        # Not as an argument: that goes through a pipe whose other end this process holds as well,
        # and would wait for ever for a process that is gone, unless it is small.
        with contextlib.suppress(OSError):
            ours.send_bytes(self.work)
        return worker

    def remove(self, worker: _Worker) -> None:
        """End a process that has nothing to do."""
        self.workers.remove(worker)
        worker.line.close()
        worker.process.join(PATIENCE)
        if worker.process.exitcode is None:
            worker.process.kill()
            worker.process.join()

    def stop(self) -> None:
        """End all processes, whatever they are at."""
        for worker in self.workers:
            worker.process.terminate()
        for worker in list(self.workers):
            self.remove(worker)


def _serve(line: Connection) -> None:
    """Do what comes until nothing more does: the life of a process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started it, and tells it
    with contextlib.suppress(EOFError, OSError):  # nobody is there any more
        opened = Outcome.of(pickle.loads, line.recv_bytes())
        while True:
            job = line.recv()
            outcome = opened if opened.error is not None else Outcome.of(opened.value, job)
            line.send_bytes(outcome.packed())


__all__ = ["Processes"]
