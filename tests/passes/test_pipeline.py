"""The pipeline: its order, and what it reports."""

from __future__ import annotations

import json

import pytest
import torch

from narrows.errors import PassError
from narrows.ir.program import Program
from narrows.ir.text import to_text
from narrows.passes.base import Fidelity, Pass, PassResult, tolerance
from narrows.passes.eliminate_dead import EliminateDead
from narrows.passes.fold_batch_norm import FoldBatchNorm
from narrows.passes.instruments import Promises, Verify, compare
from narrows.passes.pipeline import Pipeline, format_count, macs
from narrows.passes.plans.plan import ChannelPlan
from narrows.passes.proof import Numerics
from tests.builder import Builder, aten, ramp
from tests.passes.samples import Needs, Options, Scale, network, plain, register


@pytest.fixture(autouse=True)
def _own_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)


def test_the_reports_tell_what_each_pass_did():
    program = network()
    result = Pipeline((FoldBatchNorm(), EliminateDead())).run(program)
    initial, fold, dead = result.initial, *result.reports
    assert [r.nodes for r in (initial, fold, dead)] == [6, 5, 4]
    assert [r.parameters for r in (initial, fold, dead)] == [80, 76, 76]
    assert [r.macs for r in (initial, fold, dead)] == [4 * 2 * 9 * 16] * 3
    assert [r.changed for r in (fold, dead)] == [True, True]
    assert fold.spelling == "fold-batch-norm"
    assert fold.seconds > 0
    assert fold.fidelity is None
    json.dumps(fold.to_json())


def test_the_input_stays_and_the_result_remembers():
    program = network()
    before = str(program)
    made = Pipeline((Options(count=2),)).run(program).program
    assert made.history == ("options{count=2}",)
    assert (str(program), program.history) == (before, ())


def test_notes_are_collected():
    pipeline = Pipeline((Options(), FoldBatchNorm(), Needs(must=1), Needs(must=2)))
    result = pipeline.run(network())
    assert [n.message for n in result.notes] == ["a note", "a note"]
    assert result.program.notes == result.notes


def test_remarks_are_those_of_the_last_pass():
    result = Pipeline((FoldBatchNorm(),)).run(network()).program
    assert result.marks["conv"].remark == "folded norm"
    after = Pipeline((EliminateDead(),)).run(result).program
    assert not after.marks
    assert result.marks["conv"].remark == "folded norm"


def test_every_unmet_requirement_is_listed_before_anything_runs():
    ran = []

    class Spy(Verify):
        def before(self, pass_: Pass, program: Program) -> None:
            ran.append(pass_)

    with pytest.raises(PassError) as caught:
        Pipeline((Needs(must=1), Options(), Needs(must=2))).run(plain(), [Spy()])
    assert caught.value.why == (
        "needs needs options before it; needs needs fold-batch-norm before it; "
        "needs needs fold-batch-norm before it"
    )
    assert not ran


def test_a_requirement_met_by_an_earlier_pipeline_counts():
    program = Pipeline((Options(), FoldBatchNorm())).run(plain()).program
    assert Pipeline((Needs(must=1),)).run(program).program.history[-1] == "needs{must=1}"


def test_a_pass_that_returns_something_else_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Options, "run", lambda self, program: program)
    with pytest.raises(PassError, match="options returned Program, not a PassResult"):
        Pipeline((Options(),)).run(plain())


def test_a_reference_for_the_whole_pipeline_is_measured():
    program = network()
    result = Pipeline((FoldBatchNorm(), EliminateDead())).run(program, reference=program)
    assert result.measured["float32"] <= tolerance(Fidelity.EXACT, torch.float32)
    assert Pipeline((Scale(),)).run(program, reference=program).measured["float32"] > 0.1


def test_the_table_has_a_line_per_pass():
    result = Pipeline((FoldBatchNorm(),)).run(network(), [Numerics()])
    head, capture, fold = result.table().splitlines()
    assert head.split() == ["pass", "nodes", "params", "MACs", "error", "time", "notes"]
    assert capture.split() == ["capture", "6", "80", "1.15", "k", "-", "-", "-"]
    assert fold.split()[:5] == ["fold-batch-norm", "5", "76", "1.15", "k"]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1 k"),
        (272474, "272 k"),
        (999_999, "1 M"),
        (40_812_544, "40.8 M"),
        (11_300_000_000_000_000, "1.13e+04 T"),
    ],
)
def test_counts_are_short(count: int, text: str):
    assert format_count(count) == text


def test_macs_are_those_of_one_sample():
    program = plain()
    assert macs(program) == {"conv": 4 * 2 * 9 * 16}
    assert macs(program.replace(dynamic_batch=False)) == {"conv": 2 * 4 * 2 * 9 * 16}


# ------------------------------------------------------------------ the default pipeline


def residual() -> Program:
    """Return two convolutions around a residual branch, a flatten and a linear layer."""
    b = Builder((2, 2, 4, 4))
    x = b.relu(b.norm(b.conv(b.inputs[0], "stem", 6, 2), "stem_norm", 6), "stem_relu")
    y = b.relu(b.norm(b.conv(x, "inner", 4, 6), "inner_norm", 4), "inner_relu")
    y = b.conv(y, "outer", 6, 4, bias=True)
    total = b.call(aten.add.Tensor, x, y, name="total")
    flat = b.call(aten.reshape.default, total, [2, 96], name="flat")
    return b.program(b.call(aten.linear.default, flat, b.weight("head.weight", ramp(3, 96))))


def test_golden(golden):
    program = residual()
    plan = ChannelPlan.given(
        program,
        {"outer.weight": [0, 1, 3], "inner.weight": [0, 2, 3, 4]},
        {"inner.weight": [0, 1, 2]},
    )
    texts = [to_text(program)]

    class Collect(Verify):
        def after(self, pass_: Pass, program: Program, result: PassResult, seconds: float) -> None:
            super().after(pass_, program, result, seconds)
            texts.append(to_text(result.program))

    instruments = [Promises(), Numerics(double=True), Collect()]
    result = Pipeline.default(plan, fold=True).run(program, instruments)
    golden("default_pipeline", "\n".join(texts))
    assert compare(result.program, plan.masked(program)) <= 1e-5
    again = Pipeline.default(fold=True).run(result.program, instruments)
    assert not any(r.changed for r in again.reports)
