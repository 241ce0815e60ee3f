"""`Here`: one job after the other, in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from narrows.errors import UsageError
from narrows.executors.base import Work, at_once


@dataclass(frozen=True)
class Here:
    """Runs jobs one after the other.

    Attributes:
        jobs: How many run at once: one.
    """

    name: ClassVar[str] = "here"
    alone: ClassVar[bool] = True

    jobs: int = 1

    def __post_init__(self) -> None:
        at_once(self.jobs)
        if self.jobs != 1:
            raise UsageError(
                f"{self.jobs} jobs cannot run at once in this process",
                hint="executor='processes'",
            )

    def run(self, work: Work, jobs: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Yield the number of every job, and what the work made of it."""
        for number, job in enumerate(jobs):
            yield number, work(job)


__all__ = ["Here"]
