"""A plan determines the integer program: whatever floats it is applied to, if they are about those
it was made for."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import narrows
from narrows.errors import PassError, PlanError
from narrows.ir.integer.codes import Numbers, Parities
from narrows.ir.integer.grid import WeightGrid
from narrows.ir.integer.library import weight_codes
from narrows.ir.program import Program
from narrows.passes.pipeline import Pipeline
from narrows.passes.quant.plan import QuantPlan
from narrows.passes.quant.quantization import Quantized, preparation


class Net(nn.Module):
    """Folded norms, a clip, shared weights, a table, softmax, a layer norm, a learned position."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.body = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.place = nn.Parameter(torch.randn(16, 8))
        self.calm = nn.LayerNorm(8)
        self.mix = nn.Linear(8, 8)
        for tensor in (self.norm.running_var, self.norm.weight, self.norm.bias, self.calm.weight):
            nn.init.uniform_(tensor, 0.3, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.norm(self.first(x)))
        x = F.gelu(self.body(x)).mean(2) + self.place
        x = self.calm(self.mix(self.mix(x)))
        return torch.softmax(x, -1) @ self.mix(x).transpose(1, 2)


def captured() -> Program:
    torch.manual_seed(0)
    return narrows.capture(Net().eval(), (images(2),), name="net")


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def quantized() -> Quantized:
    return narrows.quantize(captured(), [images(8)])


def shaken(program: Program, by: float) -> Program:
    """Return a program whose floats are off by a share of themselves."""
    generator = torch.Generator().manual_seed(2)

    def other(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * 2 - 1
        return (tensor.detach().double() * (1 + by * noise)).to(tensor.dtype)

    return program.replace(weights={n: other(t) for n, t in program.weights.items()})


def through(dtype: torch.dtype) -> Callable[[Program], Program]:
    """Return what saves a checkpoint in another precision and loads it again."""
    return lambda p: p.replace(weights={n: t.to(dtype).to(t.dtype) for n, t in p.weights.items()})


def same(a: Program, b: Program) -> bool:
    """Whether two integer programs are the same, to the last constant."""
    alike = a.weights.keys() == b.weights.keys() and str(a.graph) == str(b.graph)
    return alike and all(torch.equal(t, b.weights[n]) for n, t in a.weights.items())


OTHERS = {
    "an ulp": lambda p: shaken(p, 2.0**-23),
    "some ulps": lambda p: shaken(p, 2.0**-18),
    "in float64": lambda p: p.to(torch.float64),
    "folded in float64": lambda p: shaken(p, 2.0**-40).to(torch.float64),
    "saved in half": through(torch.float16),
    "saved in bfloat16": through(torch.bfloat16),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_floats_give_the_same_integers(quantized: Quantized, name: str) -> None:
    other = OTHERS[name](captured())
    again = narrows.quantize(other, plan=quantized.plan)
    assert again.plan == quantized.plan
    assert same(again.program, quantized.program)
    x = images(5)
    ready = x.double() if "float64" in name else x
    assert torch.equal(again.program(ready), quantized.program(x))


def test_without_a_record_they_do_not(quantized: Quantized) -> None:
    other = narrows.quantize(shaken(captured(), 2.0**-12), plan=quantized.plan.bare())
    assert not same(other.program, quantized.program)
    assert other.plan.record is not None
    assert other.plan.record != quantized.plan.record


def test_tables_are_those_of_the_plan(quantized: Quantized) -> None:
    """As on a machine whose ``erf`` and ``exp`` end in other digits."""
    record = quantized.plan.record
    assert record is not None
    assert {*record.tables} == {"gelu", "softmax"}
    turned = {
        n: dataclasses.replace(k, codes=Numbers.of(k.codes.tensor() ^ (k.codes.tensor() > 4)))
        for n, k in record.tables.items()
    }
    plan = dataclasses.replace(quantized.plan, record=dataclasses.replace(record, tables=turned))
    made = narrows.quantize(captured(), plan=plan, check=False).program
    for name, kept in turned.items():
        assert torch.equal(made.weights[f"{name}.table"].long(), kept.codes.tensor())
        assert not torch.equal(
            made.weights[f"{name}.table"], quantized.program.weights[f"{name}.table"]
        )


def test_pipelines_go_by_the_record(quantized: Quantized, tmp_path) -> None:
    path = quantized.plan.save(tmp_path / "q.json")
    prepared = preparation().run(shaken(captured(), 2.0**-18)).program
    piped = Pipeline.parse(f"quantize{{plan={path}}}, fold-shifts").run(prepared)
    assert same(piped.program, quantized.program)


def test_a_plan_knows_how_it_was_prepared() -> None:
    options: dict[str, Any] = {"activations": 4, "equalize": True, "first_last": None}
    first = narrows.quantize(captured(), [images(8)], **options)
    assert same(narrows.quantize(captured(), plan=first.plan).program, first.program)


def test_learned_codes_and_powers_of_two_come_again() -> None:
    for options in ({"weights": "pot4x2"}, {"weights": 3, "method": "rapq", "budget": 40}):
        first = narrows.quantize(captured(), [images(8)], **options)
        again = narrows.quantize(shaken(captured(), 2.0**-20), plan=first.plan)
        assert same(again.program, first.program)


# ------------------------------------------------------------------ plans as files


def test_plans_without_a_record_are_filled_in(quantized: Quantized, tmp_path) -> None:
    old = dataclasses.replace(quantized.plan, record=None, preparation=None)
    path = old.save(tmp_path / "old.json")
    assert json.loads(path.read_text())["version"] == 1
    again = narrows.quantize(captured(), plan=path)
    assert same(again.program, quantized.program)
    assert again.plan == quantized.plan


def test_a_record_takes_little_room(quantized: Quantized, tmp_path) -> None:
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512))
    x = torch.randn(4, 64)
    plan = narrows.quantize(narrows.capture(wide.eval(), (x,)), [x], check=False).plan
    path = plan.save(tmp_path / "q.json")
    assert QuantPlan.load(path) == plan
    count = sum(p.numel() for p in wide.parameters())
    without = plan.bare().save(tmp_path / "bare.json").stat().st_size
    assert path.stat().st_size - without < 0.25 * count  # of a byte per weight


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.pop("record biases"),
        lambda d: d["record biases"]["body"].update(numbers="AAAA"),
        lambda d: d["record biases"]["body"].update(exponents=["1"]),
        lambda d: d["record weights"]["first.weight"].update(bits="!"),
        lambda d: d["record weights"]["first.weight"].update(shape=[16, 3, 3, 30]),
        lambda d: d["record tables"]["gelu"].pop("on"),
        lambda d: d["record norms"]["calm.weight"].update(shape=[7]),
        lambda d: d["preparation"].update(bits=99),
        lambda d: d["preparation"].update(equalize=1),
    ],
)
def test_damaged_records_are_refused(quantized: Quantized, damage) -> None:
    data = json.loads(json.dumps(quantized.plan.to_json()))
    assert QuantPlan.from_json(data) == quantized.plan
    damage(data)
    with pytest.raises(PlanError, match="is damaged"):
        QuantPlan.from_json(data)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("first.weight", "codes of 'first.weight' are of other weights"),
        ("norm.bias", "bias codes of first are of other weights"),
        ("place", "codes of 'place' are of other weights"),
        ("calm.weight", "numbers of 'calm.weight' are of other weights"),
    ],
)
def test_other_checkpoints_are_refused(quantized: Quantized, name: str, text: str) -> None:
    program = captured()
    other = program.replace(weights={n: -t if n == name else t for n, t in program.weights.items()})
    with pytest.raises(PlanError, match=text):
        narrows.quantize(other, plan=quantized.plan)
    narrows.quantize(other, plan=quantized.plan.bare())


def test_tables_of_other_functions_are_refused() -> None:
    def net(slope: float) -> Program:
        torch.manual_seed(0)
        layers = nn.Linear(4, 4), nn.LeakyReLU(slope), nn.Linear(4, 4)
        return narrows.capture(nn.Sequential(*layers).eval(), (torch.ones(2, 4),))

    plan = narrows.quantize(net(0.1), [torch.randn(8, 4)]).plan
    with pytest.raises(PassError, match="is of another function"):
        narrows.quantize(net(0.3), plan=plan)


def test_edited_grids_make_their_codes_anew(quantized: Quantized) -> None:
    grid = quantized.plan.weights["mix.weight"]
    coarse = WeightGrid(tuple(e - 3 for e in grid.exponents), 5)
    plan = dataclasses.replace(
        quantized.plan, weights={**quantized.plan.weights, "mix.weight": coarse}
    )
    made = narrows.quantize(captured(), plan=plan).program
    weight = captured().weights["mix.weight"].detach()
    assert torch.equal(made.weights["mix.weight"].long(), weight_codes(weight, *coarse.arguments))


# ------------------------------------------------------------------ parities


@pytest.mark.parametrize("coding", [8, 2, "pot4", "pot4x2"])
def test_parities_bring_codes_back(coding: Any) -> None:
    known = WeightGrid.spelled(coding).codes
    codes = torch.tensor(list(known)).repeat(3)[torch.randperm(3 * len(known))]
    kept = Parities.of(codes, known)
    assert Parities.from_json(kept.to_json()) == kept
    noise = torch.rand(len(codes), dtype=torch.float64) - 0.5
    assert torch.equal(kept.codes(codes + 1.9 * noise, known), codes)
    assert kept.codes(codes + 2.5, known) is None
    assert kept.codes(codes[1:].double(), known) is None
