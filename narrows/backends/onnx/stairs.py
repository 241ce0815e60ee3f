"""What of an ONNX model stands in the way of speed: widths off a step, and copies of channels.

Read from the model file alone, with the layout that a cost table tells of.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from narrows.backends.measured.layout import Layout

COPIES = ("Gather", "Slice", "Concat", "Split", "Transpose", "ScatterND", "GatherND", "Pad")
WASTE = 0.05  # a layer is told of if more than this share of its arithmetic is padding


@dataclass(frozen=True)
class Layer:
    """One convolution of a model.

    Attributes:
        name: The node's name.
        kind: ``dense``, ``1x1``, ``depthwise`` or ``grouped``.
        inputs: The channels it reads; ``outputs``: those it makes; ``groups``: its groups.
        taps: The elements of its window.
    """

    name: str
    kind: str
    inputs: int
    outputs: int
    groups: int
    taps: int

    def aligned(self, layout: Layout) -> bool:
        """Whether the runtime can compute it in the blocked layout."""
        if self.kind == "depthwise":
            return self.outputs % layout.align == 0
        if self.kind == "grouped":
            per = (self.inputs // self.groups, self.outputs // self.groups)
            return not any(p % layout.block for p in per)
        return self.inputs < layout.block or self.inputs % layout.align == 0

    def wasted(self, layout: Layout) -> float:
        """Return the share of the arithmetic that falls on channels which only fill a block."""
        if self.kind == "grouped":
            return 0.0
        full = layout.padded(self.outputs)
        share = self.outputs / full
        if self.kind != "depthwise" and self.inputs >= layout.block:
            share *= self.inputs / layout.padded(self.inputs)
        return 1.0 - share


def read_layers(path: Path) -> tuple[list[Layer], Counter[str]]:
    """Return the convolutions of a model file, and how many nodes of each type it has."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    layers = [_layer(n, shapes[n.input[1]]) for n in graph.node if _is_conv(n, shapes)]
    return layers, Counter(node.op_type for node in graph.node)


def _is_conv(node: Any, shapes: dict[str, list[int]]) -> bool:
    return node.op_type == "Conv" and node.input[1] in shapes


def _layer(node: Any, weight: list[int]) -> Layer:
    groups = next((a.i for a in node.attribute if a.name == "group"), 1)
    taps = 1
    for size in weight[2:]:
        taps *= size
    kind = "1x1" if taps == 1 else "dense"
    if groups > 1:
        kind = "depthwise" if weight[1] == 1 else "grouped"
    return Layer(node.name, kind, weight[1] * groups, weight[0], groups, taps)


def reasons(path: Path, other: Path | None, layout: Layout) -> list[str]:
    """Return in plain words why a model may not be faster than another, the gravest first.

    Args:
        path: The model file.
        other: The file of what it is compared with; what both have alike is no reason.
        layout: What the runtime does with layouts.
    """
    layers, ops = read_layers(path)
    before, ops_before = read_layers(other) if other else ([], Counter())
    found = []
    if layout.block > 1:
        for kind in ("depthwise", "dense", "1x1", "grouped"):
            found += _off(kind, layers, before, layout)
    more = sum(max(0, ops[c] - ops_before[c]) for c in COPIES)
    if more and other:
        found.append(f"it moves channels {more} times more often (gather, slice, concat ...)")
    return found


def _off(kind: str, layers: list[Layer], before: list[Layer], layout: Layout) -> list[str]:
    of_kind = [layer for layer in layers if layer.kind == kind]
    off = sum(not layer.aligned(layout) for layer in of_kind)
    off_before = sum(layer.kind == kind and not layer.aligned(layout) for layer in before)
    word = "layers" if kind in ("depthwise", "grouped") else "convolutions"
    found = []
    if off > off_before:
        step = f"{layout.block} channels a group" if kind == "grouped" else f"{layout.align}"
        found.append(
            f"{off} of {len(of_kind)} {kind} {word} are no multiple of {step} wide, "
            f"and leave the runtime's blocked layout"
        )
    wasteful = [x for x in of_kind if x.aligned(layout) and x.wasted(layout) > WASTE]
    wasteful_before = sum(
        x.kind == kind and x.aligned(layout) and x.wasted(layout) > WASTE for x in before
    )
    if len(wasteful) > wasteful_before:
        found.append(
            f"{len(wasteful)} of {len(of_kind)} {kind} {word} fall off the "
            f"{layout.block}-channel step, and compute channels that only fill it"
        )
    return found
