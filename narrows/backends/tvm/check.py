"""Holds a library to the program it was made from, in a fresh process that has TVM and no torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from narrows.backends.artifact import Artifact
from narrows.backends.base import Pair
from narrows.backends.compare import Case, Wanted, limit_of, output_error
from narrows.backends.integers import from_islands
from narrows.backends.store import encode_manifest
from narrows.backends.tvm.compiler import child_environment, describe_end
from narrows.errors import LowerError
from narrows.files.folders import temporary

RUNNER = "narrows.backends.tvm.runner"


def check(
    artifact: Artifact, wanted: Wanted, again: Callable[[], Pair], exact: Sequence[bool]
) -> dict[str, Any]:
    """Compare an artifact with what it has to give, and return the worst relative error, as JSON
    data for the manifest.

    Args:
        artifact: What was made.
        wanted: What it has to give.
        again: Returns the program and its reference; called where the artifact has float islands.
        exact: Of every output, whether its codes have to be equal.

    Raises:
        LowerError: It crashes, or an output differs.
    """
    errors = []
    results = _run_apart(artifact, [case.inputs for case in wanted.cases])
    for case, (actual, between) in zip(wanted.cases, results, strict=True):
        expected = _behind_islands(artifact, again, case, between) if between else case.outputs
        worst = 0.0
        for name, whole, got, value in zip(wanted.names, exact, actual, expected, strict=True):
            error = output_error(got, value)
            if not error <= (0.0 if whole else limit_of(value)):
                raise LowerError(
                    f"output {name} of the library differs from the program by {error:.1e}",
                    where=name,
                    why="that is relative to the output's largest number",
                    hint="report this with the model; check=False lowers without the check",
                )
            worst = max(worst, error)
        errors.append(worst)
    return wanted.report(errors, 0.0 if any(exact) else None)


def _behind_islands(
    artifact: Artifact, again: Callable[[], Pair], case: Case, between: Sequence[np.ndarray]
) -> list[Any]:
    """Return what the program gives where its islands give what the library's do."""
    program = again().reference
    nodes = [program.node(spec["name"]) for spec in artifact.manifest["islands"]]
    given = {n: torch.from_numpy(r) for n, r in zip(nodes, between, strict=True)}
    return from_islands(program, case.inputs, given)


def _run_apart(
    artifact: Artifact, trials: list[list[Any]]
) -> list[tuple[list[Any], list[np.ndarray]]]:
    """Return the flat outputs and the islands' per flat input, computed in another process."""
    with temporary() as folder:
        (folder / "manifest.json").write_text(encode_manifest(artifact.manifest), encoding="utf-8")
        fed = [artifact.arrays(inputs) for inputs in trials]
        named = {f"{i} {k}": v for i, arrays in enumerate(fed) for k, v in arrays.items()}
        np.savez(folder / "inputs.npz", count=len(trials), **named)  # type: ignore[arg-type]
        done = subprocess.run(
            [sys.executable, "-m", RUNNER, str(folder), str(artifact.folder)],
            capture_output=True,
            text=True,
            errors="replace",
            env=child_environment(),
            check=False,
        )
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise LowerError(
                f"the library does not run ({describe_end(done.returncode)})",
                why=lines[-1].strip() if lines else "it left no message",
                hint="report this with the model; check=False lowers without the check",
            )
        with np.load(folder / "outputs.npz") as stored:
            count = len(artifact.outputs) + len(artifact.manifest["islands"])
            results = [[stored[f"{i} {k}"] for k in range(count)] for i in range(len(trials))]
    count = len(artifact.outputs)
    return [(artifact.gather(a, r[:count]), r[count:]) for a, r in zip(fed, results, strict=True)]
