"""`narrows demo --quick`: the demo's whole way, with little training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import narrows
from narrows.cli import main
from narrows.demo.candidates import Candidate, count_differing, lower_to_c
from narrows.demo.digits import DigitsNet, load_splits, shrink_columns
from narrows.demo.report import describe, describe_c, verdict
from narrows.ir.dump import Dump
from narrows.passes.base import TOLERANCE, Fidelity

pytest.importorskip("sklearn")
FLOAT32 = TOLERANCE[Fidelity.EXACT][torch.float32]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:  # by other costs nothing might go
        patch.setenv("NARROWS_CACHE", str(path.with_name("nothing-measured")))
        assert main(["demo", "--quick", "-o", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def test_pruned_program_equals_the_masked_one(report: dict):
    assert report["error"] <= FLOAT32
    for entry in report["passes"][1:]:
        assert entry["measured"]["float64"] <= TOLERANCE[Fidelity.EXACT][torch.float64]


def test_pruned_artifact_is_smaller_and_as_good_as_the_masked_program(report: dict):
    for measure in ("parameters", "macs", "bytes"):
        assert report[measure]["pruned"] < report[measure]["unpruned"]
    assert report["accuracy"]["pruned"] == pytest.approx(report["accuracy"]["masked"], abs=0.005)


def test_training_the_pruned_program_gains_accuracy(report: dict):
    assert report["accuracy"]["tuned"] > report["accuracy"]["pruned"] + 0.2
    assert report["parameters"]["tuned"] < report["parameters"]["unpruned"]


def test_the_quantized_artifact_is_its_program_bit_for_bit(report: dict):
    assert report["differing"] == 0
    assert report["floats"] == {}
    assert report["bytes"]["quantized"] < 0.5 * report["bytes"]["tuned"]
    assert report["macs"]["quantized"] == report["macs"]["tuned"]
    assert report["accuracy"]["quantized"] > report["accuracy"]["tuned"] - 0.02
    assert [p["name"] for p in report["quantize_passes"]][-2:] == ["quantize", "fold-shifts"]


def test_the_c_code_is_the_program_bit_for_bit(folder: Path, report: dict):
    made = report["c"]
    assert made["bound"] <= made["arena"] <= 1.1 * made["bound"]
    assert (folder / "c" / "model.c").exists()
    if "skipped" in made:
        pytest.skip(made["skipped"])
    assert made["differing"] == 0


def test_the_c_code_is_not_run_without_a_compiler(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    images = load_splits()[2].images[:2]
    program = narrows.capture(DigitsNet(4).eval(), (images,))
    program = narrows.quantize(program, [images], check=False).program
    candidate = Candidate("quantized", program, narrows.load(folder / "quantized"), 0.0)
    monkeypatch.setenv("CC", "no-such-compiler")
    made = lower_to_c(candidate, images, tmp_path)
    assert "install gcc or clang" in made["skipped"]
    assert "written, not run" in describe_c(made)


def test_other_bits_are_counted(folder: Path):
    _, _, test = load_splits()
    artifact = narrows.load(folder / "quantized")
    program = narrows.capture(DigitsNet(4).eval(), (test.images[:8],))
    candidate = Candidate("other", program, artifact, 0.0)
    assert count_differing(candidate, test.images[:8]) > 100


def test_everything_is_written(folder: Path, report: dict):
    _, _, test = load_splits()
    for name in ("unpruned", "pruned", "tuned", "quantized"):
        artifact = narrows.load(folder / name)
        assert test.accuracy(artifact.run) == report["accuracy"][name]
    assert (
        narrows.ChannelPlan.load(folder / "plan.json").removed == report["channels_removed"]["plan"]
    )
    assert main(["show", str(folder / "dump")]) == 0
    shifts = Dump.open(folder / "dump-quantized")
    assert [s["name"] for s in shifts.stages[-2:]] == ["quantize", "fold-shifts"]
    made = shifts.snapshot()
    assert made.history[0].startswith("prune-channels")
    codes = {name for name, weight in made.weights.items() if weight.dtype == "i8"}
    assert set(narrows.QuantPlan.load(folder / "quant.json").weights) == codes


def test_the_report_reads_well(report: dict, capsys: pytest.CaptureFixture[str]):
    print(describe(report))
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 110
    for word in (
        "prune-channels",
        "masked",
        "test accuracy",
        "batch 64",
        "speed",
        "fold-shifts",
        "KiB of",
    ):
        assert word in text


def test_slow_artifacts_are_called_slow(report: dict):
    slow = {"pruned": {"speedup": 0.9}, "unpruned": {}, "tuned": {}}
    told = verdict(report | {"latency": {"batch 7": slow}, "convolutions": [(1, 9), (9, 16)]})
    assert told[0].startswith("little or no gain at batch 7: 1 of 1 convolutions")
    assert verdict(report | {"latency": {"batch 7": {"pruned": {"speedup": 1.5}}}}) == []


def test_an_unusable_folder_is_refused_before_any_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "file").write_text("mine")
    assert main(["demo", "--quick", "-o", str(tmp_path / "file")]) == 1
    assert "cannot make" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_the_penalty_zeroes_weak_columns_only():
    convolution = nn.Conv2d(2, 4, 1)
    with torch.no_grad():
        convolution.weight[:, 0] = 1.0
        convolution.weight[:, 1] = 0.01
    shrink_columns([convolution], step=0.1)
    strong, weak = convolution.weight[:, 0], convolution.weight[:, 1]
    assert weak.count_nonzero() == 0
    torch.testing.assert_close(strong, torch.full_like(strong, 0.9))
