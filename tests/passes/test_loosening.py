"""Plans of a latency in which layers choose for themselves keep no less than whole couplings."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import narrows
from narrows.backends import make_target
from narrows.ir.costs import Costs
from narrows.ir.program import Program
from narrows.passes.pipeline import Pipeline
from narrows.passes.plans.mass import kept_mass
from tests.passes.test_latency import Residual, costs

pytestmark = pytest.mark.usefixtures("shipped_costs")


class Branches(nn.Module):
    """One stem that four readers want different channels of, and a concat behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 96, 1)
        self.reads = nn.ModuleList(nn.Conv2d(96, 32, 3, padding=1) for _ in range(4))
        self.join, self.head = nn.Conv2d(128, 64, 1), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = self.join(torch.cat([read(x).relu() for read in self.reads], 1)).relu()
        return self.head(x.mean((2, 3)))


def branches() -> Program:
    torch.manual_seed(0)
    net = Branches().eval()
    with torch.no_grad():
        for i, read in enumerate(net.reads):
            read.weight[:, 24 * i : 24 * i + 24] *= 20.0
    return narrows.capture(net, (torch.randn(1, 3, 24, 24),))


def residual() -> Program:
    torch.manual_seed(0)
    return narrows.capture(Residual().eval(), (torch.randn(1, 3, 16, 16),))


def chain() -> Program:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(),
                        nn.Conv2d(64, 32, 3))  # fmt: skip
    return narrows.capture(net.eval(), (torch.randn(1, 3, 16, 16),))


def share(program: Program, plan: narrows.ChannelPlan, table: Costs) -> float:
    made = Pipeline.default(plan, table).run(program).program
    now, whole = (sum(s for _, s in table.predict(p)) for p in (made, program))
    return now / whole


@pytest.mark.parametrize("latency", [0.4, 0.7])
@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("make", [branches, residual, chain])
def test_never_less_mass_than_whole_couplings(
    make: Callable[[], Program], bits: int | None, latency: float
) -> None:
    program, target = make(), make_target("onnx")
    table = target.costs() if bits is None else target.integer_costs()
    assert table is not None
    coupled = narrows.plan(program, latency=latency, costs=table)
    free = narrows.plan(program, latency=latency, costs=table, constrained=False)
    assert kept_mass(program, free) >= kept_mass(program, coupled)
    assert share(program, free, table) <= latency * (1 + 1e-6)
    assert {n.reason for n in free.notes} & {"loosened", "coupled"}


def test_more_where_readers_want_different_channels() -> None:
    program = branches()
    coupled = narrows.plan(program, latency=0.5, costs=costs())
    free = narrows.plan(program, latency=0.5, costs=costs(), constrained=False)
    assert share(program, free, costs()) <= 0.5 * (1 + 1e-6)
    assert kept_mass(program, free) > kept_mass(program, coupled) + 0.01
    reads = [set(free.inputs.get(f"reads.{i}.weight", range(96))) for i in range(4)]
    assert any(one != other for one in reads for other in reads)
    x = torch.randn(2, 3, 24, 24)
    made = narrows.apply(program, free, target="onnx")
    torch.testing.assert_close(made(x), free.masked(program)(x), rtol=1e-4, atol=1e-4)
