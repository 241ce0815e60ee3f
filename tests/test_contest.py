"""The contest of forms: who takes part, who wins by made-up clocks, and what is told of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import narrows
from narrows.api import contest
from narrows.backends import make_target, target_type, timing
from narrows.backends.onnx import OnnxTarget
from narrows.backends.timing import Trial, here, race
from narrows.errors import LowerError, UsageError
from narrows.ir.program import Program
from narrows.passes.pruning import rivals

pytestmark = pytest.mark.usefixtures("shipped_costs")
X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A stem that two layers read in part."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1)
        self.left, self.right = nn.Conv2d(64, 32, 3, padding=1), nn.Conv2d(64, 32, 1)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.head((self.left(x).relu() + self.right(x)).mean((2, 3)))


KEEP = {"left.weight": range(0, 64, 2), "right.weight": range(16, 60, 3)}


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(autouse=True)
def _held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let contests take place, however long it takes to make forms here."""
    monkeypatch.setattr(contest, "LARGEST", 1 << 28)
    monkeypatch.setattr(contest, "MAKING", float("inf"))


def timed(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int], float]) -> list[int]:
    """Have every program take the seconds that a function says for its parameters."""
    tried: list[int] = []

    def trial(program: Program, batch: int) -> Trial:
        tried.append(program.parameter_count)
        return lambda count: seconds(program.parameter_count)

    monkeypatch.setattr(OnnxTarget, "track", lambda target: nullcontext(trial))
    return tried


def compiled(**options: Any) -> narrows.Artifact:
    plan = {"keep_inputs": {n: list(k) for n, k in KEEP.items()}, "zeros": False}
    return narrows.compile(net(), (X,), plan=plan, samples=1, **options)


def test_in_a_race_who_is_slow_leaves_early_and_who_is_near_stays() -> None:
    seconds = {"a": 1.0, "b": 1.01, "c": 1.2, "d": 9.0}
    asked: list[int] = []

    def trial(each: float) -> Trial:
        return lambda count: asked.append(count) or each

    times = race({name: trial(each) for name, each in seconds.items()}, 32.0)
    assert {name: len(turns) for name, turns in times.items()} == {"a": 4, "b": 4, "c": 3, "d": 1}
    assert [turns[0] for turns in times.values()] == [*seconds.values()]
    assert set(asked) == {1}
    alone = race({"a": trial(1.0), "d": trial(9.0)}, 1e9)
    assert {name: len(turns) for name, turns in alone.items()} == {"a": 1, "d": 1}
    asked.clear()
    assert race({"e": trial(1e-4), "f": trial(1e-4)}, 0.0)["e"] == [1e-4] * 3
    assert asked[2:] == [40] * 6  # a short call is made several times a turn


def test_a_trial_is_told_how_often_and_returns_the_time_of_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(timing, "CLOCK", lambda: now[0])

    def run() -> None:
        now[0] += 2.0

    assert here(run)(5) == 2.0
    assert now == [10.0]


def test_the_fastest_ships_whatever_was_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sum(p.numel() for p in net().parameters())
    tried = timed(monkeypatch, lambda count: 1.0 / count)
    made = compiled()
    told = made.manifest["contest"]
    assert told["winner"] == "unpruned"
    assert whole in tried
    assert made.manifest["gain"]["parameters"] == [whole, whole]
    assert made.manifest["gain"]["measured_ms"][0] == made.manifest["gain"]["measured_ms"][1]
    assert any("legalize-reads{" in p and "form=unpruned" in p for p in made.manifest["passes"])
    timed(monkeypatch, lambda count: float(count))
    least = compiled()
    forms = {f["form"]: f for f in least.manifest["contest"]["forms"]}
    assert {"unpruned", "common"} <= {name.partition("-")[0] for name in forms}
    best = min(f["measured_ms"] for f in forms.values() if "measured_ms" in f)
    assert forms[least.manifest["contest"]["winner"]]["measured_ms"] == best
    assert least.manifest["gain"]["parameters"][1] < whole
    for artifact in (made, least):
        assert f"{artifact.manifest['contest']['winner']}" in artifact.report
        assert "  ships" in artifact.report
        assert artifact.report.splitlines()[-1].startswith("measured")


def test_what_is_level_is_left_to_the_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, lambda count: 1.0 + 1e-9 * count)
    told = compiled().manifest["contest"]
    assert told["winner"] == told["forms"][0]["form"]
    predicted = [f["predicted_ms"] for f in told["forms"]]
    assert predicted == sorted(predicted)


def test_without_a_contest_the_prediction_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = timed(monkeypatch, lambda count: 1.0)
    made = compiled(contest=False)
    assert not tried
    assert "contest" not in made.manifest
    assert {"parameters", "bytes", "predicted_ms"} == set(made.manifest["gain"])
    monkeypatch.setattr(OnnxTarget, "track", lambda target: None)
    other = compiled()
    assert "runs nothing at once here" in other.manifest["contest"]["why"]
    assert "by the cost table alone" in other.report
    assert other.manifest["passes"] == made.manifest["passes"]
    with pytest.raises(UsageError, match="there can be no contest of forms"):
        compiled(contest=True)
    with pytest.raises(UsageError, match="a contest would have no effect"):
        compiled(contest=True, pipeline="prune-channels")


def test_a_form_that_does_not_run_is_told_and_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sum(p.numel() for p in net().parameters())

    def trial(program: Program, batch: int) -> Trial:
        if program.parameter_count < whole:
            raise LowerError("made up")
        return lambda count: 1.0

    monkeypatch.setattr(OnnxTarget, "track", lambda target: nullcontext(trial))
    made = compiled()
    assert made.manifest["contest"]["winner"] == "unpruned"
    assert "not timed: made up" in made.report


@pytest.mark.parametrize("integers", [False, True])
def test_forms_really_run_in_the_runtime(monkeypatch: pytest.MonkeyPatch, integers: bool) -> None:
    """By a clock that ticks when it is read all are level; each was made, loaded and called."""
    ticks = itertools.count()
    monkeypatch.setattr(timing, "CLOCK", lambda: float(next(ticks)))
    program = narrows.capture(net(), (X,))
    plan = narrows.plan(program, keep_inputs={n: list(k) for n, k in KEEP.items()}, zeros=False)
    how = {"quantize": {"calibration": [X]}} if integers else {}
    made = narrows.compile(net(), (X,), plan=plan, samples=1, **how)
    told = made.manifest["contest"]
    assert told["numbers"] == ("integers" if integers else "floats")
    assert all("measured_ms" in f or "same_as" in f for f in told["forms"])
    if not integers:
        wanted = plan.masked(program)(X).numpy()
        assert np.abs(made.run(X) - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_what_chooses_no_form_holds_no_contest() -> None:
    program = narrows.capture(net(), (X,))
    usual = narrows.api.passes_for(program, None, "onnx", None, None, False)
    ran = contest.run(program, usual, OnnxTarget())
    assert (ran.passes, ran.contest) == (usual, None)
    assert ran.result.program.parameter_count == program.parameter_count
    assert len(ran.result.reports) == len(usual.passes)


def test_forms_are_ranked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, lambda count: float(count))
    made: list[object] = []
    usual = rivals._Field.ranked
    monkeypatch.setattr(rivals._Field, "ranked", lambda field: made.append(field) or usual(field))
    winner = compiled().manifest["contest"]["winner"]
    assert len(made) == 1
    plain = compiled(contest=False, pipeline=None)
    assert len(made) == 2
    assert winner in {f["form"] for f in compiled().manifest["contest"]["forms"]}
    assert "contest" not in plain.manifest


def test_what_takes_long_to_make_leaves_the_others_out(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, lambda count: float(count))
    monkeypatch.setattr(contest, "MAKING", -1.0)
    monkeypatch.setattr(contest, "BEST", 9)
    made = compiled()
    forms = made.manifest["contest"]["forms"]
    late = [f["form"] for f in forms if f.get("failed") == contest.LATE]
    first = forms[0]["form"]
    common = next(f["form"] for f in forms if f["form"].startswith("common"))
    assert {f["form"] for f in forms} - {*late} == {first, common, "unpruned"}
    assert f"not timed: {contest.LATE}" in made.report


def test_compress_holds_the_same_contest(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sum(p.numel() for p in net().parameters())
    timed(monkeypatch, lambda count: 1.0 / count)
    made = narrows.compress(net(), (X,), data=[X], macs=0.6)
    assert made.manifest["contest"]["winner"] == "unpruned"
    assert made.manifest["gain"]["parameters"] == [whole, whole]
    assert made.report.splitlines()[-1].startswith("measured")
    timed(monkeypatch, lambda count: float(count))
    small = narrows.compress(net(), (X,), data=[X], macs=0.6, bits=8)
    assert small.manifest["contest"]["numbers"] == "integers"
    assert small.manifest["gain"]["parameters"][1] < whole
    plain = narrows.compress(net(), (X,), data=[X], macs=0.6, contest=False)
    assert "contest" not in plain.manifest


@pytest.mark.parametrize("target", ["torch", "openvino"])
def test_other_targets_say_how_forms_are_timed(
    monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    kind = target_type(target)

    def trial(program: Program, batch: int) -> Trial:
        return lambda count: float(program.parameter_count)

    monkeypatch.setattr(kind, "track", lambda self: nullcontext(trial))
    program = narrows.capture(net(), (X,))
    plan = narrows.ChannelPlan.given(program, {n: list(k) for n, k in KEEP.items()})
    usual = narrows.api.passes_for(program, plan, target, None, None, False)
    ran = contest.run(program, usual, make_target(target))
    assert ran.contest is not None
    times = {e.name: e.measured for e in ran.contest.entries}
    least = min(t for t in times.values() if t is not None)
    assert times[ran.contest.winner] == least < program.parameter_count
