"""The benchmark of the contest, on a network that takes no time."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import contest
from narrows.backends.openvino import OpenvinoTarget


def small(name: str, size: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Return a network in the place of one of timm, and images."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)
    return nn.Sequential(*layers).double(), (torch.randn(1, 3, size, size, dtype=torch.float64),)


def test_rows_are_measured_once_and_counted(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(contest, "timm_model", small)
    monkeypatch.setattr("narrows.api.contest.LARGEST", 1 << 20)  # tests hold none by themselves
    monkeypatch.setattr(OpenvinoTarget, "available", classmethod(lambda cls: "it needs openvino"))
    path = tmp_path / "contest.json"
    words = ["--models", "small", "--shares", "0.5", "--size", "8", "--seconds", "0.2"]
    words += ["--numbers", "floats", "int8", "--json", str(path)]
    assert contest.main(words) == 0
    shown = capsys.readouterr().out
    assert "openvino is left out: it needs openvino" in shown
    assert "of 2 rows" in shown.splitlines()[-1]
    rows = json.loads(path.read_text())["results"]
    assert set(rows) == {"small 0.5 floats onnx", "small 0.5 int8 onnx"}
    for found in rows.values():
        assert found["winner"] in found["ms"]
        assert {"unpruned", found["predicted"]} <= set(found["ms"]) <= set(found["costs"])
        assert found["whole"] > 0

    def refuse(*args: object) -> None:
        raise AssertionError("a row was measured twice")

    monkeypatch.setattr(contest, "row", refuse)
    assert contest.main(words) == 0
    assert capsys.readouterr().out == shown


def test_what_is_slower_than_another_form_is_counted() -> None:
    near, far = {"a": 1.0, "b": 1.009}, {"a": 1.0, "b": 1.02}
    found = {str(i): {"winner": "b", "ms": ms} for i, ms in enumerate((near, far))}
    assert contest.counted(found) == "never slower than another form beyond 1%: 1 of 2 rows"
    costs = {"a": 2.0, "unpruned": 4.0}
    told = contest.line("x", {"winner": "a", "ms": {"a": 1.0, "unpruned": 2.0}, "costs": costs,
                              "whole": None, "seconds": 0.25})  # fmt: skip
    assert told[2:6] == ["a 0.500/0.500", " -", " -", "-"]
