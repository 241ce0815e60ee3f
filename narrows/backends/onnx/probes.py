"""Small ONNX graphs that hold operators as they occur in models, each tagged as a probe.

A probe stands between two cheap convolutions, so that it finds its operand, and leaves its result,
in the layout that it would have in a model. One graph holds many probes; `Bench.model` is what ONNX
Runtime is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 20
NARROW = 16  # the channels of the convolutions around a probe

# How operators are spelled in ONNX: the node type and its attributes.
POINTWISE: dict[str, tuple[str, dict[str, Any]]] = {
    "relu": ("Relu", {}),
    "relu6": ("Clip", {}),
    "hardtanh": ("Clip", {}),
    "sigmoid": ("Sigmoid", {}),
    "tanh": ("Tanh", {}),
    "hardsigmoid": ("HardSigmoid", {"alpha": 1 / 6}),
    "hardswish": ("HardSwish", {}),
    "leaky_relu": ("LeakyRelu", {}),
    "elu": ("Elu", {}),
    "gelu": ("Gelu", {}),
    "silu": ("", {}),  # two nodes, which ONNX Runtime makes one
    "mul": ("Mul", {}),
    "add": ("Add", {}),
}


@dataclass
class Bench:
    """A graph under construction.

    Attributes:
        probes: What every probe measures, by its number; the number stands in its nodes' names.
        kind: The type of its inputs and outputs.
    """

    kind: ClassVar[int] = TensorProto.FLOAT
    probes: list[Any] = field(default_factory=list)
    _nodes: list[Any] = field(default_factory=list)
    _weights: dict[str, Any] = field(default_factory=dict)
    _inputs: dict[str, Any] = field(default_factory=dict)
    _outputs: list[str] = field(default_factory=list)
    _shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    _count: int = 0
    _random: Any = field(default_factory=lambda: np.random.default_rng(0))

    # ------------------------------------------------------------------ pieces

    def tag(self, probe: Any) -> str:
        """Return the name for the result of the node that is the probe."""
        self.probes.append(probe)
        return f"probe{len(self.probes) - 1}_"

    def input(self, *shape: int) -> str:
        """Return a graph input of this shape; one for all probes that ask for the same."""
        name = "x" + "_".join(map(str, shape))
        if name not in self._inputs:
            self._inputs[name] = helper.make_tensor_value_info(name, self.kind, shape)
            self._shapes[name] = shape
        return name

    def weight(self, *shape: int) -> str:
        """Return a weight of small random numbers."""
        return self.constant((self._random.random(shape, dtype=np.float32) - 0.5) * 0.1)

    def constant(self, array: np.ndarray) -> str:
        """Return a constant."""
        name = f"w{len(self._weights)}"
        self._weights[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def node(
        self, op: str, inputs: Sequence[str], shape: Sequence[int], tag: str = "", **attributes: Any
    ) -> str:
        """Return the result of a new node."""
        self._count += 1
        name = (tag or "n") + f"v{self._count}"
        self._nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        self._shapes[name] = tuple(shape)
        return name

    def conv(
        self,
        x: str,
        outputs: int,
        kernel: Sequence[int] = (1, 1),
        stride: int = 1,
        groups: int = 1,
        tag: str = "",
        after: str = "relu",
    ) -> str:
        """Return a convolution with as much padding as keeps the size, and what follows it.

        A window of even size has none: it is one of a patch, as wide as its step.
        """
        batch, inputs, *space = self._shapes[x]
        pads = [k // 2 if k % 2 else 0 for k in kernel]
        out = [(s + 2 * p - k) // stride + 1 for s, p, k in zip(space, pads, kernel, strict=True)]
        terms = self.terms(x, outputs, inputs // groups, *kernel)
        y = self.node(
            "Conv", terms, (batch, outputs, *out), tag, kernel_shape=list(kernel),
            strides=[stride, stride], pads=pads * 2, group=groups,
        )  # fmt: skip
        return self.followed(y, after, tag)

    def terms(self, x: str, outputs: int, *shape: int) -> list[str]:
        """Return what a convolution reads: its input, a weight ``[outputs, *shape]``, a bias."""
        return [x, self.weight(outputs, *shape), self.weight(outputs)]

    def followed(self, y: str, after: str, tag: str) -> str:
        """Return what becomes of a convolution's result in the same kernel."""
        return self.pointwise(after, y, tag=tag) if after else y

    def pointwise(self, op: str, x: str, other: str = "", tag: str = "") -> str:
        """Return the result of an element-wise operator, called as ATen calls it."""
        kind, attributes = POINTWISE[op]
        shape = self._shapes[x]
        if op == "silu":
            return self.node("Mul", [x, self.node("Sigmoid", [x], shape, tag)], shape, tag)
        inputs = [x]
        if kind == "Clip":
            inputs += [self.constant(np.float32(0)), self.constant(np.float32(6))]  # type: ignore[arg-type]
        if kind in ("Mul", "Add"):
            inputs.append(other)
        return self.node(kind, inputs, shape, tag, **attributes)

    def pool(self, op: str, x: str, kernel: int, stride: int, tag: str = "") -> str:
        """Return a pooling with the usual padding."""
        batch, channels, *space = self._shapes[x]
        pad = kernel // 2 if kernel % 2 else 0
        out = [(s + 2 * pad - kernel) // stride + 1 for s in space]
        sizes = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [pad] * 4}
        return self.node(op, [x], (batch, channels, *out), tag, **sizes)

    def blocks(self, batch: int, channels: int, space: Sequence[int]) -> str:
        """Return a tensor in the blocked layout: made by a cheap convolution."""
        return self.conv(self.input(batch, NARROW, *space), channels)

    def use(self, x: str, *, conv: bool = True) -> None:
        """Read a result, with a cheap convolution or as a graph output."""
        self._outputs.append(self.conv(x, NARROW) if conv else x)

    @property
    def size(self) -> int:
        """The bytes of the weights."""
        return sum(len(w.raw_data) for w in self._weights.values())

    def shape(self, x: str) -> tuple[int, ...]:
        """Return a result's shape."""
        return self._shapes[x]

    def model(self) -> bytes:
        """Return the graph as an ONNX model."""
        outputs = [
            helper.make_tensor_value_info(o, self.kind, self._shapes[o]) for o in self._outputs
        ]
        graph = helper.make_graph(
            self._nodes,
            "probes",
            list(self._inputs.values()),
            outputs,
            list(self._weights.values()),
        )
        opset = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=10)
        return onnx.ModelProto.SerializeToString(model)


# ---------------------------------------------------------------------- probes


@dataclass(frozen=True)
class Point:
    """One value of one grid.

    Attributes:
        grid: The grid's name in the cost table.
        sizes: The place in it, by axis.
        share: By what the measured time is divided (the groups of a grouped convolution).
        minus: The number of a point of the same graph whose time is taken off; -1 for none.
    """

    grid: str
    sizes: tuple[tuple[str, float], ...]
    share: int = 1
    minus: int = -1


def convolution(
    bench: Bench,
    probe: Any,
    *,
    batch: int,
    inputs: int,
    outputs: int,
    space: Sequence[int],
    kernel: Sequence[int],
    stride: int,
    groups: int = 1,
    direct: bool = False,
) -> None:
    """Add a convolution whose result has ``space`` positions."""
    read = [s * stride for s in space]
    x = bench.input(batch, inputs, *read) if direct else bench.blocks(batch, inputs, read)
    bench.use(bench.conv(x, outputs, kernel, stride, groups, bench.tag(probe), after=""))


def moved(bench: Bench, probe: Any, kind: str, batch: int, channels: int, side: int) -> None:
    """Add a copy of channels in the midst of blocked convolutions, or of channels that are last."""
    if kind == "pick":
        x = bench.input(batch, side * side, channels)
        order = np.random.default_rng(0).permutation(channels).astype(np.int64)
        shape = (batch, side * side, channels)
        y = bench.node("Gather", [x, bench.constant(order)], shape, bench.tag(probe), axis=2)
        return bench.use(y, conv=False)
    x = bench.blocks(batch, channels, (side, side))
    shape = (batch, channels, side, side)
    tag = bench.tag(probe)
    if kind == "gather":
        order = np.random.default_rng(0).permutation(channels).astype(np.int64)
        y = bench.node("Gather", [x, bench.constant(order)], shape, tag, axis=1)
    elif kind == "slice":
        bounds = [bench.constant(np.array([v], np.int64)) for v in (4, channels, 1)]
        y = bench.node("Slice", [x, *bounds], (batch, channels - 4, side, side), tag)
    elif kind == "copy":
        y = bench.node("Transpose", [x], (batch, channels, side, side), tag, perm=[0, 1, 3, 2])
    else:  # a concat whose operands are no whole blocks, or are
        first = NARROW if kind == "blocked concat" else NARROW + 4
        parts = [bench.blocks(batch, c, (side, side)) for c in (first, channels - first)]
        y = bench.node("Concat", parts, shape, tag, axis=1)
    bench.use(y)


def matrices(bench: Bench, probe: Any, rows: int, inputs: int, outputs: int, weight: bool) -> None:
    """Add a product of a matrix with a weight, or with another activation."""
    x = bench.input(1, rows, inputs)
    if weight:
        other = bench.weight(inputs, outputs)
    else:
        other = bench.node("Neg", [bench.input(1, inputs, outputs)], (1, inputs, outputs))
    y = bench.node("MatMul", [x, other], (1, rows, outputs), bench.tag(probe))
    bench.use(y, conv=False)


def rowwise(bench: Bench, probe: Any, kind: str, rows: int, width: int) -> None:
    """Add a layer norm or a softmax over the last axis."""
    x = bench.input(1, rows, width)
    tag = bench.tag(probe)
    if kind == "softmax":
        y = bench.node("Softmax", [x], (1, rows, width), tag, axis=-1)
    else:
        parameters = [bench.weight(width), bench.weight(width)]
        y = bench.node("LayerNormalization", [x, *parameters], (1, rows, width), tag, axis=-1)
    bench.use(y, conv=False)


Adder = Callable[[Bench], None]


def random_feeds(session: Any, batch: int = 1) -> dict[str, np.ndarray]:
    """Return random inputs for a session; integers are 0."""
    generator = np.random.default_rng(0)
    feeds = {}
    for value in session.get_inputs():
        shape = [d if isinstance(d, int) else batch for d in value.shape]
        floats = value.type in ("tensor(float)", "tensor(double)", "tensor(float16)")
        kind = {"tensor(float)": "f4", "tensor(double)": "f8", "tensor(float16)": "f2"}
        dtype = kind.get(value.type, "bool" if "bool" in value.type else value.type[7:-1])
        feeds[value.name] = (
            generator.standard_normal(shape).astype(dtype) if floats else np.zeros(shape, dtype)
        )
    return feeds
