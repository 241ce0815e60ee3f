"""Choosing channels: zeros, criteria, and the options of `narrows.plan`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import narrows
from narrows.errors import PlanError
from narrows.ir.compare import relative_error
from narrows.ir.program import Program
from narrows.ir.structure.layers import Layer, layers_of
from narrows.passes.base import TOLERANCE, Fidelity
from narrows.passes.choosing.criteria import catalog
from narrows.passes.choosing.criteria.magnitude import L1, L2, Magnitude
from tests.networks import NETWORKS
from tests.networks.registry import conv_bn, randomise
from tests.passes.test_latency import costs

EXACT = TOLERANCE[Fidelity.EXACT][torch.float64]


class Residual(nn.Module):
    """Two couplings: inside a block, and the stream that it is added to."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.up, self.down = conv_bn(8, 12), conv_bn(12, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.down(self.up(x).relu())
        return self.head(x.mean((2, 3)))


def captured(module: nn.Module, *shape: int) -> Program:
    """Return the program of a module with random weights, in float64."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    module = module.double().eval()
    randomise(module, 0, (x,))
    return narrows.capture(module, (x,))


@pytest.fixture(scope="module")
def program() -> Program:
    return captured(Residual(), 2, 3, 8, 8)


def widths(keeps: Any) -> dict[str, int]:
    return {name: len(keep) for name, keep in keeps.items()}


# ------------------------------------------------------------------ scores


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(8, 6, 3),
        nn.Conv2d(8, 6, 3, groups=2),
        nn.ConvTranspose2d(8, 6, 3),
        nn.ConvTranspose2d(8, 6, 3, groups=2),
    ],
    ids=["conv", "grouped", "transposed", "transposed-grouped"],
)
def test_magnitude_is_that_of_what_reads_or_makes_a_channel(power: int, layer: nn.Module) -> None:
    program = captured(nn.Sequential(layer), 2, 8, 6, 6)
    (use,) = layers_of(program)["0.weight"]
    criterion: Magnitude = {1: L1, 2: L2}[power]()
    expected: dict[str, list[float]] = {"inputs": [], "outputs": []}
    with torch.no_grad():
        for side, width in (("inputs", 8), ("outputs", 6)):
            for channel in range(width):
                plan = narrows.plan(
                    program, **{f"keep_{side}": {"0.weight": [channel]}}, zeros=False
                )
                weight = plan.masked(program).weights["0.weight"]
                expected[side].append(float(weight.abs().pow(power).sum()))
    for side, values in expected.items():
        assert np.allclose(criterion.score(program, use, side), values, rtol=1e-12)


def test_magnitude_of_an_embedding_and_a_product() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.w = nn.Embedding(10, 4), nn.Parameter(torch.randn(4, 3))

        def forward(self, ids: Tensor) -> Tensor:
            return self.table(ids) @ self.w

    program = narrows.capture(Net().eval(), (torch.arange(6).view(2, 3),))
    uses = layers_of(program)
    found = catalog.find("l1").score(program, uses["table.weight"][0], "outputs")
    assert np.allclose(found, program.weights["table.weight"].abs().sum(0).double(), rtol=1e-6)
    found = catalog.find("l1").score(program, uses["w"][0], "inputs")
    assert np.allclose(found, program.weights["w"].abs().sum(1).double(), rtol=1e-6)


def test_criteria_are_found_by_name_object_and_function(program: Program) -> None:
    def last(program: Program, use: Layer, side: str) -> Tensor:
        return -torch.arange(use.width(side)).double()

    assert catalog.find("l2").name == "l2"
    assert catalog.find(L2()) == L2()
    plan = narrows.plan(program, criterion=last, ratio=0.25, include="up.*", zeros=False)
    assert plan.outputs["up.0.weight"] == tuple(range(9))
    assert plan.inputs["down.0.weight"] == tuple(range(9))
    assert plan.reasons["up.0.weight"] == "last 0.25 constrained"


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        ("l3", "there is no criterion 'l3'"),
        ("L1", "did you mean 'l1'"),
        (3, "a criterion is a name"),
        (lambda program, use, side: [1.0], r"gave scores of shape \[1\] for the"),
        (lambda program, use, side: np.full(use.width(side), np.nan), "as NaN"),
        (lambda program, use, side: 1 / 0, "<lambda> failed on the .* of '.*weight': ZeroDivision"),
        (lambda program, use, side: "many", "<lambda> gave no numbers for the .* 'many'"),
        ("l1{power=2}", "l1 has no option 'power'"),
        ("random{seed=one}", "takes int, got one"),
        ("udfc{ridge=0.0}", "udfc takes a ridge above 0"),
        ("adapruner{order=adapruner}", "adapruner cannot order channels by adapruner"),
    ],
)
def test_criteria_that_do_not_work(program: Program, criterion: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        narrows.plan(program, criterion=criterion, ratio=0.5)


# ------------------------------------------------------------------ constrained


def test_a_constrained_plan_takes_whole_couplings(program: Program) -> None:
    plan = narrows.plan(program, ratio=0.5, zeros=False)
    assert widths(plan.outputs) == {"stem.0.weight": 4, "up.0.weight": 6, "down.0.weight": 4}
    assert widths(plan.inputs) == {"up.0.weight": 4, "down.0.weight": 6, "head.weight": 4}
    assert plan.outputs["stem.0.weight"] == plan.inputs["head.weight"]
    assert plan.outputs["up.0.weight"] == plan.inputs["down.0.weight"]
    result = narrows.apply(program, plan)
    assert not [n for n in result.nodes if "take" in n.name]
    assert result.weights["up.0.weight"].shape == (6, 4, 3, 3)
    assert any("model output" in n.message for n in plan.notes if n.reason == "barrier")


def test_a_coupling_is_scored_by_the_mean_over_its_layers(program: Program) -> None:
    plan = narrows.plan(program, ratio=0.5, include="up.*", zeros=False)
    made = program.weights["up.0.weight"].abs().sum((1, 2, 3))
    read = program.weights["down.0.weight"].abs().sum((0, 2, 3))
    lowest = ((made + read) / 2).argsort()[:6]
    assert plan.outputs["up.0.weight"] == tuple(sorted({*range(12)} - {*lowest.tolist()}))


def test_a_flattened_channel_is_scored_by_all_its_columns() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6 * 16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x).relu().flatten(1))

    program = captured(Flat(), 2, 3, 6, 6)
    plan = narrows.plan(program, ratio=0.5, zeros=False)
    made = program.weights["conv.weight"].abs().sum((1, 2, 3))
    read = program.weights["head.weight"].abs().sum(0).view(6, 16).sum(1)
    kept = ((made + read) / 2).argsort()[3:].sort().values.tolist()
    assert plan.outputs["conv.weight"] == tuple(kept)
    assert plan.inputs["head.weight"] == tuple(16 * c + i for c in kept for i in range(16))


@pytest.mark.parametrize(
    "name",
    ["grouped_conv", "transposed_conv_grouped", "depthwise", "split_sizes", "tied_embedding"],
)
@pytest.mark.parametrize("constrained", [True, False])
def test_plans_of_a_criterion_are_exact(name: str, constrained: bool) -> None:
    network = NETWORKS[name]
    program = narrows.capture(network.build(), network.inputs())
    plan = narrows.plan(program, ratio=0.5, constrained=constrained)
    x = network.inputs(3, seed=1)
    result = narrows.apply(program, plan)
    assert relative_error(result(*x), plan.masked(program)(*x)) <= EXACT
    assert result.parameter_count < program.parameter_count


def test_grouped_convolutions_lose_equally_much_per_group() -> None:
    module = nn.Sequential(conv_bn(3, 8), nn.ReLU(), conv_bn(8, 12, groups=2), nn.Conv2d(12, 4, 1))
    program = captured(module, 2, 3, 6, 6)
    plan = narrows.plan(program, ratio=0.5, zeros=False)
    result = narrows.apply(program, plan)
    assert result.weights["2.0.weight"].shape == (6, 2, 3, 3)
    assert not [n for n in result.notes if n.channels]


# ------------------------------------------------------------------ unconstrained


def test_each_consumer_drops_its_lowest_columns(program: Program) -> None:
    plan = narrows.plan(program, ratio=0.5, constrained=False, zeros=False)
    assert plan.outputs == {}
    assert widths(plan.inputs) == {"up.0.weight": 4, "down.0.weight": 6, "head.weight": 4}
    columns = program.weights["up.0.weight"].abs().sum((0, 2, 3))
    assert plan.inputs["up.0.weight"] == tuple(sorted(columns.argsort()[4:].tolist()))
    assert plan.reasons["up.0.weight"] == "l1 0.5 unconstrained"


def test_each_producer_drops_its_lowest_rows(program: Program) -> None:
    plan = narrows.plan(program, ratio=0.5, constrained=False, side="output", zeros=False)
    assert plan.inputs == {}
    assert widths(plan.outputs) == {"stem.0.weight": 4, "up.0.weight": 6, "down.0.weight": 4}
    both = narrows.plan(program, ratio=0.5, constrained=False, side="both", zeros=False)
    assert widths(both.outputs) == widths(plan.outputs)
    assert len(both.inputs) == 3


def test_l2_ranks_otherwise_than_l1() -> None:
    module = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), nn.Conv2d(2, 4, 1, bias=False))
    program = captured(module, 2, 3, 4, 4)
    weight = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 3.0]]).double()
    program = program.with_weights({**program.weights, "1.weight": weight.view(4, 2, 1, 1)})
    options: dict[str, Any] = {"ratio": 0.5, "constrained": False, "zeros": False}
    assert narrows.plan(program, criterion="l1", **options).inputs == {"1.weight": (0,)}
    assert narrows.plan(program, criterion="l2", **options).inputs == {"1.weight": (1,)}


# ------------------------------------------------------------------ options


def test_ratio_rounds_down_and_min_width_stays(program: Program) -> None:
    plan = narrows.plan(program, ratio=0.7, min_width=3, zeros=False)
    assert len(plan.outputs["stem.0.weight"]) == 3
    assert len(plan.outputs["up.0.weight"]) == 4
    assert len(narrows.plan(program, ratio=1.0).outputs["up.0.weight"]) == 1


def test_ratios_by_glob(program: Program) -> None:
    plan = narrows.plan(program, ratio={"up.*": 0.75, "*": 0.25}, zeros=False)
    assert widths(plan.outputs) == {"stem.0.weight": 6, "up.0.weight": 3, "down.0.weight": 6}
    assert plan.reasons["up.0.weight"] == "l1 0.75 constrained"
    only = narrows.plan(program, ratio={"up.*": 0.5}, zeros=False)
    assert widths(only.outputs) == {"up.0.weight": 6}


def test_include_and_exclude(program: Program) -> None:
    included = narrows.plan(program, ratio=0.5, include=["up.*"], zeros=False)
    assert widths(included.outputs) == {"up.0.weight": 6}
    excluded = narrows.plan(program, ratio=0.5, exclude="head.weight", zeros=False)
    assert widths(excluded.outputs) == {"up.0.weight": 6}
    single = narrows.plan(
        program, ratio=0.5, include="*.0.weight", exclude="up*", constrained=False, zeros=False
    )
    assert widths(single.inputs) == {"down.0.weight": 6}


def test_global_scope_ranks_all_together(program: Program) -> None:
    program = program.with_weights(
        {**program.weights, "down.0.weight": program.weights["down.0.weight"] * 1.0}
    )
    rows = program.weights["up.0.weight"].clone()
    rows[:9] *= 1e-3
    program = program.with_weights({**program.weights, "up.0.weight": rows})
    options: dict[str, Any] = {
        "ratio": 0.4, "constrained": False, "side": "output", "zeros": False
    }  # fmt: skip
    plan = narrows.plan(program, scope="global", **options)
    removed = 28 - sum(widths(plan.outputs).get(n, 0) for n in plan.outputs)
    removed -= sum(8 for n in ("stem.0.weight", "down.0.weight") if n not in plan.outputs)
    assert removed == 11
    assert plan.outputs["up.0.weight"] == (9, 10, 11)
    least = narrows.plan(program, scope="global", min_width=5, **options)
    assert len(least.outputs["up.0.weight"]) == 5


def test_globs_are_groups_even_where_their_ratios_are_equal() -> None:
    layers = [nn.Conv2d(3, 16, 3), *(nn.Conv2d(16, 16, 1) for _ in range(3)), nn.Conv2d(16, 4, 1)]
    module = nn.Sequential(*layers)
    with torch.no_grad():
        module[2].weight *= torch.rand(16, 1, 1, 1) ** 3  # uneven: it loses most of all
    program = captured(module, 2, 3, 6, 6)
    names = [f"{i}.weight" for i in range(4)]

    def lost(ratios: dict[str, float]) -> list[int]:
        plan = narrows.plan(program, ratio=ratios, scope="global", zeros=False)
        return [16 - len(plan.outputs.get(name, range(16))) for name in names]

    apart = lost(dict.fromkeys(names, 0.25))
    assert apart == [4, 4, 4, 4]
    assert apart == lost({**dict.fromkeys(names, 0.25), names[3]: 0.2500001})
    together = lost({"*": 0.25})
    assert sum(together) == 16
    assert together != apart


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"ratio": 1.0}, "hardly anything is left of 4 of 4 layers: "),
        ({"ratio": 1.0, "constrained": False}, "3 of 3 layers: up.0.weight (1 of 8 inputs), "),
        ({"ratio": 0.92}, "left of 2 of 4 layers: down.0.weight (1 of 12 inputs), up.0.weight (1"),
        ({"ratio": 1.0, "min_width": 3}, "head.weight (3 of 8 inputs)"),
        ({"ratio": 1.0, "scope": "global"}, "hardly anything is left of 4 of 4 layers"),
    ],
)
def test_hardly_anything_left_is_noted(program: Program, options: Any, told: str) -> None:
    (note,) = (
        n for n in narrows.plan(program, zeros=False, **options).notes if n.reason == "hardly"
    )
    assert told in note.message
    assert note.channels == 0


def test_half_and_what_comes_back_for_a_target_is_not_hardly(program: Program) -> None:
    for options in ({"ratio": 0.5}, {"keep_outputs": {"up.0.weight": [0]}}):
        assert not [n for n in narrows.plan(program, **options).notes if n.reason == "hardly"]
    module = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 1))
    small = narrows.capture(module.eval(), (torch.randn(2, 3, 8, 8),))
    gone, back = (narrows.plan(small, ratio=1.0, **o) for o in ({}, {"costs": costs(block=16)}))
    assert [n.reason for n in gone.notes].count("hardly") == 1
    assert back.removed == 0
    assert [n.reason for n in back.notes].count("hardly") == 0


def test_a_model_without_layers_has_nothing_for_a_ratio() -> None:
    program = narrows.capture(nn.ReLU().eval(), (torch.randn(2, 4),))
    with pytest.raises(PlanError, match="no layer with a weight"):
        narrows.plan(program, ratio=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.5}, "a ratio is a share from 0 to 1, got 1.5"),
        ({"ratio": True}, "a ratio is a share"),
        ({"ratio": {"up.*": "half"}}, "got 'half'"),
        ({"ratio": {"upp.*": 0.5}}, "ratio: 'upp.\\*' matches no weight"),
        ({"ratio": 0.5, "include": "stm.0.weight"}, "did you mean 'stem.0.weight'"),
        ({"ratio": {"stm.*": 0.5}}, "did you mean 'stem.\\*'"),
        ({"ratio": 0.5, "exclude": ["zzz"]}, "exclude: 'zzz' matches no weight of a layer"),
        ({"ratio": 0.5, "include": [3]}, "include takes globs"),
        ({"ratio": 0.5, "scope": "layer"}, "scope is 'local' or 'global', got 'layer'"),
        ({"ratio": 0.5, "side": "input"}, "side='input' has no effect"),
        ({"ratio": 0.5, "constrained": False, "side": "inputs"}, "side is one of input, output"),
        ({"ratio": 0.5, "min_width": 0}, "min_width is a whole number"),
        ({"include": "up.*"}, "include has no effect without a ratio"),
        ({"min_width": 2}, "min_width has no effect without a ratio"),
        ({"ratio": 0.01}, "a ratio of 0.01 removes no channel"),
        ({"ratio": 0.5, "min_width": 99}, "no channel can be removed"),
        ({"ratio": 0.5, "include": "head.*"}, "no channel can be removed"),
        ({"keep_inputs": {"stem.0.weight": [0]}, "ratio": 0.5, "include": "head.*"}, "no channel"),
    ],
)
def test_options_that_do_not_fit(program: Program, options: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        narrows.plan(program, **options)


def test_nothing_eligible_says_why(program: Program) -> None:
    with pytest.raises(PlanError, match="include does not name it"):
        narrows.plan(program, ratio=0.5, include="head.*")


def test_explicit_masks_go_first(program: Program) -> None:
    plan = narrows.plan(program, {"down.0.weight": [0, 1]}, ratio=0.5, zeros=False)
    assert plan.inputs["down.0.weight"] == (0, 1)
    assert "up.0.weight" not in plan.outputs
    assert plan.reasons["down.0.weight"] == "given, l1 0.5 constrained"


def test_a_plan_of_nothing_says_so(program: Program) -> None:
    for plan in (narrows.plan(program), narrows.plan(program, ratio=0.0)):
        assert plan.removed == 0
        assert [n.reason for n in plan.notes][-1] == "idle"


# ------------------------------------------------------------------ zeros


def test_zeros_of_another_pruner_are_found() -> None:
    module = Residual()
    prune.ln_structured(module.up[0], "weight", amount=0.5, n=1, dim=1)
    prune.remove(module.up[0], "weight")
    with torch.no_grad():  # what network slimming leaves behind
        module.stem[1].weight[:3] = 0
        module.stem[1].bias[:3] = 0
    module = module.eval()
    program = narrows.capture(module, (torch.randn(2, 3, 8, 8),))
    plan = narrows.plan(program)
    dead = module.up[0].weight.abs().sum((0, 2, 3)) == 0
    assert plan.inputs == {"up.0.weight": tuple(torch.nonzero(~dead).flatten().tolist())}
    assert plan.outputs == {"stem.0.weight": tuple(range(3, 8))}
    assert plan.reasons == {"stem.0.weight": "zeros", "up.0.weight": "zeros"}
    x = torch.randn(3, 3, 8, 8)
    assert relative_error(plan.masked(program)(x), program(x)) < 1e-6


def test_zero_rows_before_a_norm_are_not_zero_contributions() -> None:
    """Such a channel is the norm's shift; pruning folds it, a mask would change the network."""
    module = nn.Sequential(conv_bn(3, 6), nn.ReLU(), nn.Conv2d(6, 4, 1))
    program = captured(module, 2, 3, 6, 6)
    weight, bias = program.weights["0.0.weight"].clone(), program.weights["0.0.bias"].clone()
    weight[0], bias[0] = 0, 0
    program = program.with_weights({**program.weights, "0.0.weight": weight, "0.0.bias": bias})
    assert program.weights["0.1.bias"][0] != 0
    plan = narrows.plan(program)
    assert plan.outputs == {}
    x = torch.randn(3, 3, 6, 6, dtype=torch.float64)
    result = narrows.apply(program, plan)
    assert relative_error(result(x), program(x)) <= EXACT
    assert result.weights["2.weight"].shape == (4, 5, 1, 1)


def test_zeros_go_before_a_criterion(program: Program) -> None:
    weight = program.weights["down.0.weight"].clone()
    weight[:, [2, 5, 7]] = 0
    zeroed = program.with_weights({**program.weights, "down.0.weight": weight})
    plan = narrows.plan(zeroed, ratio=0.25, constrained=False, criterion="l2")
    assert plan.inputs["down.0.weight"] == (0, 1, 3, 4, 6, 8, 9, 10, 11)
    assert plan.reasons["down.0.weight"] == "zeros, l2 0.25 unconstrained"


def test_a_layer_that_is_all_zero_is_noted(program: Program) -> None:
    weight = torch.zeros_like(program.weights["down.0.weight"])
    zeroed = program.with_weights({**program.weights, "down.0.weight": weight})
    plan = narrows.plan(zeroed)
    assert plan.inputs["down.0.weight"] == ()
    assert [n.where for n in plan.notes] == ["down.0.weight"]
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    result = narrows.apply(zeroed, plan)
    assert relative_error(result(x), zeroed(x)) <= EXACT
    assert "up.0.weight" not in result.weights
