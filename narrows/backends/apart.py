"""Runs a model in a process of its own, without torch: a crash of its runtime is an error here.

A runner is a module that is called as ``python -m MODULE JOB ...``. ``JOB`` is a folder with
``inputs.npz``; `serve` runs what is in there and leaves ``outputs.npz``.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from narrows.errors import LowerError
from narrows.files.folders import temporary

INPUTS, OUTPUTS = "inputs.npz", "outputs.npz"

Arrays = Mapping[str, np.ndarray]


def run_apart(
    module: str,
    fed: Sequence[Arrays],
    *arguments: str,
    what: str,
    hint: str,
    prepare: Callable[[Path], None] = lambda job: None,
) -> list[list[np.ndarray]]:
    """Return what a runner gives for each of some inputs, computed in another process.

    Args:
        module: The runner.
        fed: Input arrays by name, once per run.
        *arguments: What follows the job's folder on its command line.
        what: What runs there, for the message if it does not.
        hint: What to do then.
        prepare: Called with the job's folder before the runner starts; it may add files.

    Raises:
        LowerError: The process did not end well; its last line says why.
    """
    with temporary() as job:
        named = {f"{i} {k}": v for i, arrays in enumerate(fed) for k, v in arrays.items()}
        np.savez(job / INPUTS, count=len(fed), **named)  # type: ignore[arg-type]
        prepare(job)
        done = subprocess.run(
            [sys.executable, "-m", module, str(job), *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            env=child_environment(),
            check=False,
        )
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise LowerError(
                f"{what} does not run ({describe_end(done.returncode)})",
                why=lines[-1].strip() if lines else "it left no message",
                hint=hint,
            )
        results: list[list[np.ndarray]] = [[] for _ in fed]
        with np.load(job / OUTPUTS) as stored:
            for key in stored.files:  # in the order in which they were stored
                results[int(key.partition(" ")[0])].append(stored[key])
    return results


def serve(job: Path, run: Callable[[dict[str, np.ndarray]], Sequence[np.ndarray]]) -> None:
    """Run the inputs of a job one after the other, and leave what comes of them."""
    with np.load(job / INPUTS) as stored:
        trials: list[dict[str, np.ndarray]] = [{} for _ in range(int(stored["count"]))]
        for key in stored.files:
            number, space, name = key.partition(" ")
            if space:
                trials[int(number)][name] = stored[key]
    results = {}
    for number, arrays in enumerate(trials):
        for i, result in enumerate(run(arrays)):
            results[f"{number} {i}"] = result
    np.savez(job / OUTPUTS, **results)  # type: ignore[arg-type]


def without_torch() -> None:
    """Keep torch out of this process: an artifact must not need it."""
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]


def child_environment() -> dict[str, str]:
    """Return the environment of a child that finds modules where this process finds them."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}


def describe_end(code: int) -> str:
    """Return in words how a process ended."""
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"
