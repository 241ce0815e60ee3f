"""The benchmarks of chosen channels and of the contest, on networks that take no time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks import choosing, contest

ZOO = Path(__file__).parent / "tiny_zoo"


def test_a_row_per_method_and_budget_is_kept(tmp_path: Path, monkeypatch, capsys) -> None:
    path = tmp_path / "choosing.json"
    words = ["--zoo", str(ZOO), "--models", "tiny", "--macs", "0.7", "--images", "32"]
    words += ["--tested", "24", "--draws", "2", "--results", str(path)]
    words += ["--methods", "losses", "l1+repair", "l1", "couplings+fold"]
    assert choosing.main(words) == 0
    table = capsys.readouterr().out
    assert table.count("| tiny ") == 4
    rows = json.loads(path.read_text())["results"]
    assert len(rows) == 1 + 4 * 2  # the network as it is, and every method by both draws
    assert all(0 <= row["figure"] <= 100 for row in rows.values())
    assert all(len(row["wrong"]) == round(24 * (1 - row["figure"] / 100)) for row in rows.values())
    pruned = [row for name, row in rows.items() if "0.7" in name]
    assert all(0 < row["share"] <= 0.7 for row in pruned)

    def refuse(*args: object) -> None:
        raise AssertionError("a row was measured twice")

    monkeypatch.setattr(choosing, "figure", refuse)
    assert choosing.main(words) == 0
    assert capsys.readouterr().out == table
    with pytest.raises(AssertionError, match="twice"):
        choosing.main([*words, "--flips"])


def small(name: str, size: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Return a network in the place of one of timm, and images."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)
    return nn.Sequential(*layers).double(), (torch.randn(1, 3, size, size, dtype=torch.float64),)


def test_the_contest_is_held_and_all_forms_are_timed(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(contest, "timm_model", small)
    words = ["--models", "small", "--amounts", "0.5", "--size", "8", "--seconds", "0.2"]
    words += ["--targets", "onnx"]
    with pytest.raises(SystemExit, match=r"no contest was held: .* too large to try"):
        contest.main(words)
    monkeypatch.setattr("narrows.api.contest.LARGEST", 1 << 20)  # tests hold none by themselves
    path = tmp_path / "contest.json"
    assert contest.main([*words, "--json", str(path)]) == 0
    assert "| small |" in capsys.readouterr().out
    (found,) = json.loads(path.read_text())["results"].values()
    assert found["winner"] in found["ms"]
    assert {"unpruned", found["predicted"]} <= set(found["ms"])
    assert not found["failed"]
