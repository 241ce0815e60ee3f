"""What the check of an artifact allows an operator, and choices of the ONNX form by hand."""

from __future__ import annotations

import os
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import narrows
from narrows.backends.onnx import rounding
from narrows.backends.onnx.integer.portable import countable_pads
from narrows.backends.onnx.quiet import quiet_native
from narrows.backends.onnx.rounding import AROUND_ONE, NEARLY, UNITS
from narrows.backends.onnx.session import MODEL
from narrows.ir.program import Program
from tests.builder import Builder, aten

EPS = UNITS * torch.finfo(torch.float32).eps

# ------------------------------------------------------------------ what rounding may do


def allowed(target: Any, *args: Any) -> Tensor:
    b = Builder(*(tuple(a.shape) for a in args if isinstance(a, Tensor)))
    nodes = iter(b.inputs)
    node: fx.Node = b.call(target, *(next(nodes) if isinstance(a, Tensor) else a for a in args))
    wide = tuple(a.double() if isinstance(a, Tensor) else a for a in args)
    return rounding._allowed(node, target(*wide), wide, {}, {node.name: torch.float32})


def test_a_sum_of_products_is_as_exact_as_its_products_are_large() -> None:
    x, w = torch.tensor([[1e4, -1e4], [1.0, 1.0]]), torch.tensor([[1.0, 1.0]])
    found = allowed(aten.linear.default, x, w)
    assert found.flatten().tolist() == pytest.approx([2e4 * EPS, 2 * EPS])


def test_a_function_is_as_exact_as_its_result_or_as_one() -> None:
    x = torch.tensor([[2.0, -0.5]])  # exact in either type
    assert allowed(aten.neg.default, x).flatten().tolist() == pytest.approx([2 * EPS, 0.5 * EPS])
    assert aten.tanh.default in AROUND_ONE
    zero = torch.tensor([[0.0, 0.0]])
    assert allowed(aten.tanh.default, zero).flatten().tolist() == pytest.approx([EPS, EPS])
    assert allowed(aten.expm1.default, zero).flatten().tolist() == [0.0, 0.0]


def test_nobody_is_held_to_more_than_torch_keeps_to() -> None:
    x = torch.tensor([[1.0, 1e8]])
    off = float((x.sin().double() - x.double().sin()).abs().max())
    assert off > 0
    found = allowed(aten.add.Tensor, torch.tensor([[1e8, 1.0]]), torch.tensor([[1.0, 1.0]]))
    lost = NEARLY * 1.0  # of 1e8 + 1 in float32
    assert found.flatten().tolist() == pytest.approx([1e8 * EPS + lost, 2 * EPS + lost], rel=1e-6)


def test_an_operator_without_a_kernel_is_as_exact_as_its_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def only_wide(x: Tensor) -> Tensor:
        if x.dtype is not torch.float64:
            raise NotImplementedError
        return 2 * x

    node = Builder((1, 2)).inputs[0]
    monkeypatch.setattr(rounding.table, "contracts", lambda _: False)
    node.target = only_wide  # type: ignore[assignment]
    x = torch.tensor([[3.0, -1.0]]).double()
    found = rounding._allowed(node, only_wide(x), (x,), {}, {node.name: torch.float32})
    assert found.flatten().tolist() == pytest.approx([6 * EPS, 2 * EPS])


# ------------------------------------------------------------------ quiet


def test_what_keeps_native_code_quiet_leaves_no_file_open(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def next_free() -> int:
        descriptor = os.dup(0)
        os.close(descriptor)
        return descriptor

    before = next_free()
    for _ in range(2):
        with quiet_native():
            os.write(1, b"dropped")
            os.write(2, b"dropped")
    with pytest.raises(ZeroDivisionError), quiet_native():
        raise ZeroDivisionError
    assert next_free() == before
    os.write(1, b"out")
    os.write(2, b"err")
    assert tuple(capfd.readouterr()) == ("out", "err")


# ------------------------------------------------------------------ forms


def integers(module: nn.Module, x: Tensor, **options: Any) -> Program:
    program = narrows.capture(module.eval(), (x,))
    return narrows.quantize(program, [x], method="minmax", **options).program


class Pool(nn.Module):
    def __init__(self, *how: Any) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x.relu(), *self.how)


@pytest.mark.parametrize(
    ("how", "pads"),
    [
        (([2, 3], [2, 2], 0, False, True), [0, 0, 0, 0]),
        (([2, 3], [2, 2], [1, 1], False, True), [1, 1, 1, 1]),
        (([2, 3], [2, 2], 0, True, True), None),  # one axis ends in a part of a window
        (([2, 3], [2, 2], 0, True, False), [0, 0, 0, 1]),
        (([2, 2], [2, 2], 0, True, True), [0, 0, 0, 0]),
        (([3, 3], [2, 2], 0, True, True), None),
    ],
)
def test_padding_that_is_counted_alike(how: Any, pads: list[int] | None) -> None:
    program = integers(Pool(*how), torch.linspace(-1, 1, 96).reshape(2, 2, 4, 6))
    node = next(n for n in program.nodes if "average_pool" in str(n.target))
    assert countable_pads(node) == pads
    artifact = narrows.lower(program, samples=1)  # compares, with ==
    ops = [n.op_type for n in onnx.load(artifact.folder / MODEL).graph.node]
    assert ("AveragePool" in ops) <= (pads is not None)


@pytest.mark.parametrize(
    ("bits", "form", "told"), [(8, "qdq", True), (6, "qdq", False), (8, "qlinear", False)]
)
def test_sessions_are_told_of_where_products_may_be_cut_off(
    bits: int, form: str, told: bool
) -> None:
    options: dict[str, Any] = {"weights": bits, "first_last": None}
    program = integers(nn.Linear(6, 5), torch.randn(4, 6), **options)
    artifact = narrows.lower(program, form=form, samples=1)
    assert any(n["reason"] == "session" for n in artifact.notes) == told


def test_a_float_program_needs_no_session_of_its_own() -> None:
    program = narrows.capture(nn.Linear(6, 5).eval(), (torch.randn(4, 6),))
    assert not [n for n in narrows.lower(program, samples=1).notes if n["reason"] == "session"]
