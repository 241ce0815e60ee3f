"""Power-of-two weights: which codes there are, how a weight is rounded to them, and that they stay
what they are in the plan, in the integer program and in ONNX."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import narrows
from narrows.cli import main
from narrows.errors import PlanError, UsageError
from narrows.ir.compare import relative_error
from narrows.ir.integer.grid import WeightGrid
from narrows.ir.integer.library import weight_codes
from narrows.ir.meta import Meta
from narrows.passes.pipeline import Pipeline
from narrows.passes.quant.calibrate import weight_exponents
from narrows.passes.quant.plan import QuantPlan
from tests.builder import Builder, aten, ramp
from tests.passes.test_quantize import captured, images

POWERS = {
    "pot2": [0, 1],
    "pot3": [0, 1, 2, 4],
    "pot4": [0, 1, 2, 4, 8, 16, 32, 64],
    "pot3x2": [0, 1, 2, 3, 4, 5, 6, 8],
}


def shifts(code: int) -> int:
    """Return the fewest signed powers of two that a whole number is the sum of."""
    count = 0
    while code:
        if code & 1:
            code, count = code - (2 - (code & 3)), count + 1
        code >>= 1
    return count


@pytest.mark.parametrize("coding", [*POWERS, "pot4x2"])
def test_codes_are_sums_of_powers_of_two(coding: str) -> None:
    grid = WeightGrid.spelled(coding)
    assert grid.coding == coding
    assert all(shifts(level) <= grid.terms for level in grid.levels)
    assert grid.levels == tuple(sorted({*grid.levels}))
    assert grid.high == grid.levels[-1] <= 127
    if coding in POWERS:
        assert list(grid.levels) == POWERS[coding]
    else:  # every sum of two powers up to 64 that int8 holds
        assert list(grid.levels) == [
            n for n in range(128) if shifts(n) <= 2 and n <= 96 and n not in (63 + 64,)
        ]
    assert WeightGrid.read(*grid.arguments) == grid


@pytest.mark.parametrize("bits", range(2, 9))
def test_whole_numbers_are_read_back(bits: int) -> None:
    grid = WeightGrid((3, 4), bits, 1)
    assert WeightGrid.read(*grid.arguments) == grid
    assert grid.reach == 2 ** (bits - 1) - 0.5


def test_weights_take_the_nearest_code() -> None:
    grid = WeightGrid((0, 4), 4, 0, 1)
    x = torch.tensor([0.4, 0.5, 0.6, 1.5, 1.6, 3.0, 3.1, -5.9, -6.1, 95.0, 1000.0, -0.0])
    wanted = torch.tensor([0, 0, 1, 1, 2, 2, 4, -4, -8, 64, 64, 0])  # ties go towards zero
    codes = weight_codes(torch.stack([x, x / 16]), *grid.arguments)
    assert torch.equal(codes, torch.stack([wanted, wanted]))
    for dtype in (torch.float32, torch.float64):
        rounded = torch.ops.narrows.fake_quantize_weight(
            torch.stack([x, x / 16]).to(dtype), *grid.arguments
        )
        assert torch.equal(rounded.double(), torch.stack([wanted, wanted / 16]).double())


@pytest.mark.parametrize("coding", ["pot4", "pot4x2", "pot2", 5])
def test_exponents_have_the_least_error(coding: Any) -> None:
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(3))
    weight *= torch.tensor([[0.001], [0.1], [1.0], [3.0], [7.0], [100.0]])
    grid = WeightGrid.spelled(coding)

    def error(exponents: tuple[int, ...]) -> Tensor:
        tried = WeightGrid(exponents, grid.bits, 0, grid.terms)
        codes = weight_codes(weight, *tried.arguments)
        scale = torch.tensor([2.0**-e for e in exponents], dtype=torch.float64)[:, None]
        return (codes * scale - weight).square().sum(1)

    chosen = weight_exponents(weight, grid, "mse")
    best = torch.stack([error((e,) * 6) for e in range(-8, 20)]).amin(0)
    assert torch.equal(error(chosen), best)
    covering = weight_exponents(weight, grid, "minmax")
    reach = weight.abs().amax(1) * 2.0 ** torch.tensor(covering)
    assert bool((reach <= grid.reach).all() & (2 * reach > grid.reach).all())


@pytest.mark.parametrize("coding", ["pot4", "pot4x2", "pot2"])
@pytest.mark.parametrize("form", ["qdq", "integer"])
def test_programs_are_exact_from_rounding_to_onnx(coding: str, form: str) -> None:
    program, x = captured(), images(4, 3, 8, 8)
    quantized = narrows.quantize(program, [x], weights=coding, first_last=None)
    expected = quantized.fake.to(torch.float64)(x.double())
    assert torch.equal(quantized.program(x).double(), expected)
    levels = set(WeightGrid.spelled(coding).levels)
    for name in quantized.plan.weights:
        codes = quantized.program.weights[name]
        assert codes.dtype == torch.int8
        assert set(codes.abs().flatten().tolist()) <= levels
    artifact = narrows.lower(quantized.program, form=form)
    assert np.array_equal(artifact.run(x), quantized.program(x).numpy())


def test_two_terms_are_closer_than_one() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(3)).double()
    errors = []
    for coding in ("pot2", "pot3", "pot4", "pot4x2", 8):
        grid = WeightGrid.spelled(coding)
        exponents = weight_exponents(weight, grid, "mse")
        codes = weight_codes(weight, *WeightGrid(exponents, grid.bits, 0, grid.terms).arguments)
        scale = torch.exp2(-torch.tensor(exponents, dtype=torch.float64))[:, None]
        errors.append(relative_error(codes * scale, weight))
    assert errors == sorted(errors, reverse=True)


def test_the_program_says_which_weights_they_are() -> None:
    program, x = captured(), images(4, 3, 8, 8)
    quantized = narrows.quantize(program, [x], weights={"gate": "pot3x2", "*": "pot4"})
    held = {
        str(n.target): Meta(n).weight_grid
        for n in quantized.program.copy().graph.nodes
        if n.op == "get_attr" and Meta(n).weight_grid is not None
    }
    assert held == dict(quantized.plan.weights)
    assert {n: g.coding for n, g in held.items()} == {
        "first.weight": 8, "body.weight": "pot4", "gate.weight": "pot3x2", "head.weight": 8,
    }  # fmt: skip
    assert not any(Meta(n).weight_grid for n in quantized.fake.graph.nodes)


def test_a_transposed_weight_says_its_axis() -> None:
    b = Builder((2, 3))
    bias, weight = b.weight("b", ramp(5)), b.weight("w", ramp(3, 5))
    program = b.program(b.call(aten.addmm.default, bias, b.inputs[0], weight))
    quantized = narrows.quantize(program, [program.examples[0]], weights="pot4", first_last=None)
    (node,) = (n for n in quantized.program.graph.nodes if Meta(n).weight_grid is not None)
    grid, codes = Meta(node).weight_grid, quantized.program.tensor(node)
    assert codes.shape == (5, 3)
    assert (grid.axis, grid.terms, len(grid.exponents)) == (0, 1, 5)


def test_plans_keep_the_coding(tmp_path: Path) -> None:
    program, x = captured(), images(4, 3, 8, 8)
    quantized = narrows.quantize(program, [x], weights="pot4")
    path = quantized.plan.save(tmp_path / "q.json")
    assert QuantPlan.load(path) == quantized.plan
    assert json.loads(path.read_text())["version"] == 3
    again = Pipeline.parse(f"quantize{{plan={path}}}, fold-shifts").run(quantized.prepared)
    assert torch.equal(again.program(x), quantized.program(x))
    uniform = narrows.quantize(program, [x], weights=4).plan.to_json()
    assert uniform["version"] == 3
    assert all("terms" not in g for g in uniform["weights"].values())
    damaged = quantized.plan.to_json()
    damaged["weights"]["body.weight"]["terms"] = 3
    with pytest.raises(PlanError, match="is damaged"):
        QuantPlan.from_json(damaged)


def test_the_report_names_them() -> None:
    program, x = captured(), images(4, 3, 8, 8)
    report = narrows.quantize(program, [x], weights="pot4", first_last=None).report([x])
    told = {t.name: t for t in report.tensors}
    assert told["gate.weight"].grid.endswith(" pot4")
    assert told["gate.weight"].terms == 1
    assert told["gate.weight"].sqnr > 12  # half a factor of two and less
    assert told["body.weight"].clipped < 0.1


@pytest.mark.parametrize("coding", ["pot", "pot5", "pot1", "pot4x3", "POT4", "four", ""])
def test_codings_that_there_are_not(coding: str) -> None:
    with pytest.raises(UsageError) as error:
        narrows.quantize(captured(), [images(2, 3, 8, 8)], weights=coding)
    lines = str(error.value).splitlines()
    assert lines[0] == f"weights takes 2 to 8 bits, or pot2, pot3, pot4, got {coding!r}"
    assert lines[-1].startswith("  try: weights='pot4'")
    with pytest.raises(UsageError, match="activations takes 2 to 16 bits"):
        narrows.quantize(captured(), [images(2, 3, 8, 8)], activations="pot4")  # type: ignore


def test_a_reconstruction_does_not_learn_them() -> None:
    with pytest.raises(UsageError, match="rapq does not learn weights of the coding 'pot4'"):
        narrows.quantize(captured(), [images(2, 3, 8, 8)], weights="pot4", method="rapq")


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pot_nets.py").write_text(
        "from torch import nn\n\n\ndef net():\n    c = nn.Conv2d\n"
        "    return nn.Sequential(c(3, 4, 1), nn.ReLU(), c(4, 4, 1), c(4, 2, 1))\n"
    )
    np.save("x.npy", images(4, 3, 8, 8).numpy())
    words = ["quantize", "pot_nets.py:net", "-i", "f32[2,3,8,8]", "--data", "x.npy"]
    words += ["-o", "out", "--save-plan", "q.json"]
    assert main([*words, "--weight-bits", "0.*=6", "--weight-bits", "pot4x2"]) == 0
    plan = QuantPlan.load("q.json")
    assert {n: g.coding for n, g in plan.weights.items()} == {
        "0.weight": 8, "2.weight": "pot4x2", "3.weight": 8,
    }  # fmt: skip
    assert main(["check", "out"]) == 0
    capsys.readouterr()
    assert main([*words, "--weight-bits", "pot9"]) == 2
    assert "or pot2, pot3, pot4, got 'pot9'" in capsys.readouterr().err
