"""Rows that say something wrong of their operator break a law."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from narrows.errors import ProgramError
from narrows.ir.ops import table
from narrows.ir.ops.contract import Contract
from narrows.ir.ops.identities import always, plus_zero, times_one
from narrows.ir.ops.integer import Clip
from narrows.ir.ops.integer_forms import Add, Lookup
from narrows.ir.ops.mixing import Reduce, Spatial
from narrows.ir.ops.pointwise import Pointwise
from narrows.ir.ops.row import Row
from narrows.ir.ops.sample import Made, Sample, Weight, image
from narrows.ir.ops.works import elementwise
from tests.backends.test_c_ops import program as alone
from tests.ir.facts import (
    affine_law,
    axes_law,
    gain_law,
    identity_law,
    integer_law,
    partial_law,
    parts_law,
    width_law,
    work_law,
)
from tests.ir.test_op_rows import constants, costs, probe, slice_law

aten = torch.ops.aten

WRONG: dict[str, tuple[Callable[[Row, Sample], None], Row, Sample]] = {
    "a softmax is not element-wise": (
        probe,
        Pointwise(target=aten.softmax.int),
        Sample((image(), 1)),
    ),
    "a clamp between constants reads nothing": (
        probe,
        Pointwise(target=aten.clamp.default),
        Sample((image(), 3.0, 4.0)),
    ),
    "a flip moves channels": (
        slice_law,
        Pointwise(target=aten.flip.default),
        Sample((image(), [1])),
    ),
    "a sum with zero is not zero": (
        constants,
        Pointwise(target=aten.add.Tensor, absorbs=True),
        Sample((image(), image())),
    ),
    "a padded mean changes constants": (
        constants,
        Spatial(target=aten.avg_pool2d.default, trailing=2),
        Sample((image(), [3, 3], [2, 2], [1, 1])),
    ),
    "a sum is not a mean": (
        constants,
        Reduce(target=aten.sum.dim_IntList, dims="dim"),
        Sample((image(), [2, 3])),
    ),
    "addmm's weight is [in, out]": (
        slice_law,
        Contract(target=aten.addmm.default, x="mat1", weight="mat2", bias="self"),
        Sample((Weight((6,)), Made((5, 6)), Weight((6, 6)))),
    ),
    "a product costs its depth": (
        costs,
        Contract(target=aten.addmm.default, costs=lambda node: elementwise(node, "copy")),
        Sample((Weight((6,)), Made((5, 6)), Weight((6, 6)))),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_rows_break_a_law(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    law, row, sample = WRONG[name]
    monkeypatch.setitem(table._ROWS, id(row.target), row)
    with pytest.raises((AssertionError, RuntimeError, ProgramError)):
        law(row, sample)


def on_codes(row: Row) -> None:
    integer_law(row, alone)


# A row of the table, and what is said of it wrongly.
WRONG_FACTS: dict[str, tuple[Callable[[Any], None], Any, dict[str, Any]]] = {
    "a logarithm ends": (partial_law, aten.log.default, {"partial": False}),
    "a quotient ends": (partial_law, aten.div.Tensor, {"partial": False}),
    "an exponential ends": (partial_law, aten.exp.default, {"partial": False}),
    "a rectifier does not": (partial_law, aten.relu.default, {"partial": True}),
    "a rectifier takes any width": (width_law, aten.relu.default, {"any_width": False}),
    "a batch norm takes any width": (width_law, aten.batch_norm.default, {"any_width": False}),
    "a softmax weighs channels": (width_law, aten.softmax.int, {"any_width": True}),
    "a layer norm says how many": (width_law, aten.layer_norm.default, {"any_width": True}),
    "groups are of one width": (width_law, aten.group_norm.default, {"any_width": True}),
    "a shuffle of four needs four": (width_law, aten.pixel_shuffle.default, {"any_width": True}),
    "expand says how many": (width_law, aten.expand.default, {"any_width": True}),
    "reshape says how many": (width_law, aten.reshape.default, {"any_width": True}),
    "permute moves": (work_law, aten.permute.default, {"work_kind": "view"}),
    "a view does not move": (work_law, aten.reshape.default, {"work_kind": "copy"}),
    "a norm of its own is no scale": (work_law, aten.instance_norm.default, {"work_kind": "scale"}),
    "a softmax is no norm": (work_law, aten.softmax.int, {"work_kind": "norm"}),
    "a sum along an axis is no softmax": (work_law, aten.cumsum.default, {"work_kind": "softmax"}),
    "resizing is no pooling": (work_law, aten.upsample_nearest2d.vec, {"work_kind": "pool"}),
    "a rectifier changes numbers": (identity_law, aten.relu.default, {"identity": always}),
    "a flip moves elements": (identity_law, aten.flip.default, {"identity": always}),
    "a sum with one is none": (identity_law, aten.add.Tensor, {"identity": times_one}),
    "a product with zero is none": (identity_law, aten.mul.Tensor, {"identity": plus_zero}),
    "a sum is no part": (parts_law, aten.add.Tensor, {"parts": ("self", "other")}),
    "both sides are parts": (parts_law, aten.where.self, {"parts": ("self",)}),
    "a slope is no gain": (gain_law, aten.prelu.default, {"gain": "weight"}),
    "a batch norm has a gain": (gain_law, aten.batch_norm.default, {"gain": ""}),
    "a norm of its own is not affine": (affine_law, aten.instance_norm.default, {"affine": True}),
    "a slope is not affine": (affine_law, aten.prelu.default, {"affine": True}),
    "a shuffle mixes axes": (axes_law, aten.pixel_shuffle.default, {"keeps_axes": True}),
    "a flip turns an axis around": (axes_law, aten.flip.default, {"keeps_axes": True}),
    "a view joins axes": (axes_law, aten.reshape.default, {"keeps_axes": True}),
    "a rectifier is a clip": (on_codes, aten.relu.default, {"integer": Lookup()}),
    "a pooling clips nothing": (on_codes, aten.max_pool2d.default, {"integer": Clip(lo=0.0)}),
    "a sum is no difference": (on_codes, aten.add.Tensor, {"integer": Add(sign=-1)}),
}


@pytest.mark.parametrize("name", WRONG_FACTS)
def test_wrong_facts_break_a_law(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    law, target, changes = WRONG_FACTS[name]
    row = dataclasses.replace(table._ROWS[id(target)], **changes)
    monkeypatch.setitem(table._ROWS, id(target), row)
    with pytest.raises((AssertionError, RuntimeError)):
        law(row)
