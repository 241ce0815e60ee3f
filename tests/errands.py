"""What tests have done in other processes: functions that these import by name, without torch."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from narrows.errors import UsageError


def square(job: int) -> int:
    return job * job


def refusing(job: int) -> int:
    if job == 3:
        raise UsageError("there is no 3", where="here", why="it is odd", hint="4")
    return job


def sleeping(job: int) -> int:
    time.sleep(job)
    return job


def unsendable(job: int) -> object:
    return (lambda: job) if job == 3 else job


@dataclass(frozen=True)
class Fragile:
    """Squares, in a process that is killed the first times that a job is begun."""

    folder: Path
    job: int
    times: int = 1
    seconds: float = 0.0

    def __call__(self, job: int) -> int:
        begun = self.folder / f"{job}.{time.monotonic_ns()}"
        begun.write_text(f"{os.getppid()} {os.getpid()}")
        time.sleep(self.seconds)
        if job == self.job and len([*self.folder.glob(f"{job}.*")]) <= self.times:
            os.kill(os.getpid(), signal.SIGKILL)
        return job * job
