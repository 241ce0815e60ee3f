"""The benchmark of chosen channels, on a network that takes no time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import choosing

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
