"""One compile makes its target once: all that asks it, costs and files, asks the same one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import narrows
from narrows.backends.onnx import OnnxTarget
from narrows.cli import main

NETS = """
from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
"""


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[OnnxTarget]:
    """Return the targets that were made since."""
    found: list[OnnxTarget] = []
    check = OnnxTarget.__post_init__

    def count(self: OnnxTarget) -> None:
        found.append(self)
        check(self)

    monkeypatch.setattr(OnnxTarget, "__post_init__", count)
    return found


@pytest.mark.parametrize("integers", [False, True])
def test_compile_makes_its_target_once(made: list[OnnxTarget], integers: bool):
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    x = torch.randn(2, 3, 4, 4)
    images = [x] if integers else None
    plan = {"latency": 1.0}
    artifact = narrows.compile(net, x, plan, opset=19, samples=1, quantize=images, check=False)
    assert [(target.opset, target.samples) for target in made] == [(19, 1)]
    assert artifact.manifest["options"]["opset"] == 19


def test_the_command_line_makes_its_target_once(
    made: list[OnnxTarget], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(NETS)
    words = ["compile", "nets.py:net", "-i", "f32[2,3,4,4]", "-o", "out", "--latency", "1"]
    assert main([*words, "-t", "onnx{samples=1}"]) == 0
    assert len(made) == 1
