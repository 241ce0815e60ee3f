"""Plans that aim at a latency: what they reach, what they leave alone, what they refuse."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import narrows
from narrows.backends.measured.grid import Grid
from narrows.backends.measured.layout import Layout
from narrows.backends.onnx.staircase import StairTable
from narrows.errors import PlanError
from narrows.ir.compare import relative_error
from narrows.ir.program import Program
from narrows.ir.structure import structure_of
from narrows.passes.base import TOLERANCE, Fidelity
from narrows.passes.pipeline import Pipeline
from narrows.passes.plans.latency import SLACK
from narrows.passes.plans.latency_model import LatencyModel
from narrows.passes.plans.latency_search import Choice, WidthSearch, worth_of
from narrows.passes.plans.mass import kept_mass, summing
from narrows.passes.plans.plan import ChannelPlan
from tests.networks import NETWORKS
from tests.networks.registry import conv_bn, randomise

EXACT = TOLERANCE[Fidelity.EXACT][torch.float64]


def grid(names: tuple[str, ...], rate: float) -> Grid:
    """Return a grid of times in proportion to the product of the sizes, and half a microsecond."""
    ends = np.array([1.0, 16.0, 1024.0])
    us = np.full([3] * len(names), rate)
    for axis in range(len(names)):
        us = us * ends.reshape([-1 if a == axis else 1 for a in range(len(names))])
    return Grid(tuple((name, tuple(ends)) for name in names), 0.5 + us)


def costs(block: int = 16) -> StairTable:
    """Return the costs of a made-up runtime, with blocks or without."""
    sizes = ("positions", "inputs", "outputs")
    grids = {
        "blocked conv 3x3/1": grid(sizes, 1e-4),
        "direct conv 3x3/1": grid(sizes, 2e-4),
        "plain conv 3x3/1": grid(sizes, 3e-4),
        "linear": grid(("rows", "inputs", "outputs"), 1e-4),
        **dict.fromkeys(
            ["reorder in", "reorder out", "copy", "gather", "pointwise"], grid(("elements",), 1e-4)
        ),
    }
    layout = Layout(block, min(block, 4), 4, fused=("relu",), blocked=("relu", "add"))
    return StairTable("made-up", "1", "cpu", layout, 5e-7, grids)


class Residual(nn.Module):
    """Two couplings: inside a block, and the stream that it is added to."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 64)
        self.up, self.down = conv_bn(64, 96), conv_bn(96, 64)
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.down(self.up(x).relu())
        return self.head(x.mean((2, 3)))


def captured(module: nn.Module) -> Program:
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    module = module.double().eval()
    randomise(module, 0, (x,))
    return narrows.capture(module, (x,))


@pytest.fixture(scope="module")
def program() -> Program:
    return captured(Residual())


def share(program: Program, plan: ChannelPlan, table: StairTable, batch: int = 1) -> float:
    """Return the predicted latency of what a plan compiles to, over the unpruned program's."""
    made = Pipeline.default(plan, table).run(program).program
    whole, now = (sum(s for _, s in table.predict(p, batch)) for p in (program, made))
    return now / whole


# ------------------------------------------------------------------ what it reaches


@pytest.mark.parametrize("block", [1, 16])
def test_it_reaches_the_latency_and_keeps_less_for_a_lower_one(program: Program, block: int):
    table, masses = costs(block), []
    for asked in (0.9, 0.7, 0.5, 0.3):
        plan = narrows.plan(program, latency=asked, costs=table)
        assert share(program, plan, table) <= asked * (1 + 1e-9)
        masses.append(kept_mass(program, plan))
    assert masses == sorted(masses, reverse=True)
    assert len(set(masses)) == 4
    assert masses[-1] > 0.3


def test_without_blocks_it_comes_near(program: Program):
    table = costs(1)
    asked = 0.6
    plan = narrows.plan(program, latency=asked, costs=table)
    assert share(program, plan, table) > asked * (1 - 3 * SLACK)


def test_the_result_equals_the_masked_program(program: Program):
    table = costs()
    plan = narrows.plan(program, latency=0.5, costs=table)
    made = Pipeline.default(plan, table).run(program).program
    masked = plan.masked(program)
    assert relative_error(made(*program.examples), masked(*program.examples)) <= EXACT
    assert made.parameter_count < program.parameter_count


@pytest.mark.parametrize(
    "name",
    ["grouped_conv", "dense_block", "image_attention", "split_sizes", "flatten_linear",
     "depthwise_multiplier"],
)  # fmt: skip
def test_it_works_on_any_structure(name: str):
    network = NETWORKS[name]
    module = network.build()
    program = narrows.capture(module, network.inputs(2))
    table = costs(1)
    plan = narrows.plan(program, latency=0.95, costs=table)
    assert plan.removed
    assert share(program, plan, table) <= 0.95 * (1 + 1e-9)
    made = Pipeline.default(plan, table).run(program).program
    masked = plan.masked(program)
    assert relative_error(made(*program.examples), masked(*program.examples)) <= EXACT


def test_it_is_deterministic_and_says_what_it_did(program: Program):
    plans = [narrows.plan(program.copy(), latency=0.6, costs=costs()) for _ in range(2)]
    assert plans[0].to_json() == plans[1].to_json()
    (note,) = (n for n in plans[0].notes if n.reason == "latency")
    kept = kept_mass(program, plans[0])
    assert "of the unpruned" in note.message
    assert f"{share(program, plans[0], costs()):.3f} of the unpruned" in note.message
    assert f"{kept:.3f} of the score mass kept" in note.message
    assert plans[0].reasons["up.0.weight"] == "l1 latency 0.6"


def test_all_of_the_latency_keeps_everything(program: Program):
    plan = narrows.plan(program, latency=1, costs=costs())
    assert plan.removed == 0
    assert any("as fast already" in n.message for n in plan.notes)


def test_the_batch_counts(program: Program):
    table = costs(1)
    plan = narrows.plan(program, latency=0.6, costs=table, batch=8)
    assert share(program, plan, table, 8) <= 0.6 * (1 + 1e-9)
    assert any("batch 8" in n.message for n in plan.notes)


# ------------------------------------------------------------------ what it leaves alone


def test_channels_of_the_least_worth_go_first(program: Program):
    weights = dict(program.weights)
    weak = torch.arange(0, 96, 3)
    weights["down.0.weight"] = weights["down.0.weight"].clone()
    weights["down.0.weight"][:, weak] *= 1e-3
    plan = narrows.plan(program.with_weights(weights), latency=0.85, costs=costs())
    gone = {*range(96)} - {*plan.inputs["down.0.weight"]}
    assert gone
    assert gone <= {*weak.tolist()} or {*weak.tolist()} <= gone


def test_include_exclude_and_explicit_masks_are_respected(program: Program):
    def touched(**options: Any) -> set[str]:
        plan = narrows.plan(program, latency=0.8, costs=costs(), **options)
        return {*plan.inputs, *plan.outputs}

    inner = {"up.0.weight", "down.0.weight"}
    assert touched(include="up.*") == inner
    assert touched(exclude="head.*") == inner
    plan = narrows.plan(program, {"down.0.weight": range(90)}, latency=0.8, costs=costs())
    assert plan.inputs["down.0.weight"] == tuple(range(90))
    assert "up.0.weight" not in plan.outputs
    assert len(plan.outputs["stem.0.weight"]) < 64
    assert share(program, plan, costs()) <= 0.8 * (1 + 1e-9)


def test_min_width_is_respected(program: Program):
    plan = narrows.plan(program, latency=0.7, costs=costs(), min_width=40)
    widths = [len(k) for keeps in (plan.inputs, plan.outputs) for k in keeps.values()]
    assert widths
    assert min(widths) >= 40


# ------------------------------------------------------------------ what it refuses


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latency": 0.8}, "a budget of latency is one of a target, and none is named"),
        ({"latency": 0.8, "costs": 3}, "costs is a cost table"),
        ({"latency": 0.8, "ratio": 0.5}, "ratio and latency exclude each other"),
        ({"latency": 0}, "a budget of latency is above 0 and up to 1, got 0"),
        ({"latency": 1.5}, "a budget of latency is above 0 and up to 1, got 1.5"),
        ({"latency": True}, "a budget of latency is above 0 and up to 1, got True"),
        ({"latency": float("nan")}, "a budget of latency is above 0 and up to 1, got nan"),
        ({"latency": 0.8, "costs": costs(), "batch": 0}, "batch is a whole number of at least 1"),
        (
            {"latency": 0.8, "costs": costs(), "constrained": False, "allocator": "global"},
            "takes whole couplings",
        ),
        ({"latency": 0.8, "costs": costs(), "scope": "global"}, "scope has no effect"),
        ({"latency": 0.8, "costs": costs(), "side": "input"}, "side='input' has no effect"),
        ({"costs": costs()}, "costs has no effect without a latency or a ratio"),
        ({"batch": 2}, "batch has no effect without a latency or a ratio"),
        ({"latency": 0.8, "costs": costs(), "include": "head.*"}, "no channel can be removed"),
    ],
)
def test_it_refuses(program: Program, options: dict[str, Any], message: str):
    with pytest.raises(PlanError, match=message):
        narrows.plan(program, **options)


def test_what_cannot_be_reached_says_what_can(program: Program):
    with pytest.raises(PlanError, match="cannot be reached") as caught:
        narrows.plan(program, latency=0.01, costs=costs(), min_width=32)
    least = float(str(caught.value).partition("the least is ")[2].split()[0].rstrip(";"))
    assert 0.01 < least < 0.6
    plan = narrows.plan(program, latency=least + 0.001, costs=costs(), min_width=32)
    assert share(program, plan, costs()) <= least + 0.001


# ------------------------------------------------------------------ score mass


def test_kept_mass_is_a_mean_over_the_layers_that_sum(program: Program):
    assert list(summing(program)) == [
        "stem.0.weight", "up.0.weight", "down.0.weight", "head.weight",
    ]  # fmt: skip
    keep = (0, 5, 7)
    plan = narrows.plan(program, keep_inputs={"down.0.weight": keep})
    scores = program.weights["down.0.weight"].abs().sum((0, 2, 3))
    own = float(scores[list(keep)].sum() / scores.sum())
    assert kept_mass(program, plan) == pytest.approx((3 + own) / 4)
    assert kept_mass(program, plan, weights=["down.0.weight"]) == pytest.approx(own)
    squares = program.weights["down.0.weight"].pow(2).sum((0, 2, 3))
    second = kept_mass(program, plan, "l2", ["down.0.weight"])
    assert second == pytest.approx(float(squares[list(keep)].sum() / squares.sum()))
    assert kept_mass(program, ChannelPlan()) == 1


def test_depthwise_layers_have_no_mass():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1))
    program = captured(net)
    assert list(summing(program)) == ["0.weight", "2.weight"]
    with pytest.raises(PlanError, match=r"'1\.weight' has no score mass"):
        kept_mass(program, ChannelPlan(), weights=["1.weight"])


# ------------------------------------------------------------------ the model and the search


def model_of(program: Program, table: StairTable) -> tuple[LatencyModel, list[Choice]]:
    structure = structure_of(program)
    choices = [
        Choice(i, np.linspace(1, 2, c.width), 1)
        for i, c in enumerate(structure.ties)
        if not c.barrier
    ]
    return LatencyModel(program, structure, table), choices


@pytest.mark.parametrize("block", [1, 16])
def test_the_model_agrees_with_the_account(program: Program, block: int):
    table = costs(block)
    model, _ = model_of(program, table)
    assert model.full().total == pytest.approx(sum(s for _, s in table.predict(program, 1)))
    couplings = [c for c in program.couplings() if not c.barrier]
    names = [c.name for c in program.couplings()]
    for width in (16, 32, 48):
        masks: dict[str, dict[str, Any]] = {"in": {}, "out": {}}
        widths = list(model.widths)
        for coupling in couplings:
            widths[names.index(coupling.name)] = width
            for m in coupling.members:
                if m.role in masks:
                    masks[m.role][m.weight] = range(width)
        plan = narrows.plan(program, masks["in"], masks["out"])
        made = narrows.apply(program, plan)
        truth = sum(s for _, s in table.predict(made, 1))
        assert model.at(widths).total == pytest.approx(truth, rel=0.02)


def test_the_search_stays_within_and_leaves_nothing_that_fits(program: Program):
    model, choices = model_of(program, costs())
    search = WidthSearch(model, choices)
    whole = model.full().total
    for part in (0.8, 0.5, 0.3):
        widths = search.within(part * whole)
        spent = model.at(widths).total
        assert spent <= part * whole
        for i, choice in enumerate(choices):
            for wider in (w for w in search.stops[i] if w > widths[choice.coupling]):
                more = list(widths)
                more[choice.coupling] = wider
                if wider - widths[choice.coupling] <= 16:
                    assert model.at(more).total > part * whole


@pytest.mark.parametrize("spread", [(1.0, 1.0), (1.0, 30.0), (30.0, 1.0)])
def test_the_search_finds_what_is_worth_most(program: Program, spread: tuple[float, float]):
    """Of all widths that two couplings may have, those within the latency that keep most."""
    model, choices = model_of(program, costs())
    most = [np.linspace(1, 1 + s, len(c.values)) for c, s in zip(choices, spread, strict=True)]
    made = [dataclasses.replace(c, values=v) for c, v in zip(choices, most, strict=True)]
    search, all_widths = WidthSearch(model, made), []
    for widths in itertools.product(*search.stops):
        full = list(model.widths)
        for choice, width in zip(made, widths, strict=True):
            full[choice.coupling] = width
        all_widths.append(full)
    for part in (0.8, 0.6, 0.5, 0.4, 0.3):
        limit = part * model.full().total
        best = max(search.value(w) for w in all_widths if model.at(w).total <= limit)
        assert search.value(search.within(limit)) == pytest.approx(best)


def test_the_last_channels_are_worth_more_than_the_first():
    worth = worth_of(np.array([1.0, 4.0, 3.0]))
    assert worth[-1] == 0
    assert worth[1] == pytest.approx(8 * np.log(4 / 8))
    assert (np.diff(worth) > 0).all()
    assert (np.diff(worth, 2) < 0).all()
    assert (worth_of(np.zeros(3)) == 0).all()


def test_widths_stop_at_whole_blocks(program: Program):
    model, choices = model_of(program, costs())
    search = WidthSearch(model, choices)
    assert search.stops[0][-4:] == [16, 32, 48, 64]
    bounded = dataclasses.replace(choices[0], least=20)
    assert WidthSearch(model, [bounded]).stops[0] == [20, 32, 48, 64]
