"""The integer forms of norms: sums in whole numbers, the rest as IEEE 754 defines it.

All of them are one operator, `narrows.ir.integer.statistics.layer_norm`. A norm over groups of
channels is one over trailing axes once the groups have an axis of their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import narrows.ir.integer.statistics as statistics
from narrows.ir.integer.grid import Grid
from narrows.ir.meta import Meta, shape_of
from narrows.ir.ops.args import arguments
from narrows.ir.ops.integer import Call, Fold, IntegerForm, Settled, along_batch, listed

ops: Any = torch.ops.narrows
aten = torch.ops.aten


def _obstacle(args: dict[str, Any], count: int) -> str:
    if count > statistics.LARGEST_NORM:
        return f"it normalises more than {statistics.LARGEST_NORM:,} elements"
    for role in ("weight", "bias"):
        node = args.get(role)
        if node is not None and node.op != "get_attr":
            return f"its {role} is computed, by {node.name}"
    return ""


def _narrow(form: IntegerForm, node: fx.Node, count: int) -> str:
    few = count <= statistics.LARGEST_WIDE_NORM
    return "" if few else f"{IntegerForm.narrow(form, node)} where it normalises {count:,} elements"


def _parameters(
    fold: Fold, node: fx.Node, shape: list[int], exponent: int, stored: list[int]
) -> list[fx.Node]:
    """Return the nodes of gain and offset: parameters of one shape, stored in another."""
    args = arguments(node)
    weight, bias = (fold.float_weight(args[k]) for k in ("weight", "bias"))
    made = statistics.norm_parameters(weight, bias, shape, exponent)
    return [
        fold.constant(f"{node.name}.{role}", tensor.reshape(stored))
        for role, tensor in zip(("gain", "offset"), made, strict=True)
    ]


@dataclass(frozen=True)
class LayerNorm(IntegerForm):
    """Normalisation over trailing axes.

    Attributes:
        centred: Whether the mean is taken away; else it is an RMS norm.
    """

    centred: bool = True

    def narrow(self, node: fx.Node) -> str:
        return _narrow(self, node, math.prod(arguments(node)["normalized_shape"]))

    def obstacle(self, node: fx.Node) -> str:
        args = arguments(node)
        return _obstacle(args, math.prod(args["normalized_shape"]))

    def fake(self, node: fx.Node, grids: list[Grid], out: Grid, rounding: str) -> Call | None:
        args = arguments(node)
        eps = torch.finfo(Meta(node).dtype).eps if args["eps"] is None else args["eps"]
        return ops.fake_layer_norm.default, (
            args["input"], args["weight"], args.get("bias"), len(args["normalized_shape"]),
            eps, self.centred, listed(grids[0]), listed(out), rounding,
        )  # fmt: skip

    def emit(self, fold: Fold, node: fx.Node, out: Settled) -> Call:
        args = arguments(node)
        x, grid = fold.codes(args["x"])
        shape = list(shape_of(node)[-args["axes"] :])
        return ops.layer_norm.default, (
            x, *_parameters(fold, node, shape, out.grid.exponent, shape), args["axes"],
            statistics.norm_eps(args["eps"], grid.exponent), grid.zero, *out.tail,
            args["centred"],
        )  # fmt: skip


@dataclass(frozen=True)
class GroupNorm(IntegerForm):
    """Normalisation over groups of channels."""

    def groups(self, node: fx.Node) -> int:
        """Return how many groups there are."""
        return arguments(node)["num_groups"]

    def count(self, node: fx.Node) -> int:
        """Return how many elements are normalised together."""
        return math.prod(shape_of(node)[1:]) // self.groups(node)

    def narrow(self, node: fx.Node) -> str:
        return _narrow(self, node, self.count(node))

    def obstacle(self, node: fx.Node) -> str:
        free = along_batch(self.operands(node)[0], range(1, len(shape_of(node))))
        return free or _obstacle(arguments(node), self.count(node))

    def fake(self, node: fx.Node, grids: list[Grid], out: Grid, rounding: str) -> Call | None:
        args = arguments(node)
        return ops.fake_group_norm.default, (
            args["input"], args["weight"], args["bias"], self.groups(node), args["eps"],
            listed(grids[0]), listed(out), rounding,
        )  # fmt: skip

    def emit(self, fold: Fold, node: fx.Node, out: Settled) -> Call:
        args = arguments(node)
        x, grid = fold.codes(args["x"])
        _, channels, *sizes = shape_of(node)
        apart = [args["groups"], channels // args["groups"]]
        parted = [-1, *apart, math.prod(sizes)]
        rows = fold.step(node, aten.reshape.default, (x, parted), "groups", grid)
        call = (
            rows, *_parameters(fold, node, [channels], out.grid.exponent, [*apart, 1]), 2,
            statistics.norm_eps(args["eps"], grid.exponent), grid.zero, *out.tail, True,
        )  # fmt: skip
        normed = fold.step(
            node, ops.layer_norm.default, call, "rows", out.grid, rounding=out.rounding
        )
        return aten.reshape.default, (normed, [-1, channels, *sizes])


@dataclass(frozen=True)
class InstanceNorm(GroupNorm):
    """Normalisation of every channel by itself: each is a group."""

    def groups(self, node: fx.Node) -> int:
        return shape_of(node)[1]

    def obstacle(self, node: fx.Node) -> str:
        if not arguments(node)["use_input_stats"]:
            return "its statistics are fixed, as those of a batch norm"
        return super().obstacle(node)


__all__ = ["GroupNorm", "InstanceNorm", "LayerNorm"]
