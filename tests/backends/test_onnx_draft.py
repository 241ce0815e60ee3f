"""A draft computes what its program does, in the nodes that ONNX Runtime would run of an export."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

import narrows
from narrows.backends.leaves import Leaves
from narrows.backends.onnx.draft import draft
from narrows.backends.onnx.session import MODEL, OnnxSession
from narrows.ir.program import Program
from narrows.passes.pipeline import Pipeline


class Many(nn.Module):
    """Every operator that a draft writes itself, and one that it leaves to the exporter (ELU)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16)
        self.wide, self.depth = nn.Conv2d(16, 32, 1), nn.Conv2d(32, 32, 3, 1, 1, groups=32)
        self.gate, self.mix = nn.Linear(32, 32), nn.Conv2d(32, 16, 1, bias=False)
        self.tokens, self.ln = nn.Linear(16, 24), nn.LayerNorm(24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.hardswish(self.norm(self.stem(x).relu()))
        x = nn.functional.max_pool2d(x, 3, 2, 1)
        a, b = nn.functional.silu(self.wide(x)).split(16, 1)
        y = nn.functional.relu6(self.depth(torch.cat([b, a], 1)))
        y = y * self.gate(y.mean((2, 3))).sigmoid()[:, :, None, None]
        y = y * nn.functional.hardsigmoid(nn.functional.adaptive_avg_pool2d(y, 1))
        x = nn.functional.avg_pool2d(x - 0.5 * self.mix(y), 2)
        t = self.ln(nn.functional.gelu(self.tokens(x.flatten(2).permute(0, 2, 1))))
        t = (t @ t.permute(0, 2, 1)).softmax(-1) @ t / 2.0
        return self.head(nn.functional.elu(t[:, 0]).tanh())


def program() -> Program:
    torch.manual_seed(0)
    made = narrows.capture(Many().eval(), (torch.randn(2, 3, 32, 32),))
    return Pipeline.parse("fold-batch-norm, eliminate-dead").run(made).program


def test_a_draft_computes_what_its_program_does() -> None:
    made = program()
    model = draft(made, Leaves.of(made).computed, 20)
    onnx.checker.check_model(model, full_check=True)
    for batch in (1, 3):
        x = torch.randn(batch, 3, 32, 32)
        (found,) = OnnxSession(model.SerializeToString(), 1).run({"x": x.numpy()})
        wanted = made(x).numpy()
        assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_the_runtime_makes_the_same_of_a_draft_and_of_an_export(tmp_path: Path) -> None:
    """Of what takes the time; where the exporter writes a constant is of no matter."""
    made = program()
    artifact = narrows.lower(made, "onnx", samples=1)
    model = draft(made, Leaves.of(made).computed, 20).SerializeToString()
    kinds = [_kinds(m, tmp_path / "o.onnx") for m in (model, str(artifact.folder / MODEL))]
    for ops in (("Conv",), ("Gemm", "MatMul"), ("MaxPool",), ("AveragePool",), ("Softmax",),
                ("LayerNormalization",), ("Concat",), ("ReorderInput",)):  # fmt: skip
        of_draft, of_export = (sum(k[o] + k[f"Fused{o}"] for o in ops) for k in kinds)
        assert of_draft == of_export, ops


def _kinds(model: bytes | str, path: Path) -> Counter[str]:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(path).graph.node)
