"""Budgets and allocators: what they count, what they meet, what they refuse."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import narrows
from narrows.errors import PlanError, PlanUsageError
from narrows.ir.program import Program
from narrows.passes.choosing.allocators.base import ByWidths, limits_of
from narrows.passes.choosing.allocators.bisection import Bisection
from narrows.passes.choosing.allocators.knapsack import CELLS, Cells, Knapsack
from narrows.passes.choosing.allocators.overall import Global
from narrows.passes.choosing.allocators.uniform import Uniform
from narrows.passes.choosing.budgets.base import Goal, Limit
from narrows.passes.choosing.budgets.catalog import find
from narrows.passes.choosing.budgets.memory import peak
from narrows.passes.choosing.criteria.catalog import find as criterion
from narrows.passes.choosing.prepare import prepared
from narrows.passes.plans.candidates import Candidates
from narrows.passes.plans.options import Choosing
from narrows.passes.plans.plan import ChannelPlan
from narrows.passes.plans.rank import Options
from narrows.passes.plans.setting import Setting
from tests.networks import NETWORKS
from tests.networks.registry import conv
from tests.passes.residual import images, left, settled
from tests.passes.test_latency import costs

DATA = [images(32, 1), images(32, 2)]


@pytest.fixture
def program() -> Program:
    return settled()


def candidates_of(
    program: Program, constrained: bool = True, plan: ChannelPlan | None = None
) -> Candidates:
    choosing = Choosing(macs=0.5, constrained=constrained)
    options = Options(criterion("l1"), (), (), (), 1, "local")
    begun = plan or ChannelPlan.given(program)
    setting = Setting(program, ChannelPlan.given(program), begun, options, choosing)
    return Candidates.of(setting, prepared(program))


def weights(program: Program, *globs: str) -> int:
    """Return the weights of the layers of some modules."""
    own = [
        n for n, t in program.weights.items() if t.dim() > 1 and (n.startswith(globs) or not globs)
    ]
    return sum(program.weights[n].numel() for n in own)


# ------------------------------------------------------------------ what may go


@pytest.mark.parametrize("constrained", [True, False])
@pytest.mark.parametrize(
    "name", ["", "grouped_conv", "flatten_linear", "image_attention", "dense_block"]
)
def test_what_widths_leave_is_what_their_plan_leaves(
    program: Program, name: str, constrained: bool
):
    if name:
        network = NETWORKS[name]
        program = narrows.capture(network.build(), network.inputs(2))
        begun = None
    else:
        begun = ChannelPlan.given(program, {"last.weight": range(8)}, {"first.0.weight": range(9)})
    found = candidates_of(program, constrained, begun)
    generator = np.random.default_rng(0)
    for _ in range(4):
        widths = [int(generator.integers(1, full + 1)) for full in found.full]
        there = found.there(widths)
        assert (there == found.reads.left_by(found.plan(widths, ""))).all()
    assert found.there(found.full).sum() == found.reads.left_by(found.setting.plan).sum()


def test_what_budgets_count(program: Program):
    found = candidates_of(program)
    widths = [full // 2 for full in found.full]
    small = narrows.apply(program, found.plan(widths, "half"))
    assert find("macs").of(found, widths) == left(small)
    assert find("macs").whole(found) == left(program)
    assert find("params").of(found, widths) == weights(small)
    made = sum(t.shape[0] for n, t in small.weights.items() if t.dim() > 1)
    assert find("channels").of(found, widths) == made


# ------------------------------------------------------------------ several at once, groups


@pytest.mark.parametrize("data", [DATA, None])
def test_several_budgets_are_all_met(program: Program, data: Any):
    plan = narrows.plan(program, macs=0.7, params=0.5, data=data, constrained=False)
    small = narrows.apply(program, plan)
    assert left(small) <= 0.7 * left(program) * (1 + 1e-9)
    assert 0.45 < weights(small) / weights(program) <= 0.5 * (1 + 1e-9)
    assert all(reason.endswith("macs 0.7, params 0.5") for reason in plan.reasons.values())


@pytest.mark.parametrize("data", [DATA, None])
def test_groups_have_budgets_of_their_own(program: Program, data: Any):
    plan = narrows.plan(
        program, params={"body": 0.6, "head.*": 0.5}, data=data, constrained=False,
        groups={"body": ["first.*", "second.*"]},
    )  # fmt: skip
    small = narrows.apply(program, plan)
    for names, share in ((("first", "second"), 0.6), (("head",), 0.5)):
        assert weights(small, *names) <= share * weights(program, *names)
    if data is not None:  # a ratio overall takes more of one of them
        assert weights(small, "head") == 0.5 * weights(program, "head")


def test_channels_are_a_budget(program: Program):
    plan = narrows.plan(program, limits={"channels": 0.7})
    small = narrows.apply(program, plan)
    made = [sum(t.shape[0] for t in p.weights.values() if t.dim() > 1) for p in (small, program)]
    assert 0.65 < made[0] / made[1] <= 0.7


# ------------------------------------------------------------------ one number for all


def kept(plan: ChannelPlan) -> dict[str, int]:
    """Return per coupling, by what makes it, how many channels a plan keeps."""
    return {weight: len(keep) for weight, keep in plan.outputs.items()}


SCALARS = ("global", "uniform", "bisection", "thresholds")


@pytest.mark.parametrize("name", SCALARS)
@pytest.mark.parametrize("constrained", [True, False])
def test_scalars_come_near_to_the_budget(program: Program, name: str, constrained: bool):
    plan = narrows.plan(program, macs=0.6, allocator=name, constrained=constrained)
    assert 0.56 < left(narrows.apply(program, plan)) / left(program) <= 0.6


def test_the_usual_one_is_global(program: Program):
    assert narrows.plan(program, macs=0.6, allocator="global") == narrows.plan(program, macs=0.6)


def test_uniform_takes_the_same_share_of_all(program: Program):
    found = kept(narrows.plan(program, params=0.5, allocator="uniform"))
    full = {"stem.0.weight": 16, "first.0.weight": 24, "gate.0.weight": 4, "last.weight": 32}
    shares = {weight: found[weight] / width for weight, width in full.items()}
    low, high = min(shares.values()), max(shares.values())
    assert high - low <= 1 / 4 + 1e-9  # a channel of the narrowest


def test_bisection_keeps_in_proportion_to_the_mean_score(program: Program):
    """One factor times the mean of the scores is the share that stays, but for one channel."""
    candidates = candidates_of(program)
    plan = narrows.plan(program, params=0.3, allocator="bisection")
    found = kept(plan)
    ratios = []
    for candidate, full in zip(candidates.members, candidates.full, strict=True):
        width = next(found[p.use.weight] for p in candidate.parts if p.side == "outputs")
        if 1 < width < full:
            mean = float(np.abs(candidate.scores).mean())
            ratios.append(((width - 1) / full / mean, (width + 1) / full / mean))
    assert len(ratios) > 1
    assert max(low for low, _ in ratios) <= min(high for _, high in ratios)


def test_thresholds_rank_within_groups(program: Program):
    groups = {"stem": "stem.*", "rest": "*"}
    plan = narrows.plan(program, params=0.5, allocator="thresholds", groups=groups)
    found, full = kept(plan), {"first.0.weight": 24, "gate.0.weight": 4, "last.weight": 32}
    stem = found["stem.0.weight"] / 16
    rest = sum(found.get(w, n) for w, n in full.items()) / sum(full.values())
    assert abs(stem - rest) < 2 / 16
    one = narrows.plan(
        program, macs={"stem": 0.8, "*": 0.5}, allocator="thresholds", groups={"stem": "stem.*"}
    )
    small = narrows.apply(program, one)
    assert left(small) <= 0.5 * left(program)
    assert small.weights["stem.0.weight"].shape[0] <= 0.8 * 16


@pytest.mark.parametrize("name", SCALARS)
def test_scalars_by_losses_in_rounds(program: Program, name: str):
    plan = narrows.plan(program, macs=0.6, params=0.7, allocator=name, data=DATA)
    small = narrows.apply(program, plan)
    assert left(small) <= 0.6 * left(program)
    assert weights(small) <= 0.7 * weights(program)
    assert left(small) > 0.4 * left(program)


# ------------------------------------------------------------------ knapsacks


def test_cells_are_the_best_there_is():
    """Against all combinations, for every capacity."""
    generator = np.random.default_rng(3)
    for _ in range(5):
        costs = [np.sort(generator.integers(0, 40, size=n)).astype(float) for n in (4, 3, 5, 2)]
        losses = [np.sort(generator.random(len(c)))[::-1].copy() for c in costs]
        cells = Cells(costs, losses, CELLS)  # a cell is 1
        every = list(itertools.product(*(range(len(c)) for c in costs)))
        for capacity in range(0, int(sum(c.max() for c in costs)) + 1, 7):
            fitting = [
                total(losses, picked) for picked in every if total(costs, picked) <= capacity
            ]
            found = cells.best(capacity)
            if found is None:
                assert not fitting
                continue
            assert total(costs, found) <= capacity
            assert total(losses, found) == pytest.approx(min(fitting), rel=1e-12)


def total(values: Sequence[np.ndarray], picked: Sequence[int]) -> float:
    return float(sum(own[i] for own, i in zip(values, picked, strict=True)))


@pytest.mark.parametrize("budget", ["macs", "params"])
@pytest.mark.parametrize("share", [0.9, 0.7])
def test_a_knapsack_loses_hardly_more_than_the_best_widths(
    program: Program, budget: str, share: float
):
    """All widths of two couplings are tried; what one costs depends on the other."""
    begun = candidates_of(program).setting
    options = Options(criterion("l1"), (), (), ("head*",), 6, "local")
    found = Candidates.of(dataclasses.replace(begun, options=options), prepared(program))
    assert len(found.members) == 2
    (limit,) = limits_of(found, [Goal(find(budget), share)])
    widths = Knapsack().widths(found, [limit])
    assert limit.meets(widths)
    spans = (range(least, full + 1) for least, full in zip(found.least, found.full, strict=True))
    best = min(lost(found, w) for w in itertools.product(*spans) if limit.meets(w))
    assert lost(found, widths) <= best * 1.02


def lost(candidates: Candidates, widths: Sequence[int]) -> float:
    return float(sum(curve[w] for curve, w in zip(candidates.lost, widths, strict=True)))


@pytest.mark.parametrize("name", ["knapsack", "spdy{tries=3}"])
def test_knapsacks_by_losses(program: Program, name: str):
    plan = narrows.plan(program, macs=0.6, allocator=name, data=DATA, constrained=False)
    assert 0.55 < left(narrows.apply(program, plan)) / left(program) <= 0.6


def test_a_knapsack_loses_no_more_than_other_widths(program: Program):
    found = candidates_of(program)
    limits = limits_of(found, [Goal(find("macs"), 0.6), Goal(find("params"), 0.7)])
    widths = Knapsack().widths(found, limits)
    assert all(limit.meets(widths) for limit in limits)
    for other in (Uniform(), Global(), Bisection()):
        assert lost(found, widths) <= lost(found, other.widths(found, limits)) * 1.001


def test_a_knapsack_sees_the_staircase(program: Program):
    """On a runtime in blocks of 16 channels no plan keeps 17."""
    plan = narrows.plan(program, latency=0.8, costs=costs(), allocator="knapsack")
    made = narrows.apply(program, plan)
    before, after = (sum(s for _, s in costs().predict(p)) for p in (program, made))
    assert after <= 0.8 * before
    assert any("seconds, predicted" in n.message for n in plan.notes)


# ------------------------------------------------------------------ memory, densities, rewards


class Wide(nn.Module):
    """A wide map between two narrow ones, and one of them is needed later."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = conv(3, 4), conv(4, 16), conv(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        return x + self.three(self.two(x).relu())


def test_the_peak_of_memory_is_counted_by_hand():
    program = narrows.capture(Wide().eval(), (images(2),))
    # While the ReLU runs its input and its result are there, and the first layer's result.
    assert peak(program) == 2 * (4 + 16 + 16) * 64 * 4


@pytest.mark.parametrize("share", [0.9, 0.6])
def test_memory_is_met(program: Program, share: float):
    plan = narrows.plan(program, limits={"memory": share})
    rest = peak(narrows.apply(program, plan)) / peak(program)
    assert share - 0.1 < rest <= share  # one channel of the widest map is 1/32
    with pytest.raises(PlanError, match=r"a budget of memory of 0\.001 cannot be met"):
        narrows.plan(program, limits={"memory": 0.001})


@pytest.mark.parametrize("rule", ["size", "score"])
def test_precropping_meets_a_budget(program: Program, rule: str):
    plan = narrows.plan(program, macs=0.6, allocator=f"precropping{{rule={rule}}}")
    assert 0.56 < left(narrows.apply(program, plan)) / left(program) <= 0.6


def test_small_layers_stay_whole_before_large_ones_are_thinned(program: Program):
    """By the layers' sizes the gate's hidden layer of four channels is the densest."""
    found = kept(narrows.plan(program, params=0.5, allocator="precropping"))
    assert "gate.0.weight" not in found
    assert found["first.0.weight"] / 24 < found["stem.0.weight"] / 16


def test_a_reward_is_bred_within_the_budget(program: Program):
    name = "reward{population=2, generations=1}"
    plan = narrows.plan(program, macs=0.6, allocator=name, data=DATA)
    assert 0.4 < left(narrows.apply(program, plan)) / left(program) <= 0.6


# ------------------------------------------------------------------ families


@pytest.mark.parametrize("constrained", [True, False])
def test_a_family_is_nested_and_meets_every_budget(program: Program, constrained: bool):
    shares = [0.9, 0.8, 0.6]
    plans = narrows.family(program, macs=shares, data=DATA, constrained=constrained)
    for plan, share in zip(plans, shares, strict=True):
        rest = left(narrows.apply(program, plan)) / left(program)
        assert share - 0.06 < rest <= share * (1 + 1e-9)
    for larger, smaller in itertools.pairwise(plans):
        for weight, keep in larger.inputs.items():
            assert set(smaller.inputs[weight]) <= set(keep)
    first = narrows.plan(program, macs=0.9, data=DATA, constrained=constrained)
    assert plans[0].inputs == first.inputs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "a family has no budget"),
        ({"macs": 0.5}, "macs of a family are shares that fall, got 0.5"),
        ({"macs": [0.5, 0.7]}, "shares that fall"),
        ({"macs": [0.5, "a"]}, "shares that fall"),
        ({"macs": []}, "shares that fall"),
        ({"macs": [0.9, float("nan")]}, "shares that fall"),
        ({"macs": [1.5, 0.7]}, "a budget of macs is above 0 and up to 1"),
        ({"macs": [0.9, 0.8], "params": [0.9]}, "got 2 of macs and 1 of params"),
        ({"macs": [0.9], "data": None}, "there is none"),
    ],
)
def test_a_family_refuses(program: Program, options: dict[str, Any], message: str):
    with pytest.raises(PlanUsageError, match=message):
        narrows.family(program, **{"data": DATA, **options})


# ------------------------------------------------------------------ one of one's own


@dataclass(frozen=True)
class Halves(ByWidths):
    """Half of everything, whatever the budget."""

    name: ClassVar[str] = "halves"
    least: int = 1

    def widths(self, candidates: Candidates, limits: Sequence[Limit]) -> Sequence[int]:
        return [max(self.least, full // 2) for full in candidates.full]


def test_an_allocator_of_ones_own(program: Program):
    plan = narrows.plan(program, macs=0.9, allocator=Halves())
    assert {len(k) / plan.widths[w][0] for w, k in plan.inputs.items()} == {0.5}
    assert any(n.reason == "budget" and "multiply-accumulates" in n.message for n in plan.notes)


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limits": {"mac": 0.5}}, "there is no budget 'mac'"),
        ({"limits": {"channels": 1.5}}, "a budget of channels is above 0 and up to 1, got 1.5"),
        ({"limits": {"channels": float("nan")}}, "is above 0 and up to 1, got nan"),
        ({"limits": {3: 0.5}}, "a budget is a name or a Budget, got 3"),
        ({"limits": 0.5}, "limits is a dict by name"),
        ({"limits": {"macs": 0.5}, "macs": 0.5}, "macs is given twice"),
        ({"macs": {"*": 0.5, "head.*": 2}}, "a budget of macs is above 0 and up to 1, got 2"),
        ({"macs": {"haed.*": 0.5}}, "the group 'haed.*': 'haed.*' matches no weight"),
        ({"macs": 0.5, "groups": {"head": "head.*"}}, "the group 'head' has no effect"),
        ({"groups": {"head": "head.*"}}, "groups has no effect without a budget"),
        ({"limits": {"channels": {"head.*": 0.5}}}, "channels is one of the whole program"),
        ({"allocator": "bisection"}, "allocator has no effect without a budget"),
        ({"macs": 0.5, "allocator": "bisect"}, "there is no allocator 'bisect'"),
        ({"macs": 0.5, "allocator": "global{turns=3}"}, "global has no option 'turns'"),
        ({"macs": 0.5, "allocator": 3}, "an allocator is a name or an Allocator, got 3"),
        ({"macs": 0.5, "allocator": "ladder"}, "'ladder' does not go by macs"),
        ({"macs": 0.5, "allocator": "reward"}, "'reward' tries plans on data"),
        ({"macs": 0.5, "allocator": "reward{accuracy=-1}"}, "an exponent of at least 0, got -1"),
        ({"macs": 0.5, "allocator": "reward{population=0}"}, "population is a whole number"),
        ({"macs": 0.5, "allocator": "precropping{rule=a}"}, "rule is one of size, score, got 'a'"),
        ({"macs": 0.5, "allocator": "spdy"}, "'spdy' tries plans on data"),
        ({"macs": 0.5, "allocator": "descent"}, "what the outputs lose on data"),
        ({"limits": {"channels": 0.5}, "data": DATA, "allocator": "descent"},
         "'descent' does not go by channels"),
        ({"limits": {"latency": 0.5}}, "a budget of latency is one of a target"),
        ({"limits": {"measured": 0.5}}, "a budget of measured is one of a target"),
        ({"limits": {"channels": 0.5}, "costs": costs()}, "costs have no effect with channels"),
        ({"limits": {"latency": 0.5}, "constrained": False}, "latency takes whole couplings"),
    ],
)  # fmt: skip
def test_what_is_refused(program: Program, options: dict[str, Any], message: str):
    with pytest.raises(PlanUsageError) as caught:
        narrows.plan(program, **options)
    assert message in str(caught.value)


def test_the_closest_is_said_where_a_budget_cannot_be_met(program: Program):
    with pytest.raises(PlanError, match=r"a budget of channels of 0.01 cannot be met: 0\.\d+ is"):
        narrows.plan(program, limits={"channels": 0.01})
    with pytest.raises(
        PlanError, match=r"a budget of macs of 0.0001 cannot be met: 0\.\d+ is the least"
    ):
        narrows.plan(program, params=0.9, macs=0.0001, data=DATA)
    with pytest.raises(PlanError, match="no channel can be removed"):
        narrows.plan(program, macs=0.5, exclude="*")


def test_a_group_of_everything_meets_all_budgets(program: Program):
    plan = narrows.plan(
        program, macs={"body": 0.9}, params=0.5, groups={"body": "*"}, allocator="thresholds"
    )
    assert weights(narrows.apply(program, plan)) <= 0.5 * weights(program)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"macs": {}}, "macs says of no layers"),
        (
            {"macs": 0.5, "groups": {"body": "typo*"}, "allocator": "thresholds"},
            "matches no weight",
        ),
        ({"macs": 0.5, "groups": {"body": 3}, "allocator": "thresholds"}, "takes globs"),
    ],
)
def test_budgets_of_no_layers_are_refused(program: Program, asked: dict[str, Any], message: str):
    with pytest.raises(PlanUsageError, match=message):
        narrows.plan(program, **asked)


def test_what_is_gone_anyway_does_not_count_as_a_score():
    """Half of a layer's channels are zero, and all scores are small."""
    torch.manual_seed(0)
    layers = [nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 4)]
    net = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    with torch.no_grad():
        for layer in layers:
            layer.weight.mul_(1e-3)
        layers[0].weight[:16].zero_()
        layers[0].bias[:16].zero_()
    made = narrows.capture(net.eval(), (torch.randn(2, 32),))
    plan = narrows.plan(made, params=0.6, allocator="bisection")
    assert len(plan.outputs["0.weight"]) <= len(plan.outputs.get("2.weight", range(32)))
