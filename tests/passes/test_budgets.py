"""Plans by a budget, and all of it in one call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import narrows
from narrows.backends.base import costs_of
from narrows.errors import PlanError, PlanUsageError, UsageError
from narrows.ir.program import Program
from narrows.passes.choosing.divergence import Divergence
from narrows.passes.choosing.losses import Losses
from narrows.passes.choosing.prepare import prepared
from narrows.passes.choosing.reads import reads_of
from narrows.passes.choosing.search import Search
from narrows.passes.choosing.statistics import split
from narrows.passes.plans.plan import ChannelPlan
from tests.passes.residual import images, left, model, settled


@pytest.fixture
def program() -> Program:
    return settled()


# ------------------------------------------------------------------ plans by a budget


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("budget", ["macs", "params"])
def test_a_budget_is_met(program: Program, budget: str, constrained: bool):
    data = [images(32, 1), images(32, 2)]
    plan = narrows.plan(program, data=data, constrained=constrained, **{budget: 0.6})
    small = narrows.apply(program, plan)
    if budget == "macs":
        share = left(small) / left(program)
    else:
        layers = [n for n in program.weights if program.weights[n].dim() > 1]
        share = sum(small.weights[n].numel() for n in layers if n in small.weights) / sum(
            program.weights[n].numel() for n in layers
        )
    assert 0.5 < share <= 0.6 + 1e-9
    assert any(n.reason == "curve" for n in plan.notes)


def test_a_search_is_better_than_a_ratio(program: Program):
    data, x = [images(64, 1), images(64, 2)], images(128, 5)
    searched = narrows.plan(program, data=data, macs=0.5, constrained=False)
    by_norm = narrows.plan(program, macs=0.5, constrained=False)
    assert left(narrows.apply(program, by_norm)) <= 0.5 * left(program) * 1.001
    divergence = Divergence.of([program(x)])

    def far(plan: ChannelPlan) -> float:
        made = plan.masked(narrows.compensate(program, plan, data=data))
        return divergence.between([program(x)], [made(x)])

    assert far(searched) < far(by_norm)


def test_what_is_excluded_or_given_stays(program: Program):
    data = [images(32, 1), images(32, 2)]
    plan = narrows.plan(
        program, {"last.weight": range(16)}, data=data, macs=0.8, constrained=False,
        exclude="second.*", min_width=8,
    )  # fmt: skip
    assert plan.inputs["last.weight"] == tuple(range(16))
    assert "second.0.weight" not in plan.inputs
    assert all(len(keep) >= 8 for keep in plan.inputs.values())


def test_a_coupling_is_excluded_by_whoever_makes_it(program: Program):
    """`first` makes what `second` reads; without a budget's data it is the same."""
    for data in ([images(32, 1), images(32, 2)], None):
        plan = narrows.plan(program, macs=0.9, data=data, exclude="first.*")
        assert plan.removed
        assert "second.0.weight" not in plan.inputs
        plan = narrows.plan(program, macs=0.9, data=data, include="first.*")
        assert {w for w, keep in plan.inputs.items() if len(keep) < plan.widths[w][0]} == {
            "second.0.weight"
        }


@pytest.mark.parametrize("side", ["inputs", "outputs"])
@pytest.mark.parametrize("data", [True, False])
def test_what_is_masked_already_counts(program: Program, side: str, data: bool):
    """Half of `last`'s inputs, or all that `first` makes but four, are gone from the beginning."""
    masks = {
        "inputs": {"keep_inputs": {"last.weight": range(8)}},
        "outputs": {"keep_outputs": {"first.0.weight": range(4)}},
    }[side]
    batches = [images(32, 1), images(32, 2)] if data else None
    plan = narrows.plan(program, **masks, macs=0.5, data=batches, constrained=False)
    assert 0.45 < left(narrows.apply(program, plan)) / left(program) <= 0.5 * 1.001
    assert plan.inputs.get("last.weight", range(8)) == tuple(range(8)) or side == "outputs"


def test_what_a_plan_leaves_of_the_reads(program: Program):
    reads = reads_of(prepared(program))
    plan = ChannelPlan.given(program, {"last.weight": [0, 3]}, {"first.0.weight": [1, 2]})
    there = reads.left_by(plan)
    names = np.array([reads.products[j].layer.weight for j in reads.layer])
    assert there[names == "last.weight"].sum() == 2
    assert there[names == "second.0.weight"].sum() == 2  # nobody makes the others any more
    assert there[names == "first.0.weight"].all()


def test_a_latency_is_reached_by_losses(program: Program):
    data = [images(32, 1), images(32, 2)]
    plan = narrows.plan(program, latency=0.9, target="onnx", data=data)
    table = costs_of("onnx")
    small = narrows.apply(narrows.compensate(program, plan, data=data), plan, target="onnx")
    assert table is not None
    seconds = [sum(s for _, s in table.predict(p, 1)) for p in (small, program)]
    assert 0.6 * seconds[1] < seconds[0] <= 0.9 * seconds[1]
    costs = Losses.of(program, [[d] for d in data]).found["last.weight"]
    assert costs.shape == (16,)
    assert (costs > 0).all()


def test_bad_budgets(program: Program):
    with pytest.raises(PlanUsageError, match="ratio and macs exclude each other"):
        narrows.plan(program, ratio=0.5, macs=0.5)
    with pytest.raises(PlanUsageError, match="loss has no effect"):
        narrows.plan(program, macs=0.5, data=[images(8)], loss=lambda outputs, batch: outputs.sum())
    with pytest.raises(PlanUsageError, match="outputs is one of"):
        narrows.plan(program, macs=0.5, data=[images(8)], outputs="logit")
    with pytest.raises(PlanUsageError, match="a budget of macs is above 0"):
        narrows.plan(program, macs=0)
    with pytest.raises(PlanUsageError, match="one example"):
        narrows.plan(program, macs=0.5, data=[images(1)])
    with pytest.raises(PlanError, match="cannot be met") as caught:
        narrows.plan(program, macs=0.0001, data=[images(8)], constrained=False)
    assert "is the least" in str(caught.value)
    for data in ([images(8)], None):
        with pytest.raises(PlanError, match="no channel can be removed") as caught:
            narrows.plan(program, macs=0.5, data=data, exclude="*", constrained=False)
        assert "exclude names it" in str(caught.value)
    with pytest.raises(UsageError, match="not batches"):
        narrows.plan(program, macs=0.5, data=images(8))
    with pytest.raises(PlanUsageError, match="no compensation 'least-square'") as wrong:
        narrows.compensate(program, ChannelPlan(), data=[images(4)], method="least-square")
    assert wrong.value.hint == "did you mean 'least-squares'?"


def test_data_is_split_in_halves(program: Program):
    x = images(5)
    one, other = split(program, [[x]])
    assert one[0][0].equal(x[:2])
    assert other[0][0].equal(x[2:])


def test_everything_costs_what_the_network_does(program: Program):
    reads = reads_of(prepared(program))
    assert reads.cost(reads.all(), reads.macs) == reads.whole(reads.macs)


# ------------------------------------------------------------------ one saved thing


def test_a_solved_plan_is_one_file(program: Program, tmp_path: Path):
    plan = ChannelPlan.given(program, {"last.weight": list(range(10))})
    made = narrows.compensate(program, plan, data=[images(32)])
    narrows.Solved.of(program, plan, made).save(tmp_path / "plan.solved")
    solved = narrows.Solved.load(tmp_path / "plan.solved")
    assert solved.plan == plan
    again = solved.applied(program)
    assert all(again.weights[n].equal(t) for n, t in made.weights.items())
    other = program.with_weights({n: t + 1 for n, t in program.weights.items()})
    with pytest.raises(PlanError, match="another checkpoint"):
        solved.applied(other)
    (tmp_path / "bad").write_bytes(b"{}")
    with pytest.raises(PlanError, match="is no solved plan"):
        narrows.Solved.load(tmp_path / "bad")
    with pytest.raises(PlanError, match="there is no file"):
        narrows.Solved.load(tmp_path / "none")


# ------------------------------------------------------------------ one call


def test_compress_makes_an_artifact():
    seen = []
    artifact = narrows.compress(
        model(), (images(2),), data=[images(32, 1), images(32, 2)], macs=0.7,
        evaluate=lambda run: float(run(images(2)).shape[1]),
        progress=lambda what, done, of: seen.append((what, done, of)),
    )  # fmt: skip
    assert any("least-squares: divergence" in n["message"] for n in artifact.notes)
    assert any("evaluate: 10 unpruned, 10 pruned" in n["message"] for n in artifact.notes)
    assert seen
    assert all(0 < done <= of for _, done, of in seen)


def test_compress_in_bits_and_by_a_drop():
    data = [images(32, 1), images(32, 2)]
    artifact = narrows.compress(model(), (images(2),), data=data, accuracy_drop=60, bits=8)
    assert artifact.plan is not None
    alone = narrows.compress(
        model(), (images(2),), data=data, bits=8, evaluate=lambda run: float(len(run(images(2))))
    )
    assert alone.plan is None
    assert any("evaluate: 2 unpruned, 2 in 8 bits" in n["message"] for n in alone.notes)


def test_a_drop_is_seen_on_what_was_kept_out(program: Program, monkeypatch: pytest.MonkeyPatch):
    used: list[int] = []
    usual = Search.__init__

    def noted(self: Search, program: Program, batches: list, *args: object, **more: object) -> None:
        used.append(sum(len(b[0]) for b in batches))
        usual(self, program, batches, *args, **more)

    monkeypatch.setattr(Search, "__init__", noted)
    narrows.plan(program, accuracy_drop=60, data=[images(64, 1)], constrained=False)
    narrows.plan(
        program, accuracy_drop=60, data=[images(64, 1)], constrained=False, evaluate=lambda run: 1.0
    )
    assert used == [48, 64]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "there is no budget"),
        ({"macs": 0.5, "limits": {"macs": 0.5}}, "macs is given twice"),
        ({"macs": 0}, "a budget of macs is above 0 and up to 1, got 0"),
        ({"macs": 0.5, "bits": 1}, "bits are 2 to 8"),
        ({"accuracy_drop": -1}, "a budget of accuracy_drop is a number from 0 to 100, got -1"),
        ({"accuracy_drop": 1, "evaluate": lambda run: float("nan")}, "evaluate returned nan"),
        ({"accuracy_drop": 1, "evaluate": lambda run: "good"}, "did not return a number"),
        ({"macs": 0.5, "bits": "8"}, "bits are 2 to 8"),
        ({"accuracy_drop": 1, "outputs": "values"}, "needs something to be measured by"),
        ({"macs": 0.5, "data": []}, "there is no data"),
    ],
)
def test_compress_refuses(options: dict, message: str):
    given = {"data": [images(8), images(8)], **options}
    with pytest.raises(UsageError, match=message):
        narrows.compress(model(), (images(2),), **given)


# ------------------------------------------------------------------ what a review found


class Two(nn.Module):
    """A layer that two others read, one of which does nothing with its channel 3."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        with torch.no_grad():
            self.a.weight[:, 3] = 0
            self.b.weight[:, 3] *= 20

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.a(x) + self.b(x)


@pytest.mark.parametrize("asked", [
    {"ratio": 0.3}, {"ratio": 0.3, "criterion": "l2"},
    {"macs": 0.8, "allocator": "knapsack"}, {"macs": 0.8, "allocator": "global"}, {"macs": 0.8},
])  # fmt: skip
def test_a_channel_that_one_of_two_readers_ignores_is_not_gone(asked: dict[str, Any]):
    torch.manual_seed(0)
    program = narrows.capture(Two().eval(), (torch.randn(2, 6),))
    if "macs" in asked:
        asked = {**asked, "data": [torch.randn(64, 6)]}
    plan = narrows.plan(program, **asked)
    assert 3 in plan.inputs["b.weight"]
    assert plan.removed


def test_a_weight_used_twice_counts_once():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.both, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.both(self.both(self.first(x).relu()).relu()).relu())

    torch.manual_seed(0)
    program = narrows.capture(Twice().eval(), (torch.randn(2, 8),))
    reads = reads_of(prepared(program))
    assert reads.whole(reads.parameters) == sum(
        w.numel() for w in program.weights.values() if w.dim() > 1
    )


@pytest.mark.parametrize("criterion", ["l1", None])
def test_a_budget_of_what_multiplies_nothing_is_refused(criterion: str | None):
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.head = nn.Embedding(10, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.emb(x).mean(1))

    program = narrows.capture(Words().eval(), (torch.randint(0, 10, (2, 5)),))
    given = {} if criterion else {"data": [torch.randint(0, 10, (8, 5))]}
    with pytest.raises(PlanUsageError, match="nothing to cut"):
        narrows.plan(program, macs={"emb.weight": 0.7}, **given)


def test_a_share_is_not_passed_by_a_hair(program: Program):
    with pytest.raises(PlanError, match="cannot be met") as error:
        narrows.plan(program, macs=0.05, data=[images(32)], min_width=12)
    least = float(str(error.value).split("met: ")[1].split()[0])
    with pytest.raises(PlanError, match="cannot be met"):
        narrows.plan(program, macs=least * 0.999, data=[images(32)], min_width=12)


def test_two_classes_that_mostly_agree_are_not_at_chance():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)).eval()
    program = narrows.capture(net, (torch.randn(2, 8),))
    data = [torch.randn(256, 8)]
    made = narrows.compensate(program, narrows.plan(program, macs=0.6, data=data), data=data)
    (said,) = (n.message for n in made.notes if n.reason == "compensated")
    share = float(said.split("-> ")[2].split("%")[0])
    assert 60 < share < 100
    assert not any(n.reason == "chance" for n in made.notes)
