"""Leaves of the passes, by hand: what counts as apart, what stays, what a group of layers costs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import narrows
from narrows.errors import PlanUsageError
from narrows.ir.channels import analyse
from narrows.ir.liveness import Demand
from narrows.ir.program import Program
from narrows.ir.structure.spaces import spaces_of
from narrows.passes import proof
from narrows.passes.choosing import scales
from narrows.passes.choosing.allocators.knapsack import Cells
from narrows.passes.choosing.budgets.base import Part
from narrows.passes.choosing.budgets.catalog import BUILTIN, find
from narrows.passes.choosing.budgets.macs import Macs
from narrows.passes.choosing.budgets.params import Params
from narrows.passes.choosing.criteria.adapruner import AdaPruner
from narrows.passes.choosing.reads import reads_of
from narrows.passes.choosing.scales import EXAMPLES, FORWARDS, MACS
from narrows.passes.forms.splitting import can_split

T = torch.tensor

# ------------------------------------------------------------------ proofs


@pytest.mark.parametrize(
    ("actual", "wanted", "errors"),
    [
        ([T([1.0, 2.0])], [T([1.0, 2.0])], [0.0]),
        ([T([1.0, 2.0])], [T([1.0, 4.0])], [0.5]),
        ([T([1, 2])], [T([1, 2])], [0.0]),
        ([T([1, 2])], [T([1, 3])], [torch.inf]),
        ([T([1, 2])], [T([1.0, 2.0])], [torch.inf]),
        ([T([1.0, 2.0])], [T([1, 2])], [torch.inf]),
        ([T([1, 2], dtype=torch.int32)], [T([1, 2])], [torch.inf]),
        ([T([1.0])], [T([1.0]), T([2.0])], [torch.inf]),
        ([], [], []),
        ([3], [3], [0.0]),
    ],
)
def test_errors_of_outputs(actual: list[Any], wanted: list[Any], errors: list[float]) -> None:
    assert proof.errors_of(actual, wanted) == pytest.approx(errors)


LARGE = torch.stack([torch.full((3,), 1e6), torch.full((3,), 1.0)], 1)  # two columns


@pytest.mark.parametrize(
    ("off", "apart"),
    [
        ([[0.0, 0.0]], False),
        ([[0.0, 0.5]], True),  # a column of its own, which the other is a million times
        ([[0.5, 0.0]], False),
    ],
)
def test_a_small_channel_beside_a_large_one_is_apart(off: list[Any], apart: bool) -> None:
    assert proof._apart([LARGE + T(off)], [LARGE]) == apart
    assert proof._apart([LARGE, LARGE + T(off)], [LARGE, LARGE]) == apart


def test_what_cannot_be_compared_channel_by_channel_is_not_apart() -> None:
    other = LARGE + 5.0
    assert not proof._apart(None, [LARGE])
    assert not proof._apart([LARGE], None)
    assert not proof._apart([other[:, 1]], [LARGE[:, 1]])  # one axis has no channels
    assert not proof._apart([3], [4])
    assert not proof._apart([LARGE.long()], [LARGE.long() + 5])
    assert not proof._apart([torch.zeros(0, 2)], [torch.zeros(0, 2)])
    assert proof._apart([other.clone()], [LARGE])


def test_what_nothing_is_proven_of() -> None:
    nan, inf = float("nan"), float("inf")
    assert proof.unseen([T([1.0, nan, inf]), T([1, 2]), 3, T([0.0])]) == [2, 0, 0, 0]
    program = SimpleNamespace(name="net")
    zeros = [T([0.0, 0.0]), T([0, 0]), T([0.0]), T([0.0, 1.0]), 0]
    pair = narrows.capture(nn.Linear(2, 2).eval(), (torch.zeros(2, 2),))
    notes = proof._zeros(pair.replace(name=program.name), zeros[:1])
    assert [(n.where, n.reason) for n in notes] == [("net", "all zero")]
    for value in zeros[1:]:
        assert proof._zeros(pair, [value]) == ()
    assert proof._zeros(pair, None) == ()


# ------------------------------------------------------------------ what layers read


class Net(nn.Module):
    """A layer that is put out and read, one that is read twice, one that is put out alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 5)
        self.left, self.right = nn.Linear(5, 3), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.first(x)
        z = self.second(y).relu()
        return y, self.left(z), self.right(z)


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return narrows.capture(Net().double().eval(), (torch.randn(3, 4, dtype=torch.float64),))


def test_what_is_put_out_stays_although_a_layer_reads_it(program: Program) -> None:
    reads = reads_of(program)
    names = [p.layer.weight for p in reads.products]
    stays = {
        n: reads.maker_stays[reads.maker_layer == i].tolist() for i, n in enumerate(names)
    }  # fmt: skip
    assert stays == {
        "first.weight": [True] * 6, "second.weight": [False] * 5, "left.weight": [True] * 3,
        "right.weight": [True] * 2,
    }  # fmt: skip
    read = [names[i] for i in reads.layer[reads.pairs[0]]]
    made = [names[i] for i in reads.maker_layer[reads.pairs[1]]]
    found = {(a, b): sum(p == (a, b) for p in zip(made, read, strict=True))
             for a, b in zip(made, read, strict=True)}  # fmt: skip
    assert found == {
        ("first.weight", "second.weight"): 6, ("second.weight", "left.weight"): 5,
        ("second.weight", "right.weight"): 5,
    }  # fmt: skip


@pytest.mark.parametrize("budget", [Macs(), Params()])
@pytest.mark.parametrize(
    ("globs", "there"),
    [
        (("left*", "right*"), [0, 0, 1, 1]), (("second.weight",), [0, 1, 0, 0]), (("*",), [1] * 4),
        (("none",), [0] * 4),
    ],
)  # fmt: skip
def test_a_group_costs_what_its_layers_do(
    program: Program, budget: Any, globs: tuple[str, ...], there: list[int]
) -> None:
    reads = reads_of(program)
    part = Part(budget, "group", globs)
    np.testing.assert_array_equal(part.each(reads), budget.each(reads) * np.array(there))
    assert (part.name, part.unit) == (f"{budget.name} of group", budget.unit)


# ------------------------------------------------------------------ which tensors can be split


def splittable(forward: Any, **layers: nn.Module) -> list[bool]:
    class Made(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, layer in layers.items():
                self.add_module(name, layer)

        def forward(self, x: Tensor) -> Any:
            return forward(self, x)

    made = narrows.capture(Made().eval(), (torch.randn(2, 4, 6, 6),))
    facts = analyse(made)
    spaces = spaces_of(facts, Demand(facts), even=True)
    return [can_split(facts, s) for s in spaces if s.makers]


def conv(inputs: int, outputs: int, **how: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **how)


READERS = {"b": conv(8, 3), "c": conv(8, 3)}


@pytest.mark.parametrize(
    ("forward", "layers", "can"),
    [
        (lambda s, x: (s.b(y := s.a(x).relu()), s.c(y)), {"a": conv(4, 8), **READERS}, True),
        (lambda s, x: s.b(s.a(x)), {"a": conv(4, 8), "b": conv(8, 3)}, False),
        (lambda s, x: (s.b(y := s.a(x)), s.c(y), y), {"a": conv(4, 8), **READERS}, False),
        (lambda s, x: (s.b(y := s.a(x)), s.b(y)), {"a": conv(4, 8), "b": conv(8, 3)}, True),
        (
            lambda s, x: (s.b(y := s.a(x)), s.c(y)),
            {"a": conv(4, 8, groups=2), **READERS},
            False,
        ),
        (
            lambda s, x: (s.b(y := s.a(x)), s.c(torch.cat([y, x], 1)[:, :8])),
            {"a": conv(4, 8), **READERS},
            False,
        ),
        (lambda s, x: (s.b(s.a(x)), s.c(s.a(x + 1))), {"a": conv(4, 8), **READERS}, False),
        (lambda s, x: (s.b(y := s.a(x) + s.d(x)), s.c(y)),
         {"a": conv(4, 8), "d": conv(4, 8), **READERS}, True),
        (lambda s, x: (s.b(y := s.a(x) + s.d(x)), s.c(y)),
         {"a": conv(4, 8), "d": conv(4, 8, groups=2), **READERS}, False),
    ],
    ids=["two readers", "one reader", "put out", "one reader twice", "groups", "a join",
         "a weight twice", "a sum", "a sum with groups"],
)  # fmt: skip
def test_which_tensors_are_made_once_per_reader(forward: Any, layers: Any, can: bool) -> None:
    assert any(splittable(forward, **layers)) == can


# ------------------------------------------------------------------ gains of a block


def test_the_mean_gain_is_that_of_the_block_unless_it_is_the_whole_network() -> None:
    class Block(nn.Sequential):
        def __init__(self, gain: float) -> None:
            super().__init__(conv(4, 4), nn.BatchNorm2d(4), conv(4, 4), nn.BatchNorm2d(4))
            nn.init.constant_(self[1].weight, gain)  # type: ignore[arg-type]
            nn.init.constant_(self[3].weight, 3 * gain)  # type: ignore[arg-type]

    def means(net: nn.Module) -> dict[str, float]:
        made = narrows.capture(net.eval(), (torch.randn(2, 4, 6, 6),))
        products = {p.layer.weight: p.layer for p in reads_of(made).products}
        rule: Any = AdaPruner()
        return {w: rule.mean(made, layer, "outputs") for w, layer in products.items()}

    two = means(nn.Sequential(Block(1.0), Block(5.0)))
    assert two == {"0.0.weight": 2.0, "0.2.weight": 2.0, "1.0.weight": 10.0, "1.2.weight": 10.0}
    one = means(nn.Sequential(Block(1.0)))  # a block that is all: each layer for itself
    assert one == {"0.0.weight": 1.0, "0.2.weight": 3.0}
    bare = means(Block(1.0))  # layers in no block
    assert bare == {"0.weight": 1.0, "2.weight": 3.0}


# ------------------------------------------------------------------ what may be asked, and how much


@pytest.mark.parametrize("name", sorted(BUILTIN))
def test_budgets_of_whole_couplings_are_of_no_single_layers(name: str, program: Program) -> None:
    budget, options = find(name), {name: 0.5}
    assert budget.coupled == (name in ("memory", "latency", "measured"))
    if budget.coupled:
        with pytest.raises(PlanUsageError, match=f"{name} takes whole couplings"):
            narrows.plan(program, limits=options, constrained=False)


@pytest.mark.parametrize(
    ("layers", "examples", "macs", "goal"),
    [
        (1, 10**9, 1e6, MACS // 10**6),  # one layer: one run for an example
        (2, 10**9, 1e6, MACS // 10**6),
        (8, 10**9, 1e6, MACS // (4 * 10**6)),
        (8, 1000, 0.0, max(EXAMPLES, 1000 * FORWARDS // 4)),
        (8, 1, 1e30, EXAMPLES),
    ],
)
def test_as_much_data_is_measured_on_as_a_while_allows(
    layers: int, examples: int, macs: float, goal: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: Any = SimpleNamespace(products=[None] * layers, macs=macs, whole=lambda each: each)
    monkeypatch.setattr(scales, "counted", lambda program, batches: examples)
    monkeypatch.setattr(scales, "first", lambda program, batches, most: [most])
    few: Any = scales.few(SimpleNamespace(), [], reads)  # type: ignore[arg-type]
    assert few == [int(goal)]


@pytest.mark.parametrize("capacity", [3.2, 5.2, 8.2, 10.0])
def test_a_knapsack_leaves_out_what_alone_is_too_large(capacity: float) -> None:
    costs = [np.array([1.0, 4.0, 11.0]), np.array([2.0, 3.0, 500.0])]
    losses = [np.array([9.0, 4.0, 0.0]), np.array([5.0, 3.0, 0.0])]
    found = Cells(costs, losses, 10.0).best(capacity)
    every = [(i, j) for i in range(3) for j in range(3) if costs[0][i] + costs[1][j] <= capacity]
    assert found == list(min(every, key=lambda of: losses[0][of[0]] + losses[1][of[1]]))
    assert Cells(costs, losses, 10.0).best(2.5) is None
