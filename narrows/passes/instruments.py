"""What can watch a pipeline: checks of structure and promises, dumps, progress.

Each is an `Instrument` (``narrows.passes.pipeline``) of a few lines::

    Pipeline.default(plan).run(program, [Verify(), Numerics(), Dumper("out/dump")])

`narrows.passes.proof` has those that compare numbers: `Numerics` after every pass, `Proof` once.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from typing import Any, TextIO

import torch

from narrows.errors import NarrowsError, PassError
from narrows.ir.compare import relative_error
from narrows.ir.dump import Dump
from narrows.ir.meta import where
from narrows.ir.program import Note, Program
from narrows.ir.snapshot import snapshot
from narrows.ir.states import shared_outputs
from narrows.passes.base import Pass, PassResult


class Watch:
    """An instrument that watches nothing; the others override what they need."""

    def before(self, pass_: Pass, program: Program) -> None:
        """Ignore the start of a pass."""

    def after(self, pass_: Pass, program: Program, result: PassResult, seconds: float) -> None:
        """Ignore the end of a pass."""


class Verify(Watch):
    """Verifies the program before the first pass and after each; the error names the pass."""

    def __init__(self) -> None:
        self._verified: object = None

    def before(self, pass_: Pass, program: Program) -> None:
        """Verify a program that no pass under this instrument made."""
        if self._verified is None:
            self._verify(program, "as it was given")

    def after(self, pass_: Pass, program: Program, result: PassResult, seconds: float) -> None:
        """Verify what the pass made."""
        self._verify(result.program, f"after {pass_.name}")
        self._verified = result.program

    def _verify(self, program: Program, when: str) -> None:
        from narrows.ir.verify import verify

        try:
            verify(program)
        except NarrowsError as error:
            raise PassError(
                f"the program is broken {when}: {error.what}",
                where=error.where,
                why=error.why,
                hint=error.hint,
            ) from error


class Promises(Watch):
    """Holds a pass to its contract: the input untouched, and ``changed`` honest (for debugging).

    It fingerprints the graph's text, the identity of the weights and their version counters, which
    every in-place operation raises.
    """

    def __init__(self) -> None:
        self._before: dict[str, str] = {}

    def before(self, pass_: Pass, program: Program) -> None:
        """Remember the input."""
        self._before = fingerprint(program)

    def after(self, pass_: Pass, program: Program, result: PassResult, seconds: float) -> None:
        """Compare the input with what it was, and ``changed`` with what happened."""
        after = fingerprint(program)
        if after != self._before:
            parts = " and ".join(k for k in after if after[k] != self._before[k])
            raise PassError(
                f"{pass_.name} changed the {parts} of its input",
                why="a pass copies the graph and puts new tensors in place of old ones",
                hint="begin run() with `program = program.copy()`",
            )
        differs = fingerprint(result.program) != self._before
        if differs != result.changed:
            done = "changed the program" if differs else "left the program as it was"
            raise PassError(
                f"{pass_.name} {done} but says changed={result.changed}",
                hint="return PassResult(program, changed=...) with what run() found to do",
            )


def fingerprint(program: Program) -> dict[str, str]:
    """Return hashes of a program's ``graph`` and ``weights``, equal only for the same tensors."""
    lines = [f"{n.op} {n.name} {n.target} {n.args} {n.kwargs}" for n in program.graph.nodes]
    held = [f"{k} {id(t)} {_version(t)}" for k, t in sorted(program.weights.items())]
    names = [repr(sorted(program.aliases.items())), repr(sorted(program.buffers))]
    return {
        "graph": hashlib.sha1("\n".join(lines).encode()).hexdigest(),
        "weights": hashlib.sha1("\n".join(held + names).encode()).hexdigest(),
    }


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def compare(actual: Program, expected: Program) -> float:
    """Return the relative error of one program's outputs against another's, on its examples.

    Each is fed the dtypes that it takes: a reference in float64 does not widen what it is held to.
    States are compared on the channels that both have.
    """
    wanted = outputs_of(expected, expected.examples)
    got = outputs_of(actual, fed(actual, expected.examples))
    return relative_error(*alike(actual, got, expected, wanted))


def alike(
    program: Program, outputs: Sequence[Any], other: Program, others: Sequence[Any]
) -> tuple[list[Any], list[Any]]:
    """Return the outputs of two forms of a program, of states the channels that both have."""
    own = shared_outputs(outputs, program.states, other.states)
    return own, shared_outputs(others, other.states, program.states)


def outputs_of(program: Program, inputs: Sequence[Any]) -> list[Any]:
    """Return the flat outputs of a program that is checked.

    An operator that draws random numbers, of which narrows knows nothing, draws the same each time.
    `PassError` names the node that cannot be run.
    """
    run = program.start(inputs)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            return run.finish()
        except Exception as cause:
            said = str(cause).partition("\n")[0] or type(cause).__name__
            raise PassError(
                f"{program.name} does not run on its examples: {said}",
                where=where(run.at),
                why="so it cannot be compared with what it has to equal",
                hint="if the model itself runs on them, report this with the model, please; "
                "check=False leaves the comparison out",
            ) from cause


def fed(program: Program, values: Sequence[Any]) -> list[Any]:
    """Return flat inputs in the dtypes of a program's own examples; states are its own examples,
    which have the channels that it takes."""
    states = {s.name for s in program.states}
    own = zip(program.placeholders, program.examples, strict=True)
    return [e if n.name in states else _cast(v, e) for v, (n, e) in zip(values, own, strict=True)]


def _cast(value: Any, own: Any) -> Any:
    tensors = isinstance(value, torch.Tensor) and isinstance(own, torch.Tensor)
    return value.to(own.dtype) if tensors else value


def measure(actual: Program, expected: Program) -> dict[str, float]:
    """Return the relative error of ``actual`` by the name of its dtype."""
    return {name_of(precision(actual)): compare(actual, expected)}


def precision(program: Program) -> torch.dtype:
    """Return the narrowest floating-point dtype among a program's weights and examples."""
    tensors = [*program.weights.values(), *program.examples]
    kinds = {t.dtype for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point()}
    return min(kinds, key=lambda d: -torch.finfo(d).eps, default=torch.float32)


def has_floats(program: Program) -> bool:
    """Return whether anything in the program is a floating-point number."""
    tensors = [*program.weights.values(), *program.examples]
    return any(isinstance(t, torch.Tensor) and t.is_floating_point() for t in tensors)


def name_of(dtype: torch.dtype) -> str:
    """Return ``float32``."""
    return str(dtype).removeprefix("torch.")


class Dumper(Watch):
    """Writes the program after every pass into a dump folder (`narrows.ir.dump`).

    Give it after the instruments that measure, so that the dump holds their numbers. A pass that
    fails is recorded in the index with its error.

    Args:
        folder: A new or empty folder, or one that holds an older dump, which is replaced.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.dump = Dump.create(folder)

    def before(self, pass_: Pass, program: Program) -> None:
        """Write the program that the pipeline was given."""
        if not self.dump.stages:
            self._add("capture", "capture", program, (), {}, 0.0)
            self.dump.set_couplings(coupling_records(program))

    def after(self, pass_: Pass, program: Program, result: PassResult, seconds: float) -> None:
        """Write what the pass made."""
        self._add(pass_.name, str(pass_), result.program, result.notes, result.measured, seconds)

    def failed(
        self, pass_: Pass, program: Program, result: PassResult | None, error: Exception
    ) -> None:
        """Record that the pass failed, with the program that was refused, where there is one."""
        if result is None:
            self.dump.fail(pass_.name, str(error))
            return
        self._add(
            pass_.name, str(pass_), result.program, result.notes, result.measured, 0.0, str(error)
        )

    def _add(
        self,
        name: str,
        spelling: str,
        program: Program,
        notes: Sequence[Note],
        measured: dict[str, float],
        seconds: float,
        error: str = "",
    ) -> None:
        view = snapshot(program, contents=True)
        self.dump.add(
            name,
            view,
            spelling=spelling,
            nodes=len(view.nodes),
            parameters=view.parameter_count,
            measured=measured,
            seconds=round(seconds, 4),
            notes=[vars(n) for n in notes],
            **({"error": error} if error else {}),
        )


def coupling_records(program: Program) -> list[dict[str, Any]]:
    """Return a program's couplings as JSON values."""
    return [c.to_json() for c in program.couplings()]


class Progress(Watch):
    """Says on a terminal which pass runs and what it did; silent elsewhere.

    Args:
        stream: Where to write; standard error unless given.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = sys.stderr if stream is None else stream

    def before(self, pass_: Pass, program: Program) -> None:
        """Say which pass runs."""
        self._say(f"{pass_.name} ...")

    def after(self, pass_: Pass, program: Program, result: PassResult, seconds: float) -> None:
        """Say what it did."""
        error = "".join(f", {k} error {v:.1e}" for k, v in result.measured.items())
        done = "changed" if result.changed else "nothing to do"
        self._say(f"\r{pass_.name}: {done} in {seconds:.2f} s{error}\n")

    def failed(
        self, pass_: Pass, program: Program, result: PassResult | None, error: Exception
    ) -> None:
        """End the line, so that the error begins one of its own."""
        self._say(f"\r{pass_.name}: failed\n")

    def _say(self, text: str) -> None:
        if self.stream.isatty():
            self.stream.write(text)
            self.stream.flush()


__all__ = [
    "Dumper",
    "Progress",
    "Promises",
    "Verify",
    "compare",
    "fingerprint",
    "measure",
    "outputs_of",
]
