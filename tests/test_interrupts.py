"""`benchmarks.interrupts` judges what cut-off commands left, and says so by its exit code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.interrupts import __main__ as interrupts
from benchmarks.interrupts.forks import Ended, Figures
from benchmarks.interrupts.jobs import Job


@pytest.mark.parametrize("faults", [[], ["something left over"]])
def test_a_fault_is_an_exit_code(
    faults: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)  # the command leaves it
    monkeypatch.setattr(sys, "argv", ["interrupts"])
    monkeypatch.setattr(interrupts, "import_all", lambda: None)
    row = {"part": "kills", "name": "plan", "done": 1, "faults": faults}
    monkeypatch.setattr(interrupts, "measure", lambda *_: [{**row, "faults": []}, row])
    assert interrupts.main() == len(faults)


@pytest.mark.parametrize(
    ("found", "counts", "fault"),
    [
        (("a", 1), {"older": 1}, ""),
        (("b", 2), {"newer": 1}, ""),
        (("b", 1), {"between": 1}, ""),
        (("b", 3), {}, "neither the older one nor the newer: parts [1]"),
    ],
)
def test_what_was_left_is_held_to_both_states(
    found: tuple[str, int], counts: dict[str, int], fault: str
):
    figures = Figures("quantize")
    job = Job("quantize", ((), ()), lambda: found, ())
    interrupts.judge(job, [("a", 1), ("b", 2)], Ended(-9, "", 0.0), figures, None)
    assert dict(figures.counts) == counts
    assert figures.faults == ([fault] if fault else [])
