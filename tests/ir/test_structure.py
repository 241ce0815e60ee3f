"""The structure of a program: its layers, its ties, and what links them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import narrows
from narrows.ir.program import Program
from narrows.ir.structure import layers_of, structure_of


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.head((y + self.body(y).relu()).flatten(1))


def captured(module: nn.Module, *shape: int) -> Program:
    return narrows.capture(module.eval(), (torch.randn(*shape),))


def test_layers_are_linked_to_the_ties_that_their_weights_follow() -> None:
    found = structure_of(captured(Residual(), 2, 3, 2, 2))
    stem, body, head = (found.layer_at[name] for name in ("stem", "body", "head"))
    tie = next(i for i, c in enumerate(found.ties) if c.name == "stem")
    assert found.along(stem, "outputs") == found.along(body, "outputs") == ((tie, 1),)
    assert found.along(body, "inputs") == ((tie, 1),)
    assert found.along(head, "inputs") == ((tie, 4),)  # a channel is four inputs, flattened
    assert found.held["add"] == ((tie, 1),)
    assert found.ties[tie].width == 8


def test_a_structure_is_found_once() -> None:
    program = captured(Residual(), 2, 3, 2, 2)
    assert structure_of(program) is structure_of(program)
    assert program.couplings() is structure_of(program).ties
    assert structure_of(program).layers is layers_of(program)


@pytest.mark.parametrize("transposed", [False, True])
def test_channels_at_positions_of_a_grouped_weight(transposed: bool) -> None:
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    program = captured(kind(6, 4, 1, groups=2), 2, 6, 2, 2)
    ((layer,),) = layers_of(program).values()
    whole, part = ("inputs", "outputs") if transposed else ("outputs", "inputs")
    assert layer.spans_groups(whole)
    assert not layer.spans_groups(part)
    assert program.weights[layer.weight].shape[layer.axis(whole)] == layer.width(whole)
    assert program.weights[layer.weight].shape[layer.axis(part)] == layer.width(part) // 2
    positions = np.array([[1], [0]])
    half = layer.width(part) // 2
    assert layer.channels(whole, positions).tolist() == [[1], [0]]
    assert layer.channels(part, positions).tolist() == [[1, half + 1], [0, half]]
