"""`Executor`: runs the same work for many jobs, and hands out each result as it comes."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from narrows.errors import NarrowsError, UsageError

# What is done with a job. It is sent to where jobs run once, by pickle, so that it may be large; a
# job and what becomes of it are sent as well, and should be small. It may be done with a job again
# where a process was lost, so it must not matter how often it is.
Work = Callable[[Any], Any]

LIVES = 3  # processes that a job may take down with it


def at_once(jobs: Any) -> None:
    """Raise `UsageError` for a number of jobs at once that is none."""
    if not isinstance(jobs, int) or isinstance(jobs, bool) or jobs < 1:
        raise UsageError(f"jobs is a whole number of at least 1, got {jobs!r}")


@runtime_checkable
class Executor(Protocol):
    """Runs jobs."""

    @property
    def name(self) -> str:
        """What the command line calls it."""
        ...

    @property
    def alone(self) -> bool:
        """Whether one job runs at a time, so that it may use all threads."""
        ...

    def run(self, work: Work, jobs: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Yield the number of every job, and what the work made of it, in the order of their ends.

        What the work raises is raised here. Whoever stops asking, by Ctrl-C too, ends what still
        runs.

        Raises:
            UsageError: The work cannot be sent to where jobs run, or nothing runs there.
            ExecutorError: A job was lost time and again.
        """
        ...


class ExecutorError(NarrowsError):
    """Jobs cannot be run to their end."""


@dataclass(frozen=True)
class Outcome:
    """What became of a job in another process.

    Attributes:
        value: What the work returned.
        error: What it raised instead.
    """

    value: Any = None
    error: Exception | None = None

    @staticmethod
    def of(work: Work, job: Any) -> Outcome:
        """Return what becomes of a job here."""
        try:
            return Outcome(work(job))
        except Exception as error:  # whatever it is, it is raised where the jobs come from
            return Outcome(error=_sendable(error))

    def packed(self) -> bytes:
        """Return it as bytes; an error in its place where pickle does not take the value."""
        try:
            return pickle.dumps(self, pickle.HIGHEST_PROTOCOL)
        except Exception as cause:  # pickle raises errors of many classes
            error = UsageError(
                "what a job made cannot be sent from another process",
                why=f"{type(cause).__name__}: {cause}".partition("\n")[0],
                hint="return numbers, or objects of a module's classes; or jobs=1",
            )
            return pickle.dumps(Outcome(error=error), pickle.HIGHEST_PROTOCOL)

    def get(self) -> Any:
        """Return what the work returned; raise what it raised."""
        if self.error is not None:
            raise self.error
        return self.value


def _sendable(error: Exception) -> Exception:
    """Return an error that pickle takes, with where it came from."""
    text = "".join(traceback.format_exception(error))
    error.add_note(f"in another process:\n{text}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # an error of a person's own class may do anything there
        return RuntimeError(text)
    return error


def packed(work: Work) -> bytes:
    """Return work as bytes; `UsageError` if it cannot be sent to another process."""
    try:
        return pickle.dumps(work, pickle.HIGHEST_PROTOCOL)
    except Exception as cause:  # pickle raises errors of many classes
        raise UsageError(
            "what is to run cannot be sent to another process",
            why=f"{type(cause).__name__}: {cause}".partition("\n")[0],
            hint="give functions of a module by their names, not a lambda; or jobs=1",
        ) from cause


def lost(why: str) -> ExecutorError:
    """Return the error for a job that took several processes down with it."""
    return ExecutorError(
        f"a job was lost {LIVES} times",
        why=f"the process that ran it {why}",
        hint="memory may be too small for so many at once: fewer jobs, or less data. A script that "
        "starts processes does so under `if __name__ == '__main__':`",
    )


__all__ = ["LIVES", "Executor", "ExecutorError", "Outcome", "Work", "lost", "packed"]
