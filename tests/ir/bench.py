"""A sample of an operator's row as a program: layers make its operands, layers read its results."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from narrows.ir.graph import interpret
from narrows.ir.labels import Bools, Value
from narrows.ir.meta import Meta
from narrows.ir.ops.row import Row
from narrows.ir.ops.sample import Given, Made, Sample, Size, Weight
from narrows.ir.program import Draft, Program

aten = torch.ops.aten

INPUTS = 3  # the width of what the layers that make operands read


class Bench:
    """A sample as a program.

    Attributes:
        node: The operator's node; ``parts``: the nodes of its results.
        made: Per `Made` operand the node that holds it; the layer of the first is called ``m0``.
        values: What every node of the program was at the examples.
    """

    def __init__(self, row: Row, sample: Sample, seed: int = 0) -> None:
        self.row = row
        self.made: dict[Made, fx.Node] = {}
        self.values: dict[fx.Node, Any] = {}
        self._generator = torch.Generator().manual_seed(seed)
        self._graph = fx.Graph()
        self._weights: dict[str, Tensor] = {}
        self._examples: list[Tensor] = []
        self._inputs: list[fx.Node] = []
        self._leaves: dict[Any, fx.Node] = {}
        args, kwargs = pytree.tree_map(self._operand, (sample.args, sample.kwargs))
        self.node = self._call(row.target, *args, name="op", **kwargs)
        self.parts = [self.node]
        self.program()
        if not isinstance(self.values[self.node], Tensor):
            count = len(self.values[self.node])
            self.parts = [self._call(operator.getitem, self.node, i) for i in range(count)]

    def program(self, outputs: list[fx.Node] | None = None) -> Draft:
        """Return the program that ends in ``outputs``, or in the results; its graph may grow."""
        old = next((n for n in reversed(self._graph.nodes) if n.op == "output"), None)
        if old is not None:
            self._graph.erase_node(old)
        outputs = outputs or self.parts
        self._graph.output(tuple(outputs))
        interpret(self._graph, self._examples, self._weights, observe=self._observe)
        spec = pytree.tree_structure((tuple(self._examples), {}))
        out = pytree.tree_structure((0,) * len(outputs))
        return Draft(self._graph, self._weights, spec, out, tuple(self._examples))

    def read(self, values: list[Value], masks: list[Bools] | None = None) -> Program:
        """Return the program in which a layer reads each result, but not the labels masked out."""
        outputs = []
        for i, (part, value) in enumerate(zip(self.parts, values, strict=True)):
            x = part
            if Meta(part).dtype != torch.float64:
                x = self._call(aten.to.dtype, x, torch.float64)
            if not value.axes:
                outputs.append(x)
                continue
            order = rest_first(len(value.shape), value.axes)
            labels = value.tensor.expand(value.shape).permute(order)
            labels = labels.flatten(len(order) - len(value.axes))
            weight = self.uniform((2, labels.shape[-1]), 0.5, 1.5)
            if masks is not None:
                keep = torch.from_numpy(masks[i])[labels.flatten(0, -2)[0]]
                weight[:, ~keep] = 0
            x = self._call(aten.permute.default, x, order)
            if len(value.axes) > 1:
                x = self._call(aten.reshape.default, x, list(labels.shape))
            w = self._weight(f"reader{i}.weight", weight)
            b = self._weight(f"reader{i}.bias", self.uniform((2,), 0.0, 1.0))
            outputs.append(self._call(aten.linear.default, x, w, b))
        return self.program(outputs)

    def uniform(self, shape: tuple[int, ...], low: float, high: float) -> Tensor:
        drawn = torch.rand(shape, generator=self._generator, dtype=torch.float64)
        return low + (high - low) * drawn

    # ---------------------------------------------------------------- operands

    def _operand(self, leaf: Any) -> Any:
        if not isinstance(leaf, Made | Weight | Given | Size):
            return leaf
        if leaf not in self._leaves:
            if isinstance(leaf, Made):
                self._leaves[leaf] = self.made[leaf] = self._make(leaf, f"m{len(self.made)}")
            elif isinstance(leaf, Weight):
                self._leaves[leaf] = self._given_weight(leaf)
            elif isinstance(leaf, Given):
                data = self.uniform(leaf.shape, leaf.low, leaf.high)
                self._leaves[leaf] = self._input(data.to(leaf.dtype))
            else:
                x = self._input(self.uniform((leaf.rows, INPUTS), 0.0, 1.0))
                self._leaves[leaf] = self._call(aten.sym_size.int, x, 0)
        return self._leaves[leaf]

    def _given_weight(self, leaf: Weight) -> fx.Node:
        data = self.uniform(leaf.shape, leaf.low, leaf.high)
        if leaf.values:
            data = torch.tensor(leaf.values).reshape(leaf.shape)
        if leaf.zeros:
            data[list(leaf.zeros)] = 0
        return self._weight(f"w{len(self._weights)}", data.to(leaf.dtype))

    def _make(self, leaf: Made, name: str) -> fx.Node:
        """Return the node of a tensor, made by a linear layer, whose values fill ``low ..
        high``."""
        order = rest_first(len(leaf.shape), leaf.axes)
        sizes = [leaf.shape[a] for a in order]
        rest, width = sizes[: -len(leaf.axes)], math.prod(sizes[-len(leaf.axes) :])
        x = self._input(self.uniform((*rest, INPUTS), 0.0, 1.0))
        weight = self.uniform((width, INPUTS), 0.0, 1.0)
        weight *= (leaf.high - leaf.low) / weight.sum(1, keepdim=True)
        bias = torch.full((width,), leaf.low, dtype=torch.float64)
        w, b = self._weight(f"{name}.weight", weight), self._weight(f"{name}.bias", bias)
        y = self._call(aten.linear.default, x, w, b)
        if len(leaf.axes) > 1:
            y = self._call(aten.reshape.default, y, sizes)
        if order != sorted(order):
            back = [order.index(a) for a in range(len(order))]
            y = self._call(aten.contiguous.default, self._call(aten.permute.default, y, back))
        if leaf.dtype == torch.bool:
            y = self._call(aten.gt.Scalar, y, (leaf.low + leaf.high) / 2)
        elif leaf.dtype != torch.float64:
            y = self._call(aten.to.dtype, y, leaf.dtype)
        return y

    # ---------------------------------------------------------------- nodes

    def _input(self, data: Tensor) -> fx.Node:
        node = self._graph.placeholder(f"x{len(self._inputs)}")
        (self._inputs[-1] if self._inputs else self._graph._root).append(node)
        self._inputs.append(node)
        self._examples.append(data)
        return node

    def _weight(self, name: str, data: Tensor) -> fx.Node:
        self._weights[name] = data
        return self._graph.get_attr(name)

    def _call(self, target: Any, *args: Any, name: str | None = None, **kwargs: Any) -> fx.Node:
        return self._graph.create_node("call_function", target, args, kwargs, name=name)

    def _observe(self, node: fx.Node, value: Any) -> None:
        self.values[node] = value
        meta = Meta(node)
        if isinstance(value, Tensor):
            meta.shape, meta.dtype = tuple(value.shape), value.dtype
        elif isinstance(value, int):
            meta.size = value


def rest_first(rank: int, axes: tuple[int, ...]) -> list[int]:
    """Return the permutation that puts ``axes`` last."""
    return [a for a in range(rank) if a not in axes] + list(axes)
