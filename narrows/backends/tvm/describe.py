"""`describe`: a program as plain data, for a process that has TVM but neither torch nor the model.

The description fixes the batch size. What does not depend on an input is computed here and becomes
a weight, so that the compiler sees neither arithmetic on sizes nor tables of positions.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from narrows.errors import LowerError
from narrows.ir.graph import interpret
from narrows.ir.meta import op_name, where
from narrows.ir.ops.args import arguments
from narrows.ir.program import Program

# What the compiler has number types for; bfloat16 has no numpy form.
DTYPES = {
    torch.float32: "float32", torch.float64: "float64", torch.float16: "float16",
    torch.int64: "int64", torch.int32: "int32", torch.int16: "int16", torch.int8: "int8",
    torch.uint8: "uint8", torch.bool: "bool",
}  # fmt: skip


@dataclass(frozen=True)
class Description:
    """A program at one batch size.

    Attributes:
        graph: JSON data: ``inputs`` and ``nodes``, each with ``name``, ``shape`` and ``dtype`` (one
            per result), ``outputs`` as names; a node also has ``op``, the overload as ATen spells
            it, and ``args`` by schema name, in which ``{"ref": name}`` stands for a tensor.
        weights: The arrays that ``args`` refer to by name.
        outputs: The nodes behind ``outputs``.
    """

    graph: dict[str, Any]
    weights: dict[str, np.ndarray]
    outputs: list[fx.Node]


def describe(program: Program, inputs: list[Any], outputs: list[fx.Node]) -> Description:
    """Return the description of the program that computes ``outputs``.

    Args:
        program: The program.
        inputs: Flat inputs of the batch size to compile for; the program runs on them once.
        outputs: The nodes whose values are wanted.

    Raises:
        LowerError: A tensor has a dtype that TVM has no form for.
    """
    scribe = _Scribe(program, outputs)
    with torch.no_grad():
        interpret(program.graph, inputs, program.weights, observe=scribe.observe)
    return scribe.finish()


class _Scribe:
    """Watches the program run and writes down what depends on its inputs."""

    def __init__(self, program: Program, outputs: list[fx.Node]) -> None:
        self.program, self.outputs = program, outputs
        self.live = _needed(outputs)
        self.fixed: dict[fx.Node, Any] = {}  # values that no input decides
        self.inputs: list[dict[str, Any]] = []
        self.nodes: list[dict[str, Any]] = []
        self.weights: dict[str, np.ndarray] = {}
        self.names: dict[int, str] = {}

    def observe(self, node: fx.Node, value: Any) -> None:
        """Write down one node and its value."""
        if node.op == "output":
            return
        if node.op == "placeholder":
            if isinstance(value, Tensor):
                self.inputs.append({"name": node.name, **self._facts(node, value)})
            else:
                self.fixed[node] = value
            return
        if node not in self.live:
            return
        if not isinstance(value, Tensor | tuple | list) or all(
            n in self.fixed for n in node.all_input_nodes
        ):
            self.fixed[node] = value
            return
        self.nodes.append({"name": node.name, **self._call(node), **self._facts(node, value)})

    def _facts(self, node: fx.Node, value: Any) -> dict[str, Any]:
        parts = value if isinstance(value, tuple | list) else [value]
        shapes = [list(part.shape) for part in parts]
        dtypes = [self._dtype(node, part.dtype) for part in parts]
        if isinstance(value, tuple | list):
            return {"shape": shapes, "dtype": dtypes}
        return {"shape": shapes[0], "dtype": dtypes[0]}

    def _dtype(self, node: fx.Node, dtype: torch.dtype) -> str:
        if dtype not in DTYPES:
            kind = str(dtype).removeprefix("torch.")
            raise LowerError(
                f"TVM has no form for {kind}",
                where=where(node),
                hint="lower program.to(torch.float32)",
            )
        return DTYPES[dtype]

    def _call(self, node: fx.Node) -> dict[str, Any]:
        if node.target is operator.getitem:
            given: dict[str, Any] = {"self": node.args[0], "index": node.args[1]}
        else:
            given = arguments(node)
        return {"op": _spelled(node), "args": {k: self._plain(node, v) for k, v in given.items()}}

    def _plain(self, node: fx.Node, value: Any) -> Any:
        """Return an argument as JSON data."""
        value = map_arg(value, self._fixed_or_node)
        if isinstance(value, fx.Node):
            return {"ref": value.name}
        if isinstance(value, Tensor):
            return {"ref": self._weight(node, value)}
        if isinstance(value, tuple | list):
            return [self._plain(node, v) for v in value]
        if isinstance(value, torch.dtype):
            return self._dtype(node, value)
        if value is None or isinstance(value, bool | int | float | str):
            return value
        return str(value)  # a device, a memory format: nothing that changes a number

    def _fixed_or_node(self, node: fx.Node) -> Any:
        return self.fixed.get(node, node)

    def _weight(self, node: fx.Node, tensor: Tensor) -> str:
        key = id(tensor)  # the tensors live as long as `fixed`
        if key not in self.names:
            self._dtype(node, tensor.dtype)
            name = f"weight_{len(self.names)}"
            self.names[key] = name
            self.weights[name] = tensor.detach().contiguous().numpy()
        return self.names[key]

    def finish(self) -> Description:
        """Return what was written down."""
        results = []
        for node in self.outputs:
            if node in self.fixed:
                value = self.fixed[node]
                tensor = value if isinstance(value, Tensor) else torch.tensor(value)
                self.fixed[node] = tensor
                results.append(self._weight(node, tensor))
            else:
                results.append(node.name)
        graph = {"inputs": self.inputs, "nodes": self.nodes, "outputs": results}
        return Description(graph, self.weights, self.outputs)


def _needed(outputs: list[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = list(outputs)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def _spelled(node: fx.Node) -> str:
    """Return the operator as rules know it: those of integer programs with their namespace."""
    name = op_name(node)
    if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "narrows":
        return f"narrows.{name.removesuffix('.default')}"
    return name
