"""`Builder`: the exact small program that a test means, node by node, with known provenance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from narrows.ir.editing import infer_shapes
from narrows.ir.meta import Meta
from narrows.ir.program import Draft, Program

aten = torch.ops.aten
BATCH = 2


def ramp(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return numbers that differ, fall into -1 .. 1, and are the same on every machine."""
    count = max(1, torch.Size(shape).numel())
    return ((torch.arange(count) * 7 % 16 - 8) / 8).reshape(shape).to(dtype)


class Builder:
    """Builds a program; axis 0 is the free batch axis wherever it has the batch's size."""

    def __init__(self, *shapes: Sequence[int], dtype: torch.dtype = torch.float32) -> None:
        self.graph = fx.Graph()
        self.weights: dict[str, Tensor] = {}
        self.nodes: dict[str, fx.Node] = {}
        self.buffers: set[str] = set()
        self.line = 0
        self.examples = tuple(ramp(*s, dtype=dtype) for s in shapes)
        self.inputs = [self.graph.placeholder(f"x{i or ''}") for i in range(len(shapes))]

    def weight(self, name: str, tensor: Tensor, *, trained: bool = True) -> fx.Node:
        """Return the node of a weight, made at its first use."""
        if name not in self.weights:
            self.weights[name] = tensor
            self.nodes[name] = self.graph.get_attr(name)
            if not trained:
                self.buffers.add(name)
        return self.nodes[name]

    def call(self, target: Any, *args: Any, name: str = "", **kwargs: Any) -> fx.Node:
        """Return a new node; it stems from the next line of ``net.py`` and from module ``name``."""
        node = self.graph.create_node("call_function", target, args, kwargs, name=name or None)
        self.line += 1
        Meta(node).source = f"net.py:{self.line}"
        Meta(node).code = f"y = self.{name}(x)" if name else ""
        Meta(node).module = name
        return node

    def conv(
        self, x: fx.Node, name: str, out: int, inner: int, *, bias: bool = False, **options: Any
    ) -> fx.Node:
        """Return a 3x3 convolution with padding 1."""
        w = self.weight(f"{name}.weight", ramp(out, inner, 3, 3))
        b = self.weight(f"{name}.bias", ramp(out)) if bias else None
        groups = options.pop("groups", 1)
        return self.call(aten.conv2d.default, x, w, b, [1, 1], [1, 1], [1, 1], groups, name=name)

    def norm(self, x: fx.Node, name: str, width: int, *, affine: bool = True) -> fx.Node:
        """Return a batch norm in eval mode whose standard deviations are exact in binary."""
        w = self.weight(f"{name}.weight", ramp(width) + 2) if affine else None
        b = self.weight(f"{name}.bias", ramp(width)) if affine else None
        mean = self.weight(f"{name}.running_mean", ramp(width) / 2, trained=False)
        var = self.weight(f"{name}.running_var", torch.full((width,), 0.25), trained=False)
        args = (x, w, b, mean, var, False, 0.1, 0.0, False)
        return self.call(aten.batch_norm.default, *args, name=name)

    def relu(self, x: fx.Node, name: str = "relu") -> fx.Node:
        """Return a relu."""
        return self.call(aten.relu.default, x, name=name)

    def program(self, *outputs: fx.Node, name: str = "net") -> Program:
        """Return the program that ends in ``outputs``."""
        self.graph.output(tuple(outputs))
        spec = pytree.tree_structure((tuple(self.examples), {}))
        out = pytree.tree_structure(tuple(0 for _ in outputs) if len(outputs) > 1 else 0)
        program = Draft(
            self.graph,
            self.weights,
            spec,
            out,
            self.examples,
            buffers=frozenset(self.buffers),
            stored=frozenset(self.buffers),
            dynamic_batch=True,
            name=name,
        )
        infer_shapes(program)
        for node in self.graph.nodes:
            shape = Meta(node).shape
            free = node.op != "get_attr" and shape and shape[0] == BATCH
            Meta(node).dynamic = (0,) if free else ()
        return program.seal()
