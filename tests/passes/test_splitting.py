"""A producer is made twice where that is cheaper than any copy, and the program stays exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import narrows
from narrows.backends.onnx.staircase import StairTable
from narrows.ir.compare import relative_error
from narrows.ir.program import Program
from narrows.passes.pipeline import Pipeline
from narrows.passes.quant.exactness import assert_exact
from tests.passes.test_forms import (
    EVENS,
    EXACT,
    HIGH,
    LOW,
    Fork,
    X,
    copies,
    costs,
    fork,
    widths,
)  # fmt: skip

ODDS = {*range(1, 20, 2)}


def made(program: Program, plan: narrows.ChannelPlan, table: StairTable) -> Program:
    result = Pipeline.default(plan, table).run(program).program
    assert relative_error(result(X), plan.masked(program)(X)) <= EXACT
    return result


def test_a_cheap_producer_is_made_once_per_reader() -> None:
    program, plan = fork(EVENS, LOW, HIGH, outputs=4)
    result = made(program, plan, costs(1e3))
    assert copies(result) == []
    found = widths(result)
    assert sorted(w for n, w in found.items() if n.startswith("stem")) == [8, 10, 10]
    notes = [n for n in result.notes if n.reason == "split"]
    assert len(notes) == 2
    assert all("a second time, for heads_" in n.message and n.source for n in notes)


def test_readers_that_want_the_same_share_a_producer() -> None:
    program, plan = fork(EVENS, ODDS, EVENS, outputs=4)
    result = made(program, plan, costs(1e3))
    stems = [n for n in widths(result) if n.startswith("stem")]
    assert len(stems) == 2
    assert copies(result) == []
    assert sorted(len(result.node(n).users) for n in stems) == [1, 1]


@pytest.mark.parametrize("gather", [1e-6, 1e3])
def test_a_dear_producer_is_made_once(gather: float) -> None:
    program, plan = fork(EVENS, LOW, HIGH, outputs=1)
    result = made(program, plan, costs(gather))
    assert [n for n in widths(result) if n.startswith("stem")] == ["stem"]


def test_weights_of_both_know_where_they_came_from() -> None:
    program, plan = fork(EVENS, ODDS, EVENS, outputs=4)
    result = made(program, plan, costs(1e3))
    stems = {n: o for n, o in result.origins.items() if n.startswith("stem") and "weight" in n}
    assert {o.name for o in stems.values()} == {"stem.weight"}
    assert {frozenset(o.index[0] or ()) for o in stems.values()} == {
        frozenset(EVENS),
        frozenset(ODDS),
    }


class Gated(nn.Module):
    """A producer with a norm, an activation that is a product, and a gate; three readers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 20, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(20)
        self.deep = nn.Conv2d(20, 20, 3, padding=1, groups=20)
        self.excite = nn.Linear(4, 20)
        self.squeeze = nn.Linear(20, 4)
        self.heads = nn.ModuleList(nn.Conv2d(20, 16, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        x = self.deep(x * torch.sigmoid(x))
        x = x * torch.sigmoid(self.excite(self.squeeze(x.mean((2, 3)))))[..., None, None]
        return torch.cat([head(x.relu()) for head in self.heads], dim=1)


def test_all_between_a_producer_and_its_reader_is_made_twice() -> None:
    torch.manual_seed(0)
    net = Gated()
    nn.init.normal_(net.norm.weight)
    nn.init.normal_(net.norm.bias)
    nn.init.normal_(net.norm.running_mean)  # pyright: ignore[reportArgumentType]
    program = narrows.capture(net.double().eval(), (X,))
    plan = narrows.plan(
        program,
        keep_inputs={
            "heads.0.weight": [0, 1, 3, 4, 7, 8, 9, 13],
            "heads.1.weight": [2, 5, 6, 10, 12, 15, 19],
            "squeeze.weight": [0],
        },
        zeros=False,
    )
    result = made(program, plan, costs(1e3))
    assert any(n.reason == "split" for n in result.notes)
    assert copies(result) == []
    assert all(n.target != torch.ops.aten.batch_norm.default for n in result.graph.nodes)


def test_a_quantization_plan_follows_both() -> None:
    torch.manual_seed(0)
    program = narrows.capture(Fork(4).eval(), (X.float(),))
    keep = {
        "heads.0.weight": [0, 1, 3, 7, 8],
        "heads.1.weight": [2, 5, 6, 10],
        "heads.2.weight": [11],
    }
    plan = narrows.plan(program, keep, zeros=False)
    split = Pipeline.default(plan, costs(1e3)).run(program).program
    assert any(n.reason == "split" for n in split.notes)
    grids = narrows.quantize(program, [X.float()]).plan.follow(split)
    quantized = narrows.quantize(split, plan=grids)
    assert grids.activations["relu_split"] == grids.activations["relu"]
    assert_exact(quantized.fake, quantized.program, X.float())
