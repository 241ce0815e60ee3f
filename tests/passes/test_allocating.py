"""Budgets and allocators: what they count, what they meet, what they refuse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest

import narrows
from narrows.errors import PlanError, PlanUsageError
from narrows.ir.program import Program
from narrows.passes.choosing.allocators.base import ByWidths
from narrows.passes.choosing.budgets.base import Limit
from narrows.passes.choosing.budgets.catalog import find
from narrows.passes.choosing.criteria.catalog import find as criterion
from narrows.passes.choosing.prepare import prepared
from narrows.passes.plans.candidates import Candidates
from narrows.passes.plans.options import Choosing
from narrows.passes.plans.plan import ChannelPlan
from narrows.passes.plans.rank import Options
from narrows.passes.plans.setting import Setting
from tests.networks import NETWORKS
from tests.passes.residual import images, left, settled

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
        ({"limits": {"channels": 1.5}}, "a share above 0 and up to 1, got 1.5"),
        ({"limits": {"channels": float("nan")}}, "a share above 0 and up to 1, got nan"),
        ({"limits": {3: 0.5}}, "a budget is a name or a Budget, got 3"),
        ({"limits": 0.5}, "limits is a dict by name"),
        ({"limits": {"macs": 0.5}, "macs": 0.5}, "macs is given twice"),
        ({"macs": {"*": 0.5, "head.*": 2}}, "macs are above 0 and up to 1, got 2"),
        ({"macs": {"haed.*": 0.5}}, "the group 'haed.*': 'haed.*' matches no weight"),
        ({"macs": 0.5, "groups": {"head": "head.*"}}, "the group 'head' has no effect"),
        ({"groups": {"head": "head.*"}}, "groups has no effect without a budget"),
        ({"limits": {"channels": {"head.*": 0.5}}}, "channels is one of the whole program"),
        ({"allocator": "bisection"}, "allocator has no effect without a budget"),
        ({"macs": 0.5, "allocator": "bisect"}, "there is no allocator 'bisect'"),
        ({"macs": 0.5, "allocator": "bisection{turns=3}"}, "bisection has no option 'turns'"),
        ({"macs": 0.5, "allocator": 3}, "an allocator is a name or an Allocator, got 3"),
        ({"macs": 0.5, "allocator": "ladder"}, "'ladder' does not go by macs"),
        ({"macs": 0.5, "allocator": "descent"}, "what the outputs lose on data"),
        ({"limits": {"channels": 0.5}, "data": DATA, "allocator": "descent"},
         "'descent' does not go by channels"),
        ({"limits": {"latency": 0.5}}, "a latency is one of a target"),
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
    with pytest.raises(PlanError, match=r"a budget of 0.0001 cannot be met: 0\.\d+ is the least"):
        narrows.plan(program, params=0.9, macs=0.0001, data=DATA)
    with pytest.raises(PlanError, match="no channel can be removed"):
        narrows.plan(program, macs=0.5, exclude="*")
