"""Linear layers with weights in few bits: the codes, the choice of groups, GPTQ, and ONNX."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import helper
from torch import Tensor, nn

import narrows
from narrows.backends.leaves import Leaves
from narrows.backends.onnx import blocks
from narrows.backends.openvino.target import OpenvinoTarget
from narrows.errors import NarrowsError, PassError, ProgramError, UsageError
from narrows.ir.compare import relative_error
from narrows.ir.integer.blocks import Blocks, dequantize_blocks, round_blocks
from narrows.ir.program import Program
from narrows.passes.quant.weight_only import gptq, nearest

WIDTH = 40


class Model(nn.Module):
    """An embedding whose weight is the head's, too, and layers with and without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 96), nn.Linear(96, WIDTH, bias=False)
        self.gate = nn.Linear(WIDTH, 96)
        self.head = nn.Linear(WIDTH, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.down(F.silu(self.gate(x)) * self.up(x))
        return self.head(x)


def tokens(seed: int = 0, count: int = 4) -> Tensor:
    return torch.randint(50, (count, 12), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    model = Model().eval()
    with torch.no_grad():
        model.gate.weight[:, 3] *= 20  # an input whose weights are larger than the others
    return narrows.capture(model, (tokens(count=2),), name="model")


def correlated(width: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    mixed = torch.randn(width, width, generator=generator).double()
    x = torch.randn(400, width, generator=generator).double() @ mixed
    return x.T @ x


# ------------------------------------------------------------------ one weight


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("axis", [0, 1])
def test_groups_cover_their_numbers_and_zero(bits: int, axis: int) -> None:
    weight = torch.randn(10, 14, generator=torch.Generator().manual_seed(1)).double() + 1
    blocks = Blocks(bits, 4, axis)
    codes, scale, zero = nearest(weight, blocks)
    assert codes.dtype == zero.dtype == torch.uint8
    assert scale.shape == zero.shape == ((3, 14), (10, 4))[axis]  # the last group is shorter
    assert int(codes.max()) == blocks.most
    wide = scale.repeat_interleave(4, axis).narrow(axis, 0, weight.shape[axis])
    error = (dequantize_blocks(codes, scale, zero, axis, 4) - weight).abs()
    assert bool((error <= wide * 1.001).all())  # half a step, and as much for the zero point
    assert float(error.mean()) < 0.3 * float(wide.mean())


def test_a_group_of_one_number_is_exact() -> None:
    weight = torch.tensor([[0.0, 0.0, 3.0, 3.0, -2.0, -2.0]]).double()
    codes, scale, zero = nearest(weight, Blocks(4, 2, 1))
    assert torch.allclose(dequantize_blocks(codes, scale, zero, 1, 2).double(), weight)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [3, 4])
def test_gptq_makes_up_for_errors(bits: int, axis: int) -> None:
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(2)).double()
    moment, blocks = correlated(32), Blocks(bits, 8, axis)

    def error(parts: tuple[Tensor, Tensor, Tensor]) -> float:
        lost = dequantize_blocks(*parts, axis, 8).double() - weight
        return float(((lost @ moment) * lost).sum())

    assert error(gptq(weight, moment, blocks)) < 0.7 * error(nearest(weight, blocks))


def test_gptq_without_correlation_is_rounding() -> None:
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(2)).double()
    blocks = Blocks(4, 4, 1)
    for got, wanted in zip(
        gptq(weight, torch.eye(16).double(), blocks), nearest(weight, blocks), strict=True
    ):
        assert torch.equal(got, wanted)


def test_inputs_that_are_never_used_cost_nothing() -> None:
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(2)).double()
    moment = correlated(16)
    moment[3], moment[:, 3] = 0.0, 0.0
    codes, scale, zero = gptq(weight, moment, Blocks(4, 4, 1))
    assert bool(dequantize_blocks(codes, scale, zero, 1, 4).isfinite().all())


# ------------------------------------------------------------------ a program


def test_layers_read_codes(program: Program) -> None:
    made = narrows.quantize_weights(program, [tokens(1), tokens(2)], bits=4, group=16)
    assert {n for n in made.weights if n.endswith(".codes")} == {
        "up.weight.codes", "down.weight.codes", "gate.weight.codes",
    }  # fmt: skip
    assert "up.weight" not in made.weights
    assert int(made.weights["up.weight.codes"].max()) <= 15
    assert torch.equal(program.weights["embed.weight"], made.weights["embed.weight"])
    told = {n.where: n.message for n in made.notes}
    assert told["embed.weight"] == "stays floating-point: embed reads it, too"
    assert told["up.weight"].startswith("4 bits, groups of 16 ")
    error = relative_error(made(tokens(3)), program(tokens(3)))
    assert 0 < error < 0.1
    assert "up.weight" in program.weights  # the given program is as it was


def test_groups_lie_along_the_axis_of_the_smaller_error(program: Program) -> None:
    errors = {}
    for groups in ("input", "output", "auto"):
        made = narrows.quantize_weights(
            program, [tokens(1)], bits=3, group=8, groups=groups, method="nearest"
        )
        axes = {
            str(n.args[0].target): n.args[3]
            for n in made.graph.nodes
            if n.target is dequantize_blocks
        }
        errors[groups] = {}
        for name, axis in axes.items():
            weight = name.removesuffix(".codes")
            parts = [made.weights[f"{weight}.{p}"] for p in ("codes", "scale", "zero")]
            moment = moments(program, weight)
            lost = (dequantize_blocks(*parts, axis, 8) - program.weights[weight]).double()
            errors[groups][weight] = (float(((lost @ moment) * lost).sum()), axis)
    for name, (error, axis) in errors["auto"].items():
        both = {1: errors["input"][name][0], 0: errors["output"][name][0]}
        assert axis == min(both, key=both.__getitem__)
        assert error == pytest.approx(both[axis])
    assert {axis for _, axis in errors["auto"].values()} == {0, 1}


def moments(program: Program, weight: str) -> Tensor:
    seen: list[Tensor] = []
    (layer,) = program.users_of(weight)

    def observe(node: Any, value: Tensor) -> None:
        if node is layer.args[0]:
            seen.append(value.flatten(0, -2).double())

    program.run_flat([tokens(1)], observe=observe)
    return seen[0].T @ seen[0]


def test_more_bits_and_gptq_are_closer(program: Program) -> None:
    data = [tokens(seed, 16) for seed in range(4)]
    x = tokens(9, 16)

    def error(**how: Any) -> float:
        lost = narrows.quantize_weights(program, data, **how)(x) - program(x)
        return float(lost.square().sum())

    errors = [error(bits=bits) for bits in (8, 4, 3, 2)]
    assert errors == sorted(errors)
    assert errors[2] < error(bits=3, method="nearest")


def test_rounding_to_the_nearest_needs_no_data(program: Program) -> None:
    made = narrows.quantize_weights(program, method="nearest", groups="input", skip="up")
    assert "up.weight" in made.weights
    assert any(n.message == "stays floating-point: skipped as asked" for n in made.notes)


# ------------------------------------------------------------------ ONNX


@pytest.mark.parametrize(
    ("options", "kernels"),
    [
        ({"bits": 4, "group": 16, "groups": "input"}, 3),  # three groups: half a byte is left over
        ({"bits": 3, "group": 32, "groups": "input"}, 3),
        ({"bits": 8, "group": 16, "groups": "input"}, 0),  # ten times as slow as floats
        ({"bits": 8, "group": 16, "groups": "input", "activations": "dynamic"}, 3),
        ({"bits": 3, "group": 32, "groups": "auto", "activations": "dynamic"}, 3),
        ({"bits": 4, "group": 24, "groups": "input"}, 0),
        ({"bits": 4, "group": 16, "groups": "output"}, 0),
        ({"bits": 8, "group": 36, "groups": "output"}, 0),
    ],
)
@pytest.mark.parametrize("simplify", [True, False])
def test_onnx_holds_codes(
    program: Program, options: dict[str, Any], kernels: int, simplify: bool
) -> None:
    made = narrows.quantize_weights(program, method="nearest", **options)
    artifact = narrows.lower(made, simplify=simplify)  # compares with the program
    model = onnx.load(artifact.folder / "model.onnx")
    assert [n.op_type for n in model.graph.node].count("MatMulNBits") == kernels
    held = {i.name: i for i in model.graph.initializer}
    kept = [i for n, i in held.items() if n.startswith(("up.weight", "down.weight", "gate.weight"))]
    codes = [i for i in kept if i.data_type == onnx.TensorProto.UINT8]
    assert len(codes) == 6  # codes and zero points
    floats = sum(np.prod(i.dims) for i in kept if i.data_type == onnx.TensorProto.FLOAT)
    assert floats < 3 * 96 * WIDTH / 8  # scales alone
    x = tokens(7, 3)
    assert relative_error(torch.from_numpy(artifact.run(x)), made(x)) < 1e-5


@pytest.mark.parametrize("activations", ["float", "dynamic"])
@pytest.mark.parametrize("simplify", [True, False])
def test_onnx_of_a_two_dimensional_input(activations: str, simplify: bool) -> None:
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 64, bias=False)).eval()
    program = narrows.capture(model, (torch.randn(2, 32),))
    for groups in ("input", "output")[: 1 if activations == "dynamic" else 2]:
        how = {"method": "nearest", "groups": groups, "activations": activations}
        artifact = narrows.lower(narrows.quantize_weights(program, **how), simplify=simplify)
        model_file = onnx.load(artifact.folder / "model.onnx")
        kernels = [n for n in model_file.graph.node if n.op_type == "MatMulNBits"]
        assert len(kernels) == (2 if groups == "input" else 0)
        levels = [helper.get_node_attr_value(n, "accuracy_level") for n in kernels
                  if activations == "dynamic"]  # fmt: skip
        assert levels == [4] * len(levels)


# ------------------------------------------------------------------ rounded, what is multiplied


def test_what_is_multiplied_is_rounded_per_group() -> None:
    x = torch.tensor([[1.0, -2.54, 0.011, 0.0, 127.0, 63.4, 0.0, 0.0, 0.0]])
    # Groups of four: steps of 0.02, of 1; the last group has one number, and it is zero.
    wanted = torch.tensor([[1.0, -2.54, 0.02, 0.0, 127.0, 63.0, 0.0, 0.0, 0.0]])
    assert torch.allclose(round_blocks(x, 4), wanted, atol=1e-6)
    assert torch.equal(round_blocks(torch.zeros(2, 0, 8), 4), torch.zeros(2, 0, 8))


def test_layers_that_read_the_same_round_it_once(program: Program) -> None:
    made = narrows.quantize_weights(program, method="nearest", group=16, activations="dynamic")
    rounds = [n for n in made.graph.nodes if n.target is round_blocks]
    assert len({n.args[0] for n in rounds}) == len(rounds)
    error = relative_error(made(tokens(3)), program(tokens(3)))
    plain = narrows.quantize_weights(program, method="nearest", group=16, groups="input")
    assert 0 < relative_error(made(tokens(3)), plain(tokens(3))) < 0.05 < 10 * error


def test_an_input_of_the_program_is_rounded(tmp_path: Any) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 16), nn.Linear(32, 16)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.a(x) + self.b(y) * self.b(x)

    x, y = torch.randn(2, 32), torch.randn(2, 32)
    program = narrows.capture(Two().eval(), (x, y))
    made = narrows.quantize_weights(program, method="nearest", bits=8, activations="dynamic")
    artifact = narrows.lower(made)
    assert relative_error(torch.from_numpy(artifact.run(x, y)), made(x, y)) < 1e-5


def test_a_runtime_that_does_not_round_is_refused(program: Program) -> None:
    made = narrows.quantize_weights(program, method="nearest", activations="dynamic")
    with pytest.raises(NarrowsError, match="openvino does not round what coded weights multiply"):
        OpenvinoTarget()._floats(made, Leaves.of(made))


# ------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({}, UsageError, "there is no calibration data"),
        ({"calibration": []}, UsageError, "there is no calibration data"),
        ({"calibration": tokens()}, UsageError, "the data is one Tensor, not batches"),
        ({"calibration": [tokens()[:, :3]]}, ProgramError, "has shape"),
        ({"bits": 1, "calibration": [tokens()]}, UsageError, "bits goes from 2 to 8, got 1"),
        ({"bits": 40, "calibration": [tokens()]}, UsageError, "bits goes from 2 to 8, got 40"),
        ({"group": 1, "calibration": [tokens()]}, UsageError, "group goes from 2 to"),
        ({"groups": "both", "calibration": [tokens()]}, UsageError, "groups is input, output"),
        ({"activations": "int8"}, UsageError, "activations is float, dynamic, got 'int8'"),
        (
            {"activations": "dynamic", "groups": "output"},
            UsageError,
            "have no groups along",
        ),
        ({"activations": "dynamic", "group": 24}, UsageError, "dynamic activations take groups of"),
        ({"method": "rapq", "calibration": [tokens()]}, UsageError, "method is nearest, gptq"),
        ({"skip": ["zz"], "calibration": [tokens()]}, PassError, "'zz' matches no linear layer"),
        ({"skip": ["*"], "calibration": [tokens()]}, PassError, "has no linear layer"),
    ],
)
def test_bad_requests(
    program: Program, options: dict[str, Any], error: type[NarrowsError], text: str
) -> None:
    with pytest.raises(error) as caught:
        narrows.quantize_weights(program, **options)
    assert text in str(caught.value).splitlines()[0]


def test_nan_is_refused() -> None:
    program = narrows.capture(nn.Linear(4, 4).eval(), (torch.randn(2, 4),))
    with pytest.raises(PassError, match="calibration met NaN or infinity"):
        narrows.quantize_weights(program, [torch.full((2, 4), torch.nan)])
    with pytest.raises(UsageError, match="quantize_weights takes a Program, got Linear"):
        narrows.quantize_weights(nn.Linear(4, 4))  # type: ignore[arg-type]


def test_an_odd_row_of_half_bytes_ends_in_zero() -> None:
    codes = np.array([[1, 2, 3], [15, 0, 9]], dtype=np.uint8)
    assert blocks._pairs(codes).tolist() == [[0x21, 0x03], [0x0F, 0x09]]
