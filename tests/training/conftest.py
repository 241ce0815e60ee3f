"""One trained network for all tests of gates, and its program: capturing it is what takes time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from narrows.ir.program import Program
from tests.training.digits import Net, captured, made, train


@pytest.fixture(scope="session")
def state() -> dict[str, Tensor]:
    model = made()
    train(model, steps=60)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="session")
def program() -> Program:
    return captured(made())


@pytest.fixture
def fresh(state: dict[str, Tensor]) -> Callable[[], Net]:
    """Return what makes the trained network anew."""

    def make() -> Net:
        torch.manual_seed(0)
        model = made()
        model.load_state_dict(state)
        return model

    return make
