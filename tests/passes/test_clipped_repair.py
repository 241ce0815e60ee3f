"""A layer that a clip follows is solved for what comes out of the clip."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import narrows
from narrows.errors import PlanUsageError
from narrows.passes.choosing.behind import ANYWHERE, clip_after, room, sum_after
from narrows.passes.choosing.compensations.least_squares import LeastSquares, Symmetric
from narrows.passes.choosing.prepare import prepared
from narrows.passes.plans.plan import ChannelPlan


class Clipped(nn.Module):
    """A layer, then a sum and a gate where asked for, then a clip."""

    def __init__(self, clip: nn.Module, skip: bool = False, gate: float | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.clip, self.skip, self.gate = nn.Linear(8, 6), clip, skip, gate

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if self.gate is not None:
            y = y * torch.sigmoid(x[:, :6] * 0 + self.gate)
        if self.skip:
            y = y + x[:, :6]
        return self.clip(y)


def judged(net: Clipped, weight: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    """Return the squared error that is left of a layer where the clip hides some of it."""
    scale = torch.sigmoid(torch.tensor(net.gate)).double() if net.gate is not None else 1.0
    rest = x[:, :6] if net.skip else 0.0
    own = net.layer.weight.detach().double(), net.layer.bias.detach().double()
    y = nn.functional.linear(x, *own)
    z = nn.functional.linear(x, weight[:, :-1], weight[:, -1])
    whole, found = y * scale + rest, z * scale + rest
    error = torch.where(
        whole <= low, found.clamp(min=low) - low,
        torch.where(whole >= high, found.clamp(max=high) - high, found - whole),
    )  # fmt: skip
    return (error / scale).square().mean()


CASES = {
    "relu": (Clipped(nn.ReLU()), 0.0, math.inf),
    "relu6": (Clipped(nn.Hardtanh(-0.2, 0.3)), -0.2, 0.3),
    "sum": (Clipped(nn.ReLU(), skip=True), 0.0, math.inf),
    "gated sum": (Clipped(nn.ReLU6(), skip=True, gate=0.3), 0.0, 6.0),
}


@pytest.mark.parametrize("case", CASES)
def test_the_weights_are_those_of_the_least_error_behind_the_clip(case: str):
    """By steps of gradients on the error itself: it is convex, so there is one least."""
    net, low, high = CASES[case]
    x = torch.randn(400, 8, dtype=torch.float64)
    net = net.eval().double()
    program = narrows.capture(net, (x[:2],))
    plan = ChannelPlan.given(program, {"layer.weight": [0, 1, 2, 4, 5, 7]})
    made = narrows.compensate(program, plan, data=[x], method=LeastSquares(ridge=1e-9, turns=2000))
    weights = made.weights["layer.weight"], made.weights["layer.bias"][:, None]
    found = torch.cat(weights, 1)
    kept = torch.ones_like(found)
    kept[:, [3, 6]] = 0
    wanted = found.clone().requires_grad_()
    steps = torch.optim.LBFGS([wanted], max_iter=500, tolerance_grad=1e-12, tolerance_change=0)

    def error() -> Tensor:
        steps.zero_grad()
        loss = judged(net, wanted * kept, x, low, high)
        loss.backward()
        return loss

    with torch.inference_mode(False), torch.enable_grad():
        steps.step(error)
    least, own = judged(net, wanted.detach() * kept, x, low, high), judged(net, found, x, low, high)
    plain = narrows.compensate(program, plan, data=[x], method=LeastSquares(ridge=1e-9, turns=0))
    before = torch.cat([plain.weights["layer.weight"], plain.weights["layer.bias"][:, None]], 1)
    assert not found[:, [3, 6]].any()
    assert own <= least * (1 + 1e-4)  # thousands of turns come close to it, and never cross it
    assert own < 0.9 * judged(net, before, x, low, high)


@pytest.mark.parametrize(
    ("whole", "down", "up"),
    [(-2.0, -math.inf, 2.0), (0.0, -math.inf, 0.0), (1.5, 0.0, 0.0), (7.0, -1.0, math.inf)],
)
def test_the_room_of_a_clip_from_0_to_6(whole: float, down: float, up: float):
    found = room(torch.tensor([whole]), None, (0.0, 6.0), lambda node: torch.tensor(0.0))
    assert [float(t) for t in found] == [down, up]


def test_behind_a_gate_that_is_shut_or_turns_the_sign_every_error_counts():
    net = Clipped(nn.ReLU(), skip=True, gate=0.0).eval()
    program = prepared(narrows.capture(net, (torch.randn(2, 8),)))
    layer = next(n for n in program.graph.nodes if "linear" in str(n.target))
    total = sum_after(layer)
    assert total is not None
    assert total.gate is not None
    gate = torch.tensor([[0.05, -0.5, 0.5]])
    values = {total.gate: gate, total.other: torch.full((1, 3), -3.0)}
    down, up = room(torch.ones(1, 3), total, (0.0, math.inf), values.__getitem__)
    assert down.tolist() == [[0.0, 0.0, -math.inf]]
    assert up.tolist() == [[0.0, 0.0, 5.0]]  # 3 - 0.5 is missing, and half of an error arrives


class Twice(nn.Module):
    """A result that a ReLU reads, and something else."""

    def __init__(self, other: str) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(8, 6), other

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.layer(x)
        others = {"sigmoid": torch.sigmoid, "relu6": nn.functional.relu6, "relu": torch.relu}
        return y.relu() * 2.0, others[self.other](y)


@pytest.mark.parametrize("other", ["sigmoid", "relu6", "relu"])
def test_what_another_reader_sees_is_not_hidden(other: str):
    program = prepared(narrows.capture(Twice(other).eval(), (torch.randn(2, 8),)))
    layer = next(n for n in program.graph.nodes if "linear" in str(n.target))
    assert clip_after(layer) == ((0.0, math.inf) if other == "relu" else ANYWHERE)


class Read(nn.Module):
    """A result that a gate, a sum and a ReLU follow, and what reads it besides."""

    def __init__(self, also: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.squeeze = nn.Linear(8, 8), nn.Linear(8, 8)
        self.later, self.also = nn.Linear(8, 3), also

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.layer(x)
        if self.also == "a sum":
            return y.relu(), y + x
        gate = torch.sigmoid(x if self.also in ("a ReLU", "a layer") else y)
        if self.also in ("nothing but a block", "the block is returned"):
            gate = torch.sigmoid(self.squeeze(y.clamp(-1, 1)))
        product = y * gate
        clipped = torch.relu(product + x)
        others = {
            "a ReLU": lambda: y.relu(),
            "a layer": lambda: self.later(y),
            "returned": lambda: y,
            "a function": lambda: torch.tanh(y) * 2.0,
            "the gate is returned": lambda: gate,
            "the block is returned": lambda: gate,
            "the product": lambda: torch.tanh(product),
            "the sum, too": lambda: y + x,
        }
        return clipped, others.get(self.also, lambda: x)()


ALSO = (
    "a sum", "a ReLU", "a layer", "returned", "a function", "the gate is returned",
    "the block is returned", "the product", "the sum, too",
)  # fmt: skip


def solved_twice(net: nn.Module) -> tuple[Tensor, Tensor]:
    """Return a layer's weights, solved for what it makes and for what comes out of the clip."""
    x = torch.randn(300, 8, dtype=torch.float64)
    program = narrows.capture(net.eval().double(), (x[:2],))
    plan = ChannelPlan.given(program, {"layer.weight": [0, 1, 2, 4, 5]})
    made = (
        narrows.compensate(program, plan, data=[x], method=LeastSquares(turns=turns))
        for turns in (0, 3)
    )
    plain, again = (m.weights["layer.weight"] for m in made)
    return plain, again


@pytest.mark.parametrize("also", ALSO)
def test_a_clip_behind_a_gate_hides_nothing_that_is_read_elsewhere(also: str):
    plain, again = solved_twice(Read(also))
    assert torch.equal(plain, again)


@pytest.mark.parametrize("also", ["nothing", "nothing but a block"])
def test_what_a_gate_alone_reads_is_solved_for_behind_the_clip(also: str):
    plain, again = solved_twice(Read(also))
    assert not torch.allclose(plain, again, rtol=1e-3)


def test_what_a_sum_has_lost_is_not_made_up_for_where_the_result_is_read_elsewhere():
    """The gated sum has lost some of its other operand; the result is returned as it is, too."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.layer = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.layer(x)
            return y * torch.sigmoid(x) + self.first(x), y

    x = torch.randn(300, 8, dtype=torch.float64)
    net = Both().eval().double()
    program = narrows.capture(net, (x[:2],))
    plan = ChannelPlan.given(program, {"first.weight": [0, 1, 2]})
    made = narrows.compensate(program, plan, data=[x])
    assert torch.allclose(made.weights["layer.weight"], net.layer.weight, rtol=1e-6)


def test_rows_that_do_not_fit_are_found_again(monkeypatch: pytest.MonkeyPatch):
    net = Clipped(nn.ReLU()).eval()
    x = torch.randn(64, 8)
    program = narrows.capture(net, (x[:2],))
    plan = ChannelPlan.given(program, {"layer.weight": [0, 1, 2, 4]})
    one = narrows.compensate(program, plan, data=[x])
    monkeypatch.setattr("narrows.passes.choosing.repair.HELD", 100)
    two = narrows.compensate(program, plan, data=[x])
    assert torch.equal(one.weights["layer.weight"], two.weights["layer.weight"])


@pytest.mark.parametrize("turns", [-1, 1.5, True, None, "3"])
@pytest.mark.parametrize("kind", [LeastSquares, Symmetric])
def test_turns_are_a_whole_number_from_0_on(kind: Any, turns: Any):
    with pytest.raises(PlanUsageError, match=r"turns of .* is a whole number of at least 0, got"):
        kind(turns=turns)


@pytest.mark.parametrize("ridge", [0.0, -1.0, math.inf, math.nan])
def test_a_ridge_is_finite_and_above_0(ridge: float):
    with pytest.raises(PlanUsageError, match="takes a finite ridge above 0"):
        LeastSquares(ridge=ridge)
