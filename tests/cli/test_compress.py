"""``narrows compress``, and plans by a budget on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import narrows
from narrows.cli import main

SPEC = ("cli_nets.py:small", "-i", "f32[2,3,8,8]")


@pytest.fixture
def data(nets: str) -> str:
    images = np.random.default_rng(0).standard_normal((40, 3, 8, 8)).astype(np.float32)
    np.save("images.npy", images)
    return "images.npy"


def test_compress_saves_an_artifact_a_plan_and_its_weights(data: str, capsys) -> None:
    words = ["--data", data, "--macs", "0.7", "-o", "out"]
    more = ["--save-plan", "p.json", "--save-solved", "p.solved"]
    assert main(["compress", *SPEC, *words, *more]) == 0
    shown = capsys.readouterr().out
    assert "least-squares: divergence" in shown
    assert "saved in out" in shown
    assert main(["check", "out"]) == 0
    assert narrows.Solved.load("p.solved").plan == narrows.ChannelPlan.load("p.json")


def test_compress_in_bits_tells_json(data: str, capsys) -> None:
    words = ["--data", data, "--params", "0.8", "--bits", "8", "-o", "out", "--json"]
    assert main(["compress", *SPEC, *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["options"]["bits"] == 8
    assert found["notes"]


def test_compress_by_a_function(data: str, capsys) -> None:
    Path("worth.py").write_text("def points(run):\n    return 50.0\n")
    words = ["--data", data, "--accuracy-drop", "1", "--evaluate", "worth.py:points", "-o", "out"]
    assert main(["compress", *SPEC, *words, "--compensation", "mean"]) == 0
    told = capsys.readouterr().out
    assert "evaluate: 50 unpruned, 50 pruned" in told
    assert "mean: divergence from the unpruned outputs" in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-o", "out"], "there is no budget"),
        (["-o", "out", "--macs", "0.5", "--limit", "macs=0.5"], "macs is given twice"),
        (["-o", "out", "--bits", "8", "--save-plan", "p.json"], "no channel plan to save"),
        (["-o", "out", "--bits", "8", "--compensation", "mean"], "without a budget"),
        (["-o", "out", "--macs", "0.5", "--compensation", "means"], "no compensation 'means'"),
        (["-o", "out", "--macs", "0.5", "--save-plan", "none/p.json"], "does not exist"),
    ],
)
def test_compress_refuses(data: str, capsys, words: list[str], message: str) -> None:
    assert main(["compress", *SPEC, "--data", data, *words]) == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_plan_by_a_budget(data: str, capsys) -> None:
    words = ["--macs", "0.7", "--data", data, "--no-constrained", "-o", "p.json"]
    assert main(["plan", *SPEC, *words]) == 0
    assert "share of the multiply-accumulates left" in capsys.readouterr().out


def test_compensations_are_listed(capsys) -> None:
    assert main(["compensations"]) == 0
    assert "least-squares" in capsys.readouterr().out
    assert main(["compensations", "--json"]) == 0
    entries = {e["name"]: e for e in json.loads(capsys.readouterr().out)}
    assert entries["symmetric"]["reads"] == "unpruned"
    assert entries["distill"]["options"]["seconds"] == "none"
    assert [n for n, e in entries.items() if not e["data"]] == ["udfc", "fold"]
    assert all(e["summary"].endswith(".") and e["paper"] for e in entries.values())
