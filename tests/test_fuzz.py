"""The fuzzer: a few networks through all of it, and what it sees, survives and makes smaller."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

import narrows
from benchmarks import machine
from benchmarks.fuzz import __main__ as fuzz
from benchmarks.fuzz import apart, shrink
from benchmarks.fuzz.apart import Outcome, outcomes
from benchmarks.fuzz.graphs import NOTHING, Graph, Mask, from_line, smaller, to_line
from benchmarks.fuzz.judge import (
    CAUGHT,
    RAW,
    REFUSED,
    RIGHT,
    WRONG,
    DiffersError,
    Finding,
    judge,
)
from narrows.errors import FidelityError, LowerError, PassError, PlanError

SIMPLE = Graph(0, (("conv", 0, 1),))


def verdicts(graph: Graph, *masks: Mask, forms: Iterable[str] = ("none",)) -> dict[str, Finding]:
    return {f.stage: f for f in judge(graph, [Mask(NOTHING), *masks], list(forms))}


# ------------------------------------------------------------------ a lean run


@pytest.mark.parametrize("seed", range(8))
def test_nothing_is_wrong_and_nothing_raw(seed: int):
    graph = Graph.drawn(seed, quantized=0.25)
    found = list(judge(graph, graph.masks(3)))
    assert not [f for f in found if shrink.trouble(f)]
    assert sum(f.verdict == RIGHT for f in found) > len(found) / 2


# ------------------------------------------------------------------ verdicts


def test_a_wrong_program_is_seen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(narrows, "apply", lambda program, *_, **__: program)
    found = verdicts(SIMPLE, Mask("both", 1))
    assert found["oracle"].verdict == RIGHT
    assert found["none"].verdict == WRONG
    assert found["none"].text.startswith("wrong by ")


def test_a_plan_that_means_something_else_is_seen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(narrows.ChannelPlan, "masked", lambda self, program: program)
    assert verdicts(SIMPLE, Mask("both", 1))["oracle"].verdict == WRONG


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (FidelityError("a pass changes the outputs"), CAUGHT),
        (PassError("no way", hint="report this model, please"), CAUGHT),
        (PlanError("no channel can be removed"), REFUSED),
        (LowerError("the c target has no rule for gelu"), REFUSED),
        (IndexError("list index out of range"), RAW),
    ],
)
def test_errors_are_told_apart(monkeypatch: pytest.MonkeyPatch, error: Exception, verdict: str):
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(narrows, "apply", fail)
    found = verdicts(SIMPLE)["none"]
    assert found.verdict == verdict
    assert found.text.startswith(type(error).__name__)


def test_integers_are_compared_bit_for_bit(monkeypatch: pytest.MonkeyPatch):
    graph = Graph(**{**vars(SIMPLE), "quantized": True})
    found = verdicts(graph, forms=())
    assert {found[s].verdict for s in ("quantize", "ort", "c")} == {RIGHT}
    lower = narrows.lower

    def other(program: Any, target: str, **options: Any) -> Any:
        artifact = lower(program, target, **options)
        run = artifact.run_flat
        monkeypatch.setattr(artifact, "run_flat", lambda inputs: [y + 1 for y in run(inputs)])
        return artifact

    monkeypatch.setattr(narrows, "lower", other)
    assert verdicts(graph, forms=())["ort"].verdict == WRONG


def test_reasons_leave_out_names_and_numbers():
    one = Finding(REFUSED, "plan", Mask("one"), "PlanError: 'conv.weight' has 12 inputs")
    other = Finding(REFUSED, "plan", Mask("one"), "PlanError: 'head.weight' has 8 inputs")
    assert one.reason == other.reason == "PlanError: '...' has N inputs"


# ------------------------------------------------------------------ graphs and masks


def test_a_seed_decides_everything():
    assert [Graph.drawn(s) for s in range(20)] == [Graph.drawn(s) for s in range(20)]
    assert Graph.drawn(3).masks(5) == Graph.drawn(3).masks(5)
    kinds = {m.kind for s in range(20) for m in Graph.drawn(s).masks(4)}
    assert {"heads", "one", "all but one", "emptied", "planned", "planned both"} <= kinds
    assert any(g.quantized for g in map(Graph.drawn, range(40)))


def test_a_line_says_it_all():
    graph, mask = Graph.drawn(7), Mask("heads", 3)
    assert from_line(to_line(graph, mask, "onnx")) == (graph, mask, "onnx")


def test_smaller_graphs_are_simpler_in_one_respect():
    graph = Graph(1, (("conv", 3, 2), ("gate", 1, 0)), "flat", (16, 16))
    found = list(smaller(graph))
    assert found[0].steps == (("gate", 1, 0),)
    assert {g.head for g in found} == {"flat", "map"}
    assert all(g != graph for g in found)
    assert not list(smaller(Graph(1, (("conv", 0, 0),))))


# ------------------------------------------------------------------ processes


def behave(task: str) -> Iterator[str]:
    yield f"{task} began"
    if task == "crashes":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "sleeps":
        time.sleep(60)
    while task == "loops":
        pass
    if task == "raises":
        raise ValueError("no\nway")
    yield f"{task} ended"


def test_a_crash_and_a_hang_are_results():
    tasks = ["crashes", "works", "loops", "raises"]
    ended = {o.task: o for o in outcomes(behave, tasks, jobs=2, limit=2)}
    assert ended["works"].found == ["works began", "works ended"]
    assert ended["works"].failure == ""
    assert ended["crashes"].found == ["crashes began"]
    assert ended["crashes"].failure == "the process ended with SIGKILL"
    assert ended["loops"].failure == "no end in 2 s"
    assert ended["raises"].failure == "ValueError: no"


@pytest.mark.parametrize("bad", ["crashes", "loops"])
def test_tasks_that_share_a_process_all_end(bad: str):
    tasks = ["raises", bad, "works", "also works", "ends"]
    ended = list(outcomes(behave, tasks, jobs=1, limit=1, share=3))
    assert [o.task for o in ended] == tasks
    assert [bool(o.failure) for o in ended] == [True, True, False, False, False]
    assert ended[2].found == ["works began", "works ended"]


def test_what_sleeps_is_ended(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(apart, "PATIENCE", 1)
    (ended,) = outcomes(behave, ["sleeps"], jobs=1, limit=1)
    assert ended.failure == "no end in 1 s"


def test_a_crash_is_a_raw_finding():
    last = Finding(RIGHT, "oracle", Mask("heads", 2))
    found = fuzz.findings_of(Outcome(None, [last], "the process ended with SIGKILL"))
    assert found[1] == Finding(RAW, "after oracle", last.mask, "the process ended with SIGKILL")
    assert fuzz.findings_of(Outcome(None, [], "no end in 9 s"))[0].stage == "after capture"


# ------------------------------------------------------------------ shrinking


def failing(when: Callable[[Graph], bool]) -> Callable[..., Iterator[Outcome]]:
    """Return a stand-in for `outcomes`: wrong for no target where ``when`` says so."""

    def run(work: Any, tasks: Any, jobs: int, limit: float, share: int = 1) -> Iterator[Outcome]:
        for task in tasks:
            graph, mask = task[0], task[1][-1] if isinstance(task[1], list) else Mask("both", 1)
            verdict, text = (WRONG, "wrong by 0.5") if when(graph) else (RIGHT, "")
            yield Outcome(task, [Finding(verdict, "none", mask, text)])

    return run


def has_gate(graph: Graph) -> bool:
    return any(kind == "gate" and a >= 3 for kind, a, _ in graph.steps)


def test_a_failure_is_made_smaller(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shrink, "outcomes", failing(has_gate))
    graph = Graph(5, (("conv", 3, 2), ("gate", 7, 9), ("norm", 1, 1)), "flat", (16, 16))
    finding = Finding(WRONG, "none", Mask("both", 1), "wrong by 0.5")
    small, found = shrink.shrunk(graph, finding, 1.0, math.inf)
    assert small == Graph(5, (("gate", 3, 0),), "map", (8, 8))
    assert found.verdict == WRONG
    assert shrink.shrunk(graph, finding, 1.0, 0.0)[0] == graph


def test_only_like_failures_count():
    def raw(text: str) -> Finding:
        return Finding(RAW, "none", Mask("both"), text)

    wrong, caught = (Finding(v, "none", Mask("both"), "") for v in (WRONG, CAUGHT))
    assert shrink.like(wrong, caught)
    assert not shrink.like(wrong, raw("KeyError: 'a'"))
    assert shrink.like(raw("KeyError: 'a'"), raw("KeyError: 'b'"))
    assert not shrink.like(raw("KeyError: 'a'"), raw("IndexError: 3"))
    assert not shrink.like(wrong, Finding(WRONG, "oracle", Mask("both"), ""))


# ------------------------------------------------------------------ the command


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "warm", lambda: None)
    monkeypatch.setattr(fuzz, "outcomes", failing(has_gate))
    monkeypatch.setattr(shrink, "outcomes", failing(has_gate))


@pytest.mark.usefixtures("quick")
def test_a_run_reports_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    log, counts = str(tmp_path / "log.jsonl"), str(tmp_path / "counts.json")
    options = ["--log", log, "--json", counts]
    bad = [s for s in range(120) if has_gate(Graph.drawn(s))]
    assert fuzz.main(["--graphs", "40", *options]) == int(any(s < 40 for s in bad))
    with Path(log).open("a") as file:
        file.write('{"seed": 40, "fou')  # killed as it wrote
    assert fuzz.main(["--graphs", "120", *options]) == 1
    text = capsys.readouterr().out
    assert f"120 graphs, 120 claims: {120 - len(bad)} right, {len(bad)} wrong" in text
    assert f"wrong at form, {len(bad)} times (seeds {bad[0]}, {bad[1]}" in text
    line = text.splitlines()[-1].partition("--repro ")[2].strip("'")
    assert from_line(line)[0].steps == (("gate", 3, 0),)
    seeds = [
        json.loads(x).get("seed")
        for x in Path(log).read_text().splitlines()
        if not x.endswith('"fou')
    ]
    assert sorted(s for s in seeds if s is not None) == list(range(120))
    with pytest.raises(SystemExit, match="other options"):
        fuzz.main(["--masks", "9", *options])


@pytest.mark.usefixtures("quick")
def test_a_log_tells_the_findings_of_other_code_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    log = ["--log", str(tmp_path / "log.jsonl")]
    monkeypatch.setattr(fuzz, "fingerprint", lambda _: "older")
    fuzz.main(["--graphs", "3", *log])
    monkeypatch.setattr(fuzz, "fingerprint", lambda _: "newer")
    with pytest.raises(SystemExit, match="findings of other code than this, newer: 3 graphs by ol"):
        fuzz.main(["--graphs", "5", *log])
    fuzz.main(["--graphs", "5", "--mixed", *log])
    text = capsys.readouterr().out
    assert "by older: 3 graphs" in text
    assert "by newer: 2 graphs" in text


def test_a_change_of_any_file_is_another_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    file = tmp_path / "narrows" / "ir" / "a.c"
    file.parent.mkdir(parents=True)
    file.write_text("int a;")
    before = machine.fingerprint(["narrows"])
    assert machine.fingerprint(["narrows"]) == before
    file.write_text("int b;")
    changed = machine.fingerprint(["narrows"])
    file.rename(file.with_name("b.c"))
    assert len({before, changed, machine.fingerprint(["narrows"])}) == 3


@pytest.mark.usefixtures("quick")
def test_a_run_ends_in_time(capsys: pytest.CaptureFixture[str]):
    fuzz.main(["--graphs", "40", "--seconds", "-1"])
    assert capsys.readouterr().out.startswith("0 graphs, 0 claims")


def test_refusals_are_counted_by_reason():
    found = {
        0: [Finding(REFUSED, "plan", Mask("one"), "PlanError: 'a' has 3")],
        1: [Finding(REFUSED, "plan", Mask("one"), "PlanError: 'b' has 4")],
        2: [Finding(RIGHT, "plan", Mask("one")), Finding(RIGHT, "plan", Mask("one"))],
    }
    text = fuzz.report(found, dict.fromkeys(found, "a"))
    assert "3 graphs, 4 claims: 2 right, 0 wrong" in text
    assert "| refused | plan  | 2     | 50.0            | PlanError: '...' has N |" in text


def test_a_case_is_shown(capsys: pytest.CaptureFixture[str]):
    line = to_line(SIMPLE, Mask("both", 1), "none")
    assert fuzz.main(["--repro", line]) == 0
    text = capsys.readouterr().out
    assert "keep_inputs={" in text
    assert "right    none     both 1" in text


def test_differences_have_a_size():
    with pytest.raises(DiffersError, match="wrong by 1"):
        fuzz_agree(1.0, 2.0)


def fuzz_agree(a: float, b: float) -> None:
    import torch

    from benchmarks.fuzz.judge import agree

    agree(torch.tensor([b]), torch.tensor([a]))


def test_two_readers_of_what_is_ragged_ask_for_the_same() -> None:
    """A shuffle that a pad and a join read, neither of which can do with what is left of it."""
    steps = [["conv", 4, 0], ["shifted", 7, 0], ["pixel", 8, 3], ["shifted", 2, 6]]
    line = json.dumps({"steps": steps, "head": "map", "size": [8, 8], "seed": 8418,
                       "quantized": False, "mask": ["input", 912], "form": "none"})  # fmt: skip
    graph, mask, form = from_line(line)
    found = list(judge(graph, [Mask(NOTHING), mask], [form]))
    assert {f.verdict for f in found} == {RIGHT}
