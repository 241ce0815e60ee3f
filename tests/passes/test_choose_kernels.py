"""choose-kernels: what is spelled otherwise, by costs that a test makes up; and it is exact."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import narrows
from narrows.backends.measured.grid import Grid
from narrows.backends.measured.layout import Layout
from narrows.backends.torch.eager import AMONG_OTHERS, EagerTable
from narrows.ir.compare import relative_error
from narrows.ir.costs import CHANNELS_LAST, DILATED, SPELLINGS
from narrows.ir.program import Program, aten
from narrows.ir.verify import verify
from narrows.passes.base import TOLERANCE, Fidelity
from narrows.passes.choose_kernels import ChooseKernels
from narrows.passes.pipeline import Pipeline


def costs(other: float) -> EagerTable:
    """Return a table in which every usual spelling takes 10 us, and another one ``other``."""
    at = (("positions", (1.0, 1e6)), ("inputs", (1.0, 1e6)), ("outputs", (1.0, 1e6)))
    usual = {
        "plain conv 1x1/1": Grid(at, np.full((2, 2, 2), 10.0)),
        "plain conv 3x3/1": Grid(at, np.full((2, 2, 2), 10.0)),
        "pool max_pool2d 3x3/2": Grid((("elements", (1.0, 1e6)),), np.full(2, 10.0)),
        "pool avg_pool2d 2x2/2": Grid((("elements", (1.0, 1e6)),), np.full(2, 10.0)),
    }
    others = {f"{DILATED} plain conv 1x1/1": usual["plain conv 1x1/1"].scaled(other / 10)}
    others |= {
        f"{CHANNELS_LAST} {n}": g.scaled(other / 10) for n, g in usual.items() if "pool" in n
    }
    return EagerTable("made up", "1", "cpu", Layout(align=16), 1e-9, {**usual, **others})


@pytest.fixture(scope="module")
def program() -> Program:
    """Return a net with two poolings, and 1x1 convolutions of whole blocks and of others."""
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 16, 3), nn.MaxPool2d(3, 2, 1), nn.Conv2d(16, 32, 1), nn.AvgPool2d(2),
        nn.Conv2d(32, 30, 1), nn.Conv2d(30, 16, 1, stride=1), nn.Flatten(), nn.Linear(16 * 9, 4),
    )  # fmt: skip
    net = nn.Sequential(*layers).eval()
    return narrows.capture(net, (torch.randn(2, 3, 14, 14),))


def spelled(program: Program) -> list[str]:
    """Return the names of what is spelled otherwise."""
    found = []
    for node in program.nodes:
        if node.target is aten.conv2d.default and [2, 2] in (*node.args, *node.kwargs.values()):
            found.append(node.name)
        if node.kwargs.get("memory_format") is torch.channels_last:
            found += [user.name for user in node.users]
    return found


def test_what_is_faster_is_spelled_so(program: Program):
    result = ChooseKernels(costs(1.0)).run(program)
    verify(result.program)
    assert result.changed
    assert spelled(result.program) == ["_1", "_2", "_3"]  # _4 and _5 have 30 channels
    assert {n.reason: n.message.split()[0] for n in result.notes} == {
        DILATED: "1", CHANNELS_LAST: "2",
    }  # fmt: skip
    assert relative_error(result.program.run_flat(program.examples),
                          program.run_flat(program.examples)) < 1e-5  # fmt: skip
    again = ChooseKernels(costs(1.0)).run(result.program)
    assert not again.changed
    assert again.program is result.program


def test_exact_in_float64(program: Program):
    """The same rewrite, where no rounding hides a mistake."""
    result = ChooseKernels(costs(1.0)).run(program).program.to(torch.float64)
    double = program.to(torch.float64)
    found, wanted = (p.run_flat(double.examples) for p in (result, double))
    assert relative_error(found, wanted) < TOLERANCE[Fidelity.EXACT][torch.float64]


@pytest.mark.parametrize("other", [10.0, 20.0])
def test_what_is_no_faster_stays(program: Program, other: float):
    result = ChooseKernels(costs(other)).run(program)
    assert (result.changed, result.program is program, result.notes) == (False, True, ())


def test_costs_are_those_of_float32_and_of_a_target(program: Program):
    double = program.to(torch.float64)
    assert not ChooseKernels(costs(1.0)).run(double).changed
    bare = replace(costs(1.0), grids={n: g for n, g in costs(1.0).grids.items() if n[0] == "p"})
    for pass_ in (ChooseKernels(), ChooseKernels(bare)):
        result = pass_.run(program)
        assert not result.changed
        assert "other kernels" in result.notes[0].message


def test_the_seconds_are_those_of_the_fastest_spelling(program: Program):
    found = dict(costs(1.0).predict(program, 1))
    assert found["_1"] == pytest.approx(1e-6)
    assert found["_2"] == pytest.approx(1e-6 * AMONG_OTHERS)
    assert found["_4"] == pytest.approx(1e-5)
    made = ChooseKernels(costs(1.0)).run(program).program
    assert sum(s for _, s in costs(1.0).predict(made, 1)) == pytest.approx(sum(found.values()))


def test_the_usual_pipeline_has_it_for_a_target_with_such_kernels(program: Program):
    from narrows.backends import costs_of

    assert costs_of("torch").has_spellings
    assert not costs_of("onnx").has_spellings
    assert "choose-kernels" in str(Pipeline.default(costs=costs_of("torch")))
    assert "choose-kernels" not in str(Pipeline.default(costs=costs_of("onnx")))
    assert "choose-kernels" not in str(Pipeline.default())


def test_a_torch_artifact_keeps_the_spelling(program: Program, tmp_path: Path):
    made = ChooseKernels(costs(1.0)).run(program).program
    artifact = narrows.lower(made, "torch", samples=1)
    exported = torch.export.load(artifact.folder / "model.pt2")
    calls = [n for n in exported.graph.nodes if n.op == "call_function"]
    formats = [n.kwargs.get("memory_format") for n in calls if "contiguous" in str(n.target)]
    assert formats.count(torch.channels_last) == 2
    dilated = [n for n in calls if n.target is aten.conv2d.default and [2, 2] in n.args]
    assert len(dilated) == 1
    assert SPELLINGS == (DILATED, CHANNELS_LAST)
