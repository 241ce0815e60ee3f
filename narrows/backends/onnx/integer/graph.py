"""`Graph`: an ONNX graph under construction, and what every form needs to write into it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx

from narrows.errors import LowerError
from narrows.files.quoting import plain
from narrows.ir.integer.grid import CENTRE, Grid
from narrows.ir.meta import Meta, where
from narrows.ir.ops.args import arguments
from narrows.ir.program import Program

BATCH = "batch"
MICROSOFT = "com.microsoft"  # the domain of ONNX Runtime's own operators

TYPES: dict[str, int] = {
    "float32": TensorProto.FLOAT, "float64": TensorProto.DOUBLE, "uint8": TensorProto.UINT8,
    "int8": TensorProto.INT8, "int32": TensorProto.INT32, "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL, "float16": TensorProto.FLOAT16,
}  # fmt: skip


class Graph:
    """Collects nodes and constants; the value of a program's node has the node's name.

    Attributes:
        program: The integer program.
        half_up: Whether ties are rounded up.
    """

    def __init__(self, program: Program, half_up: bool) -> None:
        self.program, self.half_up = program, half_up
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.domains = {""}
        self.renamed: dict[fx.Node, str] = {}  # what needs no operator of its own
        self._counts: dict[str, int] = {}
        self._taken = {n.name for n in program.graph.nodes}
        self._pooled: dict[tuple[Any, ...], str] = {}

    # ------------------------------------------------------------------ values

    def name(self, node: fx.Node) -> str:
        """Return the ONNX value that holds a node's result; a weight becomes a constant."""
        if node.op == "get_attr":
            return self.weight(node)
        return self.renamed.get(node, node.name)

    def weight(self, node: fx.Node) -> str:
        """Return the constant that holds a weight, under the weight's name."""
        name = str(node.target)
        if name not in self.constants:
            array = self.program.tensor(node).detach().cpu().numpy()
            # Wide codes are whole numbers in float32; see `narrows.backends.onnx.integer.wide`.
            array = array.astype(np.float32) if array.dtype == np.int16 else array
            self.constants[name] = numpy_helper.from_array(np.array(array, order="C"), name)
        return name

    def own(self, node: fx.Node, at: str) -> str:
        """Return a weight for one reader alone: the first has it under its name, others a copy."""
        name = str(node.target)
        if name not in self.constants:
            return self.weight(node)
        return self.constant(self.tensor(node).detach().cpu().numpy(), "int8", f"{at}{name}")

    def unsigned(self, node: fx.Node) -> str:
        """Return the constant that holds a weight's codes as uint8, for the zero point `CENTRE`.

        Products of uint8 and int8 are cut off at 2**15 by x86 processors without VNNI.
        """
        name = f"{node.target}.uint8"
        if name not in self.constants:
            codes = self.tensor(node).detach().cpu().numpy().astype(np.int16) + CENTRE
            self.constants[name] = numpy_helper.from_array(codes.astype(np.uint8), name)
        return name

    def turned(self, node: fx.Node) -> str:
        """Return a matrix with its rows as columns; of a weight it is a constant."""
        if node.op != "get_attr":
            return self.add("Transpose", [self.name(node)], f"{node.name}.", perm=[1, 0])
        name = f"{node.target}.T"
        if name not in self.constants:
            array = self.tensor(node).detach().t().cpu().numpy()
            self.constants[name] = numpy_helper.from_array(np.array(array, order="C"), name)
        return name

    def tensor(self, node: fx.Node) -> Tensor:
        """Return the weight behind a ``get_attr`` node."""
        return self.program.tensor(node)

    def constant(self, value: Any, dtype: str, name: str = "") -> str:
        """Return a constant; equal ones that have no name of their own stand once."""
        array = np.asarray(value, dtype=dtype)
        key = (dtype, array.shape, array.tobytes())
        if not name and key in self._pooled:
            return self._pooled[key]
        made = self.fresh(name or f"{dtype}_{'x'.join(map(str, array.shape)) or 'scalar'}")
        self.constants[made] = numpy_helper.from_array(array, made)
        if not name:
            self._pooled[key] = made
        return made

    def scalar(self, value: Any, dtype: str) -> str:
        """Return a constant without axes."""
        return self.constant(value, dtype)

    def fresh(self, base: str) -> str:
        """Return an unused name that begins with ``base``."""
        name = base
        while name in self._taken or name in self.constants:
            self._counts[base] = self._counts.get(base, 0) + 1
            name = f"{base}_{self._counts[base]}"
        self._taken.add(name)
        return name

    # ------------------------------------------------------------------ operators

    def add(
        self, op: str, inputs: Sequence[str], out: str = "", domain: str = "", **attributes: Any
    ) -> str:
        """Add an operator with one result and return the result's name.

        Args:
            op: The operator's type.
            inputs: Names of values; an empty one leaves an optional input out.
            out: The result's name, or what it should begin with when it is an inner step (a name
                that ends in a dot).
            domain: The operator's domain.
            **attributes: Its attributes; ``None`` leaves one out.
        """
        result = self.fresh(out + op.lower()) if not out or out.endswith(".") else out
        given = {k: v for k, v in attributes.items() if v is not None}
        self.domains.add(domain)
        self.nodes.append(
            helper.make_node(op, list(inputs), [result], name=result, domain=domain, **given)
        )
        return result

    def cast(self, x: str, dtype: str, out: str = "") -> str:
        """Convert a value."""
        return self.add("Cast", [x], out, to=TYPES[dtype])

    def reshape(self, x: str, sizes: Sequence[int], out: str = "") -> str:
        """Give a value another shape; one size may be -1."""
        return self.add("Reshape", [x, self.constant(list(sizes), "int64")], out)

    # ------------------------------------------------------------------ the program's side

    def sizes(self, node: fx.Node) -> list[int]:
        """Return a node's shape, -1 for its free axis; `LowerError` if there are several."""
        meta = Meta(node)
        free = [a for a in range(len(meta.shape)) if a in meta.dynamic]
        if len(free) > 1:
            raise LowerError(
                f"{node.name} has {len(free)} free axes",
                where=where(node),
                why="ONNX can infer one size of a reshape",
                hint="capture with dynamic_batch=False",
            )
        return [-1 if a in free else s for a, s in enumerate(meta.shape)]

    def grid(self, node: fx.Node) -> Grid:
        """Return the grid of a node's codes."""
        grid = Meta(node).grid
        assert grid is not None, node
        return grid

    def refuse(self, node: fx.Node, what: str, why: str, hint: str = "") -> LowerError:
        """Return the error for a node that cannot be expressed."""
        return LowerError(what, where=where(node), why=why, hint=hint)

    # ------------------------------------------------------------------ the end

    def give(self, outputs: Sequence[fx.Node]) -> None:
        """Give every result of the program its node's name."""
        for node in outputs:
            if self.name(node) != node.name:
                self.add("Identity", [self.renamed.pop(node)], node.name)

    def model(
        self,
        inputs: Sequence[fx.Node],
        outputs: Sequence[fx.Node],
        opset: int,
        weights: Sequence[onnx.ValueInfoProto] = (),
    ) -> onnx.ModelProto:
        """Return the model.

        Args:
            inputs: The program's inputs.
            outputs: The nodes that it returns.
            opset: The version of the ONNX operators.
            weights: Inputs that stand for weights.
        """
        read = {name for node in self.nodes for name in node.input}
        results = {self.name(n) for n in outputs}
        graph = helper.make_graph(
            self.nodes,
            plain(self.program.name),
            [*(_info(n, n.name) for n in inputs), *weights],
            [_info(n, self.name(n)) for n in outputs],
            [t for name, t in self.constants.items() if name in read | results],
        )
        imports = [helper.make_opsetid("", opset)]
        imports += [helper.make_opsetid(d, 1) for d in sorted(self.domains - {""})]
        model = helper.make_model(graph, opset_imports=imports, producer_name="narrows")
        model.ir_version = 10  # what opsets up to 22 need; older runtimes refuse newer ones
        return model


def _info(node: fx.Node, name: str) -> onnx.ValueInfoProto:
    meta = Meta(node)
    dtype = str(meta.dtype).removeprefix("torch.")
    shape = [BATCH if a in meta.dynamic else s for a, s in enumerate(meta.shape)]
    return helper.make_tensor_value_info(name, TYPES[dtype], shape)


def window_pads(
    sizes: Sequence[int],
    out: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int] = (),
) -> list[int]:
    """Return ONNX's ``pads`` for windows of so many positions: as much behind as the last needs."""
    steps = dilation or [1] * len(kernel)
    axes = zip(sizes, out, kernel, stride, padding, steps, strict=True)
    return [*padding, *(max((o - 1) * s + d * (k - 1) + 1 - n - p, 0) for n, o, k, s, p, d in axes)]


def given(node: fx.Node) -> dict[str, Any]:
    """Return a node's arguments by name."""
    return arguments(node)
