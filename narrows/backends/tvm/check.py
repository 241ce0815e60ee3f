"""Holds a library to the program it was made from, in a fresh process that has TVM and no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from narrows.backends.apart import run_apart
from narrows.backends.artifact import Artifact
from narrows.backends.base import Pair
from narrows.backends.compare import Case, Wanted, limit_of, output_error
from narrows.backends.integers import from_islands
from narrows.backends.store import MANIFEST, encode_manifest
from narrows.errors import LowerError

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
    text = encode_manifest(artifact.manifest)
    fed = [artifact.arrays(inputs) for inputs in trials]
    results = run_apart(
        RUNNER,
        fed,
        str(artifact.folder),
        what="the library",
        hint="report this with the model; check=False lowers without the check",
        prepare=lambda job: _keep(job, text),
    )
    count = len(artifact.outputs)
    return [(artifact.gather(a, r[:count]), r[count:]) for a, r in zip(fed, results, strict=True)]


def _keep(job: Path, manifest: str) -> None:
    (job / MANIFEST).write_text(manifest, encoding="utf-8")
