"""Quantization from calibration to integers: the numbers, the plan, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import narrows
from narrows.errors import NarrowsError, PassError, PlanError, UsageError
from narrows.ir.compare import relative_error
from narrows.ir.integer.grid import Grid, WeightGrid
from narrows.ir.integer.library import weight_codes
from narrows.ir.meta import Meta
from narrows.ir.program import Program
from narrows.passes.convert_batch_norm import ConvertBatchNorm
from narrows.passes.pipeline import Pipeline, macs
from narrows.passes.quant.calibrate import weight_exponents
from narrows.passes.quant.equalize_channels import EqualizeChannels
from narrows.passes.quant.fold_shifts import FoldShifts
from narrows.passes.quant.observe import Histogram
from narrows.passes.quant.plan import QuantPlan
from narrows.passes.quant.quantize import Quantize
from narrows.passes.quant.widen_clips import WidenClips
from tests.builder import Builder, aten, ramp
from tests.networks import NETWORKS


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


CLIPS = (aten.clamp.default, aten.relu.default, aten.relu6.default)


class Net(nn.Module):
    """A residual, a clip, a concat, a gate and pooling in few lines."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.gate = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.norm(self.first(x)))
        y = F.hardswish(self.body(x)) + x
        y = y * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(y, 1)))
        y = torch.cat([F.max_pool2d(x, 2), F.avg_pool2d(y, 2)], 1)
        return self.head(y.mean((2, 3)))


def captured() -> Program:
    torch.manual_seed(0)
    return narrows.capture(Net().eval(), (images(2, 3, 8, 8),), name="net")


def network(name: str) -> tuple[Program, tuple[Any, ...]]:
    found = NETWORKS[name]
    inputs = tuple(x.float() if x.is_floating_point() else x for x in found.inputs(4, 1))
    return narrows.capture(found.build().float(), inputs), inputs


# ------------------------------------------------------------------ the numbers


@pytest.mark.parametrize("rounding", ["half_even", "half_up"])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_integers_are_the_fake_quantized_program(rounding: str, bits: int) -> None:
    quantized = narrows.quantize(
        captured(), [images(4, 3, 8, 8)], weights=bits, activations=bits, rounding=rounding
    )
    for batch in (1, 5):
        x = images(batch, 3, 8, 8)
        expected = quantized.fake.to(torch.float64)(x.double())
        assert torch.equal(quantized.program(x).double(), expected)
        assert torch.equal(quantized.fake(x), expected.float())  # every bound is below 2**24


def test_every_code_is_equal_not_only_the_outputs() -> None:
    quantized = narrows.quantize(captured(), [images(4, 3, 8, 8)])
    x = images(3, 3, 8, 8)
    floats: dict[str, Tensor] = {}

    def keep(node: Any, value: Any) -> None:
        if node.target is not torch.ops.narrows.fake_quantize.default:
            return
        floats[node.name] = value
        source = node.all_input_nodes[0]
        while source.op == "call_function":  # the clips, up to the operator before them
            floats[source.name] = value
            source = source.all_input_nodes[0] if source.target in CLIPS else x_node

    x_node = quantized.fake.placeholders[0]
    quantized.fake.to(torch.float64).run_flat([x.double()], observe=keep)
    compared = []

    def compare(node: Any, value: Any) -> None:
        grid = Meta(node).grid
        if grid is not None and node.name in floats:
            compared.append(node.name)
            numbers = (value.double() - grid.zero) * grid.scale
            assert torch.equal(numbers, floats[node.name]), node.name

    quantized.program.run_flat([x], observe=compare)
    assert {"first", "body", "gate", "head", "cat", "x_q"} <= {*compared}


@pytest.mark.parametrize("name", sorted(NETWORKS)[::9])
def test_networks_of_every_kind(name: str) -> None:
    program, inputs = network(name)
    narrows.quantize(program, [inputs])  # its check is bit equality


def test_eight_bits_are_close_to_the_float_program() -> None:
    program, x = captured(), images(8, 3, 8, 8)
    error = relative_error(narrows.quantize(program, [x]).program(x), program(x))
    assert 0 < error < 0.05
    coarse = narrows.quantize(program, [x], weights=3, activations=3, first_last=None).program
    assert relative_error(coarse(x), program(x)) > 2 * error


def test_dump(golden: Callable[[str, str], None]) -> None:
    b = Builder((2, 2, 4, 4))
    x = b.relu(b.conv(b.inputs[0], "conv1", 4, 2, bias=True))
    y = b.conv(x, "conv2", 4, 1, groups=4)
    joined = b.call(aten.cat.default, [x, b.call(aten.add.Tensor, x, y)], 1)
    pooled = b.call(aten.adaptive_avg_pool2d.default, joined, [1, 1])
    w = b.weight("head.weight", ramp(3, 8))
    head = b.call(aten.linear.default, b.call(aten.flatten.using_ints, pooled, 1), w, name="head")
    program = b.program(head)
    quantized = narrows.quantize(program, [program.examples[0]], method="minmax")
    golden("fold_shifts", str(quantized.program))


# ------------------------------------------------------------------ the passes before


def test_norms_become_convolutions() -> None:
    b = Builder((2, 4, 3, 3))
    program = b.program(b.relu(b.norm(b.inputs[0], "norm", 4)))
    result = ConvertBatchNorm().run(program.to(torch.float64))
    assert result.changed
    assert aten.batch_norm.default not in {n.target for n in result.program.nodes}
    x = ramp(2, 4, 3, 3, dtype=torch.float64)
    assert relative_error(result.program(x), program.to(torch.float64)(x)) < 1e-12
    assert not ConvertBatchNorm().run(result.program).changed


def test_clips_move_to_the_end_of_the_codes() -> None:
    b = Builder((2, 2, 4, 4), dtype=torch.float64)
    b.examples = tuple(20 * e for e in b.examples)
    layers = []
    x = b.inputs[0]
    for name, out, inner in (("a", 4, 2), ("b", 4, 4)):
        w = b.weight(f"{name}.weight", ramp(out, inner, 3, 3, dtype=torch.float64))
        bias = b.weight(f"{name}.bias", ramp(out, dtype=torch.float64))
        layers.append(b.call(aten.conv2d.default, x, w, bias, [1, 1], [1, 1], name=name))
        x = b.call(aten.relu6.default, layers[-1])
    program = b.program(x)
    result = WidenClips().run(program).program
    (clip,) = (n for n in result.nodes if n.target is aten.clamp.default)
    assert clip.args[1:] == (0.0, 255 / 32)  # the second one has no layer behind it
    assert relative_error(result(*program.examples), program(*program.examples)) < 1e-12


def test_a_clip_whose_ends_are_the_wrong_way_round_is_its_upper_end() -> None:
    b = Builder((2, 3, 4))
    y = b.call(aten.clamp.default, b.call(aten.tanh.default, b.inputs[0]), 0.5, 0.25)
    program = b.program(b.call(aten.mul.Tensor, y, 3.0))
    made = narrows.quantize(program, [program.examples], method="minmax").program
    assert torch.equal(made(*program.examples), torch.full((2, 3, 4), 0.75))


def test_channels_are_equalized_without_changing_a_bit() -> None:
    b = Builder((2, 3, 6, 6))
    x = b.relu(b.conv(b.inputs[0], "a", 8, 3, bias=True))
    x = b.call(aten.max_pool2d.default, b.relu(b.conv(x, "b", 8, 1, groups=8)), [2, 2])
    w = b.weight("head.weight", ramp(3, 8))
    x = b.call(aten.flatten.using_ints, b.call(aten.adaptive_avg_pool2d.default, x, [1, 1]), 1)
    program = b.program(b.call(aten.linear.default, x, w, name="head"))
    uneven = 2.0 ** torch.tensor([-4, 0, 3, 1, 0, -2, 5, 0]).view(8, 1, 1, 1)
    program = program.copy()
    program.weights["a.weight"] = ramp(8, 3, 3, 3) * uneven
    result = EqualizeChannels().run(program).program
    rows = result.weights["a.weight"].abs().flatten(1).amax(1)
    assert rows.max() / rows.min() < 2**6  # it was 2**9
    assert torch.equal(result(*program.examples), program(*program.examples))
    b = Builder((2, 4, 6, 6))  # a residual reads the same channels elsewhere, and stops it
    x = b.relu(b.conv(b.inputs[0], "a", 4, 4))
    added = b.call(aten.add.Tensor, b.conv(x, "b", 4, 4), x)
    assert not EqualizeChannels().run(b.program(added)).changed


# ------------------------------------------------------------------ grids


def test_histograms_grow_and_choose() -> None:
    seen = Histogram()
    for scale in (0.1, 1.0, 8.0):
        seen.add(torch.arange(-500, 501) * (scale / 500))
    assert (seen.low, seen.high, seen.zeros) == (-8.0, 8.0, 3)
    assert seen.counts.sum() == 3000
    assert seen.grid("minmax", 8) == Grid(3, 128)  # 8 * 2**4 = 128 is beyond 127.5
    assert seen.grid("minmax", 4) == Grid(-1, 128, 4)
    spread = Histogram()
    spread.add(torch.cat([torch.rand(10_000), torch.tensor([40.0])]))
    assert spread.grid("minmax", 8) == Grid(2)
    assert spread.grid("percentile", 8, 99.9) == Grid(7)
    assert spread.grid("mse", 4).exponent > spread.grid("minmax", 4).exponent


def test_weights_get_an_exponent_a_channel() -> None:
    weight = torch.tensor([[1.0, -0.5], [100.0, 3.0], [0.0, 0.0]])
    assert weight_exponents(weight, WeightGrid((0,)), "minmax") == (6, 0, 6)
    assert weight_exponents(weight.t(), WeightGrid((0,), axis=1), "minmax") == (6, 0, 6)


class Dense(nn.Module):
    """A grouped convolution and a linear layer, of one place each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 1, groups=2)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).flatten(2).transpose(1, 2))


def test_the_mean_error_of_a_layer_goes_into_its_bias() -> None:
    torch.manual_seed(0)
    x = images(4, 4, 5, 5).abs()
    made = narrows.quantize(narrows.capture(Dense().eval(), (x,)), [x], weights=4, first_last=None)
    net, read = Dense(), {"conv.weight": "x", "head.weight": "conv"}
    net.load_state_dict(made.prepared.weights)
    means = {"conv.weight": x.mean((0, 2, 3)), "head.weight": net.conv(x).mean((0, 2, 3))}
    for name, grid in made.plan.weights.items():
        weight = made.prepared.weights[name].detach().double()
        step = 2.0 ** -torch.tensor(grid.along(tuple(weight.shape)), dtype=torch.float64)
        codes = weight_codes(weight, *grid.arguments).flatten(1)
        error = codes * step[:, None] - weight.flatten(1)
        mean = means[name].detach().double()
        if name == "conv.weight":
            mean = mean.reshape(2, 2).repeat_interleave(3, 0)
        step *= made.plan.activations[read[name]].scale
        offset = torch.tensor(made.plan.offsets[name])
        assert offset.abs().max() > 1
        assert (offset * step + (error * mean).sum(1)).abs().max() <= step.max()


def test_tensors_that_are_concatenated_share_a_grid() -> None:
    b = Builder((2, 3, 6, 6))
    parts = [b.relu(b.conv(b.inputs[0], name, 4, 3)) for name in ("small", "large")]
    x = b.call(aten.cat.default, parts, 1)
    program = b.program(b.call(aten.mul.Tensor, x, x))  # which wants the parts as they are
    program = program.copy()
    program.weights["large.weight"] = 16 * program.weights["large.weight"]
    for align in (True, False):
        result = narrows.quantize(program, [program.examples[0]], align=align).program
        (joined,) = (n for n in result.nodes if n.target is torch.ops.narrows.concat.default)
        assert (joined.args[2] == [0, 0]) is align


def test_bits_by_globs_and_first_and_last() -> None:
    program, x = captured(), images(4, 3, 8, 8)
    plan = narrows.quantize(program, [x], weights={"gate*": 3, "*": 5}).plan
    assert {n: g.bits for n, g in plan.weights.items()} == {
        "first.weight": 8, "body.weight": 5, "gate.weight": 3, "head.weight": 8,
    }  # fmt: skip
    plan = narrows.quantize(program, [x], weights=4, activations=4, first_last=None).plan
    assert {g.bits for g in (*plan.weights.values(), *plan.activations.values())} == {4}


# ------------------------------------------------------------------ the plan


def test_plans_are_data(tmp_path) -> None:
    program, x = captured(), images(4, 3, 8, 8)
    first = narrows.quantize(program, [x])
    path = first.plan.save(tmp_path / "q.json")
    assert QuantPlan.load(path) == first.plan
    again = narrows.quantize(program, plan=path)
    assert torch.equal(again.program(x), first.program(x))
    piped = Pipeline.parse(f"quantize{{plan={path}}}, fold-shifts").run(first.prepared)
    assert torch.equal(piped.program(x), first.program(x))
    assert "4 weights" in repr(first.plan)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda d: d.pop("format"), "is not a quantization plan"),
        (lambda d: d.update(version=99), "is of a newer narrows"),
        (lambda d: d.update(version="1"), "is damaged"),
        (lambda d: d.pop("weights"), "is damaged"),
        (lambda d: d["activations"]["x"].update(zero=7), "is damaged"),
        (lambda d: d["weights"]["head.weight"].update(exponents=[1.5]), "is damaged"),
        (lambda d: d.update(rounding="down"), "is damaged"),
    ],
)
def test_damaged_plans_are_refused(tmp_path, change, text: str) -> None:
    plan = narrows.quantize(captured(), [images(2, 3, 8, 8)], check=False).plan
    data = json.loads(json.dumps(plan.to_json()))
    change(data)
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError, match=text):
        QuantPlan.load(path)


def test_plans_of_other_programs_are_refused() -> None:
    first = narrows.quantize(captured(), [images(2, 3, 8, 8)], check=False)
    other, _ = network(sorted(NETWORKS)[0])
    with pytest.raises(PlanError, match="of another program"):
        narrows.quantize(other, plan=first.plan)
    with pytest.raises(PassError, match="has no plan"):
        Quantize().run(first.prepared)


def test_exponents_follow_their_channels() -> None:
    b = Builder((2, 3, 6, 6))
    program = b.program(b.conv(b.relu(b.conv(b.inputs[0], "first", 8, 3)), "last", 4, 8))
    program = program.copy()
    program.weights["first.weight"] = images(8, 3, 3, 3) * 2.0 ** torch.arange(8).view(8, 1, 1, 1)
    whole = narrows.quantize(program, [program.examples[0]], check=False)
    plan = narrows.plan(whole.prepared, keep_outputs={"first.weight": [0, 1, 2, 5, 7]})
    pruned = narrows.apply(whole.prepared, plan)
    followed = whole.plan.follow(pruned)
    kept = pruned.origins["first.weight"].index[0]
    exponents = whole.plan.weights["first.weight"].exponents
    assert kept is not None
    assert followed.weights["first.weight"].exponents == tuple(exponents[k] for k in kept)
    assert len({*followed.weights["first.weight"].exponents}) == 5
    narrows.quantize(pruned, plan=followed)
    with pytest.raises(PlanError, match="of another model"):
        whole.plan.follow(pruned.replace(origins={}))


# ------------------------------------------------------------------ islands and refusals


def test_what_has_no_integer_form_is_an_island() -> None:
    program, inputs = network("cumsum_space")
    quantized = narrows.quantize(program, [inputs])
    (reason,) = quantized.plan.floats.values()
    assert reason == "cumsum.default has no integer form"
    assert any("stays floating-point" in n.message for n in quantized.program.notes)
    with pytest.raises(PassError, match="would stay floating-point"):
        narrows.quantize(program, [inputs], strict=True)


def test_skipped_layers_stay_floating_point() -> None:
    program, x = captured(), images(4, 3, 8, 8)
    quantized = narrows.quantize(program, [x], skip=["body"])
    assert quantized.plan.floats == {"body": "skipped as asked"}
    assert quantized.program.weights["body.weight"].dtype == torch.float32
    assert quantized.program.weights["head.weight"].dtype == torch.int8
    with pytest.raises(PassError, match="'nothing' matches no node"):
        narrows.quantize(program, [x], skip=["nothing"])


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"calibration": None}, UsageError, "there is no calibration data"),
        ({"calibration": []}, UsageError, "there is no calibration data"),
        ({"calibration": [3]}, UsageError, "the data holds a int"),
        ({"weights": 1}, UsageError, "weights takes 2 to 8 bits, got 1"),
        ({"activations": 40}, UsageError, "activations takes 2 to 16 bits, got 40"),
        ({"first_last": True}, UsageError, "first_last takes 2 to 8 bits"),
        ({"method": "best"}, UsageError, "method is auto, mse, minmax, percentile"),
        ({"percentile": 0}, UsageError, "percentile lies above 0"),
        ({"rounding": "down"}, UsageError, "rounding is half_even or half_up"),
        ({"weights": {"gate": 4}}, UsageError, "weights says nothing of"),
        ({"calibration": [torch.full((1, 3, 8, 8), torch.nan)]}, PassError, "met NaN or infinity"),
        ({"calibration": [torch.full((1, 3, 8, 8), 1e30)]}, PassError, "cannot be quantized"),
    ],
)
def test_bad_requests(options: dict[str, Any], error: type[NarrowsError], text: str) -> None:
    given = {"calibration": [images(2, 3, 8, 8)], **options}
    with pytest.raises(error, match=text):
        narrows.quantize(captured(), given.pop("calibration"), **given)


def test_constant_activations_are_noted() -> None:
    quantized = narrows.quantize(captured(), [torch.zeros(2, 3, 8, 8)])
    assert any(n.reason == "constant" for n in quantized.plan.notes)


def test_accumulators_that_may_overflow_are_refused() -> None:
    b = Builder((2, 70_000))
    w = b.weight("wide.weight", torch.full((1, 70_000), 0.99))
    program = b.program(b.call(aten.linear.default, b.inputs[0], w, name="wide"))
    with pytest.raises(PassError, match="the accumulator of wide may overflow"):
        narrows.quantize(program, [program.examples[0].abs()], check=False)


def test_shifts_that_lose_everything_are_refused() -> None:
    program, x = captured(), images(2, 3, 8, 8)
    first = narrows.quantize(program, [x], check=False)
    name = next(n for n in first.plan.activations if n.startswith(("head", "linear")))
    grids = {**first.plan.activations, name: Grid(-30, 128)}
    weights = {n: WeightGrid((9,), g.bits, g.axis) for n, g in first.plan.weights.items()}
    plan = QuantPlan(grids, weights)
    fake = Quantize(plan).run(first.prepared).program
    with pytest.raises(PassError, match="would shift by"):
        FoldShifts().run(fake)


def test_quantized_programs_are_not_quantized_again() -> None:
    x = images(2, 3, 8, 8)
    quantized = narrows.quantize(captured(), [x], check=False)
    with pytest.raises(PassError, match="is quantized already"):
        narrows.quantize(quantized.program, [x])
    assert not FoldShifts().run(quantized.program).changed


@pytest.mark.parametrize("name", sorted(NETWORKS)[::9])
def test_integer_operators_multiply_as_often_as_the_float_ones(name: str) -> None:
    program, inputs = network(name)
    quantized = narrows.quantize(program, [inputs], check=False)
    assert sum(macs(quantized.program).values()) == sum(macs(quantized.prepared).values())


class BatchElsewhere(nn.Module):
    """The batch comes to stand last, where other tensors have their channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.a(x.transpose(0, 1)).relu()
        return torch.tanh(x[:, 0].t()), self.b(y).transpose(0, 1)


def test_batches_differ_in_size_wherever_their_axis_is() -> None:
    program = narrows.capture(BatchElsewhere().eval(), (torch.randn(4, 5, 6),))
    data = [torch.randn(4, 5, 6), torch.randn(3, 5, 6)]
    assert narrows.quantize(program, data).plan.activations


class Twins(nn.Module):
    """A weight has the name that another one's quantizer would have."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.w, self.w_q = (nn.Parameter(torch.randn(6)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.w + self.w_q


def test_weights_may_have_the_names_of_quantizers() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    made = narrows.quantize(narrows.capture(Twins().eval(), (x,)), [x])
    assert made.plan.record is not None
    assert {"w", "w_q"} <= made.plan.activations.keys()


class Again(nn.Module):
    """The first layer comes again in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.m, self.o = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.fc(self.m(self.fc(x).relu()).relu()).relu())


def test_only_the_first_and_the_last_layer_stay_in_float() -> None:
    x = torch.randn(4, 6)
    made = narrows.quantize(narrows.capture(Again().eval(), (x,)), [x], first_last="float")
    assert sorted(made.plan.floats) == ["fc", "o"]


def test_a_number_among_the_inputs_is_no_tensor_to_calibrate_on() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor, by: float) -> Tensor:
            return self.layer(x) * by

    x = images(2, 3, 4, 4)
    program = narrows.capture(Scaled().eval(), (x, 2.0))
    quantized = narrows.quantize(program, [(x, 2.0)]).program
    assert relative_error(quantized(x, 2.0), program(x, 2.0)) < 0.02
