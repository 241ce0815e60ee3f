"""Weighted averages over windows in float32, which holds every sum of theirs."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, fx

from narrows.backends.onnx.integer import exact, portable
from narrows.backends.onnx.integer.graph import Graph, given
from narrows.ir.integer.bounds import EXACT
from narrows.ir.integer.windows import reach, resizing, totals
from narrows.ir.meta import shape_of

RATIOS = (1, 2, 4, 8, 16)  # by which ONNX's own resizing has exact weights


def resample(graph: Graph, node: fx.Node) -> None:
    """Write weighted averages: `Resize` where its weights are exact, else a product an axis.

    Codes are cast, not dequantized: ONNX Runtime would resize codes in codes, and round otherwise.
    """
    args, at, grid = given(node), f"{node.name}.", graph.grid(given(node)["x"])
    places, weights = ([graph.tensor(n) for n in args[k]] for k in ("places", "weights"))
    counts, most = totals(weights), max(grid.zero - grid.low, grid.high - grid.zero)
    if graph.half_up or most * reach(weights) > EXACT or not _divides(counts, args["shift_by"]):
        portable.resample(graph, node)
        return
    x = graph.cast(graph.name(args["x"]), "float32", at)
    if args["x_zero"]:
        x = graph.add("Sub", [x, graph.scalar(args["x_zero"], "float32")], at)
    ratios = _ratios(node, places, weights)
    if ratios:
        scales = graph.constant([1.0, 1.0, *ratios], "float32")
        x = graph.add("Resize", [x, "", scales], at, mode="linear",
                      coordinate_transformation_mode="half_pixel")  # fmt: skip
    else:
        for i, pair in enumerate(zip(places, weights, strict=True)):
            x = _along(graph, node, x, i, *pair)
        if bool((counts != 1).any()):
            x = graph.add("Div", [x, graph.constant(counts.numpy(), "float32")], at)
    whole = (args["low"], args["high"]) == (0, 255)
    scale = graph.scalar(2.0 ** args["shift_by"], "float32")
    terms = [scale, graph.scalar(args["zero"], "uint8")]
    codes = graph.add("QuantizeLinear", [x, *terms], node.name if whole else at)
    if not whole:
        exact.clip(graph, codes, args["low"], args["high"], node.name)


def _divides(counts: Tensor, by: int) -> bool:
    """Whether a quotient that is divided in float32 is rounded as the exact one is.

    One that meets no tie is ``2**-by / 2 count`` away from it, at least, and those up to 2**8 are
    off by 2**-17. By a power of two it is the exact one.
    """
    if bool((counts & (counts - 1) == 0).all()):
        return True
    return by >= -8 and 2 * int(counts.max()) * 2.0 ** max(by, 0) < 2**15


def _ratios(node: fx.Node, places: list[Tensor], weights: list[Tensor]) -> list[float]:
    """Return by what ONNX's linear resizing of an image enlarges it, if that is what it is."""
    old, new = shape_of(given(node)["x"]), shape_of(node)
    if len(places) != 2 or len(new) != 4:
        return []
    ratios = [n / o for o, n in zip(old[2:], new[2:], strict=True)]
    if not all(r in RATIOS for r in ratios):
        return []
    for size, out, *pair in zip(old[2:], new[2:], places, weights, strict=True):
        linear = resizing("linear", size, out, 0.0, False, 2)
        if not all(map(torch.equal, pair, linear)):
            return []
    return ratios


def _along(
    graph: Graph, node: fx.Node, x: str, axis: int, places: Tensor, weights: Tensor
) -> str:  # fmt: skip
    """Write the product of a matrix of weights with one of the last axes."""
    at, old, new = f"{node.name}.", shape_of(given(node)["x"]), shape_of(node)
    count, rank = len(given(node)["places"]), len(new)
    place = rank - count + axis
    matrix = torch.zeros(len(places), old[place])
    matrix.scatter_add_(1, places, weights.float())
    if torch.equal(matrix, torch.eye(old[place])):
        return x
    if place == rank - 1:
        return graph.add("MatMul", [x, graph.constant(matrix.t().numpy(), "float32")], at)
    wide = place == rank - 2
    behind = list(old[place + 1 :])
    lead = [*graph.sizes(node)[:2], *new[2:place]]
    if not wide:
        x = graph.reshape(x, [*lead, old[place], int(np.prod(behind))], at)
    x = graph.add("MatMul", [graph.constant(matrix.numpy(), "float32"), x], at)
    return x if wide else graph.reshape(x, [*lead, new[place], *behind], at)


__all__ = ["resample"]
