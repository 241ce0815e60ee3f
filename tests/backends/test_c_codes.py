"""Integer operators by themselves in C, with shifts and zero points that no network would have."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import narrows.ir.integer.slopes  # noqa: F401  (it makes the operator known)
from narrows.backends import lower
from narrows.backends.c.compiler import find_compiler
from narrows.ir.program import Program
from tests.backends.test_tvm_integer import Codes, choices, layers, others

pytestmark = pytest.mark.skipif(not find_compiler(), reason="there is no C compiler")

aten: Any = torch.ops.aten


def lying(rounding: str) -> Program:
    """Operands that lie in other orders, backwards, with gaps, and again and again."""
    b = Codes(rounding, (2, 6, 4, 5), (2, 1, 4, 1))
    x, column = b.inputs
    ways = (
        b.call(aten.flip.default, x, [1, 3]), b.call(aten.slice.Tensor, x, 1, 1, 6, 2),
        b.call(aten.permute.default, x, [0, 3, 2, 1]), b.call(aten.select.int, x, 2, 1),
        b.call(aten.roll.default, x, [2], [3]),
    )  # fmt: skip
    for y in ways:
        b.add("add", y, y, 1, 0, 2, 128, 128, 128, 3, 250)
        b.add("mul", y, b.call(aten.flip.default, y, [1]), 6, 128, 100, 128, 0, 255)
        b.add("rescale", y, 1, 128, 0, 0, 255)
        b.add("lookup", y, b.number(b.bytes((256,)).to(torch.uint8)))
        b.add("mean", y, [1], False, -1, 128, 128, 0, 255)
        b.add("vector_norm", y, 2.0, [1], True, -2, 128, 0, 0, 255)
        b.outputs += [b.call(aten.amax.default, y, [-1], True), b.call(aten.clone.default, y)]
    for y in (x, ways[0], ways[1]):
        b.add("add", y, column, 0, 2, 1, 128, 0, 128, 0, 255, -1)
        b.add("mul", column, y, 8, 7, 128, 0, 0, 255)
        b.add("div", y, column, -3, 128, 9, 128, 0, 255)
        b.add("concat", [y, y], 1, [1, -1], [128, 0], 128, 0, 255)
    b.add("mean", ways[2], [1, 3], True, 0, 128, 128, 0, 255)
    b.add("average_pool", ways[2], [2, 2], [1, 2], [1, 0], True, True, 0, 128, 128, 0, 255)
    return b.finished()


@pytest.mark.parametrize("rounding", ["half_even", "half_up"])
@pytest.mark.parametrize("part", ["layers", "others", "choices", "lying"])
def test_every_operator_is_the_interpreters(part: str, rounding: str) -> None:
    if part == "others":
        program = others(rounding, floats=False)
    else:
        program = {"layers": layers, "choices": choices, "lying": lying}[part](rounding)
    lower(program, "c", samples=1)  # it compares, with ==
