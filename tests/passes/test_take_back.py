"""Channels that a target keeps a place for are kept for real, unless the user masked them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

import narrows
from narrows.ir.compare import relative_error
from narrows.ir.program import Program
from narrows.passes.base import TOLERANCE, Fidelity
from narrows.passes.plans.take_back import take_back
from tests.passes.test_forms import costs

EXACT = TOLERANCE[Fidelity.EXACT][torch.float64]
X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 24, 3, padding=1)
        self.second = nn.Conv2d(24, 20, 3, padding=1)
        self.third = nn.Conv2d(20, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x).relu()).relu())


def chain() -> Program:
    torch.manual_seed(0)
    return narrows.capture(Chain().double().eval(), (X,))


def test_channels_up_to_the_step_come_back_in_order_of_score() -> None:
    """12 of 24 channels fill one block of 8 and half of another."""
    program = chain()
    plan = narrows.plan(program, ratio=0.5, exclude="third.weight", constrained=False, zeros=False)
    assert len(plan.inputs["second.weight"]) == 12
    back = take_back(program, plan, costs(1e3, block=8))
    keep = back.inputs["second.weight"]
    assert len(keep) == 16
    weights = program.weights["second.weight"].abs().sum((0, 2, 3)).numpy()
    assert set(keep) == set(np.argsort(-weights)[:16])
    assert [n.channels for n in back.notes if n.reason == "back"] == [4]
    made = narrows.apply(program, back)
    assert relative_error(made(X), back.masked(program)(X)) <= EXACT


def test_whole_couplings_come_back_with_all_that_makes_and_reads_them() -> None:
    program = chain()
    plan = narrows.plan(program, ratio=0.5, zeros=False)
    back = take_back(program, plan, costs(1e3, block=8))
    assert len(back.inputs["second.weight"]) == len(back.outputs["first.weight"]) == 16
    assert back.inputs["second.weight"] == back.outputs["first.weight"]


def test_explicit_masks_stay() -> None:
    program = chain()
    masks = {"second.weight": [*range(11)], "third.weight": [*range(9)]}
    plan = narrows.plan(program, keep_inputs=masks, zeros=False)
    assert take_back(program, plan, costs(1e3, block=8)) is plan


def test_where_widths_fit_nothing_comes_back() -> None:
    program = chain()
    plan = narrows.plan(program, ratio=0.5, zeros=False)
    assert take_back(program, plan, costs(1e3)) is plan
