"""What becomes of every flat input and output: a tensor, a constant, or passed through."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from narrows.errors import LowerError
from narrows.ir.meta import Meta, shape_of
from narrows.ir.program import Program


@dataclass(frozen=True)
class Leaves:
    """How an artifact fills in the flat inputs and outputs of a call.

    Attributes:
        inputs: Per flat input ``{"tensor": i}``, the i-th input of the model, or ``{"value": v}``.
        outputs: Per flat output ``{"tensor": i}``, with ``"number"`` when it is a plain number,
            ``{"input": i}`` for an input that is passed through, or ``{"value": v}``.
        computed: The nodes that are the model's outputs.
    """

    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    computed: list[fx.Node]

    @staticmethod
    def of(program: Program) -> Leaves:
        """Return the leaves of a program; `LowerError` if it computes nothing."""
        inputs: list[dict[str, Any]] = []
        for example in program.examples:
            count = sum("tensor" in leaf for leaf in inputs)
            is_tensor = isinstance(example, Tensor)
            inputs.append({"tensor": count} if is_tensor else {"value": _plain(example)})
        by_holder = dict(zip(program.placeholders, inputs, strict=True))
        outputs: list[dict[str, Any]] = []
        computed: list[fx.Node] = []
        flat: Any = program.output.args[0]
        for value in flat:
            if not isinstance(value, fx.Node):
                outputs.append({"value": _plain(value)})
            elif value in by_holder:
                leaf = by_holder[value]
                outputs.append({"input": leaf["tensor"]} if "tensor" in leaf else leaf)
            else:
                if value not in computed:
                    computed.append(value)
                number = {"number": True} if Meta(value).size is not None else {}
                outputs.append({"tensor": computed.index(value), **number})
        if not computed:
            raise LowerError(f"{program.name} computes nothing: it only returns its inputs")
        return Leaves(inputs, outputs, computed)

    def specs(self, program: Program) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return name, shape and dtype of the tensors that go in, and of those that come out.

        A size that follows the batch is ``"b"``, or says how: ``"2*b + 0"``.
        """

        def spec(node: fx.Node) -> dict[str, Any]:
            meta = Meta(node)
            if meta.shape is None:
                whole = isinstance(meta.size, int)
                return {"name": node.name, "shape": [], "dtype": "int64" if whole else "float32"}
            shape: list[Any] = list(meta.shape)
            for axis in meta.dynamic if program.dynamic_batch else ():
                times, rest = divmod(meta.shape[axis], example_batch(program))
                shape[axis] = "b" if (times, rest) == (1, 0) else f"{times}*b + {rest}"
            return {"name": node.name, "shape": shape, "dtype": str(meta.dtype).partition(".")[2]}

        pairs = zip(program.placeholders, program.examples, strict=True)
        inputs = [spec(node) for node, example in pairs if isinstance(example, Tensor)]
        return inputs, [spec(node) for node in self.computed]


def example_batch(program: Program) -> int:
    """Return the batch size of the program's examples; 0 where none is free."""
    sizes = (shape_of(n)[a] for n in program.placeholders for a in Meta(n).dynamic)
    return next(sizes, 0)


def _plain(value: Any) -> Any:
    """Return a constant that JSON can hold."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise LowerError(
        f"an input or output of the type {type(value).__name__} cannot be kept: {value!r}",
        why="it is neither a tensor nor a plain number, text or None",
    )
