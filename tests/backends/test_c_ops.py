"""Every operator with an integer form, in C: the interpreter's codes, or a refusal by name."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

import narrows
from narrows.backends.c.compiler import find_compiler
from narrows.backends.c.moves import PICKS
from narrows.errors import LowerError, NarrowsError
from narrows.ir.editing import infer_shapes
from narrows.ir.integer.grid import ROUNDINGS
from narrows.ir.meta import Meta
from narrows.ir.ops import table
from narrows.ir.ops.integer import Moves
from narrows.ir.ops.integer_forms import Lookup
from narrows.ir.ops.sample import Given, Made, Sample, Size, Weight
from narrows.ir.program import Draft, Program
from tests.backends.several_forms import PROGRAMS, integers

pytestmark = pytest.mark.skipif(not find_compiler(), reason="there is no C compiler")

# A table is a table; two of the operators that become one are compiled.
TABLES = {"silu.default", "exp.default"}


def cases() -> Iterator[Any]:
    for row in table.rows():
        if row.integer is not None and (not isinstance(row.integer, Lookup) or row.name in TABLES):
            alike = isinstance(row.integer, Moves) and row.name not in PICKS
            for i, sample in enumerate(row.samples[: 1 if alike else 2]):
                yield pytest.param(row, sample, id=f"{row.name}-{i}")


class Operands:
    """Makes a sample's operands: inputs, weights and numbers."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.weights: dict[str, Tensor] = {}
        self.examples: list[Tensor] = []
        self.made: dict[int, fx.Node] = {}
        self.generator = torch.Generator().manual_seed(0)

    def node(self, leaf: Any) -> Any:
        if isinstance(leaf, Size):
            return leaf.rows
        if not isinstance(leaf, Made | Given | Weight):
            return leaf
        if id(leaf) not in self.made:
            self.made[id(leaf)] = self._new(leaf)
        return self.made[id(leaf)]

    def _new(self, leaf: Made | Given | Weight) -> fx.Node:
        drawn = torch.rand(leaf.shape, generator=self.generator)
        value = leaf.low + (leaf.high - leaf.low) * drawn
        if isinstance(leaf, Weight) and leaf.values:
            value = torch.tensor(leaf.values).reshape(leaf.shape)
        value = value.to(torch.float32 if leaf.dtype.is_floating_point else leaf.dtype)
        if isinstance(leaf, Weight):
            name = f"w{len(self.weights)}"
            self.weights[name] = value
            return self.graph.get_attr(name)
        self.examples.append(value)
        return self.graph.placeholder(f"x{len(self.examples)}")


def program(row: Any, sample: Sample) -> Program:
    """Return the program that is nothing but one operator."""
    operands = Operands()
    args, kwargs = pytree.tree_map(operands.node, (sample.args, sample.kwargs))
    inputs = [n for n in operands.graph.nodes if n.op == "placeholder"]
    for node in reversed(inputs):  # inputs stand first
        operands.graph._root.append(node)
    node = operands.graph.call_function(row.target, args, kwargs)
    Meta(node).source = "net.py:1"
    values = {n: e for n, e in zip(inputs, operands.examples, strict=True)}
    for n in operands.graph.nodes:
        if n.op == "get_attr":
            values[n] = operands.weights[n.target]
    result = row.target(*fx.node.map_arg(args, values.get), **fx.node.map_arg(kwargs, values.get))
    outputs: Any = node
    if not isinstance(result, Tensor):
        count = range(len(result))
        outputs = [operands.graph.call_function(operator.getitem, (node, i)) for i in count]
    outputs = tuple(outputs) if isinstance(outputs, list) else (outputs,)
    operands.graph.output(outputs)
    examples = tuple(operands.examples)
    made = Draft(
        operands.graph, operands.weights, pytree.tree_structure((examples, {})),
        pytree.tree_structure((0,) * len(outputs)), examples, name="op",
    )  # fmt: skip
    infer_shapes(made)
    return made.seal()


@pytest.mark.parametrize(("name", "rounding"), [*product(PROGRAMS, ROUNDINGS)])
def test_many_operators_are_the_interpreter(name: str, rounding: str) -> None:
    narrows.lower(integers(name, rounding), "c", samples=1)  # it compares, with ==


@pytest.mark.parametrize(("row", "sample"), list(cases()))
def test_every_operator_is_the_interpreter(row: Any, sample: Sample) -> None:
    floats = program(row, sample)
    if not floats.examples:
        pytest.skip("it reads no input")
    try:
        quantized = narrows.quantize(floats, [floats.examples], check=False)
    except NarrowsError as error:
        if not error.what.startswith("nothing of"):
            raise
        pytest.skip(error.what)
    integers = quantized.program
    if quantized.plan.floats:
        with pytest.raises(LowerError, match=f"everywhere: {row.name}") as caught:
            narrows.lower(integers, "c", check=False)
        assert "net.py:1" in caught.value.where
        return
    try:
        artifact = narrows.lower(integers, "c", check=False)
    except NotImplementedError as error:
        pytest.skip(f"the interpreter cannot run it: {error}")
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        inputs = [
            e[torch.randperm(len(e), generator=generator)] if e.is_floating_point() else e
            for e in floats.examples
        ]
        expected = integers.run_flat(inputs)
        actual = artifact.run_flat(inputs, optimize=False)
        for got, wanted in zip(actual, expected, strict=True):
            assert torch.equal(torch.from_numpy(got), wanted)


def test_every_function_of_one_number_is_a_table() -> None:
    rows = [r for r in table.rows() if isinstance(r.integer, Lookup) and r.samples]
    assert len(rows) > 20
    for row in rows:
        floats = program(row, row.samples[0])
        quantized = narrows.quantize(floats, [floats.examples], check=False).program
        artifact = narrows.lower(quantized, "c", check=False)
        source = (artifact.folder / "model.c").read_text()
        (made,) = (t for n, t in quantized.weights.items() if n.endswith(".table"))
        assert ", ".join(map(str, made.tolist()[:8])) in source
        assert "lookup(out_" in source
