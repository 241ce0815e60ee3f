"""Networks of many layers: nothing walks a graph by calling itself once per layer."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import narrows
from narrows.ir.compare import relative_error
from narrows.passes.base import TOLERANCE, Fidelity

LAYERS = 320
ROOM = 300  # frames: enough for torch and the exporters, fewer than there are layers


@contextlib.contextmanager
def shallow() -> Iterator[None]:
    """Let calls nest less deep than the network."""
    before, frame, depth = sys.getrecursionlimit(), sys._getframe(), 0
    while frame := frame.f_back:
        depth += 1
    sys.setrecursionlimit(depth + ROOM)
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


@pytest.fixture(scope="module")
def program() -> narrows.Program:
    torch.manual_seed(0)
    made = [nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(LAYERS // 2)]
    with shallow():
        return narrows.capture(nn.Sequential(*made, nn.Linear(6, 3)).eval(), (torch.randn(2, 6),))


def test_a_deep_chain_is_planned_and_applied(program: narrows.Program) -> None:
    with shallow():
        plan = narrows.plan(program, ratio=0.3)
        found = narrows.apply(program, plan).run_flat(program.examples)
        wanted = plan.masked(program).run_flat(program.examples)
    assert relative_error(found, wanted) <= TOLERANCE[Fidelity.EXACT][torch.float32]


@pytest.mark.parametrize("target", ["onnx", "c"])
def test_a_deep_chain_is_lowered(program: narrows.Program, target: str) -> None:
    x = [program.examples[0][:1]]
    with shallow():
        if target == "c":
            program = narrows.quantize(program, [x[0]]).program
        artifact = narrows.lower(program, target, check=False)
        found = [torch.from_numpy(a) for a in artifact.run_flat(x)]
        wanted = program.run_flat(x)
    tolerance = TOLERANCE[Fidelity.EXACT][torch.float32] if target == "onnx" else 0.0
    assert relative_error(found, wanted) <= tolerance
