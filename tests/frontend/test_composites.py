"""Operators without a row become the operators that ATen composes them of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from narrows.frontend import capture
from narrows.ir.compare import relative_error
from narrows.ir.meta import Meta, op_name
from narrows.ir.ops import table
from narrows.ir.program import Program
from narrows.ir.verify import verify

Forward = Callable[[Any, Tensor], Any]


class Around(nn.Module):
    """A module around one forward function, with weights to read."""

    def __init__(self, function: Forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.weight = nn.Parameter(torch.randn(3, 6, 8, dtype=torch.float64))
        self.lstm = nn.LSTM(6, 4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def tokens(batch: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, 6, generator=generator, dtype=torch.float64)


def captured(function: Forward) -> Program:
    """Return the program of a function; it equals the function at several batch sizes."""
    model = Around(function).eval()
    program = capture(model, tokens(2))
    verify(program, shapes=True)
    assert program.dynamic_batch
    for batch in (1, 2, 5):
        with torch.no_grad():
            expected = model(tokens(batch, seed=batch))
        assert relative_error(program(tokens(batch, seed=batch)), expected) <= 1e-12
    return program


def ops(program: Program) -> list[str]:
    return [op_name(n).partition(".")[0] for n in program.nodes if n.op == "call_function"]


def assigned(m: Any, x: Tensor) -> Tensor:
    y = x * 2
    y[:, 1:3] = x[:, :2].relu()
    y[:, 0] = 1
    return y


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        (lambda m, x: torch.einsum("btc,cd,ed->bte", x, m.weight[0], m.weight[1]), "matmul"),
        (lambda m, x: torch.tensordot(x, m.weight[0], dims=1), "matmul"),
        (lambda m, x: torch.inner(x, m.weight[0].mT), "matmul"),
        (lambda m, x: x.mean(1, keepdim=True).expand_as(x), "expand"),
        (lambda m, x: x.flatten(1).view_as(x) + x.flatten(1).reshape_as(x), "reshape"),
        (lambda m, x: torch.outer(x.mean((0, 1)), x.mean((0, 1))), "mul"),
        (lambda m, x: x.type_as(x.float()), "to"),
        (lambda m, x: torch.baddbmm(x @ x.mT, x, x.mT, beta=0.5, alpha=2), "matmul"),
        (lambda m, x: torch.addbmm(m.weight[0, :4, :4], x, x.mT, beta=0.5, alpha=2), "matmul"),
        (lambda m, x: torch.addmv(x.mean((0, 2)), x.mean(0), m.weight[0, :, 0]), "sum"),
        (lambda m, x: F.normalize(x, dim=-1), "linalg_vector_norm"),
        (lambda m, x: F.cosine_similarity(x, x.exp(), dim=2), "linalg_vector_norm"),
        (lambda m, x: x.max(1).values, "amax"),
        (lambda m, x: x.min(-1, keepdim=True)[0], "amin"),
        (lambda m, x: torch.aminmax(x, dim=2)[1], "amax"),
        (lambda m, x: torch.var_mean(x, 2, correction=0, keepdim=True), "var"),
        (lambda m, x: torch.std_mean(x, 2), "std"),
        (lambda m, x: F.adaptive_max_pool2d(x, 1), "max_pool2d"),
        (lambda m, x: F.adaptive_max_pool2d(x, (2, 3)), "max_pool2d"),
        (lambda m, x: F.adaptive_max_pool1d(x, 3), "max_pool1d"),
        (lambda m, x: F.adaptive_max_pool1d(x, 4), "amax"),  # 6 is no multiple of 4
        (lambda m, x: torch.broadcast_tensors(x, x.mean(0))[1], "expand"),
        (lambda m, x: torch.hstack([x, x]), "cat"),
        (lambda m, x: torch.diff(x, dim=1), "sub"),
        (lambda m, x: torch.special.expit(x), "sigmoid"),
        (assigned, "cat"),
    ],
)  # fmt: skip
def test_composites_have_rows(function: Forward, wanted: str | None) -> None:
    program = captured(function)
    assert table.missing(program) == {}
    if wanted is not None:
        assert wanted in ops(program)


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        (lambda m, x: torch.einsum("btc,cd->btd", x, m.weight[0]), ["matmul"]),
        (lambda m, x: torch.einsum("btc,dc", x, m.weight[0].mT), ["matmul"]),
        (lambda m, x: torch.einsum("bct,cd->bdt", x.mT, m.weight[0]), ["matmul", "permute"]),
        (lambda m, x: torch.einsum("btc,hcd->bthd", x, m.weight), ["matmul", "unflatten"]),
        (lambda m, x: torch.einsum("btc,bsc->bts", x, x.exp()), ["permute", "matmul"]),
        (lambda m, x: torch.einsum("...tc,...sc->...ts", x, x.exp()), ["permute", "matmul"]),
        (lambda m, x: torch.einsum("btc,btc->b", x, x.exp()), ["flatten", "matmul", "squeeze"]),
        (lambda m, x: torch.einsum("btc,bsd->btcsd", x, x.exp()), ["matmul", "unflatten"]),
        (lambda m, x: torch.einsum("btc,c->bt", x, m.weight[0, :, 0]), ["matmul"]),
        (lambda m, x: torch.einsum("btc->bct", x), ["permute"]),
        (lambda m, x: torch.einsum("btc->cb", x), ["sum", "permute"]),
        (lambda m, x: torch.einsum("bt...,hb->ht...", x, x.sum(2).mT), ["matmul"]),
        (lambda m, x: torch.einsum("btc,sc->bt", x, m.weight[0].mT), ["sum", "matmul"]),
        (lambda m, x: torch.einsum("bxc,btc->bx", x[:, :1], x), ["sum", "matmul"]),
        (lambda m, x: torch.einsum("btc,bxc->bxc", x, x[:, :1].exp()), ["sum", "matmul"]),
    ],
)
def test_einsum_is_one_product(function: Forward, wanted: list[str]) -> None:
    program = captured(function)
    assert table.missing(program) == {}
    assert not set(wanted) - set(ops(program))
    assert ops(program).count("matmul") == wanted.count("matmul")


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: torch.einsum("btc,btc->btc", x, x[:, :1]),
        lambda m, x: torch.einsum("btc,btd,bte->cde", x, x, x),
    ],
)
def test_an_einsum_of_another_kind_is_what_aten_makes_of_it(function: Forward) -> None:
    program = captured(function)
    assert table.missing(program) == {}
    assert "einsum" not in ops(program)


@pytest.mark.parametrize(
    ("function", "stays"),
    [
        (lambda m, x: torch.cdist(x, x), "cdist"),
        (lambda m, x: m.lstm(x.transpose(0, 1))[0], "lstm"),
    ],
)
def test_what_has_no_composition_of_rows_stays_one_operator(function: Forward, stays: str) -> None:
    program = captured(function)
    assert ops(program).count(stays) == 1
    assert stays in {name.partition(".")[0] for name in table.missing(program)}


def test_a_recurrent_layer_is_not_unrolled() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(6, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(x)[0]

    program = capture(Net().eval(), torch.randn(2, 100, 6))
    assert "lstm" in ops(program)
    assert len(program.nodes) < 20


def test_parts_come_from_the_line_of_the_whole() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        y = x.exp()
        return torch.einsum("btc,hcd->bthd", y, m.weight)

    program = captured(function)
    parts = [n for n in program.nodes if n.op == "call_function" and op_name(n) != "exp.default"]
    lines = {Meta(n).code for n in parts if op_name(n) != "sym_size.int"}
    assert lines == {'return torch.einsum("btc,hcd->bthd", y, m.weight)'}


def test_what_weights_alone_make_is_composed_for_channels_go_through_it() -> None:
    program = captured(lambda m, x: x @ torch.einsum("hcd,hed->ce", m.weight, m.weight))
    assert "einsum" not in ops(program)
    assert table.missing(program) == {}
