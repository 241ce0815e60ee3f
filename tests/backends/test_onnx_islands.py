"""Layers that stay floating-point between integers: the same numbers in any ONNX Runtime session.

The weights are whole sixteenths, so that a float32 sum of codes times weights is exact in any
order, and what an island gives can be compared with ``==``.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import narrows
from narrows.backends.onnx.session import MODEL
from narrows.errors import LowerError
from tests.builder import Builder, aten
from tests.networks import NETWORKS

LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")


class Net(nn.Module):
    """Layers in a row, a residual, a concat and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 4, 2, 2)
        self.gate = nn.Conv2d(8, 8, 1)
        self.last = nn.Conv2d(12, 4, 1)
        self.head = nn.Linear(4, 5)
        with torch.no_grad():
            for tensor in self.parameters():
                tensor.copy_((tensor * 16).round() / 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.first(x))
        x = x + F.relu(self.middle(x))
        y = torch.cat([F.max_pool2d(self.up(x), 2), self.gate(x)], 1)
        y = self.last(y)
        return self.head(y.mean((2, 3))), y


@functools.cache
def captured() -> narrows.Program:
    torch.manual_seed(0)
    return narrows.capture(Net().eval(), (images(2),), name="net")


def images(batch: int) -> Tensor:
    drawn = torch.randn(batch, 3, 6, 6, generator=torch.Generator().manual_seed(batch))
    return (drawn * 8).round() / 8


@pytest.mark.parametrize(
    ("skip", "form"),
    [
        (("first",), "qdq"),
        (("middle",), "qdq"),
        (("middle",), "qlinear"),
        (("middle", "up", "add", "cat"), "integer"),
        (("gate", "last"), "qdq"),
        (("first", "head"), "qlinear"),
    ],
)
def test_any_layer_may_stay_float(skip: tuple[str, ...], form: str) -> None:
    # With 7 bits no processor's sums of products saturate, whatever a session is told.
    bits: Any = {"weights": 7, "first_last": 7}
    quantized = narrows.quantize(captured(), [images(4)], skip=skip, **bits)
    assert {name.split(".")[0] for name in quantized.plan.floats} == set(skip)
    artifact = narrows.lower(quantized.program, form=form, samples=1)
    x = images(3)
    expected = quantized.program(x)
    for level in LEVELS:  # as a person would run the file, with nothing set but the level
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        session = onnxruntime.InferenceSession(str(artifact.folder / MODEL), options)
        for got, wanted in zip(session.run(None, {"x": x.numpy()}), expected, strict=True):
            np.testing.assert_array_equal(got, wanted.numpy(), err_msg=level)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["first", "middle", "up", "gate", "last", "head", "add", "cat"])
def test_the_integer_program_is_the_fake_quantized_one(name: str, dtype: torch.dtype) -> None:
    program = captured().to(dtype)
    quantized = narrows.quantize(program, [images(4).to(dtype)], skip=[name])  # checked bit for bit
    x = images(3).to(dtype)
    for got, wanted in zip(quantized.program(x), quantized.fake(x), strict=True):
        assert torch.equal(got.double(), wanted.double())


@pytest.mark.parametrize(
    "first",
    [nn.GroupNorm(1, 3), nn.Conv2d(3, 3, 4, padding="same"), nn.InstanceNorm2d(3, affine=True)],
)
def test_an_island_may_read_an_input(first: nn.Module) -> None:
    net = nn.Sequential(first, nn.ReLU(), nn.Conv2d(3, 4, 3)).eval()
    quantized = narrows.quantize(narrows.capture(net, (images(2),)), [images(4)], skip=["0"])
    assert quantized.plan.floats


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("multihead_attention", ("linear", "matmul", "softmax")),  # heads lie on the batch axis
        ("gram_matrix", ("matmul_1",)),  # an operand is called mT
    ],
)
def test_islands_read_what_attention_reads(name: str, kinds: tuple[str, ...]) -> None:
    found = NETWORKS[name]
    inputs = tuple(x.float() for x in found.inputs(4, 1))
    program = narrows.capture(found.build().float(), inputs)
    nodes = [n.name for n in narrows.quantize(program, [inputs]).prepared.nodes]
    skip = [n for n in nodes if any(kind in n for kind in kinds)]
    made = narrows.quantize(program, [inputs], skip=skip)
    artifact = narrows.lower(made.program, samples=1)
    assert artifact.fidelity["checked"][0]["error"] == 0.0


def test_the_first_and_the_last_layers_may_stay_float() -> None:
    plan = narrows.quantize(captured(), [images(4)], first_last="float").plan
    assert sorted(plan.floats) == ["first", "head", "last"]


def test_c_refuses_an_island_and_names_it() -> None:
    made = narrows.quantize(captured(), [images(4)], skip=["middle"]).program
    with pytest.raises(LowerError, match=r"does not compute in integers everywhere: conv2d") as got:
        narrows.lower(made, "c", check=False)
    assert "middle" in got.value.where
    assert "onnx, which keeps float islands" in got.value.hint


def test_c_refuses_an_index_of_codes_which_is_no_island() -> None:
    b = Builder((2, 8))
    program = b.program(b.call(aten.argmax.default, b.call(aten.relu.default, b.inputs[0]), 1))
    made = narrows.quantize(program, [program.examples], strict=True).program
    with pytest.raises(LowerError, match="argmax") as got:
        narrows.lower(made, "c", check=False)
    assert "compute it from the outputs" in got.value.hint


def test_an_operator_without_a_form_is_named() -> None:
    b = Builder((2, 8))
    x = b.call(aten.relu.default, b.inputs[0])
    x = b.call(aten.add.Tensor, x, 1.0)
    x = b.call(aten.special_i0e.default, b.call(aten.log.default, x), name="bessel")
    program = b.program(b.call(aten.relu.default, x))
    made: Any = narrows.quantize(program, [program.examples[0]]).program
    with pytest.raises(LowerError, match="ONNX has no form for special_i0e"):
        narrows.lower(made)
