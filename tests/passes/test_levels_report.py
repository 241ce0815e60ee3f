"""What the report says of levels: the gain of leaving out all that rounds a tensor."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import narrows
from narrows.ir.integer.grid import Grid, Levels
from narrows.passes.quant.measure import activation_quantizers
from tests.passes.test_quantize import captured, images


def decibels(x: Tensor, got: Tensor) -> float:
    return 10 * math.log10(x.double().square().sum() / (got - x).double().square().sum())


def test_the_gain_of_levels_is_that_of_no_rounding_at_all() -> None:
    x = images(4, 3, 8, 8)
    plan = narrows.quantize(captured(), [x]).plan
    plan = replace(plan, levels={"relu6": Levels(Grid(1, 0, 2), (3, 40, 180))}, offsets={})
    made, name = narrows.quantize(captured(), plan=plan), "relu6"
    without = made.fake.copy()
    quantizers = activation_quantizers(without, made.plan)
    assert set(quantizers) == set(made.plan.activations)  # levels stand behind a grid
    first, *_, last = quantizers[name]
    last.replace_all_uses_with(first.all_input_nodes[0])
    with torch.no_grad():
        exact, whole, rest = made.prepared(x), made.fake(x), without(x)
    (told,) = (t for t in made.report([x]).tensors if t.name == name)
    assert told.gain == pytest.approx(decibels(exact, rest) - decibels(exact, whole), abs=1e-6)
