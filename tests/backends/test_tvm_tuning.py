"""Timing candidates for TVM's kernels: our rules' and MetaSchedule's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import narrows
from narrows.backends import lower
from narrows.backends.tvm.cache import Kept
from narrows.frontend import capture
from tests.backends.marks import NEEDS_TVM

pytestmark = [NEEDS_TVM, pytest.mark.usefixtures("own_cache")]

ROOT = Path(narrows.__file__).parents[1]


def quick() -> Any:
    """A program whose kernels have few candidates."""
    net = nn.Sequential(nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 5))
    return capture(net.eval(), (torch.randn(2, 24),))


def test_times_are_kept_and_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lines: list[str] = []
    monkeypatch.setattr("narrows.backends.tvm.target._tell", lines.append)
    program = quick()
    first = lower(program, "tvm", tune=30)
    assert any(line.startswith("tuning 1/") for line in lines)
    kept = list((tmp_path / "cache" / "tvm").glob("*.json"))
    assert kept
    lines.clear()
    again = lower(program, "tvm", tune=30, check=False)
    assert not lines
    assert again.manifest["build"]["tuned"] == first.manifest["build"]["tuned"] == len(kept)
    kept[0].write_text("no JSON")
    lower(program, "tvm", tune=30, check=False)
    assert any(line.startswith("tuning 1/1") for line in lines)


def test_tuning_goes_on_where_it_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []

    def tell(line: str) -> None:
        lines.append(line)
        if line.startswith("tuning 2/"):
            raise KeyboardInterrupt

    program = quick()
    with monkeypatch.context() as patched:
        patched.setattr("narrows.backends.tvm.target._tell", tell)
        with pytest.raises(KeyboardInterrupt):
            lower(program, "tvm", tune=30, check=False)
    count = int(lines[-1].partition("/")[2].partition(":")[0])
    assert len(list((tmp_path / "cache" / "tvm").glob("*.json"))) == 1
    lines.clear()
    monkeypatch.setattr("narrows.backends.tvm.target._tell", lines.append)
    lower(program, "tvm", tune=30, check=False)
    assert lines[0].startswith(f"tuning 1/{count - 1}")


CANDIDATES = """
import os, signal, sys, time
sys.modules["torch"] = None
import tvm
from tvm import te
from narrows.backends.tvm import timing, tune
from narrows.backends.tvm.devices import Machine
from narrows.backends.tvm.schedules import Choice

def scheduled(function, choice, machine):
    if choice.rows == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    if choice.rows == 2:
        time.sleep(60)
    return None if choice.rows == 3 else function

tune.scheduled, timing.PATIENCE = scheduled, 1.5
x = te.placeholder((4,), name="x")
function = te.create_prim_func([x, te.compute((4,), lambda i: x[i] + 1)])
tuner = tune.Tuner(tvm.target.Target("llvm"), Machine(), {"tune": 60}, print)
best = tuner.tune({"kernel": (function, [Choice(rows) for rows in (1, 2, 3, 4)])})
print(best["kernel"].rows)
"""


def test_a_candidate_that_crashes_or_hangs_is_passed_over() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CANDIDATES], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.stdout.split("\n")[-2] == "4", done.stderr


# ------------------------------------------------------------------ MetaSchedule


def test_metaschedule_is_tried_beside_the_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr("narrows.backends.tvm.target._tell", lines.append)
    artifact = lower(quick(), "tvm", tune="5s", search="metaschedule")
    found = artifact.manifest["build"]["search"]
    assert found["failed"] == {}
    assert artifact.fidelity["checked"][0]["error"] < 1e-5
    # On a busy machine our own rules may have used up the time.
    assert any(line.startswith(("search 1/", "search: out of time")) for line in lines)


SEARCH = """
import os, signal, sys, time
from pathlib import Path
sys.modules["torch"] = None
import tvm
from tvm import te
from narrows.backends.tvm import search, timing
from narrows.backends.tvm.cache import Kept
from narrows.backends.tvm.search import Search, Work

target = tvm.target.Target("llvm")
x, y = te.placeholder((8, 16), name="x"), te.placeholder((16, 32), name="y")
k = te.reduce_axis((0, 16), name="k")
z = te.compute((8, 32), lambda i, j: te.sum(x[i, k] * y[k, j], k), name="z")
function = te.create_prim_func([x, y, z])
other = te.create_prim_func([x, y, te.compute((8, 32), lambda i, j: x[i, 0] * y[0, j])])
work = {"kernel": Work(function, function, "1 1 space", 1e-3, 2)}

def searched(seconds, end=60):
    lines = []
    run = Search(target, seconds, Kept(Path(sys.argv[1])), lines.append)
    run.run(work, time.monotonic() + end)
    lines = [line for line in lines if line.startswith("search 1/1")]
    return run, len(lines)

print(timing.compared((function, function), target, 1e-6) > 0)
print(timing.compared((other, function), target, 1e-6))
"""


def ran(script: str, folder: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", SEARCH + script, str(folder)],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second, *lines = done.stdout.splitlines()
    assert (first, second) == ("True", "None")  # another result is not faster, whatever it takes
    return lines


def test_what_metaschedule_finds_is_taken_where_it_is_faster(tmp_path: Path) -> None:
    lines = ran(
        """
def compared_anew():
    for path in Path(sys.argv[1]).glob("*.search.json"):
        path.write_text(path.read_text().replace('"against": "1 ', '"against": "2 '))

for ratio in (0.5, None, 1.5):
    timing.compared = lambda functions, target, tolerance: ratio
    run, batches = searched(2)
    print(sorted(run.found), batches > 0, run.tried > 0)
    compared_anew()
timing.compared = None
run, batches = searched(1000, end=1)
print(batches > 0)
""",
        tmp_path,
    )
    # Its time is spent after the first one; with more of it the search goes on.
    assert lines == ["['kernel'] True True", "[] False True", "[] False True", "True"]


def test_a_crash_of_metaschedule_leaves_the_rules(tmp_path: Path) -> None:
    lines = ran(
        """
def crash(*_):
    os.kill(os.getpid(), signal.SIGSEGV)
def fail(*_):
    raise ValueError("no\\nway")
for search._prepared in (crash, fail):
    run, _ = searched(5)
    print(sorted(run.found), run.tried, run.failed)
""",
        tmp_path,
    )
    assert lines == [
        "[] 0 {'kernel': 'MetaSchedule crashed or hung'}",
        "[] 0 {'kernel': 'ValueError: way'}",
    ]


def test_a_cache_that_cannot_be_written_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").write_text("")
    kept = Kept(tmp_path / "file" / "tvm")
    kept.write("a", {"b": 1})
    kept.write("c", {"d": 2})
    assert kept.read("a") == {}
    assert capsys.readouterr().err.count("times are not kept") == 1
