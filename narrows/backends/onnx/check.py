"""Holds an artifact to the program it was made from, on several inputs and batch sizes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from narrows.backends.artifact import Artifact
from narrows.backends.base import Pair
from narrows.backends.compare import Case, Wanted, limit_of, output_error
from narrows.backends.integers import float_islands, float_outputs, from_islands
from narrows.backends.onnx.rounding import Runs, in_onnxruntime, is_rounding, probe
from narrows.backends.onnx.session import MODEL, OnnxSession, open_mapped
from narrows.errors import ArtifactError, LowerError
from narrows.ir.meta import where
from narrows.ir.program import Program

# One sample, the example's size, and one that is neither: what was fixed by accident shows.
BATCHES = (1, 2, 5)


ROUNDING = (
    "an output differs from the program by {:.1e}, beyond the tolerance: this network carries "
    "rounding far, for each operator by itself gives what it should"
)


@dataclass(frozen=True)
class Checked:
    """What the check found.

    Attributes:
        fidelity: The worst relative error per batch size, as JSON data for the manifest.
        remarks: What a person should know of how outputs were rounded.
    """

    fidelity: dict[str, Any]
    remarks: tuple[str, ...] = ()


def check(
    artifact: Artifact, wanted: Wanted, again: Callable[[], Pair], exact: bool = False
) -> Checked:
    """Compare an artifact with what it has to give. Integer outputs have to be equal.

    Args:
        artifact: What was made.
        wanted: What it has to give.
        again: Returns the program whose nodes the model has, and its reference; called where an
            output is not what it has to be, and for integers.
        exact: Whether all outputs have to be equal, with the runtime's optimizations and without.

    Raises:
        LowerError: Names the first output that differs, and the first node.
    """
    trial = Trial(artifact, wanted.names, again, exact)
    found = [_compare(trial, case) for case in wanted.cases]
    fidelity = wanted.report([error for error, _ in found], 0.0 if exact else None)
    most = max(excused for _, excused in found)
    return Checked(fidelity, (ROUNDING.format(most),) if most else ())


class Trial:
    """An artifact in ONNX Runtime for the time of the check.

    The weights are mapped from the file, as far as the runtime does not rearrange them; loading the
    file as usual would cost them twice over.
    """

    def __init__(
        self, artifact: Artifact, names: Sequence[str], again: Callable[[], Pair], exact: bool
    ) -> None:
        self.artifact, self.names, self.exact = artifact, names, exact
        self.again = functools.cache(again)  # every output that differs asks
        self._sessions: dict[bool, OnnxSession] = {}

    def run_flat(self, inputs: Sequence[Any], optimize: bool) -> list[Any]:
        """Run on flat inputs, with the runtime's optimizations or without."""
        if optimize not in self._sessions:
            self._sessions[optimize] = open_mapped(self.artifact.folder, optimize)
        arrays = self.artifact.arrays(inputs)
        return self.artifact.gather(arrays, self._sessions[optimize].run(arrays))


def _compare(trial: Trial, case: Case) -> tuple[float, float]:
    """Return the worst error, and the worst that is rounding beyond the tolerance."""
    worst, excused, exact = 0.0, 0.0, trial.exact
    for optimize in (True, False) if exact else (True,):
        try:
            actual = trial.run_flat(case.inputs, optimize)
            expected = _behind_islands(trial, case, optimize) if exact else case.outputs
        except ArtifactError as error:
            raise _failure(error, case.size) from error
        for i, (got, wanted) in enumerate(zip(actual, expected, strict=True)):
            error = output_error(got, wanted)
            fine = error <= (0.0 if exact else limit_of(wanted))
            if not fine and (exact or not _is_rounding(trial, case.inputs, i, wanted, error)):
                how = case.size if optimize else f"{case.size}, without the runtime's optimizations"
                raise _difference(trial, case.inputs, i, error, how)
            worst, excused = max(worst, error), excused if fine else max(excused, error)
    return worst, excused


def _is_rounding(
    trial: Trial, inputs: Sequence[Any], output: int, wanted: Any, error: float
) -> bool:
    program = trial.again().lowered
    return is_rounding(trial.artifact, program, inputs, output, wanted, error)


def _behind_islands(trial: Trial, case: Case, optimize: bool) -> list[Any]:
    """Return what an integer program gives where its floating-point results, if it has any, are
    the runtime's."""
    import onnx

    program = trial.again().reference
    islands = [*float_islands(program), *float_outputs(program)]
    if not islands:
        return case.outputs
    model = onnx.load(trial.artifact.folder / MODEL)
    shown = {value.name for value in model.graph.output}
    model.graph.output.extend(
        onnx.ValueInfoProto(name=n.name) for n in islands if n.name not in shown
    )
    session = OnnxSession(model.SerializeToString(), None, optimize)
    pairs = zip(program.placeholders, case.inputs, strict=True)
    feed = {node.name: value.numpy() for node, value in pairs if isinstance(value, Tensor)}
    names = [value.name for value in model.graph.output]
    results = dict(zip(names, session.run(feed), strict=True))
    given = {n: torch.from_numpy(results[n.name]) for n in islands}
    return from_islands(program, case.inputs, given)


def _failure(error: ArtifactError, size: str) -> LowerError:
    why = error.why or error.what
    no_kernel = "NOT_IMPLEMENTED" in why or "ScalarType" in why
    return LowerError(
        f"the ONNX model cannot run on {size}",
        why=why,
        hint="lower program.to(torch.float32); other types have few kernels" if no_kernel else "",
    )


def _difference(
    trial: Trial, inputs: Sequence[Any], output: int, error: float, size: str
) -> LowerError:
    name = trial.names[output]
    if math.isnan(error):
        return not_finite(name, size)
    culprit = first_difference(trial.artifact, trial.again().lowered, inputs)
    why = f"that is the difference on {size}, relative to the output's largest number"
    return LowerError(
        f"output {name} of the ONNX model differs from the program by {error:.1e}",
        where=culprit or name,
        why=why + ("; the node is the first that differs" if culprit else ""),
        hint="report this with the model; check=False lowers without the check",
    )


def not_finite(name: str, size: str) -> LowerError:
    """Return the error that says that an output of the program itself tells nothing."""
    return LowerError(
        f"output {name} cannot be checked",
        why=f"the program itself gives no finite number on {size}",
        hint="look for NaN among the weights, or lower with check=False",
    )


def first_difference(
    artifact: Artifact, program: Program, inputs: Sequence[Any], run: Runs = in_onnxruntime
) -> str:
    """Return the first node whose value is another in the runtime; empty if none can be named."""
    found = probe(artifact, program, inputs, run)
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
