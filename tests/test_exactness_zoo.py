"""Five real models, pruned with random masks; `benchmarks/exactness.py` runs the whole list."""

from __future__ import annotations

import functools
import importlib.util

import pytest
import torch

import narrows
from narrows.ir.compare import relative_error
from narrows.ir.program import Program
from narrows.ir.verify import verify
from narrows.passes.base import TOLERANCE, Fidelity
from tests.networks import random_masks
from tests.networks.zoo import MODELS, SMALL_TRANSFORMERS, Model

ZOO = {**MODELS, **SMALL_TRANSFORMERS}
EXACT = TOLERANCE[Fidelity.EXACT][torch.float64]


@functools.lru_cache(maxsize=1)
def captured(name: str) -> tuple[Model, Program]:
    """Return a model of the zoo and its program, captured once for the tests that follow it."""
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    model = ZOO[name]
    return model, narrows.capture(model.build(), model.inputs())


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x1_0", "small_vit", "small_swin"]
)
@pytest.mark.parametrize(("side", "amount"), [("input", 0.5), ("output", 0.3), ("both", 0.9)])
def test_pruned_model_equals_masked_model(name: str, side: str, amount: float) -> None:
    model, program = captured(name)
    inputs, outputs = random_masks(program, amount, side)
    plan = narrows.plan(program, keep_inputs=inputs, keep_outputs=outputs, zeros=False)
    result = narrows.apply(program, plan)
    verify(result)
    assert result.parameter_count < program.parameter_count
    x = model.inputs(3, seed=1)
    assert relative_error(result(*x), plan.masked(program)(*x)) <= EXACT
