"""Runs the compiler in a process of its own, so that a crash of TVM is an error and nothing else.

The process gets a folder with the description, and leaves its result there; what it prints in
between are lines of progress. See `narrows.backends.tvm.worker`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from narrows.backends.apart import child_environment, describe_end
from narrows.backends.tvm.compiler_files import JOB, RESULT, WEIGHTS
from narrows.backends.tvm.describe import Description
from narrows.errors import LowerError
from narrows.files.folders import temporary

WORKER = "narrows.backends.tvm.worker"


Tell = Callable[[str], None]


def compile_in_child(
    description: Description,
    options: dict[str, Any],
    folder: Path,
    tell: Tell,
    prepare: Callable[[Path], None],
) -> dict[str, Any]:
    """Compile a description into ``folder`` and return what the compiler reports.

    Args:
        description: The program.
        options: The device and the target's options, as JSON data.
        folder: Where the artifact's files go.
        tell: Called with every line of progress.
        prepare: Called with the job's folder before the compiler starts; it may add files.

    Raises:
        LowerError: The compiler failed, or crashed.
    """
    with temporary() as job:
        content = {"graph": description.graph, "options": options, "folder": str(folder)}
        (job / JOB).write_text(json.dumps(content), encoding="utf-8")
        np.savez(job / WEIGHTS, **description.weights)  # type: ignore[arg-type]
        prepare(job)
        code, last = _run(job, tell)
        path = job / RESULT
        if code == 0 and path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
    raise _crash(code, last)


def _run(job: Path, tell: Tell) -> tuple[int, list[str]]:
    """Run the worker and return its exit code and the last lines of its errors."""
    with (job / "errors.txt").open("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", WORKER, str(job)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            # Candidates are timed on one core, where times say most about the code.
            env={**child_environment(), "TVM_NUM_THREADS": "1"},
            start_new_session=True,  # with its own children it can be ended as a group
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                tell(line.rstrip("\n"))
            code = process.wait()
        finally:
            _end(process)
        errors.seek(0)
        last = [line.strip() for line in deque(errors, 200) if line.strip()]
    return code, last


def _end(process: subprocess.Popen[str]) -> None:
    """End the process and the children that it may have left."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _crash(code: int, last: list[str]) -> LowerError:
    said = next((line for line in reversed(last) if not line.startswith(("^", "|"))), "")
    return LowerError(
        f"TVM crashed while it compiled the program ({describe_end(code)})",
        why=said or "it left no message",
        hint="report this with the model; tune=0 compiles without timing candidates",
    )
