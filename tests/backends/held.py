"""An ONNX artifact held to a program that need not be the one it was made from."""

from __future__ import annotations

from narrows.backends.artifact import Artifact
from narrows.backends.base import Pair
from narrows.backends.compare import Wanted
from narrows.backends.onnx.check import BATCHES, Checked, check
from narrows.ir.program import Program


def held(
    artifact: Artifact,
    program: Program,
    samples: int,
    *,
    exact: bool = False,
    lowered: Program | None = None,
) -> Checked:
    """Return what the check finds; ``lowered`` is the program whose nodes the artifact has."""
    wanted = Wanted.of(program, BATCHES if program.dynamic_batch else (None,), samples)
    return check(artifact, wanted, lambda: Pair(lowered or program, program), exact)
