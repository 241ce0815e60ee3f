"""The table of accuracies, on a network that takes no time: its rows are kept and not redone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import quantized_accuracy

ZOO = Path(__file__).parent / "tiny_zoo"


def test_rows_are_paired_image_by_image() -> None:
    plain, row = {"wrong": [1, 2, 3]}, {"wrong": [2, 3, 7, 8]}  # one got right, two got wrong
    assert quantized_accuracy.paired(plain, row, 100) == " (-1.00 ± 1.73)"
    assert quantized_accuracy.paired(plain, plain, 100) == " (+0.00 ± 0.00)"
    assert quantized_accuracy.paired({"figure": 3.2}, row, 100) == ""


def test_rows_are_kept(tmp_path: Path, monkeypatch, capsys) -> None:
    path = tmp_path / "accuracy.json"
    words = ["--zoo", str(ZOO), "--models", "tiny", "--bits", "4,4", "--samples", "32"]
    words += ["--tested", "24", "--budget", "6", "--batch", "16", "--results", str(path)]
    assert quantized_accuracy.main(words) == 0
    table = capsys.readouterr().out
    assert "| tiny W4A4 |" in table
    rows = json.loads(path.read_text())["results"]
    assert len(rows) == 6  # the network as it is, and five methods
    assert all(0 <= row["figure"] <= 100 for row in rows.values())

    def refuse(*args: object) -> None:
        raise AssertionError("a row was measured twice")

    monkeypatch.setattr(quantized_accuracy.Case, "quantized", refuse)
    assert quantized_accuracy.main(words) == 0
    assert capsys.readouterr().out == table
    with pytest.raises(AssertionError, match="twice"):
        quantized_accuracy.main([*words, "--bits", "3,3"])
