"""Networks of many layers: nothing walks a graph by calling itself once per layer."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import narrows
from narrows.ir.program import relative_error
from narrows.passes.base import TOLERANCE, Fidelity

LAYERS = 320
ROOM = 300  # frames: enough for torch and the exporters, fewer than there are layers


@pytest.fixture
def shallow() -> Iterator[None]:
    """Let calls nest less deep than the network."""
    before, frame, depth = sys.getrecursionlimit(), sys._getframe(), 0
    while frame := frame.f_back:
        depth += 1
    sys.setrecursionlimit(depth + ROOM)
    yield
    sys.setrecursionlimit(before)


def chain(layers: int) -> nn.Module:
    torch.manual_seed(0)
    made = [nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(layers // 2)]
    return nn.Sequential(*made, nn.Linear(6, 3)).eval()


def test_a_deep_chain_is_planned_and_applied(shallow: None) -> None:
    x = torch.randn(2, 6)
    program = narrows.capture(chain(LAYERS), (x,))
    plan = narrows.plan(program, ratio=0.3)
    result = narrows.apply(program, plan)
    wanted = plan.masked(program).run_flat([x])
    assert relative_error(result.run_flat([x]), wanted) <= TOLERANCE[Fidelity.EXACT][torch.float32]


@pytest.mark.parametrize("target", ["onnx", "c"])
def test_a_deep_chain_is_lowered(shallow: None, target: str) -> None:
    x = torch.randn(2, 6)
    program = narrows.capture(chain(LAYERS), (x,))
    if target == "c":
        program = narrows.quantize(program, [x]).program
    artifact = narrows.lower(program, target, check=False)
    assert artifact.manifest["files"]
