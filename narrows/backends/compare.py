"""How an artifact is compared with the program it was made from: on which inputs, how closely."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from narrows.errors import ArtifactError, LowerError, ProgramError
from narrows.ir.compare import relative_error
from narrows.ir.meta import Meta
from narrows.ir.program import Program

if TYPE_CHECKING:
    from narrows.backends.artifact import Artifact

# The largest difference that is taken for rounding, relative to the largest number of an output.
# The runtime sums in another order and fuses operators, so it differs by a few units in the last
# place per layer: 1e-6 to 1e-5 in float32 (unit 6e-8) for networks of 20 to 200 layers. A wrong
# operator, weight or axis moves an output by 1e-2 and more. float64 has the same margin above
# its unit (1e-16); float16 and bfloat16 round every layer's output to 5e-4 and 4e-3.
TOLERANCE: dict[torch.dtype, float] = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 6e-2,
}

HELD = 1 << 24  # bytes of outputs that are held whatever the weights take

FLAT = "every output was one and the same number on all checked inputs, so the check tells little"


@dataclass(frozen=True)
class Case:
    """Inputs, and what the program gives for them.

    Attributes:
        batch: The batch size; ``None`` where it is not free.
        inputs: The flat inputs.
        given: The flat outputs, or the program where those would take more memory than it does.
    """

    batch: int | None
    inputs: list[Any]
    given: list[Any] | Program

    @property
    def outputs(self) -> list[Any]:
        """The flat outputs; `LowerError` if the program does not run."""
        if not isinstance(self.given, Program):
            return self.given
        try:
            with torch.no_grad():
                return self.given.run_flat(self.inputs)
        except (ProgramError, RuntimeError) as error:
            raise LowerError(f"the program cannot run on {self.size}", why=str(error)) from error

    @property
    def size(self) -> str:
        """The batch size in words."""
        return f"batch {self.batch}" if self.batch is not None else "the example's batch"


@dataclass(frozen=True)
class Wanted:
    """What an artifact has to give, as values: whoever holds it need not hold the program.

    Only where all outputs would take more memory than the weights, the rest are computed when they
    are asked for, and the program is held.

    Attributes:
        cases: Inputs and outputs, those of a batch size in a row; the first of each are the
            example.
        samples: How many there are of a batch size.
        names: The names of the flat outputs.
        tolerance: The relative error that an output may have, by the program's dtypes.
        batch: The example's batch size.
    """

    cases: tuple[Case, ...]
    samples: int
    names: tuple[str, ...]
    tolerance: float
    batch: int

    @staticmethod
    def of(program: Program, batches: Sequence[int | None], samples: int) -> Wanted:
        """Return what a program gives on ``samples`` inputs per batch size.

        `LowerError` if it does not run on one.
        """
        generator = torch.Generator().manual_seed(0)
        cases = []
        room = max(HELD, sum(t.nbytes for t in program.weights.values()))
        for batch in batches:
            for sample in range(samples):
                inputs = draw_inputs(program, batch, generator if sample else None)
                case = Case(batch, inputs, program)
                outputs = case.outputs if room >= 0 else []
                room -= sum(v.nbytes for v in outputs if isinstance(v, Tensor))
                cases.append(replace(case, given=outputs) if room >= 0 else case)
        shapes = [e.shape for e in program.examples if isinstance(e, Tensor) and e.dim()]
        return Wanted(
            tuple(cases),
            samples,
            tuple(output_names(program)),
            tolerance_of(program),
            shapes[0][0] if shapes else 1,
        )

    @property
    def flat(self) -> bool:
        """Whether every output is one number over and over, so that little can be told."""
        return not any(varies(value) for case in self.cases for value in case.outputs)

    def report(self, errors: Sequence[float], tolerance: float | None = None) -> dict[str, Any]:
        """Return what a comparison found, as JSON data for the manifest.

        Args:
            errors: The worst relative error of every case.
            tolerance: What was allowed, where that is not the program's.
        """
        checked = [
            {
                "batch": self.batch if self.cases[i].batch is None else self.cases[i].batch,
                "inputs": self.samples,
                "error": max(errors[i : i + self.samples]),
            }
            for i in range(0, len(self.cases), self.samples)
        ]
        return {"tolerance": self.tolerance if tolerance is None else tolerance, "checked": checked}


def limit_of(wanted: Any) -> float:
    """Return the relative error that an output may have."""
    return TOLERANCE.get(wanted.dtype, 0.0) if isinstance(wanted, Tensor) else 0.0


def tolerance_of(program: Program) -> float:
    """Return the relative error that an output of a program may have, by its dtypes."""
    tensors = [*program.weights.values(), *(e for e in program.examples if isinstance(e, Tensor))]
    return max((TOLERANCE.get(t.dtype, 0.0) for t in tensors), default=0.0)


def varies(wanted: Any) -> bool:
    """Whether an output holds two numbers that differ, without which a check tells little."""
    if not isinstance(wanted, Tensor) or not wanted.numel():
        return False
    return bool((wanted != wanted.flatten()[0]).any())


def output_names(program: Program) -> list[str]:
    """Return the names of a program's flat outputs."""
    outputs: Any = program.output.args[0]
    return [getattr(value, "name", repr(value)) for value in outputs]


def output_error(actual: Any, expected: Any) -> float:
    """Return the relative error of one output; infinite unless whole numbers are equal.

    A result without a finite number, of which nothing can be told, counts as infinitely wrong.
    """
    if not isinstance(expected, Tensor):
        return 0.0 if actual == expected else math.inf
    got = torch.from_numpy(np.ascontiguousarray(actual).reshape(np.shape(actual)))
    if got.dtype != expected.dtype or got.shape != expected.shape:
        return math.inf
    if not expected.is_floating_point():
        return 0.0 if torch.equal(got, expected) else math.inf
    if expected.numel() and not bool(expected.isfinite().any()):
        return math.nan
    return relative_error(got, expected)


def held_to(wanted: Wanted, artifact: Artifact) -> dict[str, Any]:
    """Return how far an artifact is from its program, as JSON data for the manifest.

    `LowerError` if it does not run, or differs by more than rounding.
    """
    errors = []
    for case in wanted.cases:
        try:
            actual = artifact.run_flat(case.inputs)
        except ArtifactError as error:
            raise LowerError(
                "the file does not run", why=error.why or error.what, hint=error.hint
            ) from error
        worst = 0.0
        for name, got, expected in zip(wanted.names, actual, case.outputs, strict=True):
            error_ = output_error(got, expected)
            if not error_ <= limit_of(expected):
                raise LowerError(
                    f"output {name} of the file differs from the program by {error_:.1e}",
                    where=name,
                    why="that is relative to the output's largest number",
                )
            worst = max(worst, error_)
        errors.append(worst)
    return wanted.report(errors)


def draw_inputs(
    program: Program, batch: int | None, generator: torch.Generator | None
) -> list[Any]:
    """Return flat inputs of another batch size, like the program's examples.

    Numbers are drawn between the example's smallest and largest; whole numbers and truth values are
    rows of the example, so that indices stay in range. Without a generator the rows are the
    example's own, repeated where there are too few.
    """
    drawn: list[Any] = []
    for node, example in zip(program.placeholders, program.examples, strict=True):
        if not isinstance(example, Tensor):
            drawn.append(example)
            continue
        value = example.detach()
        free = Meta(node).dynamic if batch is not None else ()
        for axis in free or ((0,) if value.dim() else ()):
            rows = value.shape[axis]
            count = batch if batch is not None and axis in free else rows
            if generator is None:
                order = torch.arange(count) % rows
            elif free:
                order = torch.randint(rows, (count,), generator=generator)
            else:
                order = torch.randperm(rows, generator=generator)
            value = value.index_select(axis, order)
        drawn.append(value if generator is None else _redraw(value, generator))
    return drawn


def _redraw(value: Tensor, generator: torch.Generator) -> Tensor:
    if not value.is_floating_point() or not value.numel() or not bool(value.isfinite().all()):
        return value
    low, high = value.min().item(), value.max().item()
    drawn = torch.rand(value.shape, generator=generator) * (high - low) + low
    if low == high:  # an example of zeros says nothing of the range
        drawn = torch.randn(value.shape, generator=generator)
    return drawn.to(value.dtype)
