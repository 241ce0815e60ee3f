"""The contest of forms: who takes part, who wins by made-up clocks, and what is told of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import narrows
from narrows.api import contest
from narrows.api.contest import decide
from narrows.backends.onnx import OnnxTarget
from narrows.backends.timing import race
from narrows.errors import LowerError, UsageError
from narrows.ir.program import Program

pytestmark = pytest.mark.usefixtures("shipped_costs")
X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Clock:
    """A clock that stands still but for what is run."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def run(self, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.now += seconds

        return run


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


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Let contests take place, by a clock that the test moves."""
    clock = Clock()
    monkeypatch.setattr(contest, "LARGEST", 1 << 28)
    monkeypatch.setattr(contest, "CLOCK", clock)
    return clock


def timed(monkeypatch: pytest.MonkeyPatch, clock: Clock, seconds: Any) -> list[int]:
    """Have every program take the seconds that a function says for its parameters."""
    tried: list[int] = []

    def trial(target: OnnxTarget, program: Program, batch: int) -> Callable[[], None]:
        tried.append(program.parameter_count)
        return clock.run(seconds(program.parameter_count))

    monkeypatch.setattr(OnnxTarget, "trial", trial)
    return tried


def compiled(**options: Any) -> narrows.Artifact:
    plan = {"keep_inputs": {n: list(k) for n, k in KEEP.items()}, "zeros": False}
    return narrows.compile(net(), (X,), plan=plan, samples=1, **options)


def test_in_a_race_who_is_slow_leaves_early_and_who_is_near_stays() -> None:
    clock = Clock()
    runs = {"a": clock.run(1.0), "b": clock.run(1.02), "c": clock.run(1.3), "d": clock.run(9.0)}
    times = race(runs, 39.0, clock)
    assert {name: len(turns) for name, turns in times.items()} == {"a": 7, "b": 7, "c": 3, "d": 1}
    firsts = [turns[0] for turns in times.values()]
    assert firsts == pytest.approx([1.0, 1.02, 1.3, 9.0])
    short = race({"e": clock.run(1e-4)}, 0.0, clock)
    assert len(short["e"]) == 5
    assert short["e"][0] == pytest.approx(1e-4)


def test_the_fastest_ships_whatever_was_predicted(
    monkeypatch: pytest.MonkeyPatch, held: Clock
) -> None:
    whole = sum(p.numel() for p in net().parameters())
    tried = timed(monkeypatch, held, lambda count: 1.0 / count)
    made = compiled()
    told = made.manifest["contest"]
    assert told["winner"] == "unpruned"
    assert whole in tried
    assert made.manifest["gain"]["parameters"] == [whole, whole]
    assert made.manifest["gain"]["measured_ms"][0] == made.manifest["gain"]["measured_ms"][1]
    assert any("legalize-reads{" in p and "form=unpruned" in p for p in made.manifest["passes"])
    timed(monkeypatch, held, lambda count: float(count))
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


def test_what_is_level_is_left_to_the_prediction(
    monkeypatch: pytest.MonkeyPatch, held: Clock
) -> None:
    timed(monkeypatch, held, lambda count: 1.0 + 1e-9 * count)
    told = compiled().manifest["contest"]
    assert told["winner"] == told["forms"][0]["form"]
    predicted = [f["predicted_ms"] for f in told["forms"]]
    assert predicted == sorted(predicted)


def test_without_a_contest_the_prediction_stands(
    monkeypatch: pytest.MonkeyPatch, held: Clock
) -> None:
    tried = timed(monkeypatch, held, lambda count: 1.0)
    made = compiled(contest=False)
    assert not tried
    assert "contest" not in made.manifest
    assert {"parameters", "bytes", "predicted_ms"} == set(made.manifest["gain"])
    monkeypatch.setattr(OnnxTarget, "trial", lambda *_: None)
    other = compiled()
    assert "runs nothing at once here" in other.manifest["contest"]["why"]
    assert "by the cost table alone" in other.report
    assert other.manifest["passes"] == made.manifest["passes"]
    with pytest.raises(UsageError, match="there can be no contest of forms"):
        compiled(contest=True)
    with pytest.raises(UsageError, match="a contest would have no effect"):
        compiled(contest=True, pipeline="prune-channels")


def test_a_form_that_does_not_run_is_told_and_loses(
    monkeypatch: pytest.MonkeyPatch, held: Clock
) -> None:
    whole = sum(p.numel() for p in net().parameters())

    def trial(target: OnnxTarget, program: Program, batch: int) -> Callable[[], None]:
        if program.parameter_count < whole:
            raise LowerError("made up")
        return held.run(1.0)

    monkeypatch.setattr(OnnxTarget, "trial", trial)
    made = compiled()
    assert made.manifest["contest"]["winner"] == "unpruned"
    assert "not timed: made up" in made.report


@pytest.mark.parametrize("integers", [False, True])
def test_forms_really_run_in_the_runtime(
    monkeypatch: pytest.MonkeyPatch, held: Clock, integers: bool
) -> None:
    """By a clock that ticks when it is read all are level; each was made, loaded and called."""
    ticks = itertools.count()
    monkeypatch.setattr(contest, "CLOCK", lambda: float(next(ticks)))
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
    assert decide(program, usual, OnnxTarget()) == (usual, None)
