"""Coded weights of float programs in ONNX: stored as codes, with the scales of their groups.

What writes the model sees dense weights, and numbers that are not rounded. Then each weight is
replaced: by ONNX Runtime's ``MatMulNBits`` where its layout fits (groups along the inputs, of 16,
32, 64 ... weights) and that is fast: of 4 bits, and of any number where what is multiplied is
rounded to codes as well (accuracy level 4). Its kernel for 8 bits and floats takes up to ten times
as long as a float product. So such weights, and others that do not fit, are decoded by a few
operators, which the runtime computes once when it loads the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from torch import Tensor, fx

from narrows.errors import LowerError
from narrows.ir.integer.blocks import dequantize_blocks, round_blocks
from narrows.ir.meta import Meta, copy_meta, shape_of
from narrows.ir.ops.args import arguments
from narrows.ir.program import Program

MICROSOFT = "com.microsoft"
CODES = 4  # the accuracy level at which what is multiplied is rounded to codes


@dataclass(frozen=True)
class Packed:
    """One coded weight, ``[out, in]``; see `narrows.ir.integer.blocks`."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    axis: int
    group: int
    rounded: bool = False  # whether what it multiplies is

    @property
    def bits(self) -> int:
        """The bits of a stored code."""
        return 4 if int(self.codes.max()) < 16 else 8

    @property
    def fits(self) -> bool:
        """Whether ``MatMulNBits`` has this layout, and is no slower than a float product."""
        power = self.group & (self.group - 1) == 0
        fast = self.rounded or self.bits == 4
        return fast and self.axis == 1 and power and 16 <= self.group <= 256


def dense(program: Program) -> tuple[Program, dict[str, Packed]]:
    """Return the program with dense weights in place of coded ones, and those by name.

    What is rounded before it is multiplied is not; the weights say so.
    """
    coded = [n for n in program.graph.nodes if n.target is dequantize_blocks]
    if not coded:
        return program, {}
    packed: dict[str, Packed] = {}
    result = program.copy()
    weights = dict(program.weights)
    for node in [n for n in result.graph.nodes if n.target is dequantize_blocks]:
        args = arguments(node)
        parts = [program.weights[str(args[k].target)] for k in ("codes", "scale", "zero")]
        name = str(args["codes"].target).removesuffix(".codes")
        codes, scale, zero = parts
        rounded = any(_reads_codes(reader) for reader in node.users)
        packed[name] = Packed(codes, scale, zero, args["axis"], args["group"], rounded)
        weights[name] = dequantize_blocks(*parts, args["axis"], args["group"])
        with result.graph.inserting_before(node):
            made = result.graph.get_attr(name)
        copy_meta(node, made)
        Meta(made).shape, Meta(made).dtype = shape_of(node), weights[name].dtype
        node.replace_all_uses_with(made)
        result.graph.erase_node(node)
    for node in [n for n in result.graph.nodes if n.target is round_blocks]:
        node.replace_all_uses_with(node.args[0])
        result.graph.erase_node(node)
    for node in [n for n in result.graph.nodes if n.op == "get_attr" and not n.users]:
        result.graph.erase_node(node)
    read = {str(n.target) for n in result.graph.nodes if n.op == "get_attr"}
    return result.seal().replace(weights={n: t for n, t in weights.items() if n in read}), packed


def _reads_codes(layer: fx.Node) -> bool:
    return arguments(layer)["input"].target is round_blocks


def pack(model: Any, packed: dict[str, Packed]) -> Any:
    """Return the `onnx_ir.Model` with codes in place of the dense weights."""
    import onnx_ir

    held = {}
    for name, weight in packed.items():
        for spelling, turned in ((f"{name}.T", True), (name, False)):
            value = model.graph.initializers.get(spelling)
            if value is not None:
                held[spelling] = (weight, turned)
                del model.graph.initializers[spelling]  # they are the bulk of the model
    proto = onnx_ir.to_proto(model)
    for name, (weight, turned) in held.items():
        _replace(proto.graph, name, weight, turned)
    if any(node.domain == MICROSOFT for node in proto.graph.node):
        proto.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    return onnx_ir.from_proto(proto)


def _replace(graph: onnx.GraphProto, name: str, weight: Packed, turned: bool) -> None:
    readers = [n for n in graph.node if name in n.input]
    multiplied = [n for n in readers if weight.fits and _multiplies(n, name, turned)]
    if weight.rounded and len(multiplied) < len(readers):
        other = next(n for n in readers if n not in multiplied)
        raise LowerError(
            f"what {name} multiplies cannot be rounded in ONNX",
            where=other.name,
            why=f"the weight is read by {other.op_type}, and only MatMulNBits rounds",
            hint="quantize_weights(..., activations='float'), or skip this layer",
        )
    if multiplied:
        names = _hold(graph, name, _matmul_constants(weight))
        for node in multiplied:
            if len(node.input) == 3:
                _add_bias(graph, node)
            _multiply(node, weight, names)
    if len(multiplied) < len(readers):
        for at, node in enumerate(_decoded(graph, name, weight, turned)):
            graph.node.insert(at, node)


def _multiplies(node: onnx.NodeProto, name: str, turned: bool) -> bool:
    """Whether a node is a product with a weight, plainly."""
    how = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    plain = not turned and how.pop("transB", 0) == 1 and all(v == 1.0 for v in how.values())
    fits = node.op_type == "MatMul" if turned else node.op_type == "Gemm" and plain
    return fits and list(node.input).index(name) == 1


def _hold(graph: onnx.GraphProto, name: str, constants: dict[str, np.ndarray]) -> list[str]:
    """Add constants to a graph, and return their names."""
    names = [f"{name}.{part}" for part in constants]
    for full, array in zip(names, constants.values(), strict=True):
        graph.initializer.append(numpy_helper.from_array(array, full))
    return names


def _add_bias(graph: onnx.GraphProto, node: onnx.NodeProto) -> None:
    """Take the bias of a ``Gemm`` into an operator of its own behind it."""
    result, bias = node.output[0], node.input[2]
    node.output[0] = node.name = f"{result}.product"
    added = helper.make_node("Add", [node.output[0], bias], [result], name=result)
    graph.node.insert(list(graph.node).index(node) + 1, added)


def _multiply(node: onnx.NodeProto, weight: Packed, names: list[str]) -> None:
    """Turn a ``MatMul`` or a ``Gemm`` into a ``MatMulNBits``."""
    node.op_type, node.domain = "MatMulNBits", MICROSOFT
    node.input[:] = [node.input[0], *names]
    del node.attribute[:]
    out, width = weight.codes.shape
    sizes = {"K": width, "N": out, "bits": weight.bits, "block_size": weight.group}
    if weight.rounded:
        sizes["accuracy_level"] = CODES
    node.attribute.extend(helper.make_attribute(k, v) for k, v in sizes.items())


def _matmul_constants(weight: Packed) -> dict[str, np.ndarray]:
    """Return codes, scales and zero points as ``MatMulNBits`` has them.

    Codes ``[out, groups, bytes]``, of 4 bits two a byte, the first in the lower half; a last group
    that is not full ends in codes of zero.
    """
    out, width = weight.codes.shape
    count = math.ceil(width / weight.group)
    zero = weight.zero.numpy()
    codes = np.repeat(zero, weight.group, 1)
    codes[:, :width] = weight.codes.numpy()
    codes = codes.reshape(out, count, weight.group)
    if weight.bits == 4:
        codes, zero = _pairs(codes), _pairs(zero)
    scales = weight.scale.numpy()
    return {"codes": codes, "scales": scales.reshape(-1), "zeros": zero.reshape(-1)}


def _pairs(codes: np.ndarray) -> np.ndarray:
    """Return codes of 4 bits two a byte along the last axis; an odd one is filled up with zero."""
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[..., :1])], -1)
    return codes[..., 0::2] | codes[..., 1::2] << 4


def _decoded(
    graph: onnx.GraphProto, name: str, weight: Packed, turned: bool
) -> list[onnx.NodeProto]:
    """Return the nodes that compute a weight: ``(codes - zero) * scale``, group by group."""
    axis = 1 - weight.axis if turned else weight.axis
    sides = [t.T if turned else t for t in (weight.codes, weight.scale, weight.zero)]
    codes, scale, zero = (np.ascontiguousarray(t.numpy()) for t in sides)
    shape, count = list(codes.shape), scale.shape[axis]
    padded = np.repeat(zero, weight.group, axis)
    index: list[Any] = [slice(None), slice(None)]
    index[axis] = slice(0, shape[axis])
    padded[tuple(index)] = codes
    split = [*shape[:axis], count, weight.group, *shape[axis + 1 :]]
    whole = [*shape[:axis], count * weight.group, *shape[axis + 1 :]]
    constants = {
        "codes": padded.reshape(split),
        "zeros": np.expand_dims(zero, axis + 1),
        "scales": np.expand_dims(scale, axis + 1),
        "shape": np.array(whole, np.int64),
    }
    held = _hold(graph, name, constants)

    def node(op: str, inputs: list[str], step: str, **how: Any) -> onnx.NodeProto:
        output = name if step == "" else f"{name}.{step}"
        return helper.make_node(op, inputs, [output], name=output, **how)

    kind = helper.np_dtype_to_tensor_dtype(scale.dtype)
    partial = whole != shape
    nodes = [
        node("Cast", [held[0]], "steps", to=kind),
        node("Cast", [held[1]], "middle", to=kind),
        node("Sub", [f"{name}.steps", f"{name}.middle"], "offsets"),
        node("Mul", [f"{name}.offsets", held[2]], "groups"),
        node("Reshape", [f"{name}.groups", held[3]], "full" if partial else ""),
    ]
    if partial:
        ends = {
            "from": np.array([0], np.int64),
            "to": np.array([shape[axis]], np.int64),
            "axis": np.array([axis], np.int64),
        }
        nodes.append(node("Slice", [f"{name}.full", *_hold(graph, name, ends)], ""))
    return nodes


__all__ = ["dense", "pack"]
