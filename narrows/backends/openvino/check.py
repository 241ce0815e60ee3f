"""Holds an artifact to the program it was made from, in OpenVINO, in a process of its own.

Floats are held to what `narrows.backends.onnx.check` holds them to. Integers are not the same bits
everywhere: OpenVINO leaves out roundings between operators that it computes as one (a convolution
and the sum behind it). What is left out moves a code by half a step at most. So an output may be
as far off as it is from the program with every code moved by a step, or not, at random; how far it
is, is said. Where the bits are equal, that is said instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from narrows.backends import golden
from narrows.backends.apart import run_apart
from narrows.backends.artifact import Artifact
from narrows.backends.base import Pair
from narrows.backends.compare import Case, Wanted, limit_of, output_error
from narrows.backends.onnx.check import (
    ROUNDING,
    Checked,
    first_difference,
    not_finite,
)
from narrows.backends.onnx.rounding import is_rounding
from narrows.backends.onnx.session import MODEL
from narrows.errors import LowerError
from narrows.files.folders import temporary
from narrows.ir.compare import relative_error
from narrows.ir.graph import interpret
from narrows.ir.meta import Meta
from narrows.ir.ops import table
from narrows.ir.ops.args import arguments
from narrows.ir.ops.integer import Moves
from narrows.ir.program import Program

RUNNER = "narrows.backends.openvino.runner"
UNCHECKED = "report this with the model; check=False lowers without the check"

CODES = (
    "OpenVINO leaves out roundings between operators: of the checked numbers {:.1%} differ from "
    "the program's, by {:.1e} of an output's largest number at most; a program whose codes are "
    "all moved by a step or not, at random, is {:.1e} off"
)


def check(artifact: Artifact, wanted: Wanted, again: Callable[[], Pair], whole: bool) -> Checked:
    """Compare an artifact with what it has to give.

    Args:
        artifact: What was made; of integers, it keeps its golden digests only where they hold.
        wanted: What it has to give.
        again: Returns the program and its reference; called where an output is not what it has to
            be.
        whole: Whether it is a program of integers.

    Raises:
        LowerError: It does not run, or an output differs by more than rounding.
    """
    fed = [artifact.arrays(case.inputs) for case in wanted.cases]
    made_up = [golden.draw(artifact.inputs, int(b)) for b in artifact.manifest.get("golden", {})]
    model = str(artifact.folder / MODEL)
    ran = run_apart(RUNNER, [*fed, *made_up], model, what="the model", hint=UNCHECKED)
    results = [artifact.gather(a, r) for a, r in zip(fed, ran, strict=False)]
    if not whole:
        return _floats(artifact, wanted, again, results)
    promised = artifact.manifest.pop("golden", {})
    same = [golden.digests(found) for found in ran[len(fed) :]] == list(promised.values())
    checked = _integers(wanted, again, results, same)
    if promised and not checked.remarks:
        artifact.manifest["golden"] = promised
    return checked


# ---------------------------------------------------------------------- floats


def _floats(
    artifact: Artifact, wanted: Wanted, again: Callable[[], Pair], results: Sequence[list[Any]]
) -> Checked:
    errors, excused = [], 0.0
    for case, actual in zip(wanted.cases, results, strict=True):
        worst = 0.0
        for i, (got, value) in enumerate(zip(actual, case.outputs, strict=True)):
            error = output_error(got, value)
            if not error <= limit_of(value):
                _excuse(artifact, wanted, again, case, i, error)
                excused = max(excused, error)
            worst = max(worst, error)
        errors.append(worst)
    return Checked(wanted.report(errors), (ROUNDING.format(excused),) if excused else ())


def _excuse(
    artifact: Artifact, wanted: Wanted, again: Callable[[], Pair], case: Case, at: int, error: float
) -> None:
    """Raise `LowerError` unless an error beyond the tolerance is carried rounding."""
    name, program = wanted.names[at], again().lowered
    if math.isnan(error):
        raise not_finite(name, case.size)
    if is_rounding(artifact, program, case.inputs, at, case.outputs[at], error, in_openvino):
        return
    culprit = first_difference(artifact, program, case.inputs, in_openvino)
    raise _difference(name, error, case.size, culprit)


def _difference(name: str, error: float, size: str, culprit: str = "") -> LowerError:
    why = f"that is the difference on {size}, relative to the output's largest number"
    found = "; the node is the first that differs" if culprit else ""
    return LowerError(
        f"output {name} of the model differs from the program by {error:.1e} in OpenVINO",
        where=culprit or name,
        why=why + found,
        hint="target onnx may do; " + UNCHECKED,
    )


def in_openvino(
    model: bytes, feed: Mapping[str, np.ndarray], names: Sequence[str]
) -> Sequence[np.ndarray]:
    """Return outputs of a model in OpenVINO, by the names that they have in the file."""
    import onnx

    shown = [value.name for value in onnx.load_model_from_string(model).graph.output]
    with temporary() as folder:
        (folder / MODEL).write_bytes(model)
        (found,) = run_apart(RUNNER, [feed], str(folder / MODEL), what="the model", hint=UNCHECKED)
    by_name = dict(zip(shown, found, strict=True))
    return [by_name[name] for name in names]


# ---------------------------------------------------------------------- integers


def _integers(
    wanted: Wanted,
    again: Callable[[], Pair],
    results: Sequence[list[Any]],
    same: bool,
) -> Checked:
    pairs = [
        list(zip(r, c.outputs, strict=True)) for r, c in zip(results, wanted.cases, strict=True)
    ]
    errors = [max(code_error(got, value) for got, value in case) for case in pairs]
    if same and not any(errors):
        return Checked(wanted.report(errors, 0.0))
    bound = max(_moved(again().reference, case) for case in wanted.cases)
    for case, found in zip(wanted.cases, pairs, strict=True):
        for name, (got, value) in zip(wanted.names, found, strict=True):
            error = code_error(got, value)
            if math.isnan(error):
                raise not_finite(name, case.size)
            if not error <= bound:
                raise _difference(name, error, case.size)
    tensors = [(g, v) for case in pairs for g, v in case if isinstance(v, Tensor)]
    differing = sum(int((np.asarray(g) != v.numpy()).sum()) for g, v in tensors)
    share = differing / max(1, sum(v.numel() for _, v in tensors))
    return Checked(wanted.report(errors, bound), (CODES.format(share, max(errors), bound),))


def code_error(actual: Any, expected: Any) -> float:
    """Return the relative error of one output, codes taken as the numbers that they are.

    Other whole numbers are equal or infinitely wrong: an index off by one is another thing.
    """
    if isinstance(expected, Tensor) and expected.dtype in (torch.uint8, torch.int16):
        got = torch.from_numpy(np.array(actual))
        if (got.dtype, got.shape) != (expected.dtype, expected.shape):
            return math.inf
        return relative_error(got.double(), expected.double())
    return output_error(actual, expected)


def _moved(program: Program, case: Case) -> float:
    """Return how far the outputs are off with every code moved by a step, or not, at random."""
    generator = torch.Generator().manual_seed(0)

    def call(node: fx.Node, args: Any, kwargs: Any) -> Any:
        value = node.target(*args, **kwargs)  # type: ignore[operator]
        if Meta(node).grid is None or isinstance(table.integer_form(node), Moves):
            return value
        if not isinstance(value, Tensor) or value.dtype not in (torch.uint8, torch.int16):
            return value
        given, limits = arguments(node), torch.iinfo(value.dtype)
        low, high = given.get("low", limits.min), given.get("high", limits.max)
        steps = torch.randint(-1, 2, value.shape, generator=generator)
        return (value.to(torch.int64) + steps).clamp(low, high).to(value.dtype)

    with torch.no_grad():
        moved = interpret(program.graph, case.inputs, program.weights, call=call)
    values = [v.numpy() if isinstance(v, Tensor) else v for v in moved]
    errors = [code_error(got, value) for got, value in zip(values, case.outputs, strict=True)]
    return max(e if math.isfinite(e) else 0.0 for e in errors)
