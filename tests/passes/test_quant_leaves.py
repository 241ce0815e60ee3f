"""Leaves of quantization, by hand: sums of errors, places on a page, what only moved since."""

from __future__ import annotations

import dataclasses
import math
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import narrows
from narrows.errors import PlanError
from narrows.passes.quant.figures import Measured
from narrows.passes.quant.measure import Tally, decibels
from narrows.passes.quant.page import PLOT, _tensors
from narrows.passes.quant.plan import QuantPlan
from narrows.passes.quant.trial import Trial
from tests.builder import Builder, aten

# ------------------------------------------------------------------ what a quantizer does


def test_sums_over_a_tensor_and_its_errors() -> None:
    b = Builder((2, 3))
    node = b.relu(b.inputs[0])
    b.program(node)
    tally = Tally()
    for x, q in (([1.0, -2.0], [1.5, -2.0]), ([8.0, 0.0], [4.0, 0.0])):
        x, q = torch.tensor(x), torch.tensor(q)
        tally.add(x, q, (x - q).abs() > 1)
    grid: dict[str, Any] = {"kind": "activation", "exponents": (1,), "zero": 0, "bits": 3}
    found = tally.measured("relu", node, **grid)
    assert (found.low, found.high, found.clipped) == (-2.0, 8.0, 0.25)
    assert found.rms == pytest.approx(math.sqrt(69 / 4))
    assert found.rounding == pytest.approx(0.25)
    assert found.clipping == pytest.approx(2.0)
    assert found.sqnr == pytest.approx(10 * math.log10(69 / 16.25))
    assert found.along is None
    tally.along = 6.9
    assert tally.measured("relu", node, **grid).along == pytest.approx(10.0)
    nothing = Tally().measured("relu", node, **grid)
    assert (nothing.rms, nothing.clipped, nothing.sqnr) == (0.0, 0.0, math.inf)


@pytest.mark.parametrize(
    ("signal", "noise", "told"),
    [(100.0, 1.0, 20.0), (1.0, 0.0, math.inf), (0.0, 1.0, -math.inf), (0.0, 0.0, math.inf)],
)
def test_ratios_in_decibels(signal: float, noise: float, told: float) -> None:
    assert decibels(signal, noise) == told


# ------------------------------------------------------------------ the page


def tensor(name: str, exponent: int, low: float, high: float) -> Measured:
    return Measured(
        name, "activation", (exponent,), 0, 8, low, high, rms=(high - low) / 4, clipped=0.0,
        rounding=2.0**-exponent / 4, clipping=0.0, sqnr=30.0, along=None, gain=None, source="",
    )  # fmt: skip


def test_every_range_lies_within_its_plot_in_proportion() -> None:
    page = _tensors((tensor("small", 12, 0.0, 0.01), tensor("large", 0, -300.0, 200.0)))
    bands = [(float(x), float(width)) for x, width in
             re.findall(r'class="band" x="([-0-9.]+)" y="2" width="([0-9.]+)"', page)]  # fmt: skip
    # From half a step up to the last code: 2^-13 .. 2^-4, and 2^-1 .. 2^8, nine powers each.
    (first, width), (second, other) = bands
    assert first == 4.0
    assert width == pytest.approx(other, abs=0.2)
    assert second - first == pytest.approx(12 / 9 * width, rel=0.02)
    # The larger one reaches 300, beyond its last code.
    (beyond,) = re.findall(r'class="two" x1="([0-9.]+)"', page)
    assert second + other < float(beyond) <= PLOT - 4
    for x in re.findall(r' (?:x|x1|x2|cx)="([-0-9.]+)"', page):
        assert 0 <= float(x) <= PLOT


# ------------------------------------------------------------------ what only moved since


def test_a_tensor_that_moved_was_rounded_where_it_was_made() -> None:
    b = Builder((2, 3, 4))
    made = b.call(aten.sigmoid.default, b.inputs[0])
    moved = b.call(aten.flip.default, b.call(aten.permute.default, made, [0, 2, 1]), [1])
    other = b.call(aten.tanh.default, moved)
    b.program(other)
    trial: Any = SimpleNamespace(sites={made: None})
    assert Trial.rounded_at(trial, moved) is made
    assert Trial.rounded_at(trial, made) is made
    assert Trial.rounded_at(trial, other) is None
    assert Trial.rounded_at(trial, b.inputs[0]) is None


# ------------------------------------------------------------------ plans in files


def test_offsets_of_either_sign_are_kept(tmp_path: Any) -> None:
    b = Builder((2, 2, 4, 4))
    program = b.program(b.relu(b.conv(b.inputs[0], "conv", 4, 2, bias=True)))
    plan = narrows.quantize(program, [program.examples], method="minmax").plan
    for most in (2**31 - 1, -(2**31)):
        path = tmp_path / "plan.json"
        dataclasses.replace(plan, offsets={"conv.bias": (0, most, 1, -1)}).save(path)
        assert QuantPlan.load(path).offsets == {"conv.bias": (0, most, 1, -1)}
        beyond = most + (1 if most > 0 else -1)
        path.write_text(path.read_text().replace(str(most), str(beyond)))
        with pytest.raises(PlanError):
            QuantPlan.load(path)
