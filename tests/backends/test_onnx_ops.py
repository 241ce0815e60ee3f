"""Every operator with an integer form, in ONNX Runtime: the interpreter's codes, in some form."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle
from typing import Any

import pytest

import narrows
from narrows.errors import NarrowsError
from narrows.ir.ops import table
from narrows.ir.ops.integer_forms import Lookup
from narrows.ir.ops.row import Row
from tests.backends.test_c_ops import TABLES, program

FORMS = cycle(("qdq", "qlinear", "integer"))


def cases() -> Iterator[Any]:
    """Yield the samples of every row, the next form with each; a table is a table."""
    for row in table.rows():
        if row.integer is not None and (not isinstance(row.integer, Lookup) or row.name in TABLES):
            yield pytest.param(row, [next(FORMS) for _ in row.samples], id=row.name)


@pytest.mark.parametrize(("row", "forms"), list(cases()))
def test_every_operator_is_the_interpreter(row: Row, forms: list[str]) -> None:
    compared = 0
    for sample, form in zip(row.samples, forms, strict=True):
        floats = program(row, sample)
        if not floats.examples:
            continue
        try:
            quantized = narrows.quantize(floats, [floats.examples], check=False)
        except NarrowsError:  # these arguments have no integer form, which others test
            continue
        if not quantized.plan.floats:
            narrows.lower(quantized.program, form=form, samples=1)  # it compares, with ==
            compared += 1
    assert compared, "no sample of the row has an integer form"
