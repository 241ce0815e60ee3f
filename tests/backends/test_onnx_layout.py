"""What ONNX Runtime does for the unpruned model it does for the chosen form, too."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import narrows
from narrows.ir.program import Program


class Block(nn.Module):
    """An inverted residual: expansion, depthwise convolution, projection, sum."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU(),
            nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False), nn.BatchNorm2d(inner),
            nn.ReLU(), nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), Block(32, 96), Block(32, 96),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(64, 64, 1),
    ).eval()  # fmt: skip


def ops(program: Program, folder: Path) -> Counter[str]:
    """Count the operators of the graph that ONNX Runtime runs, blocked ones as ``nchwc Conv``."""
    path = next(narrows.lower(program, "onnx").save(folder).glob("*.onnx"))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder.with_suffix(".onnx"))
    onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
    nodes = onnx.load(options.optimized_model_filepath).graph.node
    return Counter(f"{n.domain.rpartition('.')[2]} {n.op_type}".strip() for n in nodes)


@pytest.mark.parametrize("amount", [0.3, 0.5])
def test_the_optimized_graph_stays_blocked_and_fused(amount: float, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 56, 56)
    program = narrows.capture(network(), (x,))
    before = ops(narrows.apply(program, pipeline="fold-batch-norm"), tmp_path / "whole")
    if not before["nchwc Conv"]:
        pytest.skip("this ONNX Runtime has no blocked layout")
    draw = np.random.default_rng(0)
    masks = {
        name: draw.random(w.shape[1]) >= amount
        for name, w in program.weights.items()
        if w.dim() == 4 and w.shape[1] > 3
    }
    plan = narrows.plan(program, keep_inputs=masks, zeros=False)
    after = ops(narrows.apply(program, plan, target="onnx"), tmp_path / "chosen")
    for op in ("nchwc Conv", "Conv", "microsoft FusedConv", "Add", "Relu"):
        assert after[op] == before[op], op  # sums and activations are inside convolutions
    smallest = ops(narrows.apply(program, plan), tmp_path / "smallest")
    assert smallest["nchwc Conv"] < before["nchwc Conv"]
