"""The runtime's own account of an artifact, node by node, beside what a cost table says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from narrows.backends.onnx.calibrate import Node, profile
from narrows.backends.onnx.session import MODEL
from narrows.ir.work import Work

if TYPE_CHECKING:
    import numpy as np

    from narrows.backends.onnx.staircase import StairTable

ROUNDS = 8


def profiled(
    folder: Path, feeds: dict[str, np.ndarray], table: StairTable | None = None
) -> list[dict[str, Any]]:
    """Return the nodes of an artifact's optimized graph, in order.

    Args:
        folder: The artifact's folder.
        feeds: Its inputs.
        table: What predicts a node's time, where it can.

    Returns:
        Per node ``name``, ``op``, ``shapes``, ``us`` and ``predicted_us`` (or ``None``).
    """
    return [
        {
            "name": node.name,
            "op": node.op,
            "shapes": _shapes(node),
            "us": round(node.typical, 2),
            "predicted_us": _predicted(node, table),
        }
        for node in profile(folder / MODEL, feeds, rounds=ROUNDS)
    ]


def _shapes(node: Node) -> str:
    def text(shape: list[int]) -> str:
        return "x".join(map(str, shape)) or "1"

    weight = f" by {text(node.inputs[1])}" if work_of_node(node) and len(node.inputs) > 1 else ""
    return f"{text(node.inputs[0]) if node.inputs else ''}{weight} -> {text(node.outputs[0])}"


def _predicted(node: Node, table: StairTable | None) -> float | None:
    if table is None:
        return None
    if node.op in ("ReorderInput", "ReorderOutput"):
        shape = node.outputs[0] if node.op == "ReorderInput" else node.inputs[0]
        if len(shape) != 4:
            return None
        work = Work("copy", batch=shape[0], inputs=shape[1], outputs=shape[1], space=(*shape[2:],))
        return round(table.reorder_seconds(work, out=node.op == "ReorderOutput") * 1e6, 2)
    work = work_of_node(node)
    return None if work is None else round(table.seconds(work, alone=True) * 1e6, 2)


def work_of_node(node: Node) -> Work | None:
    """Return the work of a convolution or product of a profile, from its shapes."""
    if node.op in ("Conv", "FusedConv") and len(node.inputs[0]) == 4:
        x, weight, out = node.inputs[0], node.inputs[1], node.outputs[0]
        groups = x[1] // weight[1] if x[1] % weight[1] == 0 else 1
        kind = "conv"
        if groups > 1:
            kind = "depthwise" if weight[1] == 1 else "grouped"
        stride = max(1, round(x[2] / out[2]))
        return Work(
            kind, "conv2d", batch=x[0], inputs=x[1], outputs=out[1], groups=groups,
            kernel=(*weight[2:],), stride=(stride, stride), space=(*out[2:],), source=(*x[2:],),
        )  # fmt: skip
    if node.op in ("MatMul", "Gemm", "FusedMatMul", "FusedGemm") and len(node.inputs) > 1:
        x, other, out = node.inputs[0], node.inputs[1], node.outputs[0]
        if not (x and other and out):
            return None
        rows = math.prod(out[:-1])
        if len(other) == 2:
            return Work("linear", "linear", inputs=x[-1], outputs=out[-1], space=(rows,))
        batch = math.prod(out[:-2])
        return Work("matmul", "matmul", batch, x[-1], out[-1], space=(out[-2],))
    return None
