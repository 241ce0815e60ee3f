"""What a person's own criterion, budget, allocator or compensation gives is looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

import narrows
from narrows.errors import PlanError
from narrows.ir.program import Program
from narrows.passes.choosing.allocators.base import ByWidths
from narrows.passes.choosing.budgets import catalog as budgets
from narrows.passes.choosing.budgets.base import Budget, Limit
from narrows.passes.choosing.compensations.base import Sums, Task
from narrows.passes.plans.candidates import Candidates, Widths
from tests.passes.residual import images, model, settled

DATA = [images(16, 1), images(16, 2)]


@pytest.fixture
def program() -> Program:
    return settled()


# ------------------------------------------------------------------ criteria


def test_scores_that_are_nan_are_told(program: Program):
    with pytest.raises(PlanError, match=r"scores 16 outputs of 'stem\.0\.weight' as NaN"):
        narrows.plan(program, macs=0.7, criterion=lambda p, layer, side: [np.nan] * 16)
    with pytest.raises(PlanError, match="the loss is nan"):
        narrows.plan(
            program, ratio=0.3, criterion="taylor", data=DATA, loss=lambda z, _: z.sum() * torch.nan
        )


def test_a_score_without_end_keeps_its_channel(program: Program):
    """The first channel of everything stays, and the others compare as if it were not there."""

    def score(program: Program, layer: Any, side: str) -> np.ndarray:
        return np.array([np.inf, *range(1, layer.width(side))], dtype=float)

    plan = narrows.plan(program, macs=0.3, criterion=score, constrained=False)
    assert plan.removed
    assert all(0 in keep for keep in plan.inputs.values())


# ------------------------------------------------------------------ budgets


@dataclass(frozen=True)
class Odd(Budget):
    """A number whatever the widths."""

    name: ClassVar[str] = "odd"
    unit: ClassVar[str] = "oddities"

    number: Any = float("nan")
    all: Any = 1.0

    def of(self, candidates: Candidates, widths: Widths) -> float:
        return self.number

    def whole(self, candidates: Candidates) -> float:
        return self.all


@dataclass(frozen=True)
class OddAtLast(Odd):
    """What is really used is known only once it is pruned."""

    slack: ClassVar[float] = 0.1

    def quick(self, candidates: Candidates) -> Any:
        return lambda widths: 0.1


@pytest.mark.parametrize(
    ("budget", "told"),
    [(Odd(), "nan"), (Odd("many"), "'many'"), (Odd(0.5, all=float("inf")), "inf"),
     (Odd(-1.0), "-1.0"), (OddAtLast(), "nan")],
)  # fmt: skip
def test_what_a_budget_counts_is_a_number(
    program: Program, budget: Budget, told: str, monkeypatch: pytest.MonkeyPatch
):
    usual = budgets.find
    monkeypatch.setattr(budgets, "find", lambda b: budget if b == "odd" else usual(b))
    with pytest.raises(PlanError, match=f"the budget 'odd' counts {told}"):
        narrows.plan(program, limits={"odd": 0.5})


# ------------------------------------------------------------------ allocators


@dataclass(frozen=True)
class Given(ByWidths):
    """Widths that are given."""

    name: ClassVar[str] = "given"
    found: Any = None

    def widths(self, candidates: Candidates, limits: Sequence[Limit]) -> Sequence[int]:
        return self.found


@pytest.mark.parametrize(
    "found", [None, 3, [1], [-3] * 4, [99] * 4, [2.0] * 4, [float("nan")] * 4, [0, 1, 1, 1]]
)
@pytest.mark.parametrize("asked", [{"macs": 0.5}, {"limits": {"memory": 0.5}}])
def test_an_allocator_gives_each_a_number_of_its_channels(
    program: Program, found: Any, asked: dict[str, Any]
):
    with pytest.raises(
        PlanError, match=r"the allocator 'given' gives .* for 4 candidates"
    ) as error:
        narrows.plan(program, **asked, allocator=Given(found))
    assert "1 to 16, 1 to 24, 1 to 4, 1 to 32" in str(error.value)


def test_an_allocator_stays_within_its_limits(program: Program):
    with pytest.raises(PlanError, match=r"leaves 1\.000 of the multiply-accumulates, and 0\.5 was"):
        narrows.plan(program, macs=0.5, allocator=Given((16, 24, 4, 32)))
    plan = narrows.plan(program, macs=0.5, allocator=Given(np.array([4, 4, 4, 4])))
    assert len(plan.outputs["stem.0.weight"]) == 4


# ------------------------------------------------------------------ compensations


@dataclass(frozen=True)
class Solves:
    """Weights that are made of those that are there."""

    name: ClassVar[str] = "solves"
    reads_pruned: ClassVar[bool] = True
    how: Any = None

    def solve(self, sums: Sums) -> Tensor:
        return self.how(sums.now)


@dataclass(frozen=True)
class Makes:
    """A whole network's weights, not a number any more."""

    name: ClassVar[str] = "makes"
    needs_data: ClassVar[bool] = False

    def made(self, task: Task) -> tuple[Program, list[Any]]:
        weights = {n: w * torch.nan for n, w in task.base.weights.items()}
        return task.begun.with_weights(weights), []


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Solves(lambda w: w * torch.nan), "the compensation 'solves' gives weights that are not"),
        (Solves(lambda w: w[..., :-1]), r"gives weights of \[1, 16, 27\] for a layer of"),
        (Solves(lambda w: None), "gives weights of NoneType for a layer of"),
        (Solves(lambda w: 1 / 0), "the compensation 'solves' failed: ZeroDivisionError"),
        (Makes(), "the compensation 'makes' gives weights that are not finite"),
    ],
)
def test_a_compensation_gives_weights(program: Program, method: Any, message: str):
    plan = narrows.plan(program, ratio=0.3)
    with pytest.raises(PlanError, match=message):
        narrows.compensate(program, plan, data=DATA, method=method)


# ------------------------------------------------------------------ chance


def test_what_bits_leave_of_the_outputs_is_told():
    """In two bits a network of random weights knows little; whatever it is stands in the report."""
    artifact = narrows.compress(model(), (images(2),), data=DATA, bits=2)
    told = [n["message"] for n in artifact.notes if n["reason"] == "compared"]
    assert len(told) == 1
    assert "in 2 bits: divergence from the unpruned outputs" in told[0]
    assert "of 32 examples" in told[0]
    assert told[0] in artifact.report


def test_a_network_at_chance_is_said_in_what_is_shipped():
    artifact = narrows.compress(model(), (images(2),), data=DATA, macs=0.9, compensation="mean")
    # The unpruned network, of random weights, names one class: whatever is left names it, too.
    assert any(n["reason"] == "chance" for n in artifact.notes)
    assert "the pruned network is at chance: it knows nothing" in artifact.report
