"""Every budget, allocator and compensation by name, on a small CNN and a small ViT.

Criteria have a table of their own (`tests/passes/test_criterion_formulas.py`), gates and losses
another (`tests/training/test_members.py`).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import narrows
from narrows.ir.compare import relative_error
from narrows.ir.program import Program
from narrows.ir.structure.layers import layers_of
from narrows.ir.workload import macs, works_of
from narrows.passes.choosing.allocators.catalog import ALLOCATORS
from narrows.passes.choosing.budgets.base import Lost
from narrows.passes.choosing.budgets.catalog import BUDGETS
from narrows.passes.choosing.compensations.catalog import COMPENSATIONS
from narrows.passes.plans.choose import make_plan
from narrows.passes.plans.options import Choosing
from tests.passes.scored import Small, Vit, captured, x_of
from tests.passes.test_other_costs import Flat

# As real images do, they have few directions: what is gone can be made up for.
BASIS = x_of(6, 3 * 36, seed=5)
DATA = [(x_of(12, 6, seed=seed) @ BASIS).reshape(12, 3, 6, 6) for seed in (1, 2)]
COSTS = Flat(byte=1e-14, call=0.0)  # all but the multiplications is next to nothing
QUICK = {
    "cacp": "cacp{steps=1, pairs=2}", "spdy": "spdy{tries=2}",
    "reward": "reward{population=2, generations=1}",
    "blocks": "blocks{steps=2}", "distill": "distill{steps=2}",
}  # fmt: skip


@pytest.fixture(scope="module", params=[Small, Vit], ids=["cnn", "vit"])
def program(request: pytest.FixtureRequest) -> Program:
    return captured(request.param())


def of_layers(program: Program) -> int:
    """Return the multiply-accumulates of the layers with weights: those of attention not."""
    works, layers = (
        works_of(program),
        {u.node.name for us in layers_of(program).values() for u in us},
    )
    return sum(macs(n, works) for n in program.graph.nodes if n.name in layers)


def share_of_macs(program: Program, whole: Program) -> float:
    return of_layers(program) / of_layers(whole)


@pytest.mark.parametrize("data", [None, DATA], ids=["weights", "data"])
@pytest.mark.parametrize("name", ALLOCATORS.providers())
def test_every_allocator_meets_a_budget(program: Program, name: str, data: Any) -> None:
    needs = name in ("cacp", "descent", "pagcp", "reward", "spdy")
    asked: dict[str, Any] = {"data": DATA if needs else data, "allocator": QUICK.get(name, name)}
    asked |= {"latency": 0.9, "costs": COSTS} if name == "ladder" else {"macs": 0.8}
    plan = narrows.plan(program, **asked)
    assert plan.removed
    small = narrows.apply(program, plan)  # which holds it to the masked program
    if name != "ladder":
        assert share_of_macs(small, program) <= 0.8 * (1 + 1e-9)


@pytest.mark.parametrize("name", BUDGETS.providers())
def test_every_budget_is_met(program: Program, name: str) -> None:
    """What comes out costs no more than was asked for, by the budget's own count."""
    kind = BUDGETS.lookup(name)
    share = {"accuracy_drop": 50, "divergence": 0.05}.get(name, 0.9)
    more: dict[str, Any] = {"data": DATA} if issubclass(kind, Lost) else {}
    if kind.timed:
        more["costs"] = COSTS
    choosing = Choosing(limits={name: share}, **more)
    plan = make_plan(program, None, None, choosing, clock=lambda p, bits: share_of_macs(p, program))
    assert plan.removed
    small = narrows.apply(program, plan)
    if name in ("macs", "measured"):
        assert share_of_macs(small, program) <= 0.9 * (1 + 1e-9)


@pytest.mark.parametrize("name", COMPENSATIONS.providers())
def test_every_compensation_brings_the_outputs_no_farther(program: Program, name: str) -> None:
    """A quarter of the channels goes, as their filters say; `fold` and `udfc` see no data."""
    plan = narrows.plan(program, ratio=0.25)
    made = narrows.compensate(program, plan, data=DATA, method=QUICK.get(name, name))
    small = narrows.apply(made, plan)
    x = torch.cat(DATA)
    # What is removed is what is masked; in float64 only the order of sums differs.
    assert relative_error(small(x), plan.masked(made)(x)) < 1e-9
    far = [float((p(x) - program(x)).square().mean()) for p in (plan.masked(program), small)]
    if name not in ("fold", "udfc", "mean", "moments"):
        assert far[1] < far[0]
