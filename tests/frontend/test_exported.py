"""Exported programs as inputs: decomposed or not, with a free or a fixed batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from narrows.errors import CaptureError
from narrows.frontend import capture
from narrows.ir.compare import relative_error
from narrows.ir.meta import Meta, op_name
from narrows.ir.verify import verify


class Mixed(nn.Module):
    """One of each operator that decompositions take apart."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1, groups=1), nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2, groups=2)
        self.line = nn.Conv1d(8, 8, 3)
        self.groups, self.layer = nn.GroupNorm(2, 8), nn.LayerNorm(8)
        self.pool, self.spread = nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(3)
        self.head, self.bare = nn.Linear(8, 5), nn.Linear(5, 5, bias=False)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu_(self.norm(self.conv(x)))
        x = self.spread(self.groups(self.pool(self.up(x))))
        x = self.drop(self.layer(self.line(x.flatten(2)).mean(2)))
        x = self.bare(self.head(x))
        return x.softmax(1), x.log_softmax(1)


@pytest.fixture(scope="module")
def model() -> Mixed:
    torch.manual_seed(0)
    return Mixed().double().eval()


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 6, 6, dtype=torch.float64)


def quietly(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with warnings.catch_warnings():  # torch warns of its own deprecations
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def export(model: nn.Module, inputs: Tensor, *, free: bool = True) -> ExportedProgram:
    shapes = ({0: Dim("batch")},) if free else None
    return quietly(torch.export.export, model, (inputs,), dynamic_shapes=shapes)


DECOMPOSE: dict[str, Callable[[ExportedProgram], ExportedProgram]] = {
    "undecomposed": lambda e: e,
    "functionalised": lambda e: quietly(e.run_decompositions, {}),
    "core": lambda e: quietly(e.run_decompositions),
}


@pytest.mark.parametrize("how", DECOMPOSE)
def test_exported_program(model: Mixed, how: str) -> None:
    program = capture(DECOMPOSE[how](export(model, images(3))))
    verify(program, shapes=True)
    assert program.dynamic_batch
    assert program.examples[0].shape[0] == 2
    assert program.notes == ()
    inputs = images(4)
    with torch.no_grad():
        assert relative_error(program(inputs), model(inputs)) <= 1e-12


def test_decomposed_operators_are_mapped_back(model: Mixed) -> None:
    plain = capture(model, images(1))
    core = capture(DECOMPOSE["core"](export(model, images(2))))
    ours, theirs = ({op_name(n) for n in p.nodes} for p in (plain, core))
    weights = {n: [op_name(u) for u in plain.users_of(n)] for n in plain.weights}
    assert {n: [op_name(u) for u in core.users_of(n)] for n in core.weights} == weights
    assert {"softmax.int", "log_softmax.int", "max_pool2d.default"} <= ours & theirs
    assert Meta(core.node("conv")).source == Meta(plain.node("conv")).source


def test_names_of_a_decomposed_program_are_those_of_the_modules(model: Mixed) -> None:
    core = capture(DECOMPOSE["core"](export(model, images(2))))
    assert {"conv", "norm", "up", "groups", "layer", "head", "bare"} <= {n.name for n in core.nodes}


def test_fixed_batch_of_the_export_is_kept_and_noted(model: Mixed) -> None:
    program = capture(export(model, images(3), free=False))
    assert not program.dynamic_batch
    assert program.examples[0].shape[0] == 3
    assert [n.reason for n in program.notes] == ["fixed-batch"]


def test_free_batch_can_be_fixed(model: Mixed) -> None:
    program = capture(export(model, images(3)), dynamic_batch=False)
    verify(program, shapes=True)
    assert not program.dynamic_batch
    assert program.examples[0].shape[0] == 3


def test_other_free_axes_stay_free() -> None:
    class Halves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(x.shape[0], 2, x.shape[1] // 2).sum(1)

    half = Dim("half", min=2, max=50)
    exported = quietly(
        torch.export.export,
        Halves(),
        (torch.randn(3, 8),),
        dynamic_shapes=({0: Dim("batch"), 1: 2 * half},),
    )
    program = capture(exported)
    verify(program, shapes=True)
    assert Meta(program.placeholders[0]).dynamic == (0, 1)
    inputs = torch.randn(5, 12)
    assert torch.equal(program(inputs), Halves()(inputs))


def test_example_inputs_of_another_structure(model: Mixed) -> None:
    with pytest.raises(CaptureError, match="another structure"):
        capture(export(model, images(2)), (images(2), images(2)))


def test_module_of_an_exported_program(model: Mixed) -> None:
    module = quietly(export(model, images(2)).module)
    program = capture(module, images(1))
    verify(program, shapes=True)
    assert "conv.weight" in program.weights
    assert Meta(program.node("norm")).source.startswith("tests/frontend/test_exported.py:")


def test_shared_weights_of_an_exported_program() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval()
    model[2].weight = model[0].weight
    program = capture(quietly(torch.export.export, model, (torch.randn(2, 4),)))
    assert program.aliases == {"2.weight": "0.weight"}
