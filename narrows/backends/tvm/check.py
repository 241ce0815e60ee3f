"""Holds a library to the program it was made from, in a fresh process that has TVM and no torch."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

from narrows.backends.artifact import Artifact
from narrows.backends.compare import (
    draw_inputs,
    limit_of,
    output_error,
    output_names,
    tolerance_of,
    varies,
)
from narrows.backends.integers import ends_in_floats, from_islands
from narrows.backends.store import encode_manifest
from narrows.backends.tvm.compiler import child_environment, describe_end
from narrows.errors import LowerError
from narrows.files.folders import temporary
from narrows.ir.program import Program

RUNNER = "narrows.backends.tvm.runner"


class Checked:
    """What the check found.

    Attributes:
        fidelity: The worst relative error, as JSON data for the manifest.
        flat: Whether every output was one number over and over, so that little can be told.
    """

    def __init__(self, fidelity: dict[str, Any], flat: bool) -> None:
        self.fidelity, self.flat = fidelity, flat


def check(
    artifact: Artifact, program: Program, batch: int | None, samples: int, exact: bool
) -> Checked:
    """Compare an artifact with the program on ``samples`` inputs, the first of which is the
    example.

    Args:
        artifact: What was made.
        program: What it has to equal.
        batch: The batch size, where it is free.
        samples: How many inputs are tried.
        exact: Whether it is an integer program, whose codes have to be equal.

    Raises:
        LowerError: It crashes, or an output differs.
    """
    generator = torch.Generator().manual_seed(0)
    trials = [draw_inputs(program, batch, generator if i else None) for i in range(samples)]
    results = _run_apart(artifact, trials)
    worst, flat = 0.0, True
    islands = [program.node(spec["name"]) for spec in artifact.manifest["islands"]]
    nodes: Any = program.output.args[0]
    for inputs, (actual, between) in zip(trials, results, strict=True):
        given = {n: torch.from_numpy(r) for n, r in zip(islands, between, strict=True)}
        with torch.no_grad():
            expected = from_islands(program, inputs, given) if islands else program.run_flat(inputs)
        named = zip(output_names(program), nodes, actual, expected, strict=True)
        for name, node, got, wanted in named:
            error = output_error(got, wanted)
            limit = 0.0 if exact and not ends_in_floats(node) else limit_of(wanted)
            if not error <= limit:
                raise LowerError(
                    f"output {name} of the library differs from the program by {error:.1e}",
                    where=name,
                    why="that is relative to the output's largest number",
                    hint="report this with the model; check=False lowers without the check",
                )
            worst, flat = max(worst, error), flat and not varies(wanted)
    shapes = [e.shape for e in trials[0] if isinstance(e, Tensor) and e.dim()]
    size = shapes[0][0] if shapes else 1
    checked = [{"batch": size, "inputs": samples, "error": worst}]
    tolerance = 0.0 if exact else tolerance_of(program)
    return Checked({"tolerance": tolerance, "checked": checked}, flat)


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
