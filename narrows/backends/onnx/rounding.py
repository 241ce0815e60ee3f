"""Whether what separates a float model from its program is the runtime's own rounding.

A network may carry rounding far: it divides by small numbers, or ends in a sigmoid of very negative
ones, whose results are as exact as numbers around one and tiny beside them. No runtime does better
then, and an end-to-end tolerance cannot tell it from a mistake. An operator by itself can: every
operator is computed in float64 from what the *runtime* had for its operands, and has to give what
the runtime has for its result. A wrong operator, weight or axis shows there as it does anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from narrows.backends.artifact import Artifact
from narrows.backends.compare import limit_of, output_error, output_names
from narrows.backends.onnx.session import DATA, MODEL, OnnxSession
from narrows.errors import NarrowsError
from narrows.ir.graph import interpret
from narrows.ir.ops import table
from narrows.ir.ops.args import with_argument
from narrows.ir.program import Program, aten

# The most that rounding may carry to an output; what is worse is refused, whatever it comes from.
MOST = 1e-2

# How much farther off than another way of computing the same the runtime may be.
NEARLY = 4.0

# How many units in the last place an operator may be off.
UNITS = 16

# Functions that runtimes compute to some units in the last place of one, however small the result.
AROUND_ONE = frozenset(
    {aten.sigmoid.default, aten.tanh.default, aten.erf.default, aten.sin.default, aten.cos.default,
     aten.softmax.int, aten.log_sigmoid.default}
)  # fmt: skip


# Runs a model that is given as bytes, and returns the outputs that are named.
Runs = Callable[[bytes, Mapping[str, np.ndarray], Sequence[str]], Sequence[np.ndarray]]


def in_onnxruntime(
    model: bytes, feed: Mapping[str, np.ndarray], names: Sequence[str]
) -> Sequence[np.ndarray]:
    """Return outputs of a model in ONNX Runtime."""
    return OnnxSession(model).run(feed, names)


def probe(
    artifact: Artifact, program: Program, inputs: Sequence[Any], run: Runs = in_onnxruntime
) -> dict[str, np.ndarray] | None:
    """Return the runtime's value of every node that the model has by its name, outputs included.

    ``None`` where the model cannot be changed to show them, or does not run then.
    """
    import onnx

    if (artifact.folder / DATA).exists():
        return None  # such a model cannot be changed in memory
    model = onnx.load(artifact.folder / MODEL)
    present = {name for node in model.graph.node for name in node.output}
    names = [n.name for n in program.nodes if n.op == "call_function" and n.name in present]
    shown = {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in shown)
    pairs = zip(program.placeholders, inputs, strict=True)
    feed = {node.name: value.numpy() for node, value in pairs if isinstance(value, Tensor)}
    try:
        results = run(model.SerializeToString(), feed, names)
    except (NarrowsError, ValueError):
        return None
    return dict(zip(names, results, strict=True))


def is_rounding(
    artifact: Artifact, program: Program, inputs: Sequence[Any], output: int, wanted: Any,
    error: float, run: Runs = in_onnxruntime,
) -> bool:  # fmt: skip
    """Whether an output's relative error is carried rounding: every operator by itself is right.

    With every operator shown, the runtime cannot rewrite the model as it does otherwise; so the
    output has to be about as far off then, or its rewriting is what is wrong.

    Args:
        artifact: The artifact.
        program: The program that was lowered.
        inputs: Flat inputs.
        output: Which output it is.
        wanted: What that has to be.
        error: Its relative error.
        run: Runs a model in the artifact's runtime.
    """
    found = probe(artifact, program, inputs, run) if error <= MOST else None
    name = output_names(program)[output]
    if found is None or name not in found:
        return False
    with torch.no_grad():
        own = program.run_flat(inputs)[output]
    if not output_error(own, wanted) <= limit_of(wanted):  # the program itself is another
        return False
    carried = output_error(found[name], wanted)
    return error <= NEARLY * carried and not _wrong(program, inputs, found)


def _wrong(program: Program, inputs: Sequence[Any], found: Mapping[str, np.ndarray]) -> bool:
    """Whether an operator, given the runtime's operands, gives something else than the runtime."""
    wide = program.to(torch.float64)
    dtypes = {n.name: n.meta.get("dtype") for n in program.graph.nodes}
    wrong: list[str] = []

    def call(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        args, kwargs = with_argument(node.target, args, kwargs, "device", "cpu")
        value = node.target(*args, **kwargs)  # type: ignore[operator]
        if node.name not in found or not isinstance(value, Tensor):
            return value
        result = torch.from_numpy(np.array(found[node.name])).to(value.dtype)
        if not _agrees(value, result, lambda: _allowed(node, value, args, kwargs, dtypes)):
            wrong.append(node.name)
        return result if result.shape == value.shape else value

    flat = [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in inputs]
    with torch.no_grad():
        interpret(wide.graph, flat, wide.weights, call=call)
    return bool(wrong)


def _agrees(value: Tensor, result: Tensor, allowed: Callable[[], Tensor]) -> bool:
    if result.shape != value.shape:
        return False
    if not value.is_floating_point():
        return torch.equal(value, result)
    finite = value.isfinite()
    if not torch.allclose(value[~finite], result[~finite], equal_nan=True):
        return False
    return bool(((value - result).abs() <= allowed())[finite].all())


def _allowed(
    node: fx.Node, value: Tensor, args: Any, kwargs: Any, dtypes: Mapping[str, Any]
) -> Tensor:
    """Return how far from its value in float64 every element of an operator's result may be.

    A sum of products is as exact as its products are large, element by element. Anything else may
    be some units off, and not much farther than torch is in the same dtype.
    """
    dtype, target = dtypes[node.name], cast(Callable[..., Tensor], node.target)
    units = UNITS * torch.finfo(dtype).eps
    if table.contracts(node):
        return units * target(*_each(args, Tensor.abs), **_each(kwargs, Tensor.abs))
    scale = value.abs().clamp(min=1.0) if node.target in AROUND_ONE else value.abs()
    try:
        same = target(*_each(args, lambda t: t.to(dtype)), **_each(kwargs, lambda t: t.to(dtype)))
    except (RuntimeError, NotImplementedError):  # torch has no kernel for the dtype
        return units * scale
    off = (same.double() - value).abs()
    off = off[off.isfinite()]
    return units * scale + (NEARLY * off.max() if off.numel() else 0.0)


def _each(args: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return arguments with their floating-point tensors changed."""
    return tree_map(
        lambda a: change(a) if isinstance(a, Tensor) and a.is_floating_point() else a, args
    )


__all__ = ["Runs", "in_onnxruntime", "is_rounding", "probe"]
