"""Second names of operators: the program has one spelling, and the numbers are the model's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import narrows
from narrows.frontend.spellings import SPELLINGS
from narrows.ir.ops import table

aten = torch.ops.aten
Form = Callable[[Tensor, Tensor], Tensor]

FORMS: dict[str, Form] = {
    "subtract": lambda x, y: torch.subtract(x, y, alpha=2),
    "multiply": torch.multiply,
    "divide": torch.divide,
    "true_divide": torch.true_divide,
    "add a number": lambda x, _: aten.add.Scalar(x, 2, 3),
    "sub a number": lambda x, _: aten.sub.Scalar(x, 2, 0.5),
    "subtract a number": lambda x, _: aten.subtract.Scalar(x, 2),
    "mul by a number": lambda x, _: aten.mul.Scalar(x, 0.3),
    "multiply by a number": lambda x, _: aten.multiply.Scalar(x, 0.3),
    "div by a number": lambda x, _: aten.div.Scalar(x, 0.3),
    "divide by a number": lambda x, _: aten.divide.Scalar(x, 0.3),
    "true_divide by a number": lambda x, _: aten.true_divide.Scalar(x, 0.3),
    "absolute": lambda x, _: torch.absolute(x),
    "negative": lambda x, _: torch.negative(x),
    "positive": lambda x, _: torch.positive(x) + 1,
    "clip": lambda x, _: torch.clip(x, -0.5, 0.5),
    "clip by tensors": lambda x, y: torch.clip(x, y - 1, y),
    "max of two": torch.max,
    "min of two": torch.min,
    "and": lambda x, y: ((x > 0) & (y > 0)).to(x.dtype),
    "or": lambda x, y: ((x > 0) | (y > 0)).to(x.dtype),
    "xor": lambda x, y: ((x > 0) ^ (y > 0)).to(x.dtype),
    "concat": lambda x, y: torch.concat([x, y], 1),
    "concatenate": lambda x, y: torch.concatenate([x, y], -1),
    "swapaxes": lambda x, _: x.swapaxes(1, -1),
    "swapdims": lambda x, _: x.swapdims(-1, 1),
    "movedim": lambda x, _: x.movedim(1, -1),
    "movedim of two": lambda x, _: x.movedim([1, 3], [2, 1]),
    "moveaxis": lambda x, _: x.moveaxis(-1, 1),
    "moveaxis of two": lambda x, _: x.moveaxis([1, 2], [-1, 1]),
    "T": lambda x, _: aten.numpy_T(x[:, :, 0, 0]).sum(0, keepdim=True) + 0 * x[:, :1, 0, 0],
    "t": lambda x, _: x[0, :, :, 0].t()[None] + 0 * x[:, :1, :1, 0],
    "mT": lambda x, _: x.mT,
    "adjoint": lambda x, _: torch.adjoint(x),
    "narrow": lambda x, _: x.narrow(1, 2, 3),
    "narrow from the end": lambda x, _: x.narrow(1, -3, 3),
    "narrow before the end": lambda x, _: x.narrow(-1, -3, 2),
    "narrow of the batch": lambda x, _: x.narrow(0, 0, x.shape[0]) + x.narrow(2, 1, 1),
    "mul by a size": lambda x, _: aten.mul.Scalar(x, x.shape[0]),
    "by names": lambda x, y: torch.max(input=torch.swapaxes(x, axis0=2, axis1=3), other=y),
    "movedim by names": lambda x, _: torch.movedim(x, source=1, destination=2),
    "narrow_copy": lambda x, _: torch.narrow_copy(x, 2, 1, 2),
    "split_with_sizes": lambda x, _: torch.split_with_sizes(x, [2, 4], 1)[1],
    "var": lambda x, _: aten.var.dim(x, [2, 3]),
    "var of all": lambda x, _: aten.var.dim(x, [2, 3], False, True),
    "std": lambda x, _: aten.std.dim(x, [1], True, True),
}


class Net(nn.Module):
    def __init__(self, form: Form) -> None:
        super().__init__()
        self.a, self.b, self.form = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1), form

    def forward(self, x: Tensor) -> Tensor:
        return self.form(self.a(x), self.b(x))


@pytest.mark.parametrize("name", FORMS)
def test_one_spelling_reaches_the_program(name: str) -> None:
    torch.manual_seed(0)
    net = Net(FORMS[name]).double().eval()
    program = narrows.capture(net, (torch.randn(2, 3, 4, 4).double(),))
    targets = {n.target for n in program.nodes if n.op == "call_function"}
    assert not targets & set(SPELLINGS)
    assert table.missing(program) == {}
    x = torch.randn(2, 3, 4, 4).double()
    torch.testing.assert_close(program(x), net(x), rtol=0, atol=0)


def test_a_second_name_has_no_row() -> None:
    assert [row.name for row in table.rows() if row.target in SPELLINGS] == []


@pytest.mark.parametrize("keep", [False, True])
def test_the_largest_alone_needs_no_index(keep: bool) -> None:
    def both(x: Tensor, y: Tensor) -> Tensor:
        return x.max(-1, keepdim=keep).values + y.min(dim=2 if keep else -1, keepdim=keep)[0]

    net = Net(both).double().eval()
    program = narrows.capture(net, (torch.randn(2, 3, 4, 4).double(),))
    names = {n.target for n in program.nodes}
    assert {aten.amax.default, aten.amin.default} <= names
    assert aten.max.dim not in names
    x = torch.randn(2, 3, 4, 4).double()
    torch.testing.assert_close(program(x), net(x), rtol=0, atol=0)


def test_the_largest_with_its_index_stays() -> None:
    net = Net(lambda x, y: x.max(2).values + x.max(2).indices * y.mean(2)).double().eval()
    program = narrows.capture(net, (torch.randn(2, 3, 4, 4).double(),))
    assert aten.max.dim in {n.target for n in program.nodes}
    x = torch.randn(2, 3, 4, 4).double()
    torch.testing.assert_close(program(x), net(x), rtol=0, atol=0)
