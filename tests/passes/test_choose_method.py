"""The default of `narrows.quantize`: the method by which the outputs lose least."""

from __future__ import annotations

import ast
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import narrows
from narrows.ir.program import Program
from narrows.passes.quant.choose_method import HELD, NATS, TRIED, Held
from narrows.passes.quant.quantization import Quantized


class Peaks(nn.Module):
    """Classes by the few largest numbers, which the smallest squared error clips."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().amax((2, 3)))


def peaked(count: int) -> Tensor:
    x = torch.randn(count, 3, 12, 12)
    return x * torch.rand(count, 1, 1, 1).pow(6) * 20


@pytest.fixture
def peaks() -> tuple[Program, Tensor]:
    torch.manual_seed(0)
    x = peaked(64)
    return narrows.capture(Peaks().eval(), (x[:2],), name="peaks"), x


def divergence(quantized: Quantized, program: Program, x: Tensor) -> float:
    with torch.no_grad():
        own, other = program(x).log_softmax(1), quantized.fake(x).log_softmax(1)
    return float((own.exp() * (own - other)).sum(1).mean())


def said(quantized: Quantized, reason: str) -> list[str]:
    return [n.message for n in quantized.plan.notes if n.reason == reason]


@pytest.mark.parametrize(("bits", "best"), [(4, "mse"), (5, "minmax")])
def test_chosen_method_is_the_one_of_least_divergence(
    peaks: tuple[Program, Tensor], bits: int, best: str
) -> None:
    program, x = peaks
    kept, held = x[:48], x[48:]  # a quarter is held back of a batch
    how: dict[str, Any] = {"activations": bits, "first_last": None}
    losses = {
        method: divergence(
            narrows.quantize(program, [kept], method=method, check=False, **how), program, held
        )
        for method in TRIED
    }
    assert sorted(losses.values())[1] > 1.3 * losses[best]  # or the case shows nothing
    chosen = narrows.quantize(program, [x], **how)
    (note,) = said(chosen, "auto")
    assert note.startswith(f"{best}, ")
    for method, loss in losses.items():
        assert f"{method} {loss / NATS:.2g}" in note


def test_plan_is_that_of_the_chosen_method_on_all_data(peaks: tuple[Program, Tensor]) -> None:
    program, x = peaks
    data = [x, x * 0.5, x * 1.5]
    for bits in (8, 5):
        how: dict[str, Any] = {"activations": bits, "first_last": None, "check": False}
        auto = narrows.quantize(program, (b for b in data), **how)
        name = said(auto, "auto")[0].partition(",")[0]
        named = narrows.quantize(program, data, method=name, **how)
        assert auto.plan.activations == named.plan.activations
        assert auto.plan.weights == named.plan.weights
        assert auto.plan.offsets.keys() == named.plan.offsets.keys()
        for name, offsets in auto.plan.offsets.items():  # of sums in another order
            others = named.plan.offsets[name]
            assert all(abs(i - j) <= 1 for i, j in zip(offsets, others, strict=True))


def test_what_loses_too_much_by_all_methods_is_said_with_names(
    peaks: tuple[Program, Tensor],
) -> None:
    program, x = peaks
    fine = narrows.quantize(program, [x])
    assert not said(fine, "loss")
    coarse = narrows.quantize(program, [x], weights=2, activations=2, first_last=None)
    (note,) = said(coarse, "loss")
    assert "times what they may" in note
    assert any(f"the rounding of '{name}'" in note for name in coarse.plan.activations)
    assert note in [n.message for n in coarse.program.notes]


def test_what_is_suggested_where_no_method_holds_was_tried_and_helps(
    peaks: tuple[Program, Tensor],
) -> None:
    program, x = peaks
    how: dict[str, Any] = {"weights": 4, "activations": 2, "first_last": None}
    (note,) = said(narrows.quantize(program, [x], **how), "loss")
    tried = note.partition("; try ")[2]
    assert tried
    before = least(narrows.quantize(program, [x], **how))
    for suggestion in tried.split(", or "):
        text, _, loss = suggestion.rpartition(": ")
        name, _, value = text.partition("=")
        made = narrows.quantize(program, [x], **{**how, name: ast.literal_eval(value)})
        assert least(made) <= 1.05 * float(loss) < before  # the figures have two digits


def least(quantized: Quantized) -> float:
    """Return what the outputs lose by the best method, as the notes have it."""
    (note,) = said(quantized, "auto")
    return min(float(method.split()[1]) for method in note.rpartition("): ")[2].split(", "))


class Resized(nn.Module):
    """A resize, which works on codes of 8 bits, of channels beside one 200 times as large."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        with torch.no_grad():
            self.stem.weight[5] *= 200.0
            self.last.weight[:, 5] /= 200.0

    def forward(self, x: Tensor) -> Tensor:
        return self.last(nn.functional.interpolate(self.stem(x), scale_factor=1.5, mode="bilinear"))


def test_wide_codes_that_change_nothing_are_not_suggested() -> None:
    """Whatever is asked for what the resize reads."""
    torch.manual_seed(0)
    x = torch.randn(16, 3, 6, 6)
    program = narrows.capture(Resized().eval(), (x[:2],))
    made = narrows.quantize(program, [x])
    (note,) = said(made, "loss")
    assert "most is lost by the rounding of '" in note
    assert "of weights most is rounded away of last.weight" in note
    assert "'stem': 16" not in note
    wide = narrows.quantize(program, [x], activations={"stem": 16, "*": 8})
    assert divergence(wide, program, x) == divergence(made, program, x)


def test_samples_are_held_back_of_batches_or_whole_batches(peaks: tuple[Program, Tensor]) -> None:
    program, x = peaks
    held = Held(program)
    looked = [held.hold_back([x]) for _ in range(4)]
    assert [len(b[0]) for b in looked if b is not None] == [48, 48, 64, 64]
    assert sum(len(b[0]) for b in held.samples) == HELD
    single = Held(program)  # batches of two have no quarter; one in four is held back whole
    looked = [single.hold_back([x[:2]]) for _ in range(8)]
    assert [b is None for b in looked] == 2 * [False, False, False, True]
    few = narrows.quantize(program, [x[:2]])  # judged by what it was calibrated on
    assert said(few, "auto")


def test_outputs_that_are_no_numbers_leave_the_first_method() -> None:
    class Which(Peaks):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).argmax(1)

    torch.manual_seed(0)
    x = peaked(8)
    made = narrows.quantize(narrows.capture(Which().eval(), (x,)), [x])
    assert said(made, "auto") == ["mse: no output is floating-point, so none was compared"]
