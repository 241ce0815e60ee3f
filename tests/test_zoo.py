"""Whole models without a plan: captured, rewritten, sorted into couplings; `benchmarks/zoo.py` has
them all."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor, nn

import narrows
from narrows.ir.compare import relative_error
from narrows.ir.verify import verify
from narrows.passes.base import TOLERANCE, Fidelity
from tests.networks.zoo import MODELS, SMALL_TRANSFORMERS, timm_model

# timm's own tiny configurations, one per family of operators.
TINY = (
    "test_byobnet", "test_coatnet", "test_convnext", "test_efficientnet_evos", "test_mambaout",
    "test_nfnet", "test_vit3", "test_vit_relpos",
)  # fmt: skip
OURS = {"squeezenet1_1": MODELS["squeezenet1_1"], "small_swin": SMALL_TRANSFORMERS["small_swin"]}


def built(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    if importlib.util.find_spec("torchvision" if name in OURS else "timm") is None:
        pytest.skip("the models' package is not installed")
    if name in OURS:
        return OURS[name].build(), OURS[name].inputs()
    return timm_model(name)


@pytest.mark.parametrize("name", [*OURS, *TINY])
def test_a_model_without_a_plan_stays_what_it_is(name: str) -> None:
    model, inputs = built(name)
    program = narrows.capture(model, inputs)
    made = narrows.apply(program)
    verify(made)
    with torch.no_grad():
        wanted = model(*inputs)
    assert relative_error(made(*inputs), wanted) <= TOLERANCE[Fidelity.EXACT][torch.float64]
    assert made.parameter_count <= program.parameter_count
    found = program.couplings()
    assert found
    assert all(c.width > 0 for c in found)
