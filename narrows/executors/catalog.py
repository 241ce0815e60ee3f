"""Which executors there are: those of narrows, and those that packages add.

A package adds its own through the entry point group ``narrows.executors``: a class with ``name``,
``alone`` and ``run`` (`narrows.executors.base.Executor`) that takes ``jobs``, how many run at once.
"""

from __future__ import annotations

from typing import Any

from narrows.errors import UsageError
from narrows.executors.base import Executor, at_once
from narrows.registry import Registry

EXECUTORS = Registry(
    "executor",
    "narrows.executors",
    {
        "here": "narrows.executors.here:Here",
        "processes": "narrows.executors.processes:Processes",
        "ray": "narrows.executors.cluster:Ray",
    },
    UsageError,
)


def find(executor: Any = None, jobs: int | None = None) -> Executor:
    """Return an executor.

    Args:
        executor: Its name, or itself. Without one, jobs run in this process, or in processes where
            there are to be several at once.
        jobs: How many run at once; as the executor has it unless given.
    """
    if jobs is not None:
        at_once(jobs)
    if executor is None:
        executor = "here" if jobs in (None, 1) else "processes"
    if not isinstance(executor, str):
        if not isinstance(executor, Executor):
            raise UsageError(
                f"an executor is a name or has name, alone and run, got {executor!r:.60}"
            )
        if jobs is not None:
            raise UsageError("jobs has no effect beside an executor that says how many itself")
        return executor
    kind = EXECUTORS.load_class(executor)
    return kind() if jobs is None else kind(jobs=jobs)


__all__ = ["EXECUTORS", "find"]
