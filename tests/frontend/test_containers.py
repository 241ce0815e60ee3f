"""Dataclasses in and out, and results that nobody can take apart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import narrows
from narrows.errors import CaptureError
from narrows.frontend import capture


@dataclass
class Pair:
    left: Tensor
    right: Tensor | None = None


@dataclass(frozen=True)
class Found:
    """A dataclass of a dataclass, with a field that holds nothing."""

    pair: Pair
    scores: Tensor
    aux: Tensor | None = None


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, pair: Pair) -> Found:
        y = self.a(pair.left + pair.right).relu()
        return Found(Pair(y.mean(1), y[:, :2]), self.b(y))


def pair(batch: int) -> Pair:
    return Pair(torch.randn(batch, 4), torch.randn(batch, 4))


@pytest.mark.parametrize("target", ["onnx", "torch"])
def test_dataclasses_come_out_as_they_do_of_the_model(target: str) -> None:
    model, given = Detector().eval(), pair(2)
    program = capture(model, (given,))
    plan = narrows.plan(program, {"b.weight": [0, 2, 5]}, zeros=False)
    small, wanted = narrows.apply(program, plan), plan.masked(program)(given)
    found = small(given)
    assert isinstance(found, Found)
    assert isinstance(found.pair, Pair)
    assert found.aux is None
    torch.testing.assert_close(found.scores, wanted.scores)
    artifact = narrows.lower(small, target)
    other = pair(3)
    ran = artifact.run(other)
    assert ran.keys() == {"pair", "scores"}
    np.testing.assert_allclose(ran["scores"], small(other).scores, rtol=1e-5, atol=1e-6)
    assert "Pair runs as a dict of its fields" in str(artifact.notes)


def test_a_class_of_the_users_own_is_refused_by_its_name() -> None:
    class Box:
        def __init__(self, inside: Tensor) -> None:
            self.inside = inside

    class Boxed(nn.Module):
        def forward(self, x: Tensor) -> Box:
            return Box(x * 2)

    with pytest.raises(CaptureError, match=r"(?s)no tensor.*Boxed\.forward.*Box.*register_pytree"):
        capture(Boxed().eval(), (torch.randn(2, 4),))
