"""``narrows bench``: times two tiny artifacts, says why, and calibrates."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from narrows.backends.onnx import costs
from narrows.backends.tables import cpu_name
from narrows.cli import main
from narrows.cli.bench import verdict
from narrows.ir.work import Work

INPUT = ("-i", "f32[2,3,8,8]")


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory, compiled: Path) -> Path:
    """Return a folder with two artifacts of one model, one of which takes a batch of 2 alone."""
    folder = tmp_path_factory.mktemp("artifacts")
    shutil.copytree(compiled / "out", folder / "free")
    words = ["compile", f"{compiled / 'cli_nets.py'}:small", *INPUT, "--fixed-batch"]
    assert main([*words, "-o", str(folder / "fixed")]) == 0
    other = (compiled / "cli_nets.py").read_text().replace("3, WIDTH, 3", "5, WIDTH, 3")
    (folder / "other_nets.py").write_text(other)
    words = ["compile", f"{folder / 'other_nets.py'}:small", "-i", "f32[2,5,8,8]"]
    assert main([*words, "-o", str(folder / "other")]) == 0
    return folder


def test_two_artifacts_take_turns(artifacts: Path, run):
    mine, other = artifacts / "free", artifacts / "fixed"
    code, out, err = run("bench", mine, "--against", other, "--rounds", 3)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "batch 2, 1 thread(s), 3 rounds"
    assert "ms CPU (" in lines[1]
    assert "ms wall" in lines[2]
    assert "faster" in lines[3] or "slower" in lines[3]


def test_json(artifacts: Path, run):
    mine = artifacts / "free"
    code, out, _ = run(
        "bench", mine, "--against", mine, "--batch", "1,3", "--rounds", 2, "--profile", "--json"
    )
    assert code == 0
    data = json.loads(out)
    assert [r["batch"] for r in data["results"]] == [1, 3]
    first = data["results"][0]
    assert first["ratio"]["low"] <= first["ratio"]["median"] <= first["ratio"]["high"]
    assert first["artifact"]["cpu_ms"].keys() == {"median", "low", "high"}
    assert first["verdict"]
    assert isinstance(first["reasons"], list)
    nodes = data["profile"][0]["nodes"]
    convs = [n for n in nodes if "Conv" in n["op"]]
    assert len(convs) == 2
    assert all(n["us"] > 0 and n["predicted_us"] > 0 for n in convs)


def test_the_profile_as_text(artifacts: Path, run):
    code, out, _ = run("bench", artifacts / "fixed", "--rounds", 1, "--profile")
    assert code == 0
    assert "table  node" in out
    assert "2x3x8x8 by " in out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ((), 2, "there is nothing to time"),
        (("nowhere",), 2, "no artifact"),
        (("free", "--batch", "0"), 2, "no list of batch sizes"),
        (("free", "--batch", "1;8"), 2, "no list of batch sizes"),
        (("free", "--rounds", "0"), 2, "take 1 or more"),
        (("fixed", "--batch", "1,8"), 2, "takes a batch of 2 only, not of 1"),
        (("free", "--against", "other"), 2, "different inputs"),
        (("free", "--calibrate"), 2, "--calibrate times no artifact"),
        (("free", "--quick"), 2, "--quick would have no effect"),
        (("free", "-o", "t.json"), 2, "--output would have no effect"),
        (("free", "--weights", "w.pt"), 2, "--weights would have no effect"),
        (("--calibrate", "--against", "free"), 2, "--against would have no effect"),
        (("--calibrate", "-i", "f32[2,3]"), 2, "--input would have no effect"),
        (("free", "--format", "int8"), 2, "--format would have no effect"),
        (
            ("--calibrate", "--runtime", "torch", "--format", "int8"),
            2,
            "nothing measures int8 in torch",
        ),
    ],
)
def test_refusals(words, code, message, artifacts: Path, run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(artifacts)
    got, out, err = run("bench", *words)
    assert (got, out) == (code, "")
    assert message in err


@pytest.mark.parametrize(
    ("ratio", "why", "text"),
    [
        ((1.28, 1.31, 1.33), (), "1.31x faster (1.28 to 1.33)"),
        ((0.95, 1.0, 1.05), (), "not faster: 1.00x (0.95 to 1.05)"),
        (
            (0.95, 1.0, 1.05),
            ("14 of 17 depthwise layers fall off the 16-channel step",),
            "not faster: 1.00x (0.95 to 1.05): 14 of 17 depthwise layers fall off the 16-channel "
            "step",
        ),
        ((0.4, 0.5, 0.8), ("a",), "2.00x slower (1.25 to 2.50): a"),
    ],
)
def test_verdicts(ratio, why, text):
    assert verdict(dict(zip(("low", "median", "high"), ratio, strict=True)), why) == text


# ---------------------------------------------------------------------- calibrating


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Work]:
    """Measure nothing, keep tables in a new folder, and return the works that are asked for."""
    asked: list[Work] = []

    def calibrate(*, quick, tell):
        tell(1, 1)
        here = {"runtime": costs.TABLES.version(), "cpu": cpu_name()}
        return dataclasses.replace(costs.TABLES.shipped(), **here), not quick

    def measure_works(table, works, *, tell):
        asked.extend(works)
        return table.with_works(dict.fromkeys(works, 1e-5)), True

    monkeypatch.setenv("NARROWS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(costs, "calibrate", calibrate)
    monkeypatch.setattr(costs, "measure_works", measure_works)
    return asked


def test_calibrate_keeps_a_table(measured, run):
    code, out, err = run("bench", "--calibrate", "--json")
    assert (code, err) == (0, "")
    data = json.loads(out)
    assert data["complete"]
    assert data["table"] == str(costs.TABLES.path())
    assert costs.TABLES.cached() is not None
    assert measured == []


def test_calibrate_with_a_model_measures_its_shapes(measured, nets, run):
    code, out, _ = run("bench", "--calibrate", f"{nets}:small", *INPUT, "-o", "t.json")
    assert code == 0
    assert "exact works, saved in t.json" in out
    assert {w.kind for w in measured} >= {"conv", "pointwise"}
    assert len(set(measured)) == len(measured)
    assert costs.TABLES.cached() is None


def test_an_interrupted_calibration_keeps_what_it_has(measured, run):
    code, out, err = run("bench", "--calibrate", "--quick")
    assert code == 130
    assert "what was measured is kept" in err
    assert costs.TABLES.path().is_file()
    assert str(costs.TABLES.path()) in out
