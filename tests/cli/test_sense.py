"""``narrows sense``: the table, what is kept, and how long it takes yet."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from narrows import Sensitivity
from narrows.cli.sense import Clock, left

WORTH = """

def worth(program):
    return 100 * float(program(torch.ones(1, 3, 8, 8)).abs().mean())
"""


@pytest.fixture
def words(nets: str) -> tuple[str, ...]:
    images = np.random.default_rng(0).standard_normal((40, 3, 8, 8)).astype(np.float32)
    np.save("images.npy", images)
    with open(nets, "a") as file:
        file.write(WORTH)
    return ("sense", f"{nets}:small", "-i", "f32[2,3,8,8]", "--data", "images.npy")


def test_a_table_is_printed_and_kept(words: tuple[str, ...], run) -> None:
    more = ("--ratios", 0.25, 0.5, "--bits", 4, "--evaluate", "cli_nets.py:worth")
    code, out, _ = run(*words, *more, "--cache", "kept", "-o", "sense.json")
    assert code == 0
    found = Sensitivity.load("sense.json")
    assert str(found) in out
    assert "saved in sense.json" in out
    assert [(row.name, row.amount) for row in found.rows[:2]] == [("conv", 0.25), ("conv", 0.5)]
    assert len([*Path("kept").iterdir()]) == len(found.rows) + 1
    code, out, err = run(*words, "--ratios", 0.5, "-o", "-")
    assert code == 0
    assert json.loads(out)["criterion"] == "l1"
    assert "coupling  conv  -0.5" in err


def test_processes_find_the_same(words: tuple[str, ...], run) -> None:
    more = ("--ratios", 0.5, "--bits", 4, "--evaluate", "cli_nets.py:worth", "--json")
    rows = []
    for jobs in (1, 2):
        code, out, _ = run(*words, *more, "--jobs", jobs)
        assert code == 0
        assert json.loads(out)["options"]["bits"] == [4]
        rows.append(json.loads(out)["rows"])
    for row, other in zip(*rows, strict=True):
        # One thread there, perhaps more here: sums may be in another order.
        for key in ("divergence", "figure"):
            assert row.pop(key) == pytest.approx(other.pop(key), rel=1e-3, abs=1e-9)
        assert row == other


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--ratios", "x"), "--ratios x: 'x' is no number"),
        (("--ratios", 1.5), "a ratio lies above 0 and below 1"),
        (("--jobs", 0), "jobs is a whole number of at least 1"),
        (("--executor", "rai"), "there is no executor 'rai'"),
        (("-o", "nowhere/s.json"), "folder does not exist"),
        (("--evaluate", "cli_nets.py:wort"), "has no 'wort'"),
    ],
)
def test_wrong_usage(words: tuple[str, ...], run, more: tuple[object, ...], message: str) -> None:
    code, _, err = run(*words, *more)
    assert code == 2
    assert message in err


def test_ctrl_c_says_what_is_kept(words: tuple[str, ...], run, monkeypatch) -> None:
    def interrupted(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("narrows.cli.sense.sensing.sense", lambda *a, **k: interrupted())
    code, _, err = run(*words, "--cache", "kept")
    assert code == 130
    assert "what was measured is kept in kept; the same command goes on" in err


def test_the_time_that_is_left(capsys) -> None:
    assert left(10.0, 0, 5) == left(10.0, 5, 0) == ""
    assert left(10.0, 5, 20) == ", about 40 s left"
    assert left(60.0, 1, 10) == ", about 10 min left"
    assert left(3600.0, 1, 20) == ", about 20 h left"
    clock = Clock()
    clock.shown = True
    clock("sensing", 3, 5)
    clock("sensing", 4, 5)
    clock("sensing", 5, 5)
    shown = capsys.readouterr().err
    assert "sensing: 3 of 5\r" in shown
    assert "sensing: 4 of 5, about 0 s left" in shown
    assert shown.endswith("sensing: 5 of 5\n")
