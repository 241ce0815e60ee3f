"""Latencies that are measured: budgets, what looks for them, and the stopwatch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

import narrows
from narrows.api.stopwatch import Stopwatch
from narrows.errors import PlanError, PlanUsageError
from narrows.ir.program import Program
from narrows.passes.choosing.budgets.predictor import drawn, fitted
from narrows.passes.plans.choose import make_plan
from narrows.passes.plans.options import Choosing
from tests.passes.residual import images, left, settled
from tests.passes.test_allocating import candidates_of
from tests.passes.test_latency import costs

DATA = [images(32, 1), images(32, 2)]


@pytest.fixture
def program() -> Program:
    return settled()


def slower(program: Program, bits: int | None = None) -> float:
    """Return a made-up time over the unpruned one's: a part of it stays whatever is removed."""
    return 0.3 + 0.7 * left(program) / left(settled())


@pytest.mark.parametrize("options", [
    {}, {"allocator": "uniform"}, {"data": DATA}, {"limits": {"measured": 0.7, "channels": 0.9}},
])  # fmt: skip
def test_a_measured_latency_corrects_the_predicted_one(program: Program, options: dict[str, Any]):
    given = {"limits": {"measured": 0.7}, "costs": costs(1), **options}
    plan = make_plan(program, None, None, Choosing(**given), clock=slower)
    made = narrows.apply(program, plan)
    assert 0.7 * 0.93 < slower(made) <= 0.7 * (1 + 1e-9)
    assert any("measured" in n.message for n in plan.notes if n.reason in ("latency", "budget"))


def test_without_a_cost_table_a_measured_latency_is_looked_for_by_macs(program: Program):
    plan = make_plan(program, None, None, Choosing(limits={"measured": 0.7}), clock=slower)
    assert 0.7 * 0.95 < slower(narrows.apply(program, plan)) <= 0.7 * (1 + 1e-9)
    with pytest.raises(PlanError, match=r"of measured of 0.2 cannot be met: 0\.3\d+ is the least"):
        make_plan(program, None, None, Choosing(limits={"measured": 0.2}), clock=slower)


def stairs(program: Program, bits: int | None = None) -> float:
    """Return a made-up time that steps in blocks of eight channels, and hangs on little else."""
    made = [t.shape[0] for t in program.weights.values() if t.dim() > 1]
    return 0.2 + sum(8 * -(-n // 8) for n in made) / 200


def test_a_predictor_is_fitted_to_what_was_measured(program: Program):
    """On widths that it has not seen it is nearer to the time than multiply-accumulates are."""
    found = candidates_of(program)

    def time(widths: Sequence[int]) -> float:
        return stairs(narrows.apply(program, found.plan(widths, ""), check=False))

    samples = drawn(found.full, found.least, 24, 0)
    assert samples[:2] == [tuple(found.full), tuple(found.least)]
    whole = time(found.full)
    expected = fitted(samples, [time(w) / whole for w in samples], 0)
    reads = found.reads
    other = drawn(found.full, found.least, 12, 1)[2:]
    true = np.array([time(w) / whole for w in other])
    macs = [reads.cost(found.there(w), reads.macs) / reads.whole(reads.macs) for w in other]
    by_net = np.abs([expected(w) for w in other] - true).mean()
    assert by_net < 0.1 < np.abs(np.array(macs) - true).mean()


def test_a_measured_latency_is_looked_for_by_a_predictor(program: Program):
    seen: list[float] = []

    def clock(small: Program, bits: int | None) -> float:
        seen.append(stairs(small) / stairs(program))
        return seen[-1]

    choosing = Choosing(limits={"measured{samples=16}": 0.7}, costs=costs(1))
    plan = make_plan(program, None, None, choosing, clock=clock)
    assert stairs(narrows.apply(program, plan)) / stairs(program) <= 0.7 * (1 + 1e-9)
    assert len(seen) <= 16 + 7
    for spelled, options, message in (
        ("measured{samples=2}", {}, "samples is a number of at least 4, got 2"),
        ("measured{seed=2}", {}, "seed has no effect without samples"),
        ("measured{samples=8}", {"allocator": "ladder"}, "a network is to be fitted"),
    ):
        asked = Choosing(limits={spelled: 0.7}, costs=costs(1), **options)
        with pytest.raises(PlanUsageError, match=message):
            make_plan(program, None, None, asked, clock=clock)


@pytest.mark.parametrize("bits", [None, 8])
def test_a_stopwatch_runs_what_is_lowered(program: Program, bits: int | None):
    watch = Stopwatch(program, "torch" if bits is None else "onnx", rounds=3)
    made = narrows.apply(program, narrows.plan(program, macs=0.2))
    assert 0 < watch(made, bits) < 50  # it runs; how fast is the machine's affair
