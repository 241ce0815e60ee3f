"""Activations of more than 8 bits: what they gain, which tensors have them, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import narrows
from narrows.errors import NarrowsError, PlanError, UsageError
from narrows.ir.integer.grid import Grid
from narrows.ir.meta import Meta
from narrows.ir.program import Program
from narrows.passes.quant.measure import decibels
from narrows.passes.quant.plan import QuantPlan


class Net(nn.Module):
    """A residual, a gate, a table, pooling, a concat, upsampling, an average and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.gate = nn.Conv2d(8, 8, 1)
        self.turn = nn.ConvTranspose2d(8, 8, 2, 2)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        y = self.body(x) + x
        y = F.silu(y) * torch.sigmoid(self.gate(y))
        y = torch.cat([F.max_pool2d(y, 2, padding=1), F.avg_pool2d(y, 3, 2, 1)[:, :, :5, :5]], 1)
        z = F.interpolate(self.turn(y[:, :8]), scale_factor=2.0).mean((2, 3))
        return self.head(torch.cat([F.pad(z, (0, 2))[:, :8], y[:, 8:].mean((2, 3))], 1))


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 9, 9, generator=torch.Generator().manual_seed(1))


def captured() -> Program:
    torch.manual_seed(0)
    return narrows.capture(Net().eval(), (images(2),), name="net")


def ratio(program: Program, quantized: Program) -> float:
    """Return the signal-to-noise ratio of the outputs, in dB."""
    x = images(16)
    exact = program(x)
    noise = (quantized(x) - exact).square().sum()
    return decibels(float(exact.square().sum()), float(noise))


def test_wide_codes_lose_less() -> None:
    program = captured()
    told = [
        ratio(program, narrows.quantize(program, [images(16)], activations=bits).program)
        for bits in (8, 12, 16)
    ]
    assert told[1] > told[0] + 10  # beyond 12 bits it is the weights that are rounded
    assert told[2] > told[0] + 10


def test_culprits_are_those_to_widen() -> None:
    program, x = captured(), images(16)
    plain = narrows.quantize(program, [x], check=False)
    report = plain.report([images(4)], samples=4)
    asked = {t.name: 16 for t in report.culprits[:3] if t.kind == "activation"}
    better = narrows.quantize(program, [x], activations={**asked, "*": 8}, check=False)
    assert ratio(program, better.program) > ratio(program, plain.program) + 3


def test_bits_by_globs_of_the_layer_or_of_its_clip() -> None:
    program = captured()
    for glob in ("first", "relu", "first.weight"):
        plan = narrows.quantize(program, [images(4)], activations={glob: 16, "*": 8}).plan
        wide = {n for n, g in plan.activations.items() if g.wide}
        assert wide == {"relu"}
        assert plan.activations["relu"] == Grid(plan.activations["relu"].exponent, 0, 15)
    plan = narrows.quantize(program, [images(4)], activations={"body*": 12, "*": 8}).plan
    assert str(plan.activations["body"]).endswith("signed 12b")


def test_wide_codes_are_int16_between_narrow_ones() -> None:
    asked = {"body": 16, "cat": 12, "*": 8}
    program = narrows.quantize(captured(), [images(4)], activations=asked).program
    kinds = {n.name: Meta(n).dtype for n in program.nodes if Meta(n).grid is not None}
    wide = {n for n, dtype in kinds.items() if dtype is torch.int16}
    assert {"body", "cat"} <= wide
    assert not {"first", "add", "head"} & wide
    assert all(kinds[n.name] is (torch.int16 if Meta(n).grid.wide else torch.uint8)
               for n in program.nodes if n.name in kinds)  # fmt: skip


@pytest.mark.parametrize("rounding", ["half_even", "half_up"])
def test_integers_are_the_fake_quantized_program(rounding: str) -> None:
    made = narrows.quantize(captured(), [images(8)], activations=16, rounding=rounding)
    x = images(5)
    assert torch.equal(made.program(x).double(), made.fake.to(torch.float64)(x.double()))


def test_plans_and_reports_tell_of_them(tmp_path) -> None:
    made = narrows.quantize(captured(), [images(8)], activations={"head": 16, "cat*": 12, "*": 8})
    path = made.plan.save(tmp_path / "q.json")
    assert QuantPlan.load(path) == made.plan
    again = narrows.quantize(captured(), plan=path)
    x = images(3)
    assert torch.equal(again.program(x), made.program(x))
    told = {t.name: t for t in made.report([images(8)], samples=2).tensors}
    assert told["head"].grid.endswith(" signed 16b")
    assert told["head"].sqnr > 70
    data = json.loads(path.read_text())
    data["activations"]["head"]["signed"] = 1
    with pytest.raises(PlanError, match="is damaged"):
        QuantPlan.from_json(data)


def test_learned_rounding_beside_wide_codes() -> None:
    options: dict[str, Any] = {"method": "rapq", "weights": 4, "budget": 20}
    made = narrows.quantize(captured(), [images(8)], activations={"body": 16, "*": 8}, **options)
    assert made.plan.activations["body"].wide


@pytest.mark.parametrize("scale", [2.0, 1.7, (0.6, 2.3)])
def test_nearest_resizing_picks_what_torch_picks(scale: Any) -> None:
    class Resize(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.interpolate(x * x, scale_factor=scale)

    x = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    program = narrows.capture(Resize().eval(), (x,))
    made = narrows.quantize(program, [x], activations=16)
    assert torch.equal(made.program(x).double(), made.fake.to(torch.float64)(x.double()))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x)
        return torch.softmax(self.mix(self.norm(x)), -1) @ x.transpose(1, 2)


def test_what_takes_no_wide_codes_keeps_8_bits_and_says_so() -> None:
    x = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))
    program = narrows.capture(Attention().eval(), (x,))
    made = narrows.quantize(program, [x], activations=16)
    wide = {n for n, g in made.plan.activations.items() if g.wide}
    assert {"x", "mix", "matmul", "add", "norm"} <= wide
    assert not {"mix_1", "softmax"} & wide
    notes = [n.message for n in made.plan.notes if n.reason == "narrow"]
    assert any("softmax.int works on codes of 8 bits, as softmax" in text for text in notes)


@pytest.mark.parametrize(("count", "wide"), [(2**16, True), (2**16 + 1, False)])
def test_norms_take_wide_codes_as_far_as_64_bits_hold_their_squares(count: int, wide: bool) -> None:
    x = torch.randn(2, count, generator=torch.Generator().manual_seed(0)) + 30.0
    program = narrows.capture(nn.LayerNorm(count, elementwise_affine=False).eval(), (x,))
    plan = narrows.quantize(program, [x], activations=16).plan
    assert {g.wide for g in plan.activations.values()} == {wide}
    told = [n.message for n in plan.notes if n.reason == "narrow"]
    assert bool(told) != wide
    assert all("works on codes of 8 bits where it normalises 65,537 elements" in t for t in told)


def test_accumulators_of_64_bits_are_noted() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3000, generator=torch.Generator().manual_seed(0))
    layer = nn.Linear(3000, 2)
    with torch.no_grad():
        layer.weight.abs_().add_(0.5)
    made = narrows.quantize(narrows.capture(layer.eval(), (x,)), [x], activations=16)
    (note,) = (n for n in made.program.notes if n.reason == "bound")
    assert "and takes 64 bits" in note.message


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"activations": 17}, UsageError, "activations takes 2 to 16 bits, got 17"),
        ({"activations": {"head": 20, "*": 8}}, UsageError, "activations takes 2 to 16 bits"),
        ({"weights": 12}, UsageError, "weights takes 2 to 8 bits, got 12"),
        ({"first_last": 16}, UsageError, "first_last takes 2 to 8 bits, got 16"),
    ],
)
def test_bits_that_there_are_not(change: dict[str, Any], error: type[NarrowsError], text: str):
    with pytest.raises(error, match=text):
        narrows.quantize(captured(), [images(2)], **change)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ((0, 128, 12), "a zero point is 0, got 128"),
        ((0, 0, 16), "16-bit codes are not supported"),
        ((0, 0, 17, True), "17-bit codes are not supported"),
        ((0, 0, 8, True), "signed codes of 8 bits have the zero point 128"),
    ],
)
def test_grids_that_there_are_not(given: tuple[Any, ...], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        Grid(*given)


def test_plans_that_ask_too_much_are_refused() -> None:
    x = torch.randn(4, 5, 8)
    program = narrows.capture(Attention().eval(), (x,))
    plan = narrows.quantize(program, [x]).plan.bare()
    grids = {**plan.activations, "softmax": Grid(12, 0, 15)}
    wrong = QuantPlan(grids, plan.weights)
    with pytest.raises(PlanError, match="softmax cannot have 15 bits"):
        narrows.quantize(program, plan=wrong)
