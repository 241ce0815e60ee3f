"""Bad input to quantization: what is refused, in which words, and what extreme input is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import narrows
from narrows.errors import NarrowsError, PassError, ProgramError, UsageError
from narrows.ir.compare import relative_error
from narrows.ir.integer.bounds import EXACT
from narrows.ir.program import Program
from narrows.passes.quant.survey import survey
from tests.builder import Builder, aten
from tests.passes.test_quantize import images

X = images(4, 3, 8, 8)


class Two(nn.Module):
    """Two convolutions and a linear layer, each with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.h = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = F.relu(self.b(x))
        return self.h(x.mean((2, 3)))


def two(change: Callable[[Two], Any] | None = None) -> Program:
    torch.manual_seed(0)
    model = Two().eval()
    if change is not None:
        with torch.no_grad():
            change(model)
    return narrows.capture(model, (X[:2],), name="two")


# ------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("data", "error", "lines"),
    [
        (None, UsageError, [
            "there is no calibration data", "because the ranges of activations are measured on it",
            "try: calibration=[images] or any iterable of inputs; an iterator is used up once",
        ]),
        (iter([]), UsageError, ["there is no calibration data"]),
        (X, UsageError, ["the data is one Tensor, not batches", "try: put it into a list: [data]"]),
        (np.zeros((1, 3, 8, 8)), UsageError, ["the data is one ndarray, not batches"]),
        ({"x": X}, UsageError, ["the data is one dict, not batches"]),
        (5, UsageError, ["the data is a int", "because it has to be an iterable"]),
        ("images.npy", UsageError, ["the data is a str"]),
        ([X.numpy()], UsageError, ["the data holds a ndarray"]),
        ([X, X[:0]], UsageError, [
            "batch 1 of the data has nothing in it", "at input x",
            "because the ranges of activations are measured on it",
        ]),
        ([X.double()], UsageError, [
            "batch 0 of the data is torch.float64, the program takes torch.float32", "at input x",
            "try: convert it: x.to(torch.float32)",
        ]),
        ([X[:, :2]], ProgramError, ["input x has shape [4, 2, 8, 8], the program takes [b,3,8,8]"]),
        ([(X, X)], ProgramError, [
            "two was called with another structure than it was captured with",
            "because its inputs are x; got 2 positional inputs",
        ]),
        ([{"y": X}], ProgramError, [
            "two was called with another structure than it was captured with",
            "because its inputs are x; got y",
        ]),
        ([X, X / 0], PassError, [
            "calibration met NaN or infinity", "at x", "because no grid holds them",
            "try: look for NaN in the calibration data",
        ]),
        ([X * 1e20], PassError, [
            "the range of x cannot be quantized", "at x", "because it reaches from -3",
            "try: scale the data, or skip the node",
        ]),
    ],
)  # fmt: skip
def test_data_that_is_none(data: Any, error: type[NarrowsError], lines: list[str]) -> None:
    with pytest.raises(error) as caught:
        narrows.quantize(two(), data)
    got = [line.strip() for line in str(caught.value).splitlines()]
    for line, wanted in zip(got, lines, strict=False):
        assert line.startswith(wanted)


def test_inputs_by_name_and_position_are_the_same() -> None:
    plans = [narrows.quantize(two(), [item]).plan for item in (X, (X,), [X], {"x": X})]
    assert all(plan == plans[0] for plan in plans)


class Log(nn.Module):
    """NaN in the middle, behind fine inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(torch.log(x)) + 1.0


def test_nan_is_found_where_it_arises() -> None:
    program = narrows.capture(Log().eval(), (X[:2].abs() + 1,))
    with pytest.raises(PassError, match="calibration met NaN") as caught:
        narrows.quantize(program, [X])
    where = str(caught.value).splitlines()[1]
    assert where.startswith("  at relu (")  # the first tensor with a grid behind it
    assert "test_quant_refusals.py" in where
    assert "torch.log(x)" in where


@pytest.mark.parametrize("bits", [1, 40, 0, -3, 8.0, None, True, [4], {"*": 1}])
@pytest.mark.parametrize(("what", "most"), [("weights", 8), ("activations", 16)])
def test_bits_that_codes_cannot_have(what: str, most: int, bits: Any) -> None:
    with pytest.raises(UsageError) as caught:
        narrows.quantize(two(), [X], **{what: bits})
    first, why, hint = str(caught.value).splitlines()
    assert first.startswith(f"{what} takes 2 to {most} bits, got ")
    assert "one bit holds no sign" in why
    assert hint.startswith(f"  try: {what}=8")


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"weights": {"zz": 4, "*": 8}}, UsageError, "weights has bits for 'zz', which matches"),
        ({"activations": {"zz": 4, "*": 8}}, UsageError, "activations has bits for 'zz'"),
        ({"percentile": "a"}, UsageError, "percentile lies above 0 and up to 100, got 'a'"),
        ({"skip": 3}, UsageError, "skip takes globs, got 3"),
        ({"skip": ["*"]}, PassError, "nothing of two can be quantized"),
    ],
)
def test_options_that_are_none(
    options: dict[str, Any], error: type[NarrowsError], text: str
) -> None:
    with pytest.raises(error) as caught:
        narrows.quantize(two(), [X], **options)
    assert str(caught.value).startswith(text)


def test_a_module_is_no_program() -> None:
    with pytest.raises(UsageError, match="quantize takes a Program, got Two"):
        narrows.quantize(Two(), [X])  # type: ignore[arg-type]


class Long(nn.Module):
    """More products in a sum than 32 bits hold."""

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.Linear(70_000, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.h(F.relu(x))


def test_an_accumulator_that_may_overflow_is_named() -> None:
    model = Long().eval()
    nn.init.constant_(model.h.weight, 127 / 128)
    x = torch.full((1, 70_000), 255.0)
    program = narrows.capture(model, (x,))
    with pytest.raises(PassError) as caught:
        narrows.quantize(program, [x])
    what, where, why, hint = str(caught.value).splitlines()
    assert what == "the accumulator of h may overflow"
    assert "test_quant_refusals.py" in where
    assert why.endswith(
        f"it can reach {70_000 * 127 * 255:,}, and 32 bits hold up to {2**31 - 1:,}"
    )
    assert "weights={'h': 6}" in hint
    narrows.quantize(program, [x], weights={"h": 6, "*": 8}, first_last=None)


# ------------------------------------------------------------------ extreme, and quantized


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.a.weight.mul_(1e-25),
        lambda m: m.a.weight[1].fill_(1e-30),
        lambda m: m.a.weight[1].fill_(0.0),
        lambda m: m.a.weight[1].fill_(1e9),
        lambda m: m.a.bias[1].fill_(1e9),
        lambda m: m.h.bias[1].fill_(1e6),
        lambda m: m.b.weight[0].mul_(1e-12),
    ],
    ids=["tiny", "tiny channel", "zero channel", "huge channel", "bias", "last bias", "dead"],
)
def test_channels_out_of_all_proportion_are_quantized(change: Callable[[Two], Any]) -> None:
    program = two(change)
    quantized = narrows.quantize(program, [X])  # its check is bit equality
    assert relative_error(quantized.program(X), program(X)) < 0.02
    bounds = [n for n in quantized.program.notes if n.reason == "bound"]
    assert bounds == [], f"beyond {EXACT}"
    narrows.lower(quantized.program)


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e-40, 1e9])
def test_data_out_of_all_proportion_is_quantized(scale: float) -> None:
    program = two()
    quantized = narrows.quantize(program, [X * scale])
    assert relative_error(quantized.program(X * scale), program(X * scale)) < 0.02


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
def test_constant_data_is_quantized_and_noted(value: float) -> None:
    quantized = narrows.quantize(two(), [torch.full((2, 3, 8, 8), value)])
    (note,) = (n for n in quantized.plan.notes if n.where == "x")
    assert note.message == f"it was {value:g} throughout the calibration data"


# Operators that stay floating-point, with the reason that the plan and the report give.
ISLANDS: dict[str, Callable[[Builder, Any, Any], Any]] = {
    "its slopes are computed, by ": lambda b, x, ids: b.call(
        aten.prelu.default,
        x,
        b.call(aten.slice.Tensor, b.call(aten.mean.dim, x, [0, 2]), 0, 0, 3),
    ),
    "a norm of order 3 has no integer form": lambda b, x, ids: b.call(
        aten.linalg_vector_norm.default, x, 3, [1]
    ),
    "it compares codes with whole numbers": lambda b, x, ids: b.call(aten.gt.Tensor, x, ids),
    "it compares with NaN": lambda b, x, ids: b.call(aten.ne.Scalar, x, float("nan")),
    "its condition is a number": lambda b, x, ids: b.call(
        aten.where.self, b.call(aten.to.dtype, ids, torch.uint8), x, x
    ),
    "holds whole numbers that are no codes": lambda b, x, ids: b.call(aten.maximum.default, x, ids),
    "it makes numbers of whole ones": lambda b, x, ids: b.call(aten.to.dtype, ids, torch.float32),
    "it rounds to torch.float16": lambda b, x, ids: b.call(aten.to.dtype, x, torch.float16),
    "it is undefined for -2.5": lambda b, x, ids: b.call(aten.pow.Scalar, -2.0, x),
    "it also reads": lambda b, x, ids: b.call(
        aten.floor_divide.default, x, b.call(aten.exp.default, x)
    ),
}


@pytest.mark.parametrize("reason", ISLANDS)
def test_islands_have_their_reason(reason: str) -> None:
    b = Builder((2, 3, 4), (2, 3, 4))
    b.examples = (b.examples[0], torch.ones(2, 3, 4, dtype=torch.int64))
    x = b.call(aten.neg.default, b.inputs[0])
    program = b.program(x, ISLANDS[reason](b, x, b.inputs[1]))
    found = survey(program)
    assert any(reason in told for told in found.floats.values()), found.floats
    with pytest.raises(PassError, match="would stay floating-point"):
        survey(program, strict=True)


def test_a_border_beyond_the_codes_is_noted() -> None:
    b = Builder((2, 3, 4))
    (x,) = b.inputs
    pads = [b.call(aten.pad.default, x, [1, 1], "constant", v) for v in (-0.99, 7.0)]
    program = b.program(*pads)
    made = narrows.quantize(program, [program.examples], method="minmax")
    (note,) = [n for n in made.plan.notes if n.reason == "border"]
    assert "not with 7" in note.message
    grid = made.plan.activations["x"]
    ends = made.program(*program.examples)[1][..., 0]
    assert ends.unique().tolist() == [(grid.high - grid.zero) * grid.scale]


def test_scales_too_far_apart_to_compare() -> None:
    b = Builder((2, 3, 4), (2, 3, 4))
    x, y = b.inputs
    program = b.program(b.call(aten.gt.Tensor, x, y))
    x, y = program.examples
    with pytest.raises(PassError, match="would shift by") as caught:
        narrows.quantize(program, [(x, y * 2.0**-34)])
    assert "too far apart" in caught.value.why


INTO_BATCH: dict[str, Callable[[Tensor], Tensor]] = {
    "tril": lambda x: x.tril(),
    "replicated": lambda x: F.pad(x, (1, 2), mode="replicate"),
    "resized": lambda x: F.interpolate(x, scale_factor=2.0, mode="linear"),
    "uneven windows": lambda x: F.adaptive_avg_pool1d(x, 3),
    "windows of one size": lambda x: F.adaptive_avg_pool1d(x, 2),
    "group norm": lambda x: F.group_norm(x, 2),
    "instance norm": F.instance_norm,
}


@pytest.mark.parametrize("name", INTO_BATCH)
def test_what_is_made_for_a_size_is_not_made_for_that_of_a_batch(name: str) -> None:
    class Turned(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return INTO_BATCH[name](x.tanh().transpose(0, 2)).transpose(0, 2) * 2

    x = images(4, 4, 6)
    program = narrows.capture(Turned().eval(), (x,))
    quantized = narrows.quantize(program, [(x,)])
    for batch in (images(4, 4, 6), images(7, 4, 6)):
        made, true = quantized.program(batch), program(batch)
        assert made.shape == true.shape
        assert relative_error(made, true) < 0.05  # a code of 8 bits is a part in 128 of the ends


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_whole_numbers_are_cut_off(dtype: torch.dtype) -> None:
    """A cast to whole numbers lets no codes through, as one between floating-point types does."""

    class Cut(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(x * 3)
            return y.to(dtype) * 0.5 * y

    x = images(4, 6)
    program = narrows.capture(Cut().eval(), (x,))
    made = narrows.quantize(program, [(x,)]).program(x)
    assert relative_error(made, program(x)) < 0.05  # a code of 8 bits is a part in 256 of the range
