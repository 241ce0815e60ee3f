"""What backends ask of integer programs: whether a program is one, and what it owes bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from narrows.backends import golden
from narrows.backends.compare import TOLERANCE, output_error
from narrows.errors import LowerError
from narrows.ir.graph import interpret
from narrows.ir.meta import Meta, op_name, where
from narrows.ir.ops import table
from narrows.ir.ops.integer import Moves
from narrows.ir.program import Program

if TYPE_CHECKING:
    from narrows.backends.artifact import Artifact


def is_integer(program: Program) -> bool:
    """Whether a program is one that ``fold-shifts`` made."""
    return any(Meta(n).grid is not None for n in program.graph.nodes)


def of_narrows(node: fx.Node) -> bool:
    """Whether a node calls an operator of `torch.ops.narrows`."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "narrows"


def refuse_fake(program: Program) -> None:
    """Raise `LowerError` for a fake-quantized program."""
    for node in program.graph.nodes:
        if of_narrows(node) and op_name(node).startswith("fake_"):
            raise LowerError(
                f"{program.name} is fake-quantized: its integers are not folded yet",
                where=where(node),
                hint="run the pass fold-shifts, or lower what narrows.quantize calls `program`",
            )


def refuse_wide(program: Program, target: str) -> None:
    """Raise `LowerError` for codes of more than 8 bits, which a target has no kernels for."""
    for node in program.graph.nodes:
        grid = Meta(node).grid
        if grid is not None and grid.wide:
            raise LowerError(
                f"{node.name} has codes of {grid.bits} bits, which the {target} target cannot",
                where=where(node),
                why="its kernels are for codes of 8 bits",
                hint="lower it to onnx or c, or quantize with activations=8 and method='mse': auto "
                "gives tensors with outliers 16",
            )


def float_islands(program: Program) -> list[fx.Node]:
    """Return the nodes of an integer program whose floating-point results become codes again."""
    entries = [
        n.all_input_nodes[0] for n in program.graph.nodes
        if n.target is torch.ops.narrows.quantize.default
    ]  # fmt: skip
    return [n for n in dict.fromkeys(entries) if n.op == "call_function"]


def from_islands(
    program: Program, inputs: Sequence[Any], given: Mapping[fx.Node, Tensor]
) -> list[Any]:
    """Return what the program gives where its islands give what a backend's do.

    Floating-point kernels differ in the last place, and a code behind one by a step. So an island
    is held to the tolerance of floats, and all that follows from its result to equality.

    Args:
        program: The program.
        inputs: Flat inputs.
        given: What the backend computed per island.

    Raises:
        LowerError: An island is beyond the tolerance.
    """

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


def float_outputs(program: Program) -> list[fx.Node]:
    """Return the nodes whose results are outputs and were computed by floating-point kernels."""
    return [n for n in program.output.all_input_nodes if ends_in_floats(n)]


def ends_in_floats(node: Any) -> bool:
    """Whether a result of an integer program hangs on floating-point kernels, not on codes alone.

    Such a result is held to a tolerance, as an island is.
    """
    if not isinstance(node, fx.Node):
        return False
    while isinstance(form := table.integer_form(node), Moves):
        node = form.operands(node)[0]
    if node.op != "call_function" or of_narrows(node):
        return False
    dtype = Meta(node).dtype
    return dtype is None or dtype.is_floating_point


def add_golden(artifact: Artifact, program: Program) -> None:
    """Keep digests of what the interpreter gives on made-up inputs; see `narrows check`.

    Not where floating-point kernels have a part in it: they differ from machine to machine.
    """
    if float_islands(program) or float_outputs(program):
        return
    shown = artifact.manifest["structure"]["output_leaves"]
    free = any(isinstance(s, str) for spec in artifact.inputs for s in spec.shape)
    kept: dict[str, list[str]] = {}
    for batch in golden.BATCHES:
        arrays = golden.draw(artifact.inputs, batch)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        feed = [
            tensors.get(n.name, e)
            for n, e in zip(program.placeholders, program.examples, strict=True)
        ]
        with torch.no_grad():
            found = program.run_flat(feed)
        by_tensor = {
            leaf["tensor"]: r for leaf, r in zip(shown, found, strict=True) if "tensor" in leaf
        }
        kept[str(batch)] = golden.digests(by_tensor[i].numpy() for i in sorted(by_tensor))
        if not free:
            kept = dict.fromkeys(map(str, golden.BATCHES), kept[str(batch)])
            break
    artifact.manifest["golden"] = kept
