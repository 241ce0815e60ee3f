"""`rule_of`: which function writes a node, if one does."""

from __future__ import annotations

import operator

import torch
from torch import fx

from narrows.backends.onnx.floats import layers, moving, pointwise
from narrows.backends.onnx.floats.rules import RULES, Write
from narrows.backends.onnx.integer import moves
from narrows.backends.onnx.integer.graph import given
from narrows.ir.meta import Meta, op_name, shape_of

ENTERED = (layers, moving, pointwise)  # what they import of `rules` is full once they are there

# What moves floats as it moves codes.
SHARED = frozenset({
    "reshape", "unflatten", "flatten", "squeeze", "unsqueeze", "permute", "slice", "select",
    "index_select", "split", "getitem", "alias", "clone", "contiguous", "dropout",
    "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "channel_shuffle",
    "pixel_shuffle", "pixel_unshuffle", "max_pool1d", "max_pool2d", "max_pool3d", "expand",
    "repeat", "repeat_interleave", "roll", "flip", "amax", "amin", "upsample_nearest1d",
    "upsample_nearest2d", "upsample_nearest3d", "embedding",
})  # fmt: skip

OTHERS = frozenset({"index", "indices", "condition"})  # operands that are not in floats
RESHAPES = frozenset({"reshape", "unflatten", "flatten"})  # sizes follow from the result
SIZED = frozenset({"expand", "repeat"})  # sizes are operands


def rule_of(node: fx.Node, opset: int) -> Write | None:
    """Return what writes a node of a float program, or ``None`` for what the exporter has to.

    Args:
        node: The node, of which no operand is a size that the program computes, but of what is
            reshaped or expanded.
        opset: The version of the ONNX operators.
    """
    name = "getitem" if node.target is operator.getitem else op_name(node)
    if not _is_plain(node, name.partition(".")[0]):
        return None
    found = RULES.get(name)
    if found is not None:
        return found.write if opset >= found.opset and found.fits(node) else None
    if name.partition(".")[0] not in SHARED or not _moves_evenly(node, name):
        return None
    return moves.find(node)


def _is_plain(node: fx.Node, name: str) -> bool:
    """Whether a node is of float32 numbers, and all sizes but one, the batch, are known."""
    if shape_of(node) is not None and Meta(node).dtype is not torch.float32:
        return False
    if len(Meta(node).dynamic) > 1 or _fixes_the_batch(node):
        return False
    sizes = [n for n in node.all_input_nodes if Meta(n).size is not None]
    if sizes and name not in RESHAPES:
        return name in SIZED and all(op_name(n) == "sym_size.int" for n in sizes)
    if node.target is operator.getitem:
        return True
    others = {v for k, v in given(node).items() if k in OTHERS and isinstance(v, fx.Node)}
    tensors = [n for n in node.all_input_nodes if shape_of(n) is not None and n not in others]
    return name == "to" or all(Meta(n).dtype is torch.float32 for n in tensors)


def _fixes_the_batch(node: fx.Node) -> bool:
    """Whether a result has no free axis, though what it is made of has one."""
    free = any(Meta(n).dynamic for n in node.all_input_nodes if shape_of(n) is not None)
    return free and shape_of(node) is not None and not Meta(node).dynamic


def _moves_evenly(node: fx.Node, name: str) -> bool:
    """Whether what moves codes moves these numbers: parts of a split, along axes that are known."""
    if name == "getitem":
        return op_name(node.args[0]).startswith("split")  # type: ignore[arg-type]
    if name.startswith(("roll", "flip")):
        args, rank = given(node), len(shape_of(node))
        return bool(args["dims"]) and not {d % rank for d in args["dims"]} & {*Meta(node).dynamic}
    if name.startswith("repeat_interleave"):
        args = given(node)
        return (
            args["dim"] is not None and args["dim"] % len(shape_of(node)) not in Meta(node).dynamic
        )
    return name != "slice.Tensor" or all(
        isinstance(given(node)[k], int | None) for k in ("start", "end", "step")
    )


__all__ = ["rule_of"]
