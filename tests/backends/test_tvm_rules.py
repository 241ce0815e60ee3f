"""The lowering rules of the tvm target: every sample of the op table, many of them in one program.

Operands that are images or tokens come out of a layer, so that they are stored with the channels
last and padded, as they are in networks.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from narrows.backends import lower
from narrows.errors import LowerError
from narrows.ir.graph import interpret
from narrows.ir.ops import table
from narrows.ir.ops.row import Row
from narrows.ir.ops.sample import Given, Made, Sample, Size, Weight
from narrows.ir.program import Program
from tests.backends.marks import NEEDS_TVM

pytestmark = NEEDS_TVM

aten = torch.ops.aten

# Rows without a rule, each with its reason.
WITHOUT = {
    "erfinv": "TVM has no inverse error function",
}


class Bench:
    """Collects samples in one graph, in float32."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.examples: list[Tensor] = []
        self.weights: dict[str, Tensor] = {}
        self.holders: list[fx.Node] = []
        self.outputs: list[fx.Node] = []
        self.generator = torch.Generator().manual_seed(0)

    def add(self, row: Row, sample: Sample) -> None:
        leaves: dict[int, Any] = {}

        def operand(leaf: Any) -> Any:
            if id(leaf) not in leaves:
                leaves[id(leaf)] = self.operand(leaf)
            return leaves[id(leaf)]

        args, kwargs = pytree.tree_map(operand, (sample.args, sample.kwargs))
        node = self.graph.call_function(row.target, args, kwargs)
        value = self.value(node)
        if isinstance(value, Tensor):
            self.outputs.append(node)
        else:
            parts = [
                self.graph.call_function(operator.getitem, (node, i)) for i in range(len(value))
            ]
            self.outputs.extend(parts)

    def value(self, node: fx.Node) -> Any:
        values: dict[fx.Node, Any] = {}
        interpret_until(self, node, values)
        return values[node]

    def operand(self, leaf: Any) -> Any:
        if isinstance(leaf, Size):
            return leaf.rows
        if isinstance(leaf, Weight):
            data = torch.tensor(leaf.values) if leaf.values else self.uniform(leaf.shape, leaf)
            data = data.reshape(leaf.shape)
            if leaf.zeros:
                data[list(leaf.zeros)] = 0
            return self.weight(single(data.to(leaf.dtype)))
        if isinstance(leaf, Given) or not self.layered(leaf):
            if isinstance(leaf, Given | Made):
                return self.input(single(self.uniform(leaf.shape, leaf).to(leaf.dtype)))
            return torch.float32 if leaf is torch.float64 else leaf
        return self.layer(leaf)

    def layered(self, leaf: Any) -> bool:
        return (
            isinstance(leaf, Made)
            and leaf.dtype.is_floating_point
            and leaf.axes in ((1,), (len(leaf.shape) - 1,))
            and len(leaf.shape) in (2, 3, 4, 5)
        )

    def layer(self, leaf: Made) -> fx.Node:
        axis, rank = leaf.axes[0], len(leaf.shape)
        shape = list(leaf.shape)
        shape[axis] = 3
        x = self.input(self.uniform(tuple(shape), leaf).float())
        if axis == rank - 1:
            w = self.weight(torch.randn(leaf.shape[axis], 3, generator=self.generator))
            y = self.graph.call_function(aten.linear.default, (x, w))
        else:
            kernel = (1,) * (rank - 2)
            w = self.weight(torch.randn(leaf.shape[1], 3, *kernel, generator=self.generator))
            conv = getattr(aten, f"conv{rank - 2}d").default
            y = self.graph.call_function(conv, (x, w))
        return self.graph.call_function(aten.clamp.default, (y, leaf.low, leaf.high))

    def uniform(self, shape: tuple[int, ...], leaf: Any) -> Tensor:
        low, high = leaf.low, leaf.high
        return torch.rand(shape, generator=self.generator, dtype=torch.float64) * (high - low) + low

    def input(self, data: Tensor) -> fx.Node:
        before = self.holders[-1] if self.holders else self.graph._root
        with self.graph.inserting_after(before):
            node = self.graph.placeholder(f"x{len(self.examples)}")
        self.holders.append(node)
        self.examples.append(data)
        return node

    def weight(self, data: Tensor) -> fx.Node:
        name = f"w{len(self.weights)}"
        self.weights[name] = data
        return self.graph.get_attr(name)

    def program(self) -> Program:
        self.graph.output(tuple(self.outputs))
        spec = pytree.tree_structure((tuple(self.examples), {}))
        out = pytree.tree_structure((0,) * len(self.outputs))
        interpret(self.graph, self.examples, self.weights, observe=note)
        return Program(self.graph, self.weights, spec, out, tuple(self.examples))


def single(data: Tensor) -> Tensor:
    return data.float() if data.dtype == torch.float64 else data


def note(node: fx.Node, value: Any) -> None:
    if isinstance(value, Tensor):
        node.meta["shape"], node.meta["dtype"] = tuple(value.shape), value.dtype


def interpret_until(bench: Bench, wanted: fx.Node, values: dict[fx.Node, Any]) -> None:
    feed = dict(zip(bench.holders, bench.examples, strict=True))
    needed = {wanted}
    for node in reversed(list(bench.graph.nodes)):
        if node in needed:
            needed.update(node.all_input_nodes)
    for node in bench.graph.nodes:
        if node not in needed:
            continue
        if node.op == "placeholder":
            values[node] = feed[node]
        elif node.op == "get_attr":
            values[node] = bench.weights[str(node.target)]
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            with torch.no_grad():
                values[node] = node.target(*args, **kwargs)


def lowered(rows: Iterable[Row]) -> None:
    bench = Bench()
    for row in rows:
        if row.name.removesuffix(".default") in WITHOUT:
            continue
        for sample in row.samples:
            bench.add(row, sample)
    lower(bench.program(), "tvm", tune=0, samples=1)  # compares the outputs itself


TOGETHER = 40  # rows to a program: compiling one takes a few seconds


# What TVM has no rule for: it is refused by name, and ONNX takes it.
REFUSED = {
    "argsort.default", "argsort.stable", "col2im.default", "cummax.default", "cummin.default",
    "gather.default", "grid_sampler.default", "im2col.default", "index.Tensor",
    "kthvalue.default", "max.dim", "median.dim", "min.dim", "scatter.src", "scatter.value",
    "scatter_add.default", "sort.default", "sort.stable", "take_along_dim.default", "topk.default",
}  # fmt: skip


def batches() -> Iterator[Any]:
    for kind in sorted({row.kind for row in table.rows()}):
        rows = [row for row in table.rows() if row.kind == kind and row.name not in REFUSED]
        for start in range(0, len(rows), TOGETHER):
            part = rows[start : start + TOGETHER]
            yield pytest.param(part, id=f"{kind}-{start // TOGETHER}")


def test_what_tvm_has_no_rule_for_is_refused_by_name() -> None:
    rows = [row for row in table.rows() if row.name in REFUSED]
    assert {row.name for row in rows} == REFUSED
    with pytest.raises(LowerError, match=f"no rule for {len(REFUSED)} operators") as caught:
        lowered(rows)
    assert all(name in str(caught.value) for name in REFUSED)
    assert "target onnx" in caught.value.hint


@pytest.mark.parametrize("rows", list(batches()))
def test_every_sample_of_the_table_is_lowered(rows: list[Row]):
    lowered(rows)
