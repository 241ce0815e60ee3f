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
from narrows.backends.onnx.session import DATA, MODEL, OnnxSession
from narrows.errors import ArtifactError, LowerError, ProgramError
from narrows.ir.program import Meta, Program, interpret, relative_error, where

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

# One sample, the example's size, and one that is neither: what was fixed by accident shows.
BATCHES = (1, 2, 5)


@dataclass
class Checked:
    """What the check found.

    Attributes:
        fidelity: The worst relative error per batch size, as JSON data for the manifest.
        flat: Whether every output was one number over and over, so that little can be told.
    """

    fidelity: dict[str, Any]
    flat: bool


def check(artifact: Artifact, program: Program, samples: int, exact: bool = False) -> Checked:
    """Compare the artifact with the program, on ``samples`` inputs per batch size.

    The first input is the example. Integer outputs have to be equal.

    Args:
        artifact: What was made.
        program: What it has to equal.
        samples: How many inputs are tried per batch size.
        exact: Whether all outputs have to be equal, with the runtime's optimizations and without.

    Raises:
        LowerError: Names the first output that differs, and the first node.
    """
    generator = torch.Generator().manual_seed(0)
    limit = max((TOLERANCE[d] for d in _float_dtypes(program)), default=0.0)
    if exact:
        limit = 0.0
    flat = True
    checked = []
    for batch in BATCHES if program.dynamic_batch else (None,):
        worst = 0.0
        for sample in range(samples):
            inputs = draw_inputs(program, batch, generator if sample else None)
            error, varied = _compare(artifact, program, inputs, batch, exact)
            worst, flat = max(worst, error), flat and not varied
        size = batch if batch is not None else _example_batch(program)
        checked.append({"batch": size, "inputs": samples, "error": worst})
    return Checked({"tolerance": limit, "checked": checked}, flat)


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


def _compare(
    artifact: Artifact, program: Program, inputs: Sequence[Any], batch: int | None, exact: bool
) -> tuple[float, bool]:
    """Return the worst error, and whether an output holds two numbers that differ."""
    size = f"batch {batch}" if batch is not None else "the example's batch"
    try:
        with torch.no_grad():
            expected = program.run_flat(inputs)
    except (ProgramError, RuntimeError) as error:
        raise LowerError(f"the program cannot run on {size}", why=str(error)) from error
    worst, varied = 0.0, False
    islands = float_islands(program) if exact else []
    for optimize in (True, False) if exact else (True,):
        try:
            actual = artifact.run_flat(inputs, optimize=optimize)
            if islands:
                expected = _behind_islands(artifact, program, inputs, islands, optimize)
        except ArtifactError as error:
            raise _failure(error, size) from error
        for name, got, wanted in zip(_output_names(program), actual, expected, strict=True):
            error = output_error(got, wanted)
            if not error <= (0.0 if exact else _limit(wanted)):
                how = size if optimize else f"{size}, without the runtime's optimizations"
                raise _difference(artifact, program, inputs, name, error, how)
            worst = max(worst, error)
    for wanted in expected:
        if isinstance(wanted, Tensor) and wanted.numel():
            varied = varied or bool((wanted != wanted.flatten()[0]).any())
    return worst, varied


def float_islands(program: Program) -> list[fx.Node]:
    """Return the nodes of an integer program whose floating-point results become codes again."""
    entries = [
        n.all_input_nodes[0] for n in program.graph.nodes
        if n.target is torch.ops.narrows.quantize.default
    ]  # fmt: skip
    return [n for n in dict.fromkeys(entries) if n.op == "call_function"]


def _behind_islands(
    artifact: Artifact,
    program: Program,
    inputs: Sequence[Any],
    islands: Sequence[fx.Node],
    optimize: bool,
) -> list[Any]:
    """Return what the program gives where its islands give what the runtime's do.

    Floating-point kernels differ in the last place, and a code behind one by a step. So an island
    is held to the tolerance of floats, and all that follows from its result to equality.
    """
    import onnx

    model = onnx.load(artifact.folder / MODEL)
    model.graph.output.extend(onnx.ValueInfoProto(name=n.name) for n in islands)
    session = OnnxSession(model.SerializeToString(), None, optimize)
    pairs = zip(program.placeholders, inputs, strict=True)
    feed = {node.name: value.numpy() for node, value in pairs if isinstance(value, Tensor)}
    results = session.run(feed)[-len(islands) :]
    given = {n: torch.from_numpy(r) for n, r in zip(islands, results, strict=True)}

    def call(node: fx.Node, args: Any, kwargs: Any) -> Any:
        value = node.target(*args, **kwargs)  # type: ignore[operator]
        if node not in given:
            return value
        error = output_error(given[node], value)
        if not error <= TOLERANCE[torch.float32]:
            raise LowerError(
                f"the float island {node.name} differs from the program by {error:.1e}",
                where=where(node),
                hint="report this with the model; check=False lowers without the check",
            )
        return given[node]

    with torch.no_grad():
        return interpret(program.graph, inputs, program.weights, call=call)


def _limit(wanted: Any) -> float:
    return TOLERANCE.get(wanted.dtype, 0.0) if isinstance(wanted, Tensor) else 0.0


def _failure(error: ArtifactError, size: str) -> LowerError:
    why = error.why or error.what
    no_kernel = "NOT_IMPLEMENTED" in why or "ScalarType" in why
    return LowerError(
        f"the ONNX model cannot run on {size}",
        why=why,
        hint="lower program.to(torch.float32); other types have few kernels" if no_kernel else "",
    )


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
    import onnx
    import onnxruntime

    if (artifact.folder / DATA).exists():
        return ""  # such a model cannot be changed in memory
    model = onnx.load(artifact.folder / MODEL)
    present = {name for node in model.graph.node for name in node.output}
    probed = {n.name: n for n in program.nodes if n.op == "call_function" and n.name in present}
    outputs = {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=n) for n in probed if n not in outputs)
    expected: dict[str, Any] = {}

    def observe(node: fx.Node, value: Any) -> None:
        if node.name in probed:
            expected[node.name] = value

    with torch.no_grad():
        program.run_flat(inputs, observe=observe)
    pairs = zip(program.placeholders, inputs, strict=True)
    feed = {node.name: value.numpy() for node, value in pairs if isinstance(value, Tensor)}
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        results = session.run(list(probed), feed)
    except Exception:  # then the difference is told without the node
        return ""
    for name, result in zip(probed, results, strict=True):
        if not output_error(result, expected[name]) <= _limit(expected[name]):
            return where(probed[name])
    return ""


def _float_dtypes(program: Program) -> set[torch.dtype]:
    tensors = [*program.weights.values(), *(e for e in program.examples if isinstance(e, Tensor))]
    return {t.dtype for t in tensors if t.dtype in TOLERANCE}


def _example_batch(program: Program) -> int:
    shapes = [e.shape for e in program.examples if isinstance(e, Tensor) and e.dim()]
    return shapes[0][0] if shapes else 1


def _output_names(program: Program) -> list[str]:
    outputs: Any = program.output.args[0]
    return [getattr(value, "name", repr(value)) for value in outputs]
