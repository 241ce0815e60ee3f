"""The batch's axis: free where the model allows it, fixed with a note where it does not."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import narrows
from narrows.frontend import capture
from narrows.ir.compare import relative_error
from narrows.ir.meta import Meta, op_name
from narrows.ir.verify import verify
from tests.frontend.test_capture import assert_equal, build, images


class ManyHeads(nn.Module):
    """Uses its batch size in arithmetic, as attention over windows does."""

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        windows = x.view(batch, channels, 2, height // 2, 2, width // 2).permute(0, 2, 4, 1, 3, 5)
        tokens = windows.reshape(batch * 4, channels, -1).softmax(-1)
        return tokens.reshape(batch, 4 * channels, -1).flatten(1) * x.shape[0]


def test_sizes_of_the_batch_have_one_node() -> None:
    program = capture(ManyHeads().eval(), images(1))
    verify(program, shapes=True)
    sizes = [n for n in program.nodes if op_name(n) == "sym_size.int"]
    assert [(n.name, n.args) for n in sizes] == [("sym_size", (program.placeholders[0], 0))]
    assert Meta(sizes[0]).size == 2
    assert_equal(program, ManyHeads(), images(3))


def test_sizes_of_two_inputs_have_one_node() -> None:
    class Both(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x.reshape(x.shape[0], -1) + y.reshape(y.shape[0], -1)

    program = capture(Both().eval(), (images(1), images(1)))
    assert sum(op_name(n) == "sym_size.int" for n in program.nodes) == 1
    assert_equal(program, Both(), images(3), images(3))


def test_fixed_batch_has_no_size_nodes() -> None:
    program = capture(ManyHeads().eval(), images(2), dynamic_batch=False)
    assert all(Meta(n).shape is not None for n in program.nodes if n.op == "call_function")


class OnlyTwo(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] != 2:
            raise ValueError("two samples, please")
        return x * 2


class AtMostSeven(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] < 8 else x


class ViewOfFour(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(4, 3, 36) * 2


@pytest.mark.parametrize(
    ("model", "batch", "why"),
    [
        (OnlyTwo(), 2, "makes a constant of it"),
        (AtMostSeven(), 3, "asks for 2 <= batch and batch <= 7"),
        (ViewOfFour(), 4, "shape '\\[4, 3, 36\\]' is invalid"),
    ],
)
def test_specialised_batch_falls_back_to_the_examples(
    model: nn.Module, batch: int, why: str
) -> None:
    program = capture(model.eval(), images(batch))
    verify(program, shapes=True)
    assert not program.dynamic_batch
    assert program.examples[0].shape[0] == batch
    assert_equal(program, model, images(batch, seed=9))
    (note,) = program.notes
    assert note.reason == "fixed-batch"
    assert note.source.startswith("tests/frontend/test_batch.py:")
    assert re.search(why, note.message)


class Squeezed(nn.Module):
    """Takes axes away by whichever call it is given."""

    def __init__(self, call: Any) -> None:
        super().__init__()
        self.conv, self.head, self.call = nn.Conv2d(3, 6, 3), nn.Linear(6, 2), call

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.call(self.conv(x).mean((2, 3), keepdim=True)))


@pytest.mark.parametrize(
    "call",
    [
        lambda y: y.squeeze(),
        lambda y: y.squeeze((0, 2, 3)),
        lambda y: y.flatten(1).squeeze(0),
    ],
    ids=["all", "axes", "the batch"],
)
def test_what_squeezes_the_batch_fixes_it(call: Any) -> None:
    for batch in (1, 3):
        model, x = build(Squeezed(call)), images(batch)
        program = capture(model, (x,))
        (note,) = [n for n in program.notes if n.reason == "fixed-batch"]
        assert "squeezes the batch's axis" in note.message
        assert "test_batch.py:" in note.message
        assert not program.dynamic_batch
        assert_equal(program, model, x)


def test_squeezed_axes_that_are_named_leave_the_batch_free() -> None:
    program = capture(build(Squeezed(lambda y: y.squeeze((-2, -1)))), (images(1),))
    assert program.dynamic_batch
    assert program.notes == ()


def test_an_exported_program_that_squeezes_keeps_the_batch_of_its_example() -> None:
    model, x = build(Squeezed(lambda y: y.squeeze())), images(3)
    free = ({0: torch.export.Dim("b")},)
    program = capture(torch.export.export(model, (x,), dynamic_shapes=free))
    assert not program.dynamic_batch
    assert_equal(program, model, x)


@pytest.mark.parametrize(
    "call",
    [
        lambda y: y.sum().squeeze(0),
        lambda y: y.sum().mean(0),
        lambda y: y.sum().softmax(0).cumsum(0),
        lambda y: y.sum() / (y.sum() ** 2).mean(-1, keepdim=True).sqrt(),
        lambda y: y / (y.pow(2).mean(-1, keepdim=True) + 1).sqrt() * y.shape[0],
    ],
    ids=["squeeze", "mean", "softmax", "norm of one number", "norm times the batch"],
)
def test_numbers_without_axes(call: Any) -> None:
    model = build(Net(call))
    program = capture(model, (torch.randn(2, 6, dtype=torch.float64),))
    x = torch.randn(3, 6, dtype=torch.float64)
    assert_equal(program, model, x)
    plan = narrows.plan(program, keep_outputs={"layer.weight": [0, 2]})
    assert relative_error(narrows.apply(program, plan)(x), plan.masked(program)(x)) <= 1e-12


class Net(nn.Module):
    """A function of a linear layer's result."""

    def __init__(self, call: Any) -> None:
        super().__init__()
        self.layer, self.call = nn.Linear(6, 4), call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.layer(x))
