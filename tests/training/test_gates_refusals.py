"""What is wrong with gates is told: what, where, why, and what to try."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import narrows
from narrows import training
from narrows.errors import PlanError, UsageError
from narrows.ir.program import Program
from tests.training.digits import Net, digits
from tests.training.kinds import KINDS, Make, parts

BAD: dict[str, tuple[Make, str]] = {
    "a glob of nothing": (
        lambda m, p: training.GumbelGates(m, p, outputs="blok*"), "'blok\\*' matches no weight"
    ),
    "nothing named": (lambda m, p: training.GumbelGates(m, p), "there is nothing to gate"),
    "all that is named has to stay": (
        lambda m, p: training.GumbelGates(m, p, outputs="head.*"), "there is nothing to gate"
    ),
    "a model in place of a program": (
        lambda m, p: training.GumbelGates(m, m, outputs="*"),  # type: ignore[arg-type]
        "take a torch module and its program",
    ),
    "another model": (
        lambda m, p: training.GumbelGates(nn.Linear(2, 2), p, outputs="*"), "not of this model"
    ),
    "gates on gates": (
        lambda m, p: (training.GumbelGates(m, p, "*"), training.GumbelGates(m, p, "*"))[1],
        "has gates already",
    ),
    "a ratio of everything": (
        lambda m, p: training.GumbelGates(m, p, outputs="*", ratio=1.0), "the share of channels"
    ),
    "no norm": (
        lambda m, p: training.NormSparsity(m, p, outputs="plain.weight"), "there is no norm"
    ),
    "an empty group": (
        lambda m, p: training.NormSparsity(
            m, p, outputs="block*", groups={"stem": "stem*"}
        ), "the group 'stem' has no gate",
    ),
    "a ratio of no group": (
        lambda m, p: training.NormSparsity(m, p, outputs="block*", ratio={"rest": 0.2}),
        "there is no group 'rest'",
    ),
    "a pattern that does not divide": (
        lambda m, p: training.DifferentiableMasks(m, p, outputs="*", pattern=(2, 3)),
        "2 of every 3 cannot be kept of 8",
    ),
    "no interval": (
        lambda m, p: training.SoftMasks(m, p, inputs="*", interval=0), "every 0 steps"
    ),
    "an epoch of one batch": (
        lambda m, p: training.AnnealedMasks(m, p, outputs="*", steps=1), "Sawtooth has 1 steps"
    ),
    "no mass": (
        lambda m, p: training.Predictors(m, p, outputs="*", mass=0), "cannot make up 0"
    ),
    "no width": (
        lambda m, p: training.SearchedWidths(m, p, outputs="*", widths=(0.0, 1.0)),
        "widths has no share",
    ),
    "nothing drawn": (
        lambda m, p: training.SearchedWidths(m, p, outputs="*", samples=0), "0 widths"
    ),
    "a block that is not there": (
        lambda m, p: training.SearchedWidths(
            m, p, depths=[{"blok1": "block1.conv2.weight"}]
        ), "no module 'blok1'",
    ),
    "a footprint of nothing": (
        lambda m, p: training.AnnealedMasks(m, p, outputs="*", steps=4, kind="flops"),
        "no footprint 'flops'",
    ),
    "latencies in nothing": (
        lambda m, p: training.GeneratedGates(m, p, outputs="*", target=0.0), "measured in 0.0"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_use_is_told(case: str, program: Program, fresh: Callable[[], Net]) -> None:
    make, text = BAD[case]
    with pytest.raises(UsageError, match=text) as error:
        make(fresh(), program)
    parts(error.value)


def test_an_unknown_weight_is_told(program: Program, fresh: Callable[[], Net]) -> None:
    with pytest.raises(PlanError, match=r"no weight 'stem.wieght'") as error:
        training.GumbelGates(fresh(), program, outputs="stem.wieght")
    assert "did you mean 'stem.weight'?" in str(error.value)


UNTRAINED: tuple[Any, ...] = (
    training.GumbelGates,
    training.SoftMasks,
    training.GeneratedGates,
    training.AttendedRatios,
    training.SearchedWidths,
    training.NormSparsity,
)


@pytest.mark.parametrize("kind", UNTRAINED)
def test_gates_that_were_never_trained_have_no_plan(
    kind: Any, program: Program, fresh: Callable[[], Net]
) -> None:
    model, (images, _) = fresh(), digits(4)
    gates = kind(model, program, outputs="block?.conv1.*")
    with pytest.raises(PlanError, match="have not been trained") as error:
        gates.plan(program)
    parts(error.value)
    model.train()(images)  # and in no optimizer
    with pytest.raises(PlanError, match=r"it began with|no masks were chosen|never called"):
        gates.plan(program)


def test_a_layer_that_closes_is_told(program: Program, fresh: Callable[[], Net]) -> None:
    model, (images, _) = fresh(), digits(4)
    gates = training.AnnealedMasks(model, program, outputs="block?.conv2.weight", steps=4)
    with torch.no_grad():
        gates.scores[0].fill_(-1)
    model.train()(images)
    with pytest.raises(PlanError, match="close all 8 channels") as error:
        gates.plan(program)
    assert "block1.conv2.weight outputs" in parts(error.value)
    plan = gates.plan(program, empty=True)
    assert plan.outputs["block1.conv2.weight"] == ()


def test_a_step_without_gradients_is_told(program: Program, fresh: Callable[[], Net]) -> None:
    for make in (KINDS["soft masks, inputs"], KINDS["norm sparsity"]):
        gates = make(fresh(), program)
        with pytest.raises(UsageError, match="no gradient") as error:
            gates.step()
        parts(error.value)


def test_a_temperature_of_zero_is_told(program: Program, fresh: Callable[[], Net]) -> None:
    model, (images, _) = fresh(), digits(4)
    training.GumbelGates(model, program, outputs="*", temperature=0.0)
    with pytest.raises(UsageError, match=r"the temperature is 0\.0") as error:
        model.train()(images)
    parts(error.value)


@pytest.mark.parametrize(
    ("text", "make"),
    [
        ("Ramp has 0 steps", lambda: training.Ramp(0, 1, 0)),
        ("Tent has 0 steps", lambda: training.Tent(1, 0)),
        ("Tent has its peak", lambda: training.Tent(1, 4, top=1.0)),
        ("Sawtooth rises to 1", lambda: training.Sawtooth(1, 4)),
    ],
)
def test_a_schedule_that_goes_nowhere_is_told(text: str, make: Callable[[], Any]) -> None:
    with pytest.raises(UsageError, match=text) as error:
        make()
    parts(error.value)


class Shared(nn.Module):
    """A norm without a gain, and an embedding that is the head, too."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4)
        self.a = nn.Linear(4, 4, bias=False)
        self.norm = nn.BatchNorm1d(4, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.a(self.table(x))) @ self.table.weight.T


def test_what_a_mask_of_parameters_cannot_say_is_told() -> None:
    model = Shared().eval()
    program = narrows.capture(model, (torch.arange(3),))
    with pytest.raises(PlanError, match="no gain for each channel") as error:
        training.GumbelGates(model, program, outputs="a.weight")
    parts(error.value)
    with pytest.raises(PlanError) as error:
        training.GumbelGates(model, program, outputs="table.weight")
    parts(error.value)
