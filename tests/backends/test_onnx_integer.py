"""Integer programs in ONNX Runtime: the numbers of the interpreter, in every form."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

import narrows
from narrows.backends.onnx.integer.qdq import pooled_exactly
from narrows.backends.onnx.session import (
    EXACT_PRODUCTS,
    MODEL,
    OnnxSession,
    has_vnni,
    session_options,
)
from narrows.errors import LowerError, UsageError
from narrows.ir.integer.rounding import divide
from narrows.ir.program import Program
from tests.backends.held import held
from tests.backends.several_forms import PROGRAMS, integers
from tests.builder import Builder, aten, ramp
from tests.networks import NETWORKS

FORMS = ("qdq", "qlinear", "integer")
KINDS = (
    "average_pool_not_counting_pad", "class_token", "concat_three_widths", "cumsum_space",
    "dense_block", "depthwise", "group_norm", "grouped_conv", "image_attention",
    "instance_norm", "layer_norm_tokens", "rms_norm",
    "multihead_attention", "multiply_gated", "pixel_shuffle", "residual_projection",
    "shuffle_block", "squeeze_excite_hardsigmoid", "subtract_branches", "transposed_conv_grouped",
    "two_inputs", "upsample_nearest",
)  # fmt: skip


def quantized(name: str, **options: Any) -> narrows.Quantized:
    found = NETWORKS[name]
    inputs = tuple(x.float() if x.is_floating_point() else x for x in found.inputs(4, 1))
    program = narrows.capture(found.build().float(), inputs)
    return narrows.quantize(program, [inputs], check=False, **options)


def small(*, rounding: str = "half_even", target: Any = aten.relu.default) -> Program:
    b = Builder((2, 3, 6, 6))
    x = b.call(target, b.conv(b.inputs[0], "conv1", 4, 3, bias=True))
    y = b.conv(x, "conv2", 4, 4)
    program = b.program(b.call(aten.relu.default, b.conv(b.relu(y), "conv3", 4, 4)))
    return narrows.quantize(program, [program.examples[0]], rounding=rounding).program


@pytest.mark.parametrize(("name", "form"), [*product(KINDS, FORMS)])
def test_every_form_is_the_interpreter(name: str, form: str) -> None:
    artifact = narrows.lower(quantized(name).program, form=form, samples=1)
    assert {c["error"] for c in artifact.fidelity["checked"]} == {0.0}
    assert artifact.fidelity["tolerance"] == 0.0


class Loud(torch.nn.Module):
    """Weights and inputs so large that two products add up to more than 2**15; one weight twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 16, 3, padding=1)
        self.block = torch.nn.Conv2d(16, 16, 3, padding=1)
        self.head = torch.nn.Linear(16, 1)
        self.other = torch.nn.Linear(16, 1)
        for layer in (self.stem, self.block, self.head, self.other):
            torch.nn.init.constant_(layer.weight, 127 / 128)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self.block(self.block(self.stem(x)) / 16).mean((2, 3))
        return self.head(x), self.other(x)


@pytest.mark.parametrize("form", FORMS)
def test_large_products_are_not_cut_off(form: str) -> None:
    """ONNX Runtime does that on processors without VNNI, where it is not told otherwise."""
    x = 1 - torch.rand(2, 3, 6, 6) / 16
    program = narrows.quantize(narrows.capture(Loud().eval(), (x,)), [x]).program
    artifact = narrows.lower(program, form=form)
    model = onnx.load(artifact.folder / MODEL).graph
    kinds = {i.name: i.data_type for i in model.initializer}
    own = [n for n in artifact.report.splitlines() if "session.x64quantprecision=1" in n]
    if form != "qdq":  # safe in any session
        dense = [n for n in model.node if n.op_type in ("QLinearConv", "QGemm", "MatMulInteger")]
        read = [kinds.get(name) for node in dense for name in node.input]
        assert TensorProto.INT8 not in read
        assert not own
        return
    assert len(own) == 1
    codes = [n for n in model.node if kinds.get(n.input[0]) == TensorProto.INT8]
    assert len(codes) == 5
    # ONNX Runtime makes uint8 of each weight and each zero point, and of none twice.
    assert len({n.input[0] for n in codes}) == len({n.input[2] for n in codes}) == 5


@pytest.mark.parametrize("vnni", [False, True])
def test_sessions_ask_for_exact_products_where_they_have_to(
    monkeypatch: pytest.MonkeyPatch, vnni: bool
) -> None:
    monkeypatch.setattr("narrows.backends.onnx.session.has_vnni", lambda: vnni)
    asked: list[tuple[str, str]] = []
    entry = onnxruntime.SessionOptions.add_session_config_entry
    monkeypatch.setattr(
        onnxruntime.SessionOptions, "add_session_config_entry",
        lambda self, *pair: (asked.append(pair), entry(self, *pair)),
    )  # fmt: skip
    session_options()
    assert (EXACT_PRODUCTS in asked) is not vnni


def test_what_numpy_does_not_tell_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np, "_core", object())
    assert not has_vnni()


@pytest.mark.parametrize(("name", "form"), [*product(PROGRAMS, FORMS)])
def test_many_operators_are_the_interpreter_in_every_form(name: str, form: str) -> None:
    narrows.lower(integers(name), form=form, samples=1)  # lower itself compares, with ==


def operators(artifact: narrows.Artifact) -> list[str]:
    return [n.op_type for n in onnx.load(artifact.folder / MODEL).graph.node]


def test_forms_are_what_they_say() -> None:
    program = small()
    made = {form: operators(narrows.lower(program, form=form)) for form in FORMS}
    assert made["qdq"].count("Conv") == made["qlinear"].count("QLinearConv") == 3
    assert made["integer"].count("ConvInteger") == 3
    assert "DequantizeLinear" not in made["qlinear"][:-1]
    with pytest.raises(UsageError, match="onnx takes the form qdq, qlinear, integer"):
        narrows.lower(program, form="best")


def test_a_wrong_number_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from narrows.backends.onnx.integer import qdq

    right = qdq.exponents
    monkeypatch.setattr(qdq, "exponents", lambda *a: [e + 1 for e in right(*a)])
    program = small()
    with pytest.raises(LowerError, match="of the ONNX model differs from the program"):
        narrows.lower(program)


def test_fake_quantized_programs_are_not_lowered() -> None:
    with pytest.raises(LowerError, match="its integers are not folded yet"):
        narrows.lower(quantized("depthwise").fake)


def test_ties_go_up_where_the_nudged_scale_is_exact() -> None:
    program = small(rounding="half_up")
    with pytest.raises(LowerError, match="rounds ties up, which the form qdq cannot"):
        narrows.lower(program)
    for form in ("qlinear", "integer"):
        narrows.lower(program, form=form)
    signed = small(rounding="half_up", target=aten.tanh.default)
    narrows.lower(signed, form="integer")
    with pytest.raises(LowerError, match="cannot round ties up in this form"):
        narrows.lower(signed, form="qlinear")


def test_accumulators_beyond_float32_are_refused_by_fast_forms() -> None:
    program = small().copy()
    layer = program.node("conv2")
    layer.update_arg(3, [20])
    program.weights["conv2.bias"] = torch.full((4,), 2**27, dtype=torch.int32)
    with program.graph.inserting_before(layer):
        layer.update_arg(2, program.graph.get_attr("conv2.bias"))
    with pytest.raises(LowerError, match="conv2 would not be exact in this form"):
        narrows.lower(program, check=False)


def test_islands_are_held_to_tolerance_and_what_follows_to_equality() -> None:
    artifact = narrows.lower(quantized("cumsum_space").program)
    assert artifact.fidelity["checked"][0]["error"] == 0.0


def test_an_island_may_be_an_output() -> None:
    b = Builder((2, 8))
    x = b.call(aten.cumsum.default, b.call(aten.add.Tensor, b.relu(b.inputs[0]), 1.5), 1)
    program = b.program(x, b.call(aten.mul.Tensor, x, 2.0))
    made = narrows.quantize(program, [program.examples[0]]).program
    artifact = narrows.lower(made)
    assert "golden" not in artifact.manifest  # other machines have other last places
    broken = made.copy()
    node = next(n for n in broken.nodes if n.target is aten.cumsum.default)
    node.target = aten.cumprod.default
    with pytest.raises(LowerError, match="the float island cumsum"):
        held(artifact, broken, 1, exact=True)


def test_functions_are_operators_where_no_kernel_can_miss_a_code() -> None:
    b = Builder((2, 64))
    b.examples = (torch.linspace(-3.9, 3.9, 128).reshape(2, 64),)
    program = b.program(b.call(aten.gelu.default, b.inputs[0]))
    made = narrows.quantize(program, [program.examples[0]]).program
    assert "Gelu" in operators(narrows.lower(made))
    assert "Gather" in operators(narrows.lower(made, form="integer"))


@pytest.mark.parametrize(("count", "by"), [(49, 0), (49, -2), (36, 0), (64, 2), (196, -1)])
@pytest.mark.parametrize("optimize", [True, False])
def test_runtime_averages_every_sum_exactly(count: int, by: int, optimize: bool) -> None:
    assert pooled_exactly(count, by)
    sums = np.arange(0, 255 * count + 1, max(1, count // 40))
    rest = sums % count
    x = (sums // count)[:, None] + (np.arange(count)[None] < rest[:, None])
    exact = divide(torch.from_numpy(sums) << max(-by, 0), count << max(by, 0), "half_even")
    session = OnnxSession(_average(count, by), 1, optimize)
    (got,) = session.run({"x": x.astype(np.uint8)[None, :, :, None]})
    np.testing.assert_array_equal(got.ravel(), exact.clamp(0, 255).numpy())


def test_averages_that_a_rounded_reciprocal_breaks_are_known() -> None:
    assert not pooled_exactly(7, 1)
    assert not pooled_exactly(121, 2)
    assert not pooled_exactly(3136, 3)


def _average(count: int, by: int) -> bytes:
    terms = {"sx": 2.0**-by, "sy": 1.0}
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "sx", "z"], ["a"]),
        helper.make_node("GlobalAveragePool", ["a"], ["b"]),
        helper.make_node("QuantizeLinear", ["b", "sy", "z"], ["y"]),
    ]
    values = [helper.make_tensor(n, TensorProto.FLOAT, [], [v]) for n, v in terms.items()]
    values.append(helper.make_tensor("z", TensorProto.UINT8, [], [0]))
    ends = [
        [helper.make_tensor_value_info(n, TensorProto.UINT8, [1, "c", size, 1])]
        for n, size in (("x", count), ("y", 1))
    ]
    graph = helper.make_graph(nodes, "average", *ends, values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    model.ir_version = 10
    return model.SerializeToString()


def test_add_and_mul_round_as_the_interpreter_on_every_pair_of_codes() -> None:
    grid = ramp(1).new_tensor(range(256))
    for op in (aten.add.Tensor, aten.mul.Tensor):
        b = Builder((256, 1), (256, 256))
        b.examples = ((grid[:, None] - 128) / 16, (grid[None] / 64).expand(256, 256).clone())
        program = b.program(b.call(op, *b.inputs))
        made = narrows.quantize(program, [program.examples], method="minmax").program
        for form in ("qdq", "qlinear"):
            artifact = narrows.lower(made, form=form, check=False)
            for optimize in (True, False):
                (got,) = artifact.run_flat(program.examples, optimize=optimize)
                assert torch.equal(torch.from_numpy(got), made(*program.examples))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("width", [258, 259, 1024, 4000])
def test_the_sums_of_a_layer_norm_are_exact_at_every_width(width: int, signed: bool) -> None:
    low = -1.0 if signed else 0.0
    b = Builder((2, width))
    b.examples = (torch.linspace(low, 1.0, 2 * width).reshape(2, width),)
    normed = b.call(aten.layer_norm.default, b.inputs[0], [width])
    made = narrows.quantize(b.program(normed), [b.examples[0]]).program
    rows = torch.rand(6, width) * (1 - low) + low
    # Codes at the ends have the largest sums; where they hardly differ, an error shows most.
    rows[:5] = 1.0
    rows[1] = low
    rows[2, ::2] = low
    rows[3, ::64] -= 1 / 127
    rows[4, :7] -= 3 / 127
    artifact = narrows.lower(made, samples=1)
    for optimize in (True, False):
        (got,) = artifact.run_flat([rows], optimize=optimize)
        assert np.array_equal(got, made(rows).numpy())


def test_a_window_of_spread_taps_may_reach_far_beyond_the_tensor() -> None:
    """ONNX Runtime refuses padding of a kernel or more, which rounding up would ask for."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.MaxPool2d(3, 4, 1, dilation=2, ceil_mode=True))
    x = torch.randn(4, 3, 9, 10)
    made = narrows.quantize(narrows.capture(net.eval(), (x[:2],)), [x]).program
    artifact = narrows.lower(made, "onnx")
    assert torch.equal(torch.as_tensor(artifact.run_flat([x])[0]), made.run_flat([x])[0])
