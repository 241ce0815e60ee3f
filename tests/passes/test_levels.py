"""Levels of unequal width: thresholds become a table of 256 codes; how data chooses them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import narrows
from narrows.backends.c.compiler import find_compiler
from narrows.errors import PlanError, UsageError
from narrows.ir.integer.grid import Grid, Levels
from narrows.ir.program import Program
from narrows.passes.quant.choose_levels import even, fine
from narrows.passes.quant.plan import QuantPlan
from narrows.passes.quant.quantization import Quantized
from narrows.passes.quant.survey import survey
from narrows.passes.quant.trial import Trial
from narrows.passes.quant.walk import spans_of, walk
from tests.passes.test_quantize import captured, images

ops: Any = torch.ops.narrows

RELU = Levels(Grid(1, 0, 2), (3, 40, 180))  # codes of relu6 to 0, 1/2, 1, 3/2
GATE = Levels(Grid(3, 128, 3), (10, 90, 110, 128, 129, 140, 250))
INPUT = Levels(Grid(2, 128, 4), tuple(range(96, 156, 4)))


@pytest.fixture(scope="module")
def program() -> Program:
    return captured()


@pytest.fixture(scope="module")
def quantized(program: Program) -> Quantized:
    plan = narrows.quantize(program, [images(4, 3, 8, 8)]).plan
    plan = replace(plan, levels={"relu6": RELU, "gate": GATE, "x": INPUT}, offsets={})
    return narrows.quantize(program, plan=plan)


def test_codes_become_the_level_that_they_reach(quantized: Quantized) -> None:
    made = quantized.program
    tables = {name: made.weights[f"{name}_levels.table"] for name in quantized.plan.levels}
    for name, levels in quantized.plan.levels.items():
        reached = [sum(t <= c for t in levels.thresholds) for c in range(256)]
        assert tables[name].tolist() == [levels.grid.low + k for k in reached]
        assert tables[name].dtype == torch.uint8
    assert sorted(set(tables["relu6"].tolist())) == [0, 1, 2, 3]


def test_integers_are_the_fake_quantized_program(quantized: Quantized) -> None:
    for batch in (1, 5):
        x = images(batch, 3, 8, 8)
        expected = quantized.fake.to(torch.float64)(x.double())
        assert torch.equal(quantized.program(x).double(), expected)


@pytest.mark.parametrize("form", ["qdq", "qlinear", "integer"])
def test_onnx_computes_the_same(quantized: Quantized, form: str) -> None:
    artifact = narrows.lower(quantized.program, form=form)
    x = images(3, 3, 8, 8)
    assert np.array_equal(artifact.run(x), quantized.program(x).numpy())


def test_layers_read_the_levels(quantized: Quantized) -> None:
    values: dict[str, torch.Tensor] = {}
    quantized.fake.run_flat(
        [images(2, 3, 8, 8)], observe=lambda n, v: values.__setitem__(n.name, v)
    )
    assert set(values["relu6_levels_q"].unique().tolist()) == {0.0, 0.5, 1.0, 1.5}
    assert all(
        user.all_input_nodes[0].name != "relu6_q" or user.target is ops.staircase.default
        for node in quantized.fake.graph.nodes
        if node.name == "relu6_q"
        for user in node.users
    )


def test_thresholds_that_are_even_are_a_coarser_grid(program: Program) -> None:
    x = images(4, 3, 8, 8)
    plan = narrows.quantize(program, [x], method="minmax").plan
    fine = plan.activations["relu6"]
    even = Levels(Grid(fine.exponent - 4, 0, 4), tuple(16 * k + 9 for k in range(15)))
    made = narrows.quantize(program, plan=replace(plan, levels={"relu6": even})).program
    values: dict[str, torch.Tensor] = {}
    made.run_flat([x], observe=lambda n, v: values.__setitem__(n.name, v))
    codes = values["first"].to(torch.int64)  # the clip is absorbed
    coarse = ((codes + 7) // 16).clamp(max=15)  # half a coarse step is rounded down
    assert torch.equal(values["relu6_levels"].to(torch.int64), coarse)


def test_plans_keep_them(quantized: Quantized, program: Program, tmp_path: Path) -> None:
    path = quantized.plan.save(tmp_path / "q.json")
    assert QuantPlan.load(path) == quantized.plan
    assert quantized.plan.to_json()["version"] == 3
    x = images(2, 3, 8, 8)
    again = narrows.quantize(program, plan=path)
    assert torch.equal(again.program(x), quantized.program(x))
    assert quantized.plan.follow(quantized.prepared).levels == quantized.plan.levels


def test_the_report_measures_what_they_cost(quantized: Quantized) -> None:
    report = quantized.report([images(4, 3, 8, 8)])
    told = {t.name: t for t in report.tensors}
    assert {*told} == {*quantized.plan.activations, *quantized.plan.weights}
    assert told["relu6"].sqnr < 15 < told["mean"].sqnr
    assert report.culprits[0].name == "relu6"


@pytest.mark.parametrize(
    ("grid", "thresholds", "text"),
    [
        (Grid(0, 0, 2), (5, 4), "have to rise"),
        (Grid(0, 0, 2), (5, 257), "have to rise, between"),
        (Grid(0, 0, 2), (-1, 5), "have to rise, between"),
        (Grid(0, 0, 2), (1, 2, 3, 4), "4 thresholds do not fit 2 bits"),
        (Grid(0, 0, 2), (), "0 thresholds do not fit"),
    ],
)
def test_levels_that_there_are_not(grid: Grid, thresholds: tuple[int, ...], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        Levels(grid, thresholds)


def test_levels_of_nothing(quantized: Quantized, program: Program) -> None:
    plan = replace(quantized.plan, levels={"nothing": RELU})
    with pytest.raises(PlanError, match="levels for 'nothing', which has no grid"):
        narrows.quantize(program, plan=plan)


# ------------------------------------------------------------------ chosen from data


class Plain(nn.Module):
    """Layers in a row, positive and signed activations, a residual and a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.second = nn.Conv2d(12, 12, 3, padding=1)
        self.third = nn.Conv2d(12, 12, 3, padding=1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.first(x))
        x = F.relu(self.third(F.hardswish(self.second(x))) + x)
        rows = x.flatten(2).transpose(1, 2)
        weights = (rows @ rows.transpose(1, 2) / 4).softmax(2)
        return self.head((weights @ rows).mean(1))


@pytest.fixture(scope="module")
def net() -> Program:
    torch.manual_seed(0)
    return narrows.capture(Plain().eval(), (images(2, 3, 8, 8),), name="plain")


@pytest.fixture(scope="module")
def chosen(net: Program) -> Quantized:
    data = [images(64, 3, 8, 8)]
    return narrows.quantize(net, data, activations=3, first_last=None, levels=True)


def test_thresholds_begin_even() -> None:
    for grid in (Grid(2, 0, 3), Grid(1, 128, 4), Grid(0, 0, 5)):
        own = fine(grid)
        assert own is not None
        levels = Levels(grid, tuple(even(grid)))
        x = torch.arange(256, dtype=torch.float64) - own.zero  # every code, also those half way
        expected = (
            ((x / 2 ** (8 - grid.bits)) + 0.5)
            .floor()
            .clamp(grid.low - grid.zero, grid.high - grid.zero)
        )
        got = ops.staircase.default(x * own.scale, *levels.arguments(own))
        assert torch.equal(got, expected * grid.scale)


def test_levels_are_chosen_where_outputs_gain(net: Program, chosen: Quantized) -> None:
    plain = narrows.quantize(net, [images(64, 3, 8, 8)], activations=3, first_last=None)
    levels = chosen.plan.levels
    assert levels
    assert {v.grid for v in levels.values()} == {plain.plan.activations[n] for n in levels}
    assert any(list(v.thresholds) != even(v.grid) for v in levels.values())
    told = {n.where: n.message for n in chosen.plan.notes if n.reason == "levels"}
    assert told.keys() == levels.keys()
    x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    exact = plain.prepared(x)
    errors = [float((q.fake(x) - exact).square().mean()) for q in (plain, chosen)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("form", ["qdq", "qlinear", "integer"])
def test_chosen_levels_are_exact(chosen: Quantized, form: str) -> None:
    x = images(5, 3, 8, 8)
    expected = chosen.program(x)
    assert torch.equal(expected.double(), chosen.fake.to(torch.float64)(x.double()))
    assert np.array_equal(narrows.lower(chosen.program, form=form).run(x), expected.numpy())


@pytest.mark.skipif(not find_compiler(), reason="there is no C compiler")
def test_chosen_levels_are_exact_in_c(chosen: Quantized) -> None:
    x = images(1, 3, 8, 8)
    artifact = narrows.lower(chosen.program, "c")
    assert np.array_equal(artifact.run(x), chosen.program(x).numpy())


def test_chosen_levels_are_in_the_report(chosen: Quantized) -> None:
    told = {t.name: t for t in chosen.report([images(8, 3, 8, 8)], samples=0).tensors}
    for name, levels in chosen.plan.levels.items():
        assert told[name].levels == len(levels.thresholds) + 1 == 8
        assert told[name].grid.endswith("3b, 8 levels")


def test_a_trial_with_levels_is_the_fake_quantized_program(net: Program, chosen: Quantized) -> None:
    prepared, plan = chosen.prepared, chosen.plan
    even_ = {n: plan.levels[n].grid if n in plan.levels else g for n, g in plan.activations.items()}
    bare = replace(plan, activations=even_, levels={})
    trial = Trial(prepared, bare, survey(prepared), torch.device("cpu"))
    whole, x = trial.span(trial.output, []), images(4, 3, 8, 8)
    without = narrows.quantize(net, plan=bare).fake
    assert torch.equal(trial.run(whole, {trial.named["x"]: x}, "hard")[0], without(x))
    for site in trial.sites.values():
        if site.name in plan.levels:
            site.levels = plan.activations[site.name], plan.levels[site.name]
    assert torch.equal(trial.run(whole, {trial.named["x"]: x}, "hard")[0], chosen.fake(x))
    assert not torch.equal(without(x), chosen.fake(x))


def test_levels_of_full_width_are_refused(program: Program) -> None:
    x = [images(2, 3, 8, 8)]
    with pytest.raises(UsageError, match="for activations of 5 bits and fewer"):
        narrows.quantize(program, x, levels=True)
    with pytest.raises(UsageError, match="no activation of net can have levels"):
        narrows.quantize(program, x, activations={"*": 8}, levels=True)
    with pytest.raises(UsageError, match="the data is one Tensor"):
        narrows.quantize(program, x[0], activations=4, levels=True)


def test_blocks_are_held_to_the_network_before_it_was_rounded(net: Program) -> None:
    x = [images(8, 3, 8, 8)]
    made = narrows.quantize(net, x, weights=3, activations=3, method="rapq", budget=6)
    assert made.plan.codes
    found, device = survey(made.prepared), torch.device("cpu")
    trial = Trial(made.prepared, made.plan, found, device)
    exact = Trial(made.prepared, replace(made.plan, codes={}, offsets={}), found, device)
    values: dict[str, torch.Tensor] = {}
    made.prepared.run_flat(x, observe=lambda n, v: values.__setitem__(n.name, v))
    rounded: dict[str, torch.Tensor] = {}
    made.fake.run_flat(x, observe=lambda n, v: rounded.__setitem__(n.name, v))
    blocks = list(walk(trial, spans_of(trial, found), [x], exact))
    assert len(blocks) > 1
    for block in blocks:
        assert torch.equal(block.targets[0], values[block.span.exit.name])
        for node in block.span.reads:
            assert torch.equal(block.rounded[0][node], rounded[node.name])
