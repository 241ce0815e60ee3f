"""Holds an artifact to the program it was made from, on several inputs and batch sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from narrows.backends.artifact import Artifact
from narrows.backends.compare import (
    draw_inputs,
    limit_of,
    output_error,
    output_names,
    tolerance_of,
    varies,
)
from narrows.backends.integers import float_islands, float_outputs, from_islands
from narrows.backends.onnx.rounding import is_rounding, probe
from narrows.backends.onnx.session import MODEL, OnnxSession, open_mapped
from narrows.errors import ArtifactError, LowerError, ProgramError
from narrows.ir.program import Program, where

# One sample, the example's size, and one that is neither: what was fixed by accident shows.
BATCHES = (1, 2, 5)


ROUNDING = (
    "an output differs from the program by {:.1e}, beyond the tolerance: this network carries "
    "rounding far, for each operator by itself gives what it should"
)


@dataclass
class Checked:
    """What the check found.

    Attributes:
        fidelity: The worst relative error per batch size, as JSON data for the manifest.
        flat: Whether every output was one number over and over, so that little can be told.
        rounding: What to say where an output is beyond the tolerance by rounding alone.
    """

    fidelity: dict[str, Any]
    flat: bool
    rounding: str = ""


def check(
    artifact: Artifact,
    program: Program,
    samples: int,
    exact: bool = False,
    lowered: Program | None = None,
) -> Checked:
    """Compare the artifact with the program, on ``samples`` inputs per batch size.

    The first input is the example. Integer outputs have to be equal.

    Args:
        artifact: What was made.
        program: What it has to equal.
        samples: How many inputs are tried per batch size.
        exact: Whether all outputs have to be equal, with the runtime's optimizations and without.
        lowered: The program whose nodes the model has, where that is another.

    Raises:
        LowerError: Names the first output that differs, and the first node.
    """
    generator = torch.Generator().manual_seed(0)
    limit = 0.0 if exact else tolerance_of(program)
    flat, trial = True, Trial(artifact)
    checked, most = [], 0.0
    for batch in BATCHES if program.dynamic_batch else (None,):
        worst = 0.0
        for sample in range(samples):
            inputs = draw_inputs(program, batch, generator if sample else None)
            error, excused, varied = _compare(
                trial, program, inputs, batch, exact, lowered or program
            )
            worst, most, flat = max(worst, error), max(most, excused), flat and not varied
        size = batch if batch is not None else _example_batch(program)
        checked.append({"batch": size, "inputs": samples, "error": worst})
    rounding = ROUNDING.format(most) if most else ""
    return Checked({"tolerance": limit, "checked": checked}, flat, rounding)


class Trial:
    """An artifact in ONNX Runtime for the time of the check.

    The weights are mapped from the file, as far as the runtime does not rearrange them; loading the
    file as usual would cost them twice over.
    """

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self._sessions: dict[bool, OnnxSession] = {}

    def run_flat(self, inputs: Sequence[Any], optimize: bool) -> list[Any]:
        """Run on flat inputs, with the runtime's optimizations or without."""
        if optimize not in self._sessions:
            self._sessions[optimize] = open_mapped(self.artifact.folder, optimize)
        arrays = self.artifact.arrays(inputs)
        return self.artifact.gather(arrays, self._sessions[optimize].run(arrays))


def _compare(
    trial: Trial,
    program: Program,
    inputs: Sequence[Any],
    batch: int | None,
    exact: bool,
    lowered: Program,
) -> tuple[float, float, bool]:
    """Return the worst error, the worst that is rounding beyond the tolerance, and whether an
    output holds two numbers that differ."""
    size = f"batch {batch}" if batch is not None else "the example's batch"
    try:
        with torch.no_grad():
            expected = program.run_flat(inputs)
    except (ProgramError, RuntimeError) as error:
        raise LowerError(f"the program cannot run on {size}", why=str(error)) from error
    worst, excused, artifact = 0.0, 0.0, trial.artifact
    islands = [*float_islands(program), *float_outputs(program)] if exact else []
    for optimize in (True, False) if exact else (True,):
        try:
            actual = trial.run_flat(inputs, optimize)
            if islands:
                expected = _behind_islands(artifact, program, inputs, islands, optimize)
        except ArtifactError as error:
            raise _failure(error, size) from error
        for i, (got, wanted) in enumerate(zip(actual, expected, strict=True)):
            error = output_error(got, wanted)
            fine = error <= (0.0 if exact else limit_of(wanted))
            if not fine and (exact or not is_rounding(artifact, lowered, inputs, i, wanted, error)):
                how = size if optimize else f"{size}, without the runtime's optimizations"
                name = output_names(program)[i]
                raise _difference(artifact, lowered, inputs, name, error, how)
            worst, excused = max(worst, error), excused if fine else max(excused, error)
    return worst, excused, any(varies(wanted) for wanted in expected)


def _behind_islands(
    artifact: Artifact,
    program: Program,
    inputs: Sequence[Any],
    islands: Sequence[fx.Node],
    optimize: bool,
) -> list[Any]:
    """Return what the program gives where its islands give what the runtime's do."""
    import onnx

    model = onnx.load(artifact.folder / MODEL)
    shown = {value.name for value in model.graph.output}
    model.graph.output.extend(
        onnx.ValueInfoProto(name=n.name) for n in islands if n.name not in shown
    )
    session = OnnxSession(model.SerializeToString(), None, optimize)
    pairs = zip(program.placeholders, inputs, strict=True)
    feed = {node.name: value.numpy() for node, value in pairs if isinstance(value, Tensor)}
    names = [value.name for value in model.graph.output]
    results = dict(zip(names, session.run(feed), strict=True))
    given = {n: torch.from_numpy(results[n.name]) for n in islands}
    return from_islands(program, inputs, given)


def _failure(error: ArtifactError, size: str) -> LowerError:
    why = error.why or error.what
    no_kernel = "NOT_IMPLEMENTED" in why or "ScalarType" in why
    return LowerError(
        f"the ONNX model cannot run on {size}",
        why=why,
        hint="lower program.to(torch.float32); other types have few kernels" if no_kernel else "",
    )


def _difference(
    artifact: Artifact, program: Program, inputs: Sequence[Any], name: str, error: float, size: str
) -> LowerError:
    if math.isnan(error):
        return LowerError(
            f"output {name} cannot be checked",
            why=f"the program itself gives no finite number on {size}",
            hint="look for NaN among the weights, or lower with check=False",
        )
    culprit = first_difference(artifact, program, inputs)
    why = f"that is the difference on {size}, relative to the output's largest number"
    return LowerError(
        f"output {name} of the ONNX model differs from the program by {error:.1e}",
        where=culprit or name,
        why=why + ("; the node is the first that differs" if culprit else ""),
        hint="report this with the model; check=False lowers without the check",
    )


def first_difference(artifact: Artifact, program: Program, inputs: Sequence[Any]) -> str:
    """Return the first node whose value is another in ONNX Runtime; empty if none can be named."""
    found = probe(artifact, program, inputs)
    if found is None:  # then the difference is told without the node
        return ""
    expected: dict[fx.Node, Any] = {}

    def observe(node: fx.Node, value: Any) -> None:
        if node.name in found:
            expected[node] = value

    with torch.no_grad():
        program.run_flat(inputs, observe=observe)
    for node, value in expected.items():
        result = found[node.name]
        if value.dtype is torch.int16:  # wide codes are float32 there
            result = result.astype(np.int16)
        if not output_error(result, value) <= limit_of(value):
            return where(node)
    return ""


def _example_batch(program: Program) -> int:
    shapes = [e.shape for e in program.examples if isinstance(e, Tensor) and e.dim()]
    return shapes[0][0] if shapes else 1
