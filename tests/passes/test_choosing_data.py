"""Choosing by what the outputs lose: data as people give it, and repairs that are easily wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import narrows
import narrows.passes.choosing.scales as scales
from narrows.errors import PlanError, PlanUsageError, UsageError
from narrows.ir.program import Program
from narrows.ir.structure.layers import layers_of
from narrows.passes.choosing.compensations.least_squares import LeastSquares
from narrows.passes.choosing.criteria.base import NoScoreError
from narrows.passes.choosing.divergence import Divergence
from narrows.passes.choosing.losses import Losses
from narrows.passes.choosing.prepare import prepared
from narrows.passes.choosing.products import gram
from narrows.passes.choosing.reads import reads_of
from narrows.passes.choosing.statistics import examples_of, split
from narrows.passes.plans.plan import ChannelPlan
from tests.passes.residual import images, model
from tests.passes.test_choosing import built


@pytest.fixture(scope="module")
def program() -> Program:
    return narrows.capture(model(), (images(2),))


# ------------------------------------------------------------------ data as people give it


def test_data_that_is_not_finite_is_refused(program: Program):
    bad = images(16)
    bad[3, 0, 2, 2] = torch.nan
    plan = ChannelPlan.given(program, {"last.weight": list(range(10))})
    with pytest.raises(PlanError, match="the network's own outputs hold NaN on the samples"):
        narrows.plan(program, macs=0.7, data=[bad], constrained=False)
    with pytest.raises(PlanError, match="is not finite"):
        narrows.compensate(program, plan, data=[images(16), bad])


def test_no_data_is_told_without_a_word_of_calibration(program: Program):
    with pytest.raises(UsageError, match="there is no data") as caught:
        narrows.plan(program, macs=0.7, data=iter([]))
    assert "what the outputs lose" in caught.value.why
    assert caught.value.hint.startswith("data=")


def test_inference_mode_is_no_obstacle(program: Program):
    wanted = narrows.plan(program, macs=0.8, data=[images(16)], constrained=False)
    with torch.inference_mode():
        data = [images(16)]
        assert narrows.plan(program, macs=0.8, data=data, constrained=False) == wanted


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_summed_in_float32(dtype: torch.dtype):
    """A result of 300 has squares that float16 does not hold."""
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.weight.fill_(100.0)
        layer.bias.zero_()
    x = torch.ones(8, 4, dtype=dtype)
    base = prepared(narrows.capture(layer.to(dtype).eval(), (x,)))
    product = reads_of(base).products[0]
    lines, made = product.rows(x, base(x), None)
    assert gram(lines).equal(torch.full((1, 5, 5), 8.0, dtype=torch.float64))
    assert (made @ made.mT).equal(torch.full((1, 3, 3), 8 * 400.0**2))


def test_classes_that_are_ruled_out_add_nothing():
    a, b = torch.tensor([[0.0, 2.0]]), torch.tensor([[2.0, 0.0]])
    never = torch.full((1, 1), -torch.inf)
    divergence = Divergence.of([a])
    wanted = divergence.between([a], [b])
    assert divergence.between([torch.cat([a, never], 1)], [torch.cat([b, never], 1)]) == wanted


def test_evaluate_is_tried_before_anything_takes_long():
    told = []
    with pytest.raises(PlanError, match="evaluate failed: ZeroDivisionError"):
        narrows.compress(
            model(), (images(2),), data=[images(8)], macs=0.5, evaluate=lambda run: 1 / 0,
            progress=lambda *step: told.append(step),
        )  # fmt: skip
    assert not told


class Shifted(nn.Module):
    """The first input is a table that every example is added to; its length is no batch."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, table: Tensor, x: Tensor) -> Tensor:
        return self.two(self.one(x + table.sum(0)).relu())


def test_an_input_without_a_batch_is_not_cut():
    table, x = torch.randn(4, 6), torch.randn(4, 6)
    dynamic = ({}, {0: torch.export.Dim("b")})
    made = torch.export.export(Shifted().eval(), (table, x[:2]), dynamic_shapes=dynamic)
    program = narrows.capture(made)
    one, other = split(program, [[table, x]])
    assert [t.shape[0] for t in (*one[0], *other[0])] == [4, 2, 4, 2]
    assert examples_of(program, [table, x[:3]]) == 3
    plan = narrows.plan(program, macs=0.7, data=[(table, x)], constrained=False)
    assert plan.removed


def test_batches_of_a_fixed_size_are_not_cut(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scales, "FORWARDS", 1)
    x = images(24)
    program = narrows.capture(model(), (x[:8],), dynamic_batch=False)
    data = [*x.split(8)]
    with pytest.raises(PlanUsageError, match="one batch to choose by"):
        narrows.plan(program, macs=0.8, data=data[:1])
    reads = reads_of(prepared(program))
    batches = [[t] for t in data]
    some = scales.few(program, batches, reads)
    assert all(batch[0].shape == (8, 3, 8, 8) for batch in some)
    assert len(some) == 2  # of three, as 12 examples are asked for at least


class Turned(nn.Module):
    """Two layers whose weights are transposed before they are multiplied with."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.one.t() + 1.0) @ self.two.t()


def test_a_layer_is_repaired_by_what_a_repaired_one_makes_behind_a_transpose():
    """Without a nonlinearity the second layer is fed what the first one's new weights make."""
    torch.manual_seed(0)
    program = narrows.capture(Turned().eval(), (torch.randn(2, 6),))
    x = torch.randn(256, 4) @ torch.randn(4, 6)
    plan = ChannelPlan.given(program, {"one": [0, 1, 3, 5]})  # x has four directions: none is lost
    made = narrows.compensate(program, plan, data=[x], method=LeastSquares(ridge=1e-6))
    own = program(x)
    far = (plan.masked(made)(x) - own).square().mean() / own.square().mean()
    assert float(far) < 1e-4


def test_channels_that_no_layer_reads_have_no_cost_in_nats():
    program, data = built("multihead_attention")
    found = Losses.of(program, data)
    layers = [layer for layers in layers_of(program).values() for layer in layers]
    with pytest.raises(NoScoreError):
        found.score(program, layers[0], "outputs")


class Scaled(nn.Module):
    """A branch that is scaled by a number below zero, as a learned scale may be."""

    def __init__(self) -> None:
        super().__init__()
        self.skip, self.one, self.two = nn.Linear(6, 4), nn.Linear(6, 32), nn.Linear(32, 4)
        self.scale = nn.Parameter(torch.full((4,), -0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.two(self.one(x).relu()) * self.scale


def test_what_a_sum_lost_is_made_up_for_behind_a_scale_below_zero():
    torch.manual_seed(0)
    x = torch.randn(512, 6)
    program = narrows.capture(Scaled().eval(), (x[:2],))
    plan = ChannelPlan.given(program, {"skip.weight": [0, 1, 2]})
    found = {m: plan.masked(narrows.compensate(program, plan, data=[x], method=m))
             for m in ("least-squares", "mean")}  # fmt: skip
    far = {m: float((made(x) - program(x)).square().mean()) for m, made in found.items()}
    assert far["least-squares"] < 0.2 * far["mean"]


def test_the_classes_of_maps_tell_what_chance_is():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 3, 1, bias=False)).eval()
    x = torch.randn(4, 3, 2, 100)
    net[2].weight.data[:, 0] = 0.0
    program = narrows.capture(net, (x,))
    plan = ChannelPlan.given(program, {"2.weight": [0]})
    made = narrows.compensate(program, plan, data=[x], method="mean", outputs="logits")
    (note,) = [n for n in made.notes if n.reason == "compensated"]
    share = float(note.message.rsplit(" -> ", 1)[1].split("%")[0])
    assert share < 200 / 3  # one class everywhere
    assert any(n.reason == "chance" for n in made.notes)
