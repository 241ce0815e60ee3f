"""The structure of a program: its layers, its ties, and what links them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import narrows
from narrows.ir.channels import analyse
from narrows.ir.liveness import Demand
from narrows.ir.program import Program
from narrows.ir.structure import layers_of, structure_of
from narrows.ir.structure.spaces import joined_spaces, spaces_of


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


def test_what_an_operator_reads_and_makes() -> None:
    program = captured(Residual(), 2, 3, 2, 2)
    found = structure_of(program)
    names = [c.name for c in found.ties]
    x, stem, head = (names.index(name) for name in ("x", "stem", "head"))
    told = {n: (found.read(program.node(n)), found.made(program.node(n))) for n in ("stem", "add")}
    assert told == {"stem": (((x, 1),), ((stem, 1),)), "add": (((stem, 1),), ((stem, 1),))}
    assert found.read(program.node("head")) == ((stem, 4),)
    assert found.made(program.node("head")) == ((head, 1),)


def test_concats_join_spaces_to_families() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 5, 1), nn.Conv2d(9, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.cat((self.a(x).relu(), self.b(x)), 1))

    facts = analyse(captured(Net(), 2, 3, 2, 2))
    spaces = spaces_of(facts, Demand(facts))
    named = [[s.nodes[0].name for s in f] for f in joined_spaces(facts, spaces)]
    assert named == [["x"], ["a", "b", "cat"], ["c"]]
    assert [len(f) for f in joined_spaces(facts, spaces, lambda entry: False)] == [1] * len(spaces)
    (reader,) = next(s for s in spaces if s.nodes[0].name == "cat").readers
    assert (reader.node.name, reader.x.name, reader.tail) == ("c", "cat", [])


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
