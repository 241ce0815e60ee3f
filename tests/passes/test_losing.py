"""Budgets of what is lost: points of a function or of agreement, and the divergence."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import narrows
from narrows.errors import PlanError, PlanUsageError, UsageError
from narrows.ir.program import Program
from narrows.passes.choosing.judged import Judged, apart
from narrows.passes.choosing.prepare import prepared
from narrows.passes.choosing.tolerance import made_up
from narrows.passes.plans.choose import setting_of
from narrows.passes.plans.options import Choosing
from narrows.passes.plans.plan import ChannelPlan
from tests.passes.residual import images, left, model, settled
from tests.passes.test_latency import costs

DATA = [images(32, 1), images(32, 2)]


@pytest.fixture
def program() -> Program:
    return settled()


def size(program: Program) -> float:
    """Return points that a program is worth: what is left of its multiply-accumulates, percent.

    What is masked counts as gone: its columns are zero.
    """
    whole = settled()
    zero = {n: w for n, w in program.weights.items() if w.dim() > 1 and n in whole.weights}
    return 100 * float(
        sum(int((w != 0).sum()) for w in zero.values())
        / sum(whole.weights[n].numel() for n in zero)
    )


@pytest.mark.parametrize("options", [
    {"constrained": False}, {"criterion": "l2", "data": None}, {"criterion": "wanda"},
])  # fmt: skip
def test_as_much_goes_as_a_function_allows(program: Program, options: dict[str, Any]):
    """A function that counts what is there: the search stops within a step of what is allowed."""
    given: dict[str, Any] = {"data": DATA, "accuracy_drop": 25, "evaluate": size, **options}
    plan = narrows.plan(program, **given)
    small = narrows.apply(program, plan)
    assert plan.removed
    lost = 100 - size(plan.masked(program))
    assert 5 < lost <= 25
    assert left(small) < 0.95 * left(program)
    assert any(n.reason == "lost" and "points" in n.message for n in plan.notes)


def far(program: Program, plan: ChannelPlan) -> float:
    """Return what a plan loses on the quarter that is kept out, repaired by the rest."""
    given, held = apart(prepared(program), [[x] for x in DATA])
    made = narrows.compensate(program, plan, data=[tuple(x) for x in given])
    return Judged.of(prepared(program), held, "auto").far(plan.masked(made))


def test_a_divergence_is_one_of_data_kept_out(program: Program):
    plan = narrows.plan(program, divergence=5e-7, data=DATA, constrained=False)
    assert plan.removed
    assert far(program, plan) <= 5e-7 * 3  # on its way the search solves by fewer positions
    larger = narrows.plan(program, divergence=1e-5, data=DATA, constrained=False)
    assert left(narrows.apply(program, larger)) < left(narrows.apply(program, plan))


def test_beside_other_budgets_their_plan_is_looked_at(program: Program):
    alone = narrows.plan(program, macs=0.8, data=DATA, constrained=False)
    both = narrows.plan(
        program, macs=0.8, divergence=1.0, accuracy_drop=100, data=DATA, constrained=False
    )
    assert left(narrows.apply(program, both)) <= 0.8 * left(program)
    (told,) = (n.message for n in both.notes if n.reason == "lost")
    assert "nats an example" in told
    assert "points" in told
    assert alone.removed
    with pytest.raises(PlanError, match=r"a budget of divergence of 1e-09 cannot be met") as caught:
        narrows.plan(program, macs=0.3, divergence=1e-9, data=DATA, constrained=False)
    assert "nats an example are lost at 0.2" in str(caught.value)
    assert "(macs 0.3)" in str(caught.value)


def test_with_a_target_its_latency_falls(program: Program):
    table = costs(16)
    plan = narrows.plan(program, accuracy_drop=40, evaluate=size, costs=table)
    seconds = [sum(s for _, s in table.predict(p, 1))
               for p in (narrows.apply(program, plan), program)]  # fmt: skip
    assert seconds[0] < seconds[1]
    assert 0 < 100 - size(plan.masked(program)) <= 40


def test_the_first_step_may_be_too_much(program: Program):
    with pytest.raises(PlanError, match=r"cannot be met: .* points are lost where 0\.9"):
        narrows.plan(program, accuracy_drop=0, evaluate=size, data=DATA, constrained=False)


def test_a_budget_of_what_is_lost_gives_widths_its_number(program: Program):
    from narrows.passes.choosing.budgets.catalog import find
    from narrows.passes.plans.candidates import Candidates

    choosing = Choosing(accuracy_drop=50, evaluate=size)
    setting = setting_of(program, None, None, choosing)
    found = Candidates.of(setting, prepared(program))
    widths = [full // 2 for full in found.full]
    masked = found.plan(widths, "half").masked(program)
    assert find("accuracy_drop").of(found, widths) == pytest.approx(100 - size(masked))
    assert find("accuracy_drop").of(found, found.full) == 0
    assert made_up(setting, found.plan(widths, "half")).weights.keys() == masked.weights.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accuracy_drop": 1}, "a drop of accuracy needs something to be measured by"),
        ({"divergence": 0.1}, "a divergence is measured on data"),
        ({"accuracy_drop": 1, "data": DATA, "outputs": "values"}, "the outputs are no logits"),
        ({"accuracy_drop": 101, "evaluate": size}, "a number from 0 to 100, got 101"),
        ({"divergence": float("nan"), "data": DATA}, "a number of at least 0, got nan"),
        ({"limits": {"divergence": {"a": 1}}, "data": DATA}, "number of at least 0, got {'a': 1}"),
        ({"macs": 0.5, "evaluate": size}, "evaluate has no effect without accuracy_drop"),
        ({"accuracy_drop": 1, "evaluate": 3}, "evaluate is a function of a program, got 3"),
        ({"divergence": 0.1, "data": [images(1)]}, "too little data to see what is lost"),
        ({"accuracy_drop": 1, "evaluate": lambda run: float("nan")}, "evaluate returned nan"),
        ({"accuracy_drop": 1, "evaluate": lambda run: "good"}, "did not return a number"),
        ({"accuracy_drop": 1, "evaluate": lambda run: 1 / 0}, "evaluate failed: ZeroDivision"),
        ({"accuracy_drop": 1, "evaluate": size, "costs": costs(), "constrained": False},
         "takes whole couplings"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_loss_is_told(program: Program, options: dict[str, Any], message: str):
    with pytest.raises((PlanUsageError, UsageError, PlanError), match=message):
        narrows.plan(program, **options)


def test_a_function_that_becomes_nan_on_the_way_is_told(program: Program):
    """It gives a number for the unpruned program, and none for a pruned one."""
    seen: list[Program] = []

    def worth(run: Program) -> float:
        seen.append(run)
        return 1.0 if len(seen) == 1 else float("nan")

    with pytest.raises(UsageError, match="evaluate returned nan"):
        narrows.plan(program, accuracy_drop=1, evaluate=worth)
    assert len(seen) == 2


# ------------------------------------------------------------------ in one call


def test_compress_meets_several_budgets():
    """One of them takes whole couplings, so all of them do."""
    data, whole = [images(16, 1), images(16, 2)], narrows.capture(model(), (images(2),))
    artifact = narrows.compress(
        model(), (images(2),), data=data, latency=0.95, macs=0.8, accuracy_drop=100
    )
    assert artifact.plan is not None
    assert left(narrows.apply(whole, ChannelPlan.from_json(artifact.plan))) <= 0.8 * left(whole)
    assert any(" points at 0." in n["message"]
               for n in artifact.notes)  # fmt: skip


def test_compress_ships_nothing_that_loses_too_much():
    with pytest.raises(PlanError, match=r"37 points are lost at 0\.8.. of .* \(macs 0\.9\)"):
        narrows.compress(
            model(), (images(2),), data=[images(16)], macs=0.9, accuracy_drop=0.5,
            evaluate=iter_of(90.0, 90.0, 53.0),
        )  # fmt: skip


def iter_of(*values: float) -> Any:
    """Return a function that gives one value after another."""
    left = iter(values)
    return lambda run: next(left)


def test_outputs_that_are_not_finite_lose_everything(program: Program):
    bad = program.with_weights({**program.weights, "head.bias": torch.full((10,), torch.nan)})
    with pytest.raises(PlanError):
        narrows.plan(bad, divergence=0.1, data=DATA)
