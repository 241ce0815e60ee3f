"""Sums that a target has no place for are refused, with the node; what saturates gives the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

import narrows
import narrows.ir.integer.comparisons
import narrows.ir.integer.windows
from narrows.backends.c.compiler import find_compiler
from narrows.errors import LowerError
from narrows.ir.integer.grid import Grid
from narrows.ir.meta import Meta
from narrows.ir.program import Program
from tests.backends.marks import NEEDS_TVM
from tests.builder import Builder, aten

needs_compiler = pytest.mark.skipif(not find_compiler(), reason="there is no C compiler")
ops: Any = torch.ops.narrows


def single(
    make: Callable[[Builder, fx.Node], fx.Node], *shape: int, grid: Grid | None = None
) -> Program:
    """Return a program of one integer operator on bytes, or on codes of a grid."""
    b = Builder(shape)
    (x,) = b.inputs
    if grid is None:
        b.examples = (torch.full(shape, 255, dtype=torch.uint8),)
    else:
        call = (x, grid.exponent, grid.zero, grid.low, grid.high, "half_even", grid.wide)
        x = b.call(ops.quantize.default, *call)
        Meta(x).grid = grid
    made = make(b, x)
    Meta(made).grid = Grid(0)
    return b.program(made)


def mean(by: int, divisor: int = 0) -> Callable[[Builder, fx.Node], fx.Node]:
    return lambda b, x: b.call(ops.mean.default, x, [1], True, by, 0, 0, 0, 255, divisor)


def add(up: int) -> Callable[[Builder, fx.Node], fx.Node]:
    return lambda b, x: b.call(ops.add.default, x, x, up, 0, up, 0, 0, 0, 0, 255)


def compare(up: int) -> Callable[[Builder, fx.Node], fx.Node]:
    return lambda b, x: b.call(ops.compare.default, x, x, "gt", up, 0, 0, 0)


def matmul(b: Builder, x: fx.Node) -> fx.Node:
    turned = b.call(aten.permute.default, x, [1, 0])
    Meta(turned).grid = Meta(x).grid
    return b.call(ops.matmul.default, x, turned, -18, 0, 0, 0, 0, 255)


def resample(b: Builder, x: fx.Node) -> fx.Node:
    places = b.weight("places", torch.tensor([[0, 1], [1, 2]]))
    weights = b.weight("weights", torch.tensor([[2**23, 2**16], [2**16, 2**23]], dtype=torch.int32))
    return b.call(ops.resample.default, x, [places], [weights], 23, 0, 0, 0, 255)


REFUSED: list[tuple[str, Callable[[Builder, fx.Node], fx.Node], tuple[int, ...], str]] = [
    ("c", mean(0), (1, 2**23 + 2**16), "averages too much"),
    ("c", resample, (1, 1, 3), "averages over too much"),
    ("c", add(41), (1, 3), r"adds numbers whose scales are 2\^41 apart"),
    ("c", compare(41), (1, 3), r"compares numbers whose scales are 2\^41 apart"),
    ("c", matmul, (2, 2**14), "computes numbers up to"),
    ("tvm", mean(-52), (1, 2**10), "an average that is shifted by -52"),
    ("tvm", resample, (1, 1, 3), "weighted sums of up to 2,155,806,720"),
    ("tvm", add(53), (1, 3), "an operand that is shifted to the left by 53"),
    ("tvm", compare(53), (1, 3), "whose scales are too far apart"),
]


@pytest.mark.parametrize(
    ("target", "make", "shape", "text"),
    [
        pytest.param(*case, id=f"{case[0]}-{case[3]}", marks=NEEDS_TVM if case[0] == "tvm" else ())
        for case in REFUSED
    ],
)
def test_sums_that_are_too_large_are_refused(
    target: str, make: Callable[[Builder, fx.Node], fx.Node], shape: tuple[int, ...], text: str
) -> None:
    program = single(make, *shape, grid=Grid(0, 0, 16, True) if make is matmul else None)
    with pytest.raises(LowerError, match=rf"(?s){text}") as caught:
        narrows.lower(program, target, check=False)
    assert "net.py:" in str(caught.value)


@needs_compiler
@pytest.mark.parametrize("by", [-12, -3, 0, 9])
def test_a_sum_beyond_the_codes_is_their_end(by: int) -> None:
    narrows.lower(single(mean(by, divisor=1), 1, 2**15), "c", samples=1)  # it compares, with ==


@pytest.mark.parametrize("rounding", ["half_even", "half_up"])
def test_channels_may_be_shifted_to_both_sides(rounding: str) -> None:
    b = Builder((2, 3))
    b.examples = (torch.tensor([[90, 7, 3], [20, 250, 255]], dtype=torch.uint8),)
    weight = b.weight("w", torch.tensor([[1, 0, 0], [0, 3, 5]], dtype=torch.int8))
    rest = (None, [-1, 3], 0, 0, 0, 255, rounding)
    made = b.call(ops.linear.default, b.inputs[0], weight, *rest)
    Meta(made).grid = Grid(0)
    program = b.program(made)
    assert program(*b.examples).tolist() == [[180, 4 + (rounding == "half_up")], [40, 253]]
    narrows.lower(program, form="integer", samples=1)  # it compares, with ==
