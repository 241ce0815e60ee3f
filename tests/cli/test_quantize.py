"""``narrows quantize``, and what ``narrows check`` says of its artifacts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from narrows.backends.store import encode_manifest
from narrows.cli import main

SPEC = ("cli_nets.py:small", "-i", "f32[2,3,8,8]")


@pytest.fixture
def data(nets: str) -> str:
    images = np.random.default_rng(0).standard_normal((40, 3, 8, 8)).astype(np.float32)
    np.save("images.npy", images)
    np.savez("images.npz", x=images)
    return "images.npy"


def test_quantize_saves_an_artifact_and_its_plan(data: str, capsys) -> None:
    code = main(["quantize", *SPEC, "--data", data, "-o", "out", "--save-plan", "q.json"])
    shown = capsys.readouterr().out
    assert code == 0
    assert "saved in out" in shown
    assert main(["check", "out"]) == 0
    assert "bit for bit" in capsys.readouterr().out
    assert main(["quantize", *SPEC, "--plan", "q.json", "-o", "again", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["floats"] == {}
    assert 0 < found["error"] < 0.1
    golden = [json.loads(Path(d, "manifest.json").read_text())["golden"] for d in ("out", "again")]
    assert golden[0] == golden[1]


def test_options_reach_the_plan(data: str, capsys) -> None:
    words = ["--weight-bits", "conv=4", "--weight-bits", "6", "--method", "minmax"]
    words += ["--activation-bits", "7", "-t", "onnx{form=integer}", "--rounding", "half_up"]
    words += ["--data", "images.npz", "-o", "out", "--save-plan", "q.json"]
    assert main(["quantize", *SPEC, *words]) == 0
    plan = json.loads(Path("q.json").read_text())
    assert plan["rounding"] == "half_up"
    assert plan["weights"]["conv.weight"]["bits"] == 8  # the first layer
    capsys.readouterr()


def test_every_kind_of_option_has_its_effect(data: str, capsys) -> None:
    words = ["--data", data, "-o", "out", "--weight-bits", "4", "--save-plan", "q.json", "--json"]
    plans, told = [], []
    for more in (
        [],
        ["--first-last", "none", "--no-correct-bias"],
        ["--method", "percentile", "--percentile", "60", "--no-align", "--equalize"],
    ):
        assert main(["quantize", *SPEC, *words, *more]) == 0
        plans.append(json.loads(Path("q.json").read_text()))
        told.append(json.loads(capsys.readouterr().out)["options"])
    usual, bare, cut = plans
    assert usual["weights"]["conv.weight"]["bits"] == 8
    assert usual["offsets"]
    assert bare["weights"]["conv.weight"]["bits"] == 4
    assert not bare["offsets"]
    assert cut["activations"]["x"]["exponent"] > usual["activations"]["x"]["exponent"]
    assert [(t["weights"], t["first_last"], t["align"]) for t in told] == [
        (4, 8, True),
        (4, None, True),
        (4, 8, False),
    ]


def test_levels_are_asked_for(data: str, capsys) -> None:
    assert main(["quantize", *SPEC, "--data", data, "--levels", "-o", "no"]) == 2
    assert "for activations of 5 bits and fewer" in capsys.readouterr().err
    words = ["--data", data, "--levels", "--activation-bits", "3", "--save-plan", "q.json"]
    assert main(["quantize", "cli_nets.py:wide", *SPEC[1:], *words, "-o", "out"]) == 0
    notes = json.loads(Path("q.json").read_text())["notes"]
    assert "levels" in {note["reason"] for note in notes}
    assert main(["check", "out"]) == 0


def test_rounding_is_learned(data: str, capsys) -> None:
    words = ["--data", data, "--method", "rapq", "--budget", "6", "--checkpoint", "state.pt"]
    assert main(["quantize", *SPEC, *words, "-o", "out", "--save-plan", "q.json"]) == 0
    assert Path("state.pt").exists()
    assert json.loads(Path("q.json").read_text())["codes"].keys() >= {"conv.weight"}
    assert main(["quantize", *SPEC, "--plan", "q.json", "-o", "again"]) == 0
    golden = [json.loads(Path(d, "manifest.json").read_text())["golden"] for d in ("out", "again")]
    assert golden[0] == golden[1]
    capsys.readouterr()


def test_compile_quantizes_what_it_pruned(data: str, capsys) -> None:
    words = ["--ratio", "0.5", "--quantize", data, "--weight-bits", "7"]
    assert main(["compile", *SPEC, *words, "-o", "out", "--dump"]) == 0
    shown = capsys.readouterr().out
    assert "fold-shifts" in shown
    assert "error against the float model" in shown
    manifest = json.loads(Path("out/manifest.json").read_text())
    assert manifest["plan"] is not None
    assert manifest["passes"][-1] == "fold-shifts"
    assert main(["show", "out@quantize"]) == 0
    words = ["--ratio", "0.5", "--quantize", "images.npz", "--json"]
    capsys.readouterr()
    assert main(["compile", *SPEC, *words, "-o", "again"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["floats"] == {}
    assert [p["name"] for p in found["passes"]][-2:] == ["quantize", "fold-shifts"]
    assert found["options"]["quantize"]["weights"] == 8
    assert main(["check", "again"]) == 0


def test_pruned_and_quantized_is_one_program_whichever_command_makes_it(data: str) -> None:
    assert main(["plan", *SPEC, "--ratio", "0.5", "--side", "output", "-o", "p.json"]) == 0
    assert (
        main(
            ["compile", *SPEC, "--plan", "p.json", "--quantize", data, "-o", "one", "--no-contest"]
        )
        == 0
    )
    assert main(["quantize", *SPEC, "--channels", "p.json", "--data", data, "-o", "two"]) == 0
    one, two = (json.loads(Path(d, "manifest.json").read_text()) for d in ("one", "two"))
    assert one["files"] == two["files"]
    assert one["passes"] == two["passes"]


def test_reports(data: str, capsys) -> None:
    words = ["--weight-bits", "3", "--data", data, "--save-plan", "q.json", "--report", "told"]
    assert main(["quantize", *SPEC, *words, "-o", "out"]) == 0
    shown = capsys.readouterr().out
    assert "costliest quantizers: " in shown
    assert "report in told" in shown
    told = json.loads(Path("told/report.json").read_text())
    assert told["samples"] == 40
    assert Path("told/report.html").is_file()
    words = ["--data", data, "--plan", "q.json", "--report", "--json"]
    assert main(["quantize", *SPEC, *words, "-o", "again"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["report"] == "again.report"
    assert found["sqnr"] == told["sqnr"]
    assert next(iter(found["culprits"])) == told["culprits"][0]
    words = ["--quantize", data, "--ratio", "0.5", "--report"]
    assert main(["compile", *SPEC, *words, "-o", "third"]) == 0
    assert Path("third.report/report.txt").is_file()
    assert main(["check", "third"]) == 0
    capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--plan", "q.json", "--report"], "a report is measured on data"),
        (["--data", "images.npy", "--report", "out"], "cannot go into the artifact's folder"),
        (["--data", "images.npy", "--report", "images.npy"], "is not a writable folder"),
    ],
)
def test_reports_that_cannot_be(data: str, words: list[str], text: str, capsys) -> None:
    assert main(["quantize", *SPEC, *words, "-o", "out"]) in (1, 2)
    assert text in capsys.readouterr().err
    assert not Path("out").exists()


def test_grids_without_quantize_are_wrong_usage(nets: str, capsys) -> None:
    assert main(["compile", *SPEC, "--method", "minmax", "-o", "out"]) == 2
    assert "method would have no effect" in capsys.readouterr().err
    assert main(["compile", *SPEC, "-o", "out", "--report"]) == 2
    assert "report would have no effect" in capsys.readouterr().err


def test_check_tells_other_bits(data: str, capsys) -> None:
    assert main(["quantize", *SPEC, "--data", data, "-o", "out"]) == 0
    path = Path("out/manifest.json")
    manifest = json.loads(path.read_text())
    manifest["golden"]["3"] = ["0" * 64]
    path.write_text(encode_manifest(manifest))
    capsys.readouterr()
    assert main(["check", "out"]) == 1
    assert "batch 3" in (shown := capsys.readouterr().out)
    assert "has other bits than it should" in shown


def test_islands_are_told_and_strict_refuses(data: str, capsys) -> None:
    spec = ("cli_nets.py:summed", "-i", "f32[2,3,8,8]")
    assert main(["quantize", *spec, "--data", data, "-o", "out"]) == 0
    told = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("float: "))
    assert told.startswith("float: norm_cumsum: cumsum.default has no integer form  (")
    assert "cli_nets.py:" in told
    for command, option in (("quantize", "--data"), ("compile", "--quantize")):
        assert main([command, *spec, option, data, "--strict", "-o", "strict"]) == 1
        lines = capsys.readouterr().err.splitlines()
        assert lines[0] == "cumsum.default would stay floating-point"
        assert "cli_nets.py:" in lines[1]
        assert lines[2:] == [
            "  because cumsum.default has no integer form",
            "  try: leave out strict=True to compute it as a float island",
        ]
        assert not Path("strict").exists()


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--data", "nan.npy"], 1, "calibration met NaN or infinity\n  at x\n"),
        (["--data", "huge.npy"], 1, "the range of x cannot be quantized"),
        (["--data", "shape.npy"], 2, "shape.npy holds float32[40, 2, 8, 8]\n  at input x\n"),
        (["--data", "wide.npy"], 2, "try: data.astype('float32')"),
        (["--data", "bytes.npy"], 2, "scaled and shifted as in training"),
        (["--data", "images.npy", "--weight-bits", "40"], 2, "weights takes 2 to 8 bits, got 40"),
        (["--data", "images.npy", "--activation-bits", "1"], 2, "takes 2 to 16 bits, got 1"),
        (["--data", "images.npy", "--weight-bits", "zz=4"], 2, "bits for 'zz', which matches noth"),
        (["--data", "images.npy", "--skip", "*"], 1, "nothing of small can be quantized"),
        (["--data", "images.npy", "--skip", "zz"], 2, "'zz' matches no node"),
        (["--data", "one.npy", "--fixed-batch"], 2, "holds 1 samples, the model takes 2"),
        (["--data", "images.npy", "--save-plan", "no/q.json"], 2, "folder does not exist"),
        (["--plan", "missing.json"], 2, "cannot read the plan missing.json"),
    ],
)
def test_refusals_leave_nothing(data: str, words: list[str], code: int, text: str, capsys) -> None:
    images = np.load("images.npy")
    np.save("nan.npy", images * np.nan)
    np.save("huge.npy", images * 1e25)
    np.save("shape.npy", images[:, :2])
    np.save("wide.npy", images.astype(np.float64))
    np.save("bytes.npy", np.zeros(images.shape, np.uint8))
    np.save("one.npy", images[:1])
    assert main(["quantize", *SPEC, "-o", "out", *words]) == code
    assert text in capsys.readouterr().err
    assert not Path("out").exists()


def test_constant_and_tiny_data_are_quantized(data: str, capsys) -> None:
    for name, scale in (("zero", 0.0), ("tiny", 1e-12)):
        np.save(f"{name}.npy", (np.load(data) * scale).astype(np.float32))
        assert main(["quantize", *SPEC, "--data", f"{name}.npy", "-o", name]) == 0
        assert main(["check", name]) == 0
    assert "x: it was 0 throughout the calibration data" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "takes either data or a plan"),
        (["--data", "images.npy", "--plan", "q.json"], "takes either data or a plan"),
        (["--plan", "made.json", "--method", "minmax"], "method would have no effect beside a pl"),
        (["--data", "nothing.npy"], "cannot read the data nothing.npy\n  because No such file"),
        (["--data", "made.json"], "because it is no .npy or .npz file"),
        (["--data", "images.npy", "--weight-bits", "1"], "weights takes 2 to 8 bits, got 1"),
        (["--data", "images.npy", "--weight-bits", "few"], "is no number"),
        (["--data", "images.npy", "--method", "rapq", "--budget", "soon"], "'soon' is no time"),
        (["--data", "images.npy", "--budget", "9"], "an option of method='rapq'"),
        (["--data", "two.npz"], "holds 2 arrays, the model takes 1 inputs"),
        (["--data", "words.npy"], "holds <U5[1]"),
        (["--data", "one.npy"], "holds float64[]"),
        (["--data", "none.npy"], "there is no calibration data"),
        (["--data", "images.npy", "-t", "onnx{form=best}"], "onnx takes the form"),
    ],
)
def test_wrong_usage(data: str, words: list[str], text: str, capsys) -> None:
    if "made.json" in words:
        assert main(["quantize", *SPEC, "--data", data, "-o", "made", "--save-plan", words[1]]) == 0
    np.savez("two.npz", a=np.zeros(3), b=np.zeros(3))
    np.save("words.npy", np.array(["words"]))
    np.save("one.npy", np.array(1.0))
    np.save("none.npy", np.zeros((0, 3, 8, 8), np.float32))
    assert main(["quantize", *SPEC, "-o", "out", *words]) == 2
    assert text in capsys.readouterr().err


def test_numbers_in_another_order_of_bytes_are_the_same(data: str, capsys) -> None:
    np.save("swapped.npy", np.load(data).astype(">f4"))
    for name, plan in (("images.npy", "one.json"), ("swapped.npy", "two.json")):
        assert main(["quantize", *SPEC, "--data", name, "-o", "out", "--save-plan", plan]) == 0
    assert Path("one.json").read_text() == Path("two.json").read_text()


MODEL = """
from torch import nn

def tokens():
    return nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 50))
"""


def test_weights_alone_are_quantized(data: str, capsys) -> None:
    Path("text_nets.py").write_text(MODEL)
    np.save("tokens.npy", np.random.default_rng(0).integers(0, 50, (6, 12)))
    spec = ("text_nets.py:tokens", "-i", "i64[2,12]:50")
    words = ["--data", "tokens.npy", "--bits", "3", "--skip", "3.*", "-o", "out", "--json"]
    assert main(["quantize-weights", *spec, *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["options"]["bits"] == 3
    assert 0 < found["error"] < 1
    manifest = json.loads(Path("out/manifest.json").read_text())
    told = {note["where"]: note["message"] for note in manifest["notes"]}
    assert told["1.weight"].startswith("3 bits, groups of 32 ")
    assert told["3.weight"].startswith("stays floating-point")
    assert main(["check", "out"]) == 0
    nearest = ["--method", "nearest", "--groups", "input", "-o", "near"]
    assert main(["quantize-weights", *spec, *nearest]) == 0
    assert "error against the float model" in capsys.readouterr().out
    assert main(["quantize-weights", *spec, "-o", "no"]) == 2
    assert "--method nearest --groups input" in capsys.readouterr().err
