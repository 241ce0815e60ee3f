"""What is said of a result by budgets: counts of what comes out, extremes, NaN, labels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import narrows
from narrows.errors import PlanError, PlanUsageError
from narrows.ir.program import Program
from narrows.passes.choosing.budgets.base import Goal
from narrows.passes.choosing.budgets.catalog import find
from narrows.passes.choosing.closeness import closeness
from narrows.passes.plans.choose import setting_of
from narrows.passes.plans.options import Choosing
from narrows.passes.plans.plan import ChannelPlan
from tests.passes.residual import images, left, model, settled

DATA = [images(32, 1), images(32, 2)]


@pytest.fixture
def program() -> Program:
    return settled()


def said(notes: Any, reason: str) -> list[str]:
    return [n.message for n in notes if n.reason == reason]


# ------------------------------------------------------------------ what comes out is counted


def test_budgets_count_the_pruned_program(program: Program):
    plan = ChannelPlan.given(program, {"last.weight": range(4), "second.0.weight": range(6)})
    small = narrows.apply(program, plan)
    setting = setting_of(program, None, None, Choosing(macs=0.5))
    share = left(small) / left(program)
    assert find("macs").left(setting, small) == pytest.approx(share)
    assert Goal(find("macs"), 0.9).told(setting, small) == (
        f"{share:.3f} of the multiply-accumulates (macs 0.9)"
    )
    assert "(macs 0.1, more than was asked for)" in Goal(find("macs"), 0.1).told(setting, small)
    for name in ("params", "channels", "memory"):
        assert find(name).left(setting, program) == 1
        kept = find(name).left(setting, small)
        assert kept is not None
        assert kept < 1 or name == "memory"


def test_compress_counts_what_is_lowered():
    asked: dict[str, Any] = {"macs": 0.7, "params": 0.9, "limits": {"channels": 0.9}}
    artifact = narrows.compress(model(), (images(2),), data=DATA, **asked, allocator="uniform")
    (text,) = [n["message"] for n in artifact.notes if n["reason"] == "counted"]
    assert text.startswith("left in what is lowered: 0.")
    whole, plan = narrows.capture(model(), (images(2),)), artifact.plan
    assert plan is not None
    small = narrows.apply(whole, ChannelPlan.from_json(plan), target="onnx")
    share = left(small) / left(whole)  # the form that is fastest fills places that cost nothing
    over = ", more than was asked for" if share > 0.7 else ""
    assert f" {share:.3f} of the multiply-accumulates (macs 0.7{over}), " in text
    assert " of the weights (params 0.9" in text
    assert " of the channels (channels 0.9" in text


def test_steps_down_are_counted_and_not_as_asked(program: Program):
    """`uniform` takes whole channels of few: what is left is not what a step asks for."""
    plan = narrows.plan(
        program, accuracy_drop=0, evaluate=lambda run: 1.0, allocator="uniform", data=None
    )
    (text,) = said(plan.notes, "lost")
    last = text.rpartition(", ")[2].split(":")[0]
    assert last == f"{left(narrows.apply(program, plan)) / left(program):.3f}"


def test_a_step_on_the_way_names_what_was_asked_for(program: Program):
    with pytest.raises(PlanError, match=r"a budget of channels of 0\.01 cannot be met"):
        narrows.plan(program, limits={"channels": 0.01}, data=DATA)


# ------------------------------------------------------------------ everything, and nothing


class Around(nn.Module):
    """A branch that a path without layers goes around: it may go whole."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.relu(self.a(x)))


def test_budgets_that_leave_nothing_say_so(program: Program):
    x = torch.randn(64, 8)
    around = narrows.capture(Around().eval(), (x[:2],))
    plan = narrows.plan(around, macs=0.01, data=[x])
    (text,) = said(plan.notes, "nothing")
    assert text == (
        "nothing is left of the multiply-accumulates (macs 0.01): all layers are constants"
    )
    assert narrows.apply(around, plan)(x).sub(x).std(0).max() < 1e-6
    plan = narrows.plan(program, macs={"second.*": 0.001}, data=DATA)
    (text,) = said(plan.notes, "nothing")
    assert "(macs of second.* 0.001): its layers are constants" in text
    assert not said(narrows.plan(program, macs=0.5, data=DATA).notes, "nothing")


@pytest.mark.parametrize("data", [None, DATA])
def test_a_budget_that_leaves_everything_says_so(program: Program, data: Any):
    plan = narrows.plan(program, macs=1.0, data=data)
    assert not plan.removed
    assert said(plan.notes, "idle") == ["the plan removes nothing: macs 1 leaves everything"]


def test_the_same_layers_have_one_limit(program: Program):
    with pytest.raises(PlanUsageError, match="macs is given twice for the same layers: for 'body'"):
        narrows.plan(
            program, macs={"body": 0.5, "second.*": 0.6}, groups={"body": ["second.0.*"]}, data=DATA
        )


# ------------------------------------------------------------------ NaN


class Logarithm(nn.Module):
    """A network whose outputs are NaN on some samples."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x))) + (x[:, :4] + 2).log()


@pytest.mark.parametrize("asked", [
    {"macs": 0.5, "constrained": False}, {"macs": 0.5, "allocator": "knapsack"},
    {"divergence": 0.1}, {"accuracy_drop": 5}, {"ratio": 0.5, "criterion": "taylor"},
])  # fmt: skip
def test_outputs_of_nan_are_told(asked: dict[str, Any]):
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    program = narrows.capture(Logarithm().eval(), (x[:2].abs(),))
    assert program(x).isnan().any()
    with pytest.raises(PlanError, match="own outputs hold NaN on the samples"):
        narrows.plan(program, data=[x], **asked)
    with pytest.raises(PlanError, match="own outputs hold NaN on the samples"):
        closeness(program, [program], [[x]], "logits")


def test_among_nan_no_class_is_the_same(program: Program):
    x = images(8)
    bad = program.with_weights({**program.weights, "head.bias": torch.full((10,), torch.nan)})
    (found,), _ = closeness(program, [bad], [[x]], "logits")
    assert found.same == 0
    assert found.chance


# ------------------------------------------------------------------ labels


@pytest.mark.parametrize("budget", [
    {"divergence": 10.0}, {"accuracy_drop": 100}, {"accuracy_drop": 100, "macs": 0.7},
])  # fmt: skip
def test_a_loss_sees_labels_beside_a_budget_of_what_is_lost(
    program: Program, budget: dict[str, Any]
):
    labels = torch.arange(32) % 10
    seen: list[Tensor] = []

    def loss(outputs: Tensor, batch: Any) -> Tensor:
        seen.append(batch[1])
        return nn.functional.cross_entropy(outputs, batch[1], reduction="sum")

    data = [(x, labels) for x in DATA]
    plan = narrows.plan(program, data=data, criterion="taylor", loss=loss, **budget)
    assert plan.removed
    assert len(seen) == 2
    assert all(s.equal(labels) for s in seen)
