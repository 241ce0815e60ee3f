"""Tensors of unlike ranges that are joined: each part keeps its codes, whoever reads it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import narrows
from narrows.errors import PassError, PlanError
from narrows.ir.compare import relative_error
from narrows.passes.quant.choose_parts import Reading
from narrows.passes.quant.observe import Histogram
from narrows.passes.quant.plan import QuantPlan
from narrows.passes.quant.scale_parts import ScaleParts
from tests.backends.marks import NEEDS_TVM

Body = Callable[[Any, Tensor, Tensor], Any]


def images(batch: int, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


class Head(nn.Module):
    """Boxes of 0 to 640 and scores of 0 to 1 from the same features, and what joins them.

    The layer that reads both gives the scores weights of their own size, as training would.
    """

    def __init__(self, body: Body, reader: nn.Module | None = None, axis: int = 1) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 16, 3, padding=1)
        self.boxes, self.scores = nn.Conv2d(16, 4, 1), nn.Conv2d(16, 6, 1)
        self.other, self.gate = nn.Conv2d(16, 10, 1), nn.Conv2d(10, 10, 1)
        self.body = body
        self.reader: Any = reader
        if reader is not None:
            with torch.no_grad():
                weight: Any = reader.weight
                share = weight.shape[axis] * 4 // 10
                weight.narrow(axis, share, weight.shape[axis] - share).mul_(500)

    def forward(self, x: Tensor) -> Any:
        f = F.relu(self.features(x))
        return self.body(self, torch.sigmoid(self.boxes(f)) * 640, torch.sigmoid(self.scores(f)))


def network(body: Body, reader: Callable[[], nn.Module] | None = None, axis: int = 1) -> Head:
    torch.manual_seed(0)
    return Head(body, None if reader is None else reader(), axis).eval()


def quantized(net: nn.Module, **options: Any) -> narrows.Quantized:
    program = narrows.capture(net, (images(2),), name="head")
    return narrows.quantize(program, [images(4), images(4, 2)], **options)


def decibels(got: Tensor, wanted: Tensor) -> float:
    noise = (got - wanted).double().square().sum()
    return 10 * math.log10(wanted.double().square().sum() / noise) if noise else math.inf


def ratios(made: narrows.Quantized, net: nn.Module, axis: int = 1) -> list[float]:
    """Return the ratio of boxes and scores in every output that holds both, or of the whole."""
    x = images(6, 3)
    with torch.no_grad():
        pairs = zip(_flat(made.program(x)), _flat(net(x)), strict=True)
    found: list[float] = []
    for got, wanted in pairs:
        whole = wanted.shape[axis] != 10
        cut: Sequence[Any] = [slice(None)] if whole else [slice(0, 4), slice(4, 10)]
        for part in cut:
            found.append(decibels(*(t.movedim(axis, 0)[part] for t in (got, wanted))))
    return found


def _flat(given: Any) -> list[Tensor]:
    return list(given) if isinstance(given, tuple | list) else [given]


def join(_: Head, a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([a, b], 1)


def nested(_: Head, a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([a, torch.cat([b[:, :3] * 0.01, b[:, 3:]], 1)], 1)


def rows(_: Head, a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([t.flatten(2).transpose(1, 2) for t in (a, b)], -1).transpose(1, 2)


def levels(_: Head, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    near = torch.cat([a, b], 1).flatten(2)
    far = torch.cat([F.max_pool2d(a, 2), F.max_pool2d(b, 2)], 1).flatten(2)
    return torch.cat([near, far], 2).split([4, 6], 1)


def cut(_: Head, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    both = torch.cat([a, b], 1)
    return both[:, :4] * 3, torch.sigmoid(both[:, 4:])


def space(_: Head, a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([a, b[:, :4]], 3)


def stacked(_: Head, a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([a, b[:, :4]], 1)


# ------------------------------------------------------------------ where they leave the network


@pytest.mark.parametrize("body", [join, nested, rows, levels, cut, space, stacked])
def test_every_part_of_an_output_keeps_its_codes(body: Body) -> None:
    net = network(body)
    made = quantized(net)
    assert made.plan.parts
    assert not made.plan.floats
    assert min(ratios(made, net)) > 40
    if body is stacked:
        x = images(6, 3)
        pairs = zip(made.program(x).unbind(1), net(x).detach().unbind(1), strict=True)
        assert min(decibels(a, b) for a, b in pairs) > 40
    if body is join:  # without powers the scores are one number
        whole = quantized(network(lambda s, a, b: torch.cat([a, b], 1) + a.mean()), allow_lost=True)
        assert not whole.plan.parts


def test_parts_of_either_sign_and_parts_that_are_inputs() -> None:
    net = network(lambda s, a, b: torch.cat([a - 320, b], 1))
    boxes, scores = ratios(quantized(net), net)
    assert boxes > 25  # they are differences of larger numbers
    assert scores > 40
    program = narrows.capture(_Pair().eval(), (images(2), images(2) * 1000))
    made = narrows.quantize(program, [(images(4), images(4, 2) * 1000)])
    got, x, y = made.program(images(2), images(2, 3) * 1000), images(2), images(2, 3) * 1000
    assert min(decibels(got[:, :3], x), decibels(got[:, 3:], y)) > 35


class _Pair(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([x, y], 1)


# ------------------------------------------------------------------ where a layer reads them


def through(*steps: Callable[[Tensor], Tensor]) -> Body:
    def body(net: Head, a: Tensor, b: Tensor) -> Tensor:
        x = torch.cat([a, b], 1)
        for step in steps:
            x = step(x)
        return net.reader(x)

    return body


def gated(net: Head, a: Tensor, b: Tensor) -> Tensor:
    x = torch.cat([a, b], 1)
    return net.reader(x * torch.sigmoid(net.gate(F.adaptive_avg_pool2d(x, 1))))


def twice(net: Head, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    x = torch.cat([a, b], 1)
    return net.reader(x), x


def shared(net: Head, a: Tensor, b: Tensor) -> Tensor:
    return net.reader(torch.cat([a, b], 1)) + net.reader(net.other(b.repeat(1, 3, 1, 1)[:, :16]))


READERS: dict[str, tuple[Body, Callable[[], nn.Module], int]] = {
    "conv": (through(), lambda: nn.Conv2d(10, 5, 3, padding=1), 1),
    "relu, pool, pad": (
        through(F.relu, lambda x: F.pad(F.avg_pool2d(x, 2), (1, 0, 0, 1))),
        lambda: nn.Conv2d(10, 5, 1), 1,
    ),
    "groups": (through(), lambda: nn.Conv2d(10, 10, 1, groups=2), 1),
    "transposed": (through(), lambda: nn.ConvTranspose2d(10, 5, 2, 2), 0),
    "linear": (through(lambda x: x.mean((2, 3))), lambda: nn.Linear(10, 5), 1),
    "flattened": (through(lambda x: F.max_pool2d(x, 4).flatten(1)), lambda: nn.Linear(40, 5), 1),
    "gate": (gated, lambda: nn.Conv2d(10, 5, 1), 1),
    "two readers": (twice, lambda: nn.Conv2d(10, 5, 1), 1),
    "shared weight": (shared, lambda: nn.Conv2d(10, 5, 1), 1),
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_a_layer_makes_up_for_the_powers_of_its_parts(name: str) -> None:
    body, reader, axis = READERS[name]
    net = network(body, reader, axis)
    if name == "shared weight":  # both of its inputs, else their own accumulators decide
        net.reader.weight.data.div_(20)
    made = quantized(net)
    assert made.plan.parts
    assert min(ratios(made, net)) > 30
    plain = narrows.capture(net, (images(2),)).to(torch.float64)
    x = images(3).double()
    for got, wanted in zip(_flat(made.prepared.to(torch.float64)(x)), _flat(plain(x)), strict=True):
        assert torch.allclose(got, wanted, rtol=1e-12, atol=1e-12)  # the network is what it was


def test_what_is_alike_keeps_one_grid() -> None:
    net = network(lambda s, a, b: s.reader(torch.cat([a / 640, b], 1)), lambda: nn.Conv2d(10, 5, 1))
    net.reader.weight.data[:, 4:] /= 500
    assert not quantized(net).plan.parts


# ------------------------------------------------------------------ every backend


@pytest.mark.parametrize("form", ["qdq", "qlinear", "integer"])
def test_parts_in_onnx_are_the_interpreter(form: str) -> None:
    artifact = narrows.lower(quantized(network(twice, lambda: nn.Conv2d(10, 5, 1))).program,
                             form=form, samples=1)  # fmt: skip
    assert {c["error"] for c in artifact.fidelity["checked"]} == {0.0}
    assert "golden" in artifact.manifest  # no floating-point kernel has a part in it


@pytest.mark.parametrize("target", ["c", pytest.param("tvm", marks=NEEDS_TVM)])
def test_parts_in_c_and_tvm_are_the_interpreter(target: str) -> None:
    made = quantized(network(lambda s, a, b: (rows(s, a, b), s.reader(join(s, a, b))),
                             lambda: nn.Conv2d(10, 5, 1)))  # fmt: skip
    artifact = narrows.lower(made.program, target)
    assert artifact.fidelity["tolerance"] == 0.0
    if target == "c":
        text = (artifact.folder / "model.h").read_text()
        assert "_POWERS[10] = {0, 0, 0, 0, 9, 9, 9, 9, 9, 9};" in text
        assert "(uint8_t code, int index)" in text


# ------------------------------------------------------------------ what is said, and refused


def added(net: Head, a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([a, b], 1) + net.other(b.repeat(1, 3, 1, 1)[:, :16])


def test_a_part_is_not_lost_in_silence() -> None:
    with pytest.raises(
        PassError, match=r"part 1 \(sigmoid_1\) of cat would become one number"
    ) as e:
        quantized(network(added))
    assert "add.Tensor reads them together" in e.value.why
    assert "allow_lost=True goes on" in e.value.hint
    made = quantized(network(added), allow_lost=True)
    (note,) = (n for n in made.plan.notes if n.reason == "lost" and n.where == "cat")
    assert "part 1 (sigmoid_1) keeps 0.1 dB" in note.message
    report = made.report([images(4)], samples=0)
    assert [p.lost for p in report.parts] == [False, True]
    assert "1 part LOST" in report.headline
    assert "cat: part 1 (sigmoid_1)" in str(report)
    assert json.loads(json.dumps(report.to_json()))["parts"][1]["lost"]


def test_the_report_tells_what_is_left_of_every_part() -> None:
    net = network(join)
    made = quantized(net)
    parts = made.report([images(6, 3)], samples=0).parts
    assert [p.part for p in parts] == ["0 (mul)", "1 (sigmoid_1)"]
    assert [p.along for p in parts] == pytest.approx(ratios(made, net), abs=1e-3)
    assert parts[1].high < 1 < parts[0].low


def test_parts_that_keep_little_are_noted_with_their_neighbours() -> None:
    net = network(lambda s, a, b: torch.softmax(torch.cat([a / 8, b * 0.7], 1), 1))
    notes = quantized(net).plan.notes
    (note,) = (n for n in notes if n.reason == "lost" and "alone" in n.message)
    assert "softmax.int reads them together" in note.message


def test_what_a_condition_chooses_is_not_lost_in_silence() -> None:
    def body(net: Head, a: Tensor, b: Tensor) -> Tensor:
        return torch.where(a > 320, a, b[:, :4]) + 0.5

    with pytest.raises(PassError, match=r"part \w+ of where would become one number") as caught:
        quantized(network(body))
    assert "the largest reaches" in caught.value.why


def test_channels_beside_an_outlier_are_noted() -> None:
    net = network(lambda s, a, b: s.other(a.repeat(1, 4, 1, 1) / 640) + 0.1)
    with torch.no_grad():
        net.other.bias[3] = 400.0
    lost = {n.where: n.message for n in quantized(net).plan.notes if n.reason == "lost"}
    assert "9 of its 10 channels keep less than 15 dB: the largest reaches 40" in lost["add"]


# ------------------------------------------------------------------ masks of attention


class Attention(nn.Module):
    """Attention whose scores a mask takes away, in one of the ways that people write it."""

    def __init__(self, fill: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))
        self.fill = fill

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).transpose(1, 2) / 4
        return self.fill(scores, kept[:, None]).softmax(-1) @ self.value(x)


def tokens(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    kept = (torch.rand(4, 12, generator=generator) < 0.7).float()
    kept[:, 0] = 1
    return torch.randn(4, 12, 16, generator=generator), kept


LATER = torch.ones(12, 12, dtype=torch.bool).triu(1)


@pytest.mark.parametrize(
    "fill",
    [
        lambda scores, kept: scores.masked_fill(kept < 0.5, -1e4),
        lambda scores, kept: torch.where(kept < 0.5, torch.full_like(scores, -1e9), scores),
        lambda scores, kept: scores + (kept - 1) * 1e9,
        lambda scores, kept: scores + ((kept.transpose(1, 2) - 1) * 1e9).transpose(1, 2),
        lambda scores, kept: scores.masked_fill(LATER, -math.inf).masked_fill(kept < 0.5, -1e9),
        lambda scores, kept: scores + (kept - 1) * 1e4 - LATER * 1e4,
        lambda scores, kept: (
            LATER.float().masked_fill(LATER, -math.inf)
            + scores
            + torch.where(kept < 0.5, -math.inf, 0.0)
        ),
    ],
)
def test_masked_scores_keep_their_codes(fill: Callable[[Tensor, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    net = Attention(fill).eval()
    program = narrows.capture(net, tokens(0))
    made = narrows.quantize(program, [tokens(1), tokens(2)])
    x = tokens(3)
    with torch.no_grad():
        assert decibels(made.program(*x), net(*x)) > 25
    (softmax,) = (n for n in made.fake.nodes if "softmax" in n.name and "_q" not in n.name)
    assert made.plan.activations[softmax.all_input_nodes[0].all_input_nodes[0].name].exponent >= 2
    assert min(grid.exponent for grid in made.plan.activations.values()) >= 2  # the mask's, too


def test_a_mask_hides_the_scores_of_every_layer_that_adds_it() -> None:
    """Those of the first reach far, those of the last do not."""
    torch.manual_seed(0)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Attention(torch.add) for _ in range(2))
            with torch.no_grad():
                self.layers[0].query.weight.mul_(100)

        def forward(self, x: Tensor, kept: Tensor) -> Tensor:
            mask = (kept - 1) * 1e9
            first, last = self.layers
            return last(first(x, mask), mask)

    net = Both().eval()
    made = narrows.quantize(narrows.capture(net, tokens(0)), [tokens(1), tokens(2)])
    x, kept = tokens(3)
    hidden = torch.where(kept[..., None] < 0.5, torch.full_like(x, 3.0), x)
    assert torch.equal(made.program(x, kept)[kept > 0.5], made.program(hidden, kept)[kept > 0.5])


# ------------------------------------------------------------------ the plan


def test_a_plan_keeps_the_powers() -> None:
    net = network(join)
    made = quantized(net)
    plan = QuantPlan.from_json(json.loads(json.dumps(made.plan.to_json())))
    assert plan.parts == made.plan.parts == {"cat": (0, 9)}
    again = narrows.quantize(narrows.capture(net, (images(2),)), plan=plan)
    assert torch.equal(again.program(images(3)), made.program(images(3)))
    with pytest.raises(PlanError, match="scales the parts of 'cat' otherwise"):
        ScaleParts(plan).run(narrows.capture(network(lambda s, a, b: a), (images(2),)))
    with pytest.raises(PassError, match="scale-parts has no plan"):
        ScaleParts().run(made.prepared)


@pytest.mark.parametrize("options", [
    {"align": False}, {"method": "minmax"}, {"rounding": "half_up"}, {"activations": 6},
    {"method": "rapq", "budget": 8}, {"activations": 4, "first_last": 4, "levels": True},
])  # fmt: skip
def test_every_way_of_calibrating_scales_parts(options: dict[str, Any]) -> None:
    made = quantized(network(twice, lambda: nn.Conv2d(10, 5, 1)), **options)
    assert made.plan.parts["cat"][1] > 5


def test_outputs_of_parts_have_the_bits_of_outputs() -> None:
    net = network(twice, lambda: nn.Conv2d(10, 5, 1))  # which alone would have 4 bits of them
    plan = quantized(net, activations=4).plan
    assert plan.activations["cat"].bits == plan.activations["sigmoid_1"].bits == 8


def test_histograms_scale_and_join() -> None:
    a, b, both = Histogram(), Histogram(), Histogram()
    x, y = images(2).flatten(), images(2, 5).flatten() * 100
    a.add(x)
    b.add(y)
    both.add(torch.cat([x * 8, y]))
    made = a.times(3).joined(b)
    assert (made.low, made.high, made.zeros, made.power) == (
        both.low, both.high, both.zeros, both.power,
    )  # fmt: skip
    assert torch.equal(made.counts, both.counts)
    assert a.energy == pytest.approx(float(x.double().square().sum()), rel=1e-3)


class Nested(nn.Module):
    """Parts that are joined along another axis than the tensor that is joined of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(3, 4, 1) for _ in range(4))
        self.e = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        small = torch.cat([self.a(x) * 0.01, self.b(x) * 0.01], 2)
        large = torch.cat([self.c(x), self.c(x)], 2) * 10
        return torch.cat([small, self.d(x) * 100], 2), self.e(torch.cat([small, large], 1))


def test_what_joins_a_joined_tensor_reads_it_as_it_was() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 4, 4)
    program = narrows.capture(Nested().eval(), (x,))
    made = narrows.quantize(program, [x], allow_lost=True)
    assert made.plan.parts
    assert relative_error(made.prepared.run_flat([x]), program.run_flat([x])) == 0


class Joined(nn.Module):
    """A large part behind two others, through a function that hands factors on."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.z = (nn.Conv2d(3, 4, 1) for _ in range(3))
        self.d, self.function = nn.Conv2d(12, 2, 1), function

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat([self.z(x), self.b(x), self.a(x) * 3000.0], 1)
        return self.d(self.function(joined))


@pytest.mark.parametrize(
    "function", [nn.LeakyReLU(), nn.PReLU(), nn.PReLU(12), nn.ReLU(), nn.AvgPool2d(2)]
)
def test_factors_pass_through_what_is_homogeneous(function: nn.Module) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 4, 4)
    made = narrows.quantize(narrows.capture(Joined(function).eval(), (x,)), [x])
    powers = made.plan.parts["cat"]
    assert powers[0] > powers[2] == 0
    narrows.lower(made.program)


def test_powers_do_not_follow_operands_that_are_gone() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 4, 4)
    program = narrows.capture(Joined(nn.LeakyReLU()).eval(), (x,))
    made = narrows.quantize(program, [x])
    plan = narrows.plan(program, keep_inputs={"d.weight": list(range(4, 12))})
    small = narrows.apply(program, plan)
    with pytest.raises(PlanError, match="scales the parts"):
        narrows.quantize(small, plan=made.plan.follow(small))


def test_powers_that_no_float_holds_are_refused() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 4, 4)
    made = narrows.quantize(narrows.capture(Joined(nn.ReLU()).eval(), (x,)), [x])
    data = {**made.plan.to_json(), "parts": {"cat": [0, 0, 5000]}}
    with pytest.raises(PlanError, match="is damaged"):
        QuantPlan.from_json(data)


def test_the_noise_of_a_layer_is_the_mean_of_its_outputs() -> None:
    """The second output is carried half as strongly as it is there."""
    none = torch.zeros(2, 1)
    reading = Reading(energy=torch.tensor([[1.0], [3.0]]), largest=none, count=none)
    noise = reading.noise(torch.zeros(1), torch.tensor([1.0]), torch.tensor([2.0]), 127.0)
    assert noise == pytest.approx(0.5)
