"""Families of nodes that are joined, and weights that nothing reads any more."""

from __future__ import annotations

import torch
from torch import fx, nn

import narrows
from narrows.ir.editing import drop_unread
from narrows.ir.structure.leaders import Leaders


def test_families_are_joined_and_keep_one_leader() -> None:
    graph = fx.Graph()
    a, b, c, d = (graph.placeholder(name) for name in "abcd")
    leaders = Leaders()
    for node in (a, b, c):
        leaders.add(node)
    assert d not in leaders
    leaders.join(a, b)
    assert leaders.find(a) is leaders.find(b) is b
    leaders.join(b, c)
    assert {leaders.find(node) for node in leaders} == {c}
    assert [*leaders] == [a, b, c]


def test_a_weight_goes_when_nothing_reads_it() -> None:
    draft = narrows.capture(nn.Linear(3, 2).eval(), (torch.randn(2, 3),)).copy()
    weight, bias = (n for n in draft.graph.nodes if n.op == "get_attr")
    (layer,) = bias.users
    layer.args = tuple(None if arg is bias else arg for arg in layer.args)
    drop_unread(draft, [*draft.placeholders, weight, bias, bias])
    assert [*draft.weights] == ["weight"]
    assert weight in draft.graph.nodes
