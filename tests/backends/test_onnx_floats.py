"""Every operator that a rule writes equals torch in ONNX Runtime; what has none is exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import narrows
from narrows.backends.leaves import Leaves
from narrows.backends.onnx.floats import written
from narrows.backends.onnx.floats.rules import RULES
from narrows.backends.onnx.session import MODEL, OnnxSession
from narrows.ir.meta import op_name
from narrows.ir.program import Program

IMAGE, TOKENS, ROW = (2, 6, 8, 12), (2, 5, 6), (2, 6)


def weight(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


class Does(nn.Module):
    """A function as a module, with the weights it is given."""

    def __init__(self, does: Callable[..., Any], *weights: Tensor) -> None:
        super().__init__()
        self.does, self.count = does, len(weights)
        for i, value in enumerate(weights):
            self.register_parameter(f"w{i}", nn.Parameter(value, requires_grad=False))

    def forward(self, x: Tensor) -> Any:
        return self.does(x, *(getattr(self, f"w{i}") for i in range(self.count)))


CASES: dict[str, tuple[tuple[int, ...], nn.Module]] = {
    "conv": (IMAGE, nn.Conv2d(6, 8, (3, 2), (2, 1), (1, 0), (1, 2), groups=2)),
    "conv1d": (TOKENS, nn.Conv1d(5, 4, 3, padding=2, bias=False)),
    "conv3d": ((2, 3, 4, 5, 6), nn.Conv3d(3, 4, 2, padding=1)),
    "transposed": (IMAGE, nn.ConvTranspose2d(6, 4, 3, 2, 1, 1, groups=2)),
    "transposed 1d": (TOKENS, nn.ConvTranspose1d(5, 4, 4, 3, 1, dilation=2, bias=False)),
    "row": (ROW, nn.Linear(6, 4)),
    "tokens": (TOKENS, nn.Linear(6, 4)),
    "tokens without a bias": (TOKENS, nn.Linear(6, 4, bias=False)),
    "product": (TOKENS, Does(lambda x: x @ x.transpose(1, 2))),
    "attention": (TOKENS, Does(lambda x: F.scaled_dot_product_attention(x, 2 * x, x))),
    "masked": (
        TOKENS,
        Does(lambda x, m: F.scaled_dot_product_attention(x, x, x, m, scale=0.3), weight(5, 5)),
    ),
    "batch norm": (IMAGE, nn.BatchNorm2d(6)),
    "layer norm": (TOKENS, nn.LayerNorm(6, eps=1e-3)),
    "layer norm of two axes": (TOKENS, nn.LayerNorm([5, 6], bias=False)),
    "group norm": (IMAGE, nn.GroupNorm(3, 6)),
    "group norm alone": (IMAGE, nn.GroupNorm(2, 6, affine=False)),
    "instance norm": (IMAGE, nn.InstanceNorm2d(6, affine=True)),
    "average": (IMAGE, nn.AvgPool2d(3, 2, 1)),
    "average without its padding": (
        IMAGE,
        nn.AvgPool2d((2, 3), padding=1, count_include_pad=False),
    ),
    "transposed 3d": ((2, 3, 4, 5, 6), nn.ConvTranspose3d(3, 4, 2)),
    "adaptive 1d": (TOKENS, nn.AdaptiveAvgPool1d(3)),
    "scaled tokens": (TOKENS, Does(lambda x, w: F.linear(x, w.abs()), weight(4, 6))),
    "products as weights": (ROW, Does(lambda x, w: F.linear(w, x * 2), weight(4, 6))),
    "average 3d": ((2, 3, 4, 5, 6), nn.AvgPool3d(2, 1)),
    "chosen": (ROW, Does(lambda x, b: torch.where(b, x, x * 2), weight(6) > 0)),
    "average 1d": (TOKENS, nn.AvgPool1d(2)),
    "adaptive": (IMAGE, nn.AdaptiveAvgPool2d((4, 3))),
    "adaptive to one": (IMAGE, nn.AdaptiveAvgPool2d(1)),
    "largest": (IMAGE, nn.MaxPool2d(3, 2, 1, ceil_mode=True)),
    "silu": (ROW, nn.SiLU()),
    "gelu": (ROW, nn.GELU()),
    "gelu by tanh": (ROW, nn.GELU("tanh")),
    "hard": (ROW, Does(lambda x: F.hardsigmoid(4 * x) + F.hardswish(4 * x))),
    "elu": (ROW, nn.ELU(0.7)),
    "selu": (ROW, nn.SELU()),
    "mish": (ROW, nn.Mish()),
    "leaky": (ROW, nn.LeakyReLU(0.2)),
    "prelu": (IMAGE, Does(F.prelu, weight(6))),
    "prelu of one": (IMAGE, Does(F.prelu, weight(1))),
    "softplus": (ROW, Does(lambda x: F.softplus(30 * x))),
    "clips": (
        ROW,
        Does(lambda x: F.relu6(9 * x) + x.clamp(min=-0.2) + x.clamp(max=0.1) + F.hardtanh(x)),
    ),
    "functions": (
        ROW,
        Does(lambda x: (x.exp() + 1).log() + x.abs().sqrt() - (-x).erf() + x.tanh()),
    ),
    "others": (
        ROW,
        Does(lambda x: x.sin() + x.cos() * x.floor() - x.ceil() + x.sign() + x.sigmoid()),
    ),
    "roots": (ROW, Does(lambda x: (x.abs() + 0.1).rsqrt() + (x.abs() + 0.1).reciprocal())),
    "softmax": (TOKENS, Does(lambda x: x.softmax(1) + x.log_softmax(-1))),
    "numbers": (ROW, Does(lambda x: (2 * x + 1 - x / 3) ** 2 + (1 - x) + (x - 0.25))),
    "of two": (ROW, Does(lambda x, w: (x + w) * w - x / (w + 9) + torch.maximum(x, w), weight(6))),
    "where": (ROW, Does(lambda x, w: torch.minimum(x, w), weight(6))),
    "means": (IMAGE, Does(lambda x: x.mean(1, keepdim=True) + x.mean((2, 3), keepdim=True))),
    "mean of an image": (IMAGE, Does(lambda x: x.mean((-1, -2)))),
    "sums": (IMAGE, Does(lambda x: x.sum(1) + x.sum((1, -1), keepdim=True)[:, 0])),
    "norm": (TOKENS, Does(lambda x: F.normalize(x, dim=-1))),
    "extremes": (IMAGE, Does(lambda x: x.amax((2, 3)) + x.amin((2, 3)))),
    "joined": (TOKENS, Does(lambda x: torch.cat([x, torch.stack([x, 2 * x], 2).flatten(1, 2)], 1))),
    "padded": (IMAGE, Does(lambda x: F.pad(F.pad(x, (1, 0, 2, 1)), (0, 1), value=3.0))),
    "reflected": (IMAGE, Does(lambda x: F.pad(x, (1, 2, 0, 1), "reflect"))),
    "replicated": (IMAGE, Does(lambda x: F.pad(x, (1, 2, 0, 1), "replicate"))),
    "bilinear": (IMAGE, Does(lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"))),
    "bilinear to a size": (IMAGE, Does(lambda x: F.interpolate(x, (5, 17), mode="bilinear"))),
    "corners": (
        IMAGE,
        Does(lambda x: F.interpolate(x, (5, 17), mode="bilinear", align_corners=True)),
    ),
    "bicubic": (IMAGE, Does(lambda x: F.interpolate(x, (12, 20), mode="bicubic"))),
    "nearest": (IMAGE, Does(lambda x: F.interpolate(x, scale_factor=2))),
    "shuffled": (
        (2, 8, 4, 4),
        Does(lambda x: F.pixel_unshuffle(F.channel_shuffle(F.pixel_shuffle(x, 2), 2), 2)),
    ),
    "expanded": (
        TOKENS,
        Does(lambda x, w: torch.cat([w.expand(x.shape[0], -1, -1), x], 1), weight(1, 1, 6)),
    ),
    "repeated": (
        TOKENS,
        Does(lambda x: x.repeat(1, 2, 1).roll(2, 1).flip(2).repeat_interleave(2, 1)),
    ),
    "heads": (TOKENS, Does(lambda x: x.reshape(x.shape[0], 5, 2, 3).permute(2, 0, 3, 1)[1])),
    "windows": (
        (2, 4, 4, 6),
        Does(
            lambda x: (
                x.view(-1, 2, 2, 2, 2, 6).transpose(2, 3).reshape(-1, 4, 6).mean(1).view(-1, 4, 6)
            )
        ),
    ),
    "parts": (IMAGE, Does(lambda x: torch.chunk(x, 3, 1)[1] + x[:, 1:3] + x[:, None, 4])),
    "scaled weights": (
        ROW,
        Does(lambda x, w, s: F.linear(x, w * s.exp()), weight(4, 6), weight(4, 1)),
    ),
    "positions": (TOKENS, Does(lambda x, t: x + t[torch.arange(5) % 3], weight(3, 6))),
    "large weights": (
        (2, 40),
        nn.Sequential(nn.Linear(40, 60), nn.Unflatten(1, (3, 20)), nn.Linear(20, 90)),
    ),
    "itself": (ROW, Does(lambda x: (x.clone(), x.relu(), x.relu().clone().contiguous()))),
}


def program_of(name: str) -> Program:
    shape, module = CASES[name]
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean), nn.init.uniform_(part.running_var, 0.5, 2)
    example = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return narrows.capture(module.eval(), (example,))


def model_of(program: Program, opset: int = 20) -> onnx.ModelProto | None:
    made = written(program, Leaves.of(program).computed, opset)
    return None if made is None else onnx_ir.to_proto(made)


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_equals_torch(name: str) -> None:
    program = program_of(name)
    model = model_of(program)
    assert model is not None
    onnx.checker.check_model(model, full_check=True)
    session = OnnxSession(model.SerializeToString(), 1)
    for batch in (1, 3):
        x = torch.randn(batch, *CASES[name][0][1:], generator=torch.Generator().manual_seed(batch))
        found = dict(
            zip(
                (o.name for o in model.graph.output),
                session.run({model.graph.input[0].name: x.numpy()}),
                strict=True,
            )
        )
        wanted = zip(program.output.args[0], program.run_flat([x]), strict=True)
        for node, value in wanted:
            if node.op == "placeholder":
                continue
            assert found[node.name].shape == value.shape
            error = np.abs(found[node.name] - value.numpy()).max() / max(
                float(value.abs().max()), 1e-3
            )
            assert error < 2e-6, node.name


def test_pictures_of_bytes_and_tokens_are_read() -> None:
    picture = Does(lambda x, w: F.conv2d(x.to(torch.float32) / 255, w), weight(4, 3, 2, 2))
    tokens = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 3))
    for module, x in (
        (picture, torch.randint(256, (2, 3, 5, 5), dtype=torch.uint8)),
        (tokens, torch.randint(11, (2, 7))),
    ):
        program = narrows.capture(module.eval(), (x,))
        model = model_of(program)
        assert model is not None
        session = OnnxSession(model.SerializeToString(), 1)
        (found,) = session.run({model.graph.input[0].name: x.numpy()})
        assert np.allclose(found, program(x).numpy(), atol=1e-6)


class Odd(nn.Module):
    """A network with one thing that no rule is for."""

    def __init__(self, odd: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.odd = nn.Linear(6, 6), odd

    def forward(self, x: Tensor) -> Any:
        return self.odd(self.linear(x))


@pytest.mark.parametrize(
    "odd",
    [
        lambda x: x.cumsum(1),  # an operator without a rule
        lambda x: F.softplus(x, threshold=1.0),  # a rule that does not fit
        lambda x: (x > 0).to(torch.float32),  # other numbers than floats
        lambda x: x.reshape(-1, 3),  # a result with two rows an example
        lambda x: x.double() * 2,
    ],
)
def test_a_program_with_one_operator_that_has_no_rule_is_exported(odd: Callable[[Tensor], Any]):
    module, x = Odd(odd).eval(), torch.randn(2, 6)
    program = narrows.capture(module, (x,))
    assert model_of(program) is None
    artifact = narrows.lower(program)
    assert np.allclose(artifact.run(x), module(x).detach().numpy(), atol=1e-5)


def test_gelu_came_with_opset_20() -> None:
    program = program_of("gelu")
    assert model_of(program, 20) is not None
    assert model_of(program, 19) is None
    assert narrows.lower(program, "onnx", opset=18).fidelity


def test_weights_are_not_copied_and_keep_their_names(tmp_path: Path) -> None:
    program = program_of("large weights")
    made = written(program, Leaves.of(program).computed, 20)
    held = made.graph.initializers
    assert held["0.weight"].const_value.raw.data_ptr() == program.weights["0.weight"].data_ptr()
    assert {"0.weight", "0.bias", "2.weight.T", "2.bias"} <= set(held)
    artifact = narrows.lower(program)
    names = {t.name for t in onnx.load(artifact.folder / MODEL).graph.initializer}
    assert {"0.weight", "0.bias", "2.weight.T", "2.bias"} <= names


def test_a_weight_may_have_the_name_of_an_input() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(torch.randn(6))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.x

    x = torch.randn(2, 6)
    module = Named().eval()
    artifact = narrows.lower(narrows.capture(module, (x,)))
    assert np.allclose(artifact.run(x), module(x).detach().numpy())


def test_every_rule_is_tried() -> None:
    tried = {
        op_name(node) for name in CASES for node in program_of(name).graph.nodes
        if node.op == "call_function" and not isinstance(node.target, type(len))
    }  # fmt: skip
    tried |= {"to.dtype", "embedding.default"}
    same = {"mm.default", "bmm.default", "add.Scalar", "sub.Scalar", "mul.Scalar", "div.Scalar"}
    assert sorted(RULES.keys() - tried - same) == []
