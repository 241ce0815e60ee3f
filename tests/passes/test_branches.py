"""Branches that a network can do without: which ones may go whole, and that they do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import narrows
from narrows.errors import PlanError
from narrows.ir.program import Program
from narrows.ir.structure import structure_of
from narrows.ir.structure.branches import Branches
from narrows.ir.workload import macs, works_of
from narrows.passes.choosing.prepare import prepared
from tests.networks.registry import conv, conv_bn, randomise
from tests.passes.test_latency import costs


class Blocks(nn.Module):
    """A residual network, one of whose blocks hardly changes what goes past it."""

    def __init__(self, faint: float = 1e-3) -> None:
        super().__init__()
        self.stem = conv(3, 16)
        self.inner = nn.ModuleList(conv_bn(16, 16) for _ in range(2))
        self.outer = nn.ModuleList(conv_bn(16, 16) for _ in range(2))
        self.head = nn.Linear(16, 10)
        self.faint = faint

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for inner, outer in zip(self.inner, self.outer, strict=True):
            x = (x + outer(inner(x).relu())).relu()
        return self.head(x.mean((2, 3)))


class Sides(nn.Module):
    """Two branches side by side, and nothing that goes around both."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8))
        self.right = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8))
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.left(x) + self.right(x)).relu().mean((2, 3)))


def program_of(net: nn.Module) -> Program:
    torch.manual_seed(0)
    randomise(net, 0, (data(2),))
    if isinstance(net, Blocks):
        with torch.no_grad():
            for parameter in net.outer[0][1].parameters():
                parameter.mul_(net.faint)
    return narrows.capture(net, (torch.randn(2, 3, 8, 8),))


def data(count: int = 32) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def ties_read_by(program: Program, weight: str) -> list[int]:
    return [
        number
        for number, tie in enumerate(structure_of(program).ties)
        if any(m.weight == weight and m.role == "in" for m in tie.members)
    ]


def test_a_residual_block_may_go_and_what_all_else_goes_through_may_not():
    program = program_of(Blocks())
    ties = range(len(structure_of(program).ties))
    branches = Branches(program, ties)
    (first,), (second,) = (ties_read_by(program, f"outer.{i}.0.weight") for i in (0, 1))
    (stream,) = ties_read_by(program, "head.weight")
    assert branches.open_without({first})
    assert branches.open_without({first, second})
    assert not branches.open_without({stream})


def test_of_two_branches_side_by_side_one_may_go():
    program = program_of(Sides())
    branches = Branches(program, range(len(structure_of(program).ties)))
    (left,), (right,) = (ties_read_by(program, f"{side}.2.weight") for side in ("left", "right"))
    assert branches.open_without({left})
    assert branches.open_without({right})
    assert not branches.open_without({left, right})


def test_channels_that_more_than_layers_read_keep_one():
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.inner, self.outer = conv(3, 8), conv(8, 8), conv(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            y = self.inner(x).relu()
            return x + self.outer(y) * y.mean(1, keepdim=True)

    program = program_of(Gated())
    (tie,) = ties_read_by(program, "outer.weight")
    assert not Branches(program, [tie]).readers


@pytest.mark.parametrize("constrained", [True, False])
def test_a_block_that_does_nothing_goes_first(constrained: bool):
    program = program_of(Blocks())
    plan = narrows.plan(program, macs=0.5, data=[data()], constrained=constrained)
    assert plan.inputs["outer.0.0.weight"] == ()
    made = narrows.compensate(program, plan, data=[data()])
    small = narrows.apply(made, plan)  # which holds it to the masked program
    assert "inner.0.0.weight" not in small.weights
    works = works_of(small)
    counted = sum(macs(n, works) for n in small.graph.nodes if n.op == "call_function")
    full = works_of(program)
    assert counted <= 0.5 * sum(macs(n, full) for n in program.graph.nodes if n.op != "output")


def test_with_a_least_width_no_block_goes():
    program = program_of(Blocks())
    plan = narrows.plan(program, macs=0.5, data=[data()], min_width=2)
    assert min(map(len, plan.inputs.values())) >= 2


def test_a_latency_takes_blocks_too():
    program = program_of(Blocks())
    plan = narrows.plan(program, latency=0.6, costs=costs(), data=[data()])
    assert plan.inputs["outer.0.0.weight"] == ()
    small = narrows.apply(narrows.compensate(program, plan, data=[data()]), plan)
    table = costs()
    seconds = [sum(s for _, s in table.predict(p, 1)) for p in (small, program)]
    assert seconds[0] <= 0.6 * seconds[1]


def test_a_chain_keeps_a_channel_everywhere():
    net = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, 4))
    program = program_of(net)
    with pytest.raises(PlanError, match="every layer keeps a channel"):
        narrows.plan(program, macs=0.01, data=[data()], constrained=False)
    base = prepared(program)
    assert not Branches(base, ()).open_past([next(iter(base.users_of("2.weight")))])
