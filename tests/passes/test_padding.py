"""Channels of zeros, added where a width keeps a target from its fast kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import narrows
from narrows.backends.measured.layout import Layout
from narrows.backends.onnx.staircase import StairTable
from narrows.ir.compare import relative_error
from narrows.ir.meta import Meta
from narrows.ir.program import Origin, Program, Pruning
from narrows.passes.forms.padding import longer_origin, padded
from narrows.passes.pipeline import Pipeline
from narrows.passes.plans.state import place_of, without_zeros
from narrows.passes.plans.take_back import take_back
from tests.passes.test_forms import EXACT, X, costs

SLOW_PLAIN = 100.0


def table() -> StairTable:
    """Return costs by which convolutions of whole blocks of 4 channels are 100 times faster."""
    made = costs(1e-3, 4)
    plain = made.grids["plain conv 3x3/1"]
    slow = replace(plain, us=plain.us * SLOW_PLAIN)
    grids = {**made.grids, "plain conv 3x3/1": slow, "plain depthwise 3x3/1": slow}
    grids["blocked depthwise 3x3/1"] = plain
    return replace(made, layout=Layout(4, 4, 1, ("relu",), ("relu", "add")), grids=grids)


class Odd(nn.Module):
    """A residual stream of 10 channels with norms, a depthwise layer, a gate, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 10, 3, padding=1)
        self.norm = nn.BatchNorm2d(10)
        self.deep = nn.Conv2d(10, 10, 3, padding=1, groups=10)
        self.squeeze = nn.Conv2d(10, 4, 1)
        self.excite = nn.Conv2d(4, 10, 1)
        self.back = nn.Conv2d(10, 10, 3, padding=1, bias=False)
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        y = self.deep(x)
        y = y * torch.sigmoid(self.excite(self.squeeze(y.mean((2, 3), keepdim=True)).relu()))
        x = x + self.back(y)
        return self.head(torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1))


def captured(net: nn.Module) -> Program:
    torch.manual_seed(0)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias)
            nn.init.normal_(m.running_mean)  # pyright: ignore[reportArgumentType]
    return narrows.capture(net.double().eval(), (X,))


def made(program: Program, plan: narrows.ChannelPlan | None = None) -> Program:
    result = Pipeline.default(plan, table()).run(program).program
    masked = program if plan is None else plan.masked(program)
    for got, expected in zip(flat(result(X)), flat(masked(X)), strict=True):
        assert relative_error(got, expected) <= EXACT
    return result


def flat(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def widths(program: Program) -> dict[str, int]:
    return {
        n.name: Meta(n).shape[1] for n in program.graph.nodes if "conv2d" in str(n.target)
    }  # fmt: skip


def test_odd_widths_grow_to_whole_blocks() -> None:
    result = made(captured(Odd()))
    found = widths(result)
    assert {found["stem"], found["deep"], found["back"]} == {12}
    assert result.weights["deep.weight"].shape == (12, 1, 3, 3)
    (groups,) = {n.args[6] for n in result.graph.nodes if n.name == "deep"}
    assert groups == 12
    told = {n.where: n.channels for n in result.notes if n.reason == "width"}
    # A channel counts where it is made: not in the norm, the sum and the pooling that pass it on.
    assert told == dict.fromkeys(("stem", "deep", "excite", "back"), 2)


def test_what_was_added_has_no_place_in_the_original() -> None:
    result = made(captured(Odd()))
    index = result.origins["back.weight"].index
    assert sorted(index[1] or ())[:2] == [-1, -1]
    assert sorted(index[1] or ())[2:] == list(range(10))


def test_again_changes_nothing() -> None:
    once = made(captured(Odd()))
    twice = Pipeline.default(None, table()).run(once).program
    assert widths(twice) == widths(once)
    assert relative_error(twice(X), once(X)) <= EXACT


def test_without_costs_the_zeros_go_again() -> None:
    program = captured(Odd())
    small = Pipeline.default().run(made(program)).program
    assert set(widths(small).values()) <= {10, 4}
    assert relative_error(small(X), program(X)) <= EXACT


@pytest.mark.parametrize("keep", [range(9), range(0, 10, 2), [3]])
def test_masks_and_added_channels_together(keep: range | list[int]) -> None:
    program = captured(Odd())
    plan = narrows.plan(program, {"back.weight": list(keep)}, zeros=False)
    made(program, plan)


def test_a_criterion_takes_back_no_zeros() -> None:
    program = captured(Odd())
    plan = narrows.plan(program, ratio=0.3, zeros=False)
    back = take_back(program, plan, table())
    assert all(max(k, default=0) < 10 for k in back.inputs.values())
    made(program, back)


class Twice(nn.Module):
    """Two branches of 10 channels, joined by a function of both."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor], wide: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 10, 3, padding=1)
        self.b = nn.Conv2d(3, 10, 3, padding=1)
        self.head = nn.Conv2d(wide, 4, 3, padding=1)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.join(self.a(x), self.b(x)))


JOINS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int]] = {
    "twice": (lambda a, b: torch.cat((a, b, a), 1), 30),
    "stack": (lambda a, b: torch.stack((a, b), 1).flatten(1, 2), 20),
    "softmax": (lambda a, b: (a + b).softmax(1), 10),
    "group norm": (lambda a, b: nn.functional.group_norm(a + b, 2), 10),
    "view": (lambda a, b: (a + b).view(2, 5, 2, 8, 8).transpose(1, 2).reshape(2, 10, 8, 8), 10),
    "mean of channels": (lambda a, b: b * a.mean(1, keepdim=True), 10),
    "slice": (lambda a, b: (a + b)[:, :9].contiguous(), 9),
    "quotient": (lambda a, b: a / b.abs(), 10),
    "picked": (lambda a, b: torch.maximum(a[:, [*range(9), 3]], b), 10),
    "sorted": (lambda a, b: torch.where(a > 0, a.sort(1).values, b), 10),
    "logarithm": (lambda a, b: (a * b).square().log(), 10),
}


@pytest.mark.parametrize("name", JOINS)
def test_nothing_grows_where_more_channels_would_mean_something(name: str) -> None:
    program = captured(Twice(*JOINS[name]))
    result = made(program)
    assert result.weights["a.weight"].shape[0] <= 10, name


class Tied(nn.Module):
    """A norm that two tensors share, one of them an output, and a scale that is reshaped."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 10, 3, padding=1)
        self.b = nn.Conv2d(3, 10, 3, padding=1)
        self.norm = nn.BatchNorm2d(10)
        self.c = nn.Conv2d(3, 5, 3, padding=1)
        self.scale = nn.Parameter(torch.randn(5))
        self.head = nn.Conv2d(15, 4, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        c = self.c(x) * self.scale.view(1, 5, 1, 1)
        return self.head(torch.cat((self.norm(self.a(x)), c), 1)), self.norm(self.b(x))


def test_weights_that_others_read_stay() -> None:
    shapes = {n: tuple(w.shape) for n, w in made(captured(Tied())).weights.items()}
    assert shapes["a.weight"] == (10, 3, 3, 3)
    assert shapes["c.weight"] == (5, 3, 3, 3)


class Dense(nn.Module):
    """Tensors of 10, 6 and 5 channels that concats join, some twice, read in every usual way."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 10, 3, padding=1)
        self.b = nn.Conv2d(10, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.c = nn.Conv2d(16, 5, 3, padding=1)
        self.deep = nn.Conv2d(21, 21, 3, padding=1, groups=21)
        self.d = nn.Conv2d(21, 4, 3, padding=1)
        self.head = nn.Linear(21, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a = self.a(x).relu()
        b = torch.cat((a, self.b(a)), 1)
        c = torch.cat((b, self.c(self.norm(b).relu())), 1)
        y = nn.functional.max_pool2d(self.deep(c), 2)
        return self.d(y), self.head(y.mean((2, 3)))


def test_what_a_concat_joins_grows_in_the_middle() -> None:
    program = captured(Dense())
    wider = padded(Pruning(program), table())
    assert wider is not None
    shapes = {n: tuple(w.shape) for n, w in wider.program.weights.items()}
    assert shapes["c.weight"][:2] == (8, 20)  # 10 + 2, 6 + 2
    assert shapes["deep.weight"] == (28, 1, 3, 3)
    origin = wider.program.origins["head.weight"].index[1]
    assert origin == (*range(10), -1, -1, *range(10, 16), -1, -1, *range(16, 21), -1, -1, -1)
    for made, was in zip(wider.program(X), program(X), strict=True):
        assert relative_error(made, was) <= EXACT


@pytest.mark.parametrize("amount", [0.0, 0.3, 0.7])
def test_concats_and_masks_together(amount: float) -> None:
    program = captured(Dense())
    draw = np.random.default_rng(0)
    keep = {
        name: np.flatnonzero(draw.random(program.weights[name].shape[1]) >= amount).tolist()
        for name in ("b.weight", "c.weight", "d.weight", "head.weight")
    }
    made(program, narrows.plan(program, keep, zeros=False))


def test_the_usual_widths_need_nothing() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
    assert padded(Pruning(captured(net)), table()) is None
    assert padded(Pruning(captured(Odd())), costs(1.0)) is None  # a target without blocks


NESTED = Origin("w", (12, 6, 3, 3), ((4, 9), ((1,), (4,)), None, None))


def test_rows_of_zeros_have_no_columns_of_their_own() -> None:
    rows = longer_origin(NESTED, "w", torch.zeros(2, 1, 3, 3), 0, np.array([0, 1, 2, 2]))
    assert rows.index[:2] == ((4, 9, -1, -1), ((1,), (4,), (-1,), (-1,)))
    columns = longer_origin(NESTED, "w", torch.zeros(2, 1, 3, 3), 1, np.array([0, 1]))
    assert columns.index[:2] == ((4, 9), ((1, -1), (4, -1)))


@pytest.mark.parametrize(
    "origin",
    [
        Origin("w", (12, 6), ((4, 9, -1), (5, 1, -1, -1))),
        Origin("w", (12, 6), ((4, 9, -1), ((1, -1), (4, -1), (-1, -1)))),
        Origin("w", (12, 6), ((4, 9), None)),
    ],
)
def test_zeros_that_were_added_do_not_go_back(origin: Origin) -> None:
    original = torch.arange(72.0).view(12, 6)
    taken = original[place_of(origin)]
    sizes = [6 if i is None else len(i) for i in origin.index]
    if isinstance(origin.index[1][0] if origin.index[1] else 0, tuple):
        sizes[1] = 2
    wide = torch.zeros(sizes)
    wide[: taken.shape[0], : taken.shape[1]] = taken
    assert torch.equal(without_zeros(wide, origin), taken)
