"""The commands that make something: compile and plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from narrows.backends.artifact import load
from narrows.ir.dump import Dump

INPUT = ("-i", "f32[2,3,8,8]")


# ------------------------------------------------------------------ compile


def test_compile_prints_the_table_and_saves(nets, run):
    passes = "fold-batch-norm, eliminate-dead"
    code, out, err = run("compile", f"{nets}:small", *INPUT, "-p", passes, "-o", "out")
    assert code == 0, err
    assert err == ""
    assert [line.split()[0] for line in out.splitlines()[:4]] == [
        "pass",
        "capture",
        "fold-batch-norm",
        "eliminate-dead",
    ]
    assert "saved in out" in out
    assert Path("out/manifest.json").is_file()
    assert not Path("out.dump").exists()


def test_compile_json(nets, run):
    code, out, _ = run(
        "compile", f"{nets}:small", *INPUT, "-p", "fold-batch-norm", "-o", "out", "--double",
        "--dump", "--json", "-t", "onnx",
    )  # fmt: skip
    assert code == 0
    data = json.loads(out)
    assert data["artifact"] == "out"
    assert data["dump"] == "out/dump"
    assert not Path("out.dump").exists()
    assert [p["name"] for p in data["passes"]] == ["capture", "fold-batch-norm"]
    assert data["passes"][1]["measured"].keys() == {"float32", "float64"}
    assert data["passes"][1]["measured"]["float64"] <= 1e-12
    assert Dump.open("out/dump").snapshot().history == ("fold-batch-norm",)
    assert Dump.open("out/dump").artifact == load("out").identity


def test_compile_with_a_plan(nets, run):
    code, _, err = run("plan", f"{nets}:small", *INPUT, "--ratio", "0.5", "-o", "p.json")
    assert code == 0, err
    code, out, err = run(
        "compile", f"{nets}:small", *INPUT, "--plan", "p.json", "-o", "out", "--json"
    )
    assert code == 0, err
    passes = json.loads(out)["passes"]
    assert passes[0]["parameters"] > passes[-1]["parameters"]
    assert passes[1]["spelling"] == "prune-channels{plan=p.json}"
    assert json.loads(Path("out/manifest.json").read_text())["plan"] is not None


def test_compile_chooses_channels_itself(nets, run):
    words = ("--ratio", "0.5", "--side", "output", "-t", "onnx{opset=22, samples=1}")
    code, out, err = run("compile", f"{nets}:small", *INPUT, *words, "-o", "out", "--json")
    assert code == 0, err
    manifest = json.loads(Path("out/manifest.json").read_text())
    assert len(manifest["plan"]["outputs"]["conv.weight"]) == 2
    assert manifest["options"]["opset"] == 22
    told = json.loads(out)
    assert told["passes"][-1]["parameters"] < told["passes"][0]["parameters"]
    assert (told["options"]["plan"]["ratio"], told["options"]["plan"]["side"]) == (0.5, "output")
    assert told["options"]["quantize"] is None


def test_compile_aims_at_a_latency_of_its_target(nets, run):
    words = ("--latency", "0.8", "--batch", "2", "-t", "onnx{samples=1}", "-o", "out", "--json")
    code, out, err = run("compile", f"{nets}:wide", "-i", "f32[2,3,16,16]", *words)
    assert code == 0, err
    passes = json.loads(out)["passes"]
    assert passes[-1]["macs"] < passes[0]["macs"]
    plan = json.loads(Path("out/manifest.json").read_text())["plan"]
    assert "l1 latency 0.8" in plan["reasons"].values()


def test_a_plan_that_no_pass_takes_is_wrong_usage(nets, run):
    run("plan", f"{nets}:small", *INPUT, "--ratio", "0.5", "-o", "p.json")
    words = ("--plan", "p.json", "-p", "fold-batch-norm", "-o", "out")
    code, _, err = run("compile", f"{nets}:small", *INPUT, *words)
    assert code == 2
    assert "the plan would not be used" in err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("-p", "fold"), 2, "there is no pass 'fold'"),
        (("-t", "onx"), 2, "there is no target 'onx'"),
        (("-t", "onnx{"), 2, "malformed"),
        (("-t", "onnx{opset=99}"), 2, "onnx takes an opset from 18 to 25, got 99"),
        (("-t", "onnx{opset=17}"), 2, "onnx takes an opset from 18 to 25, got 17"),
        (("--ratio", "0.5", "--plan", "p.json"), 2, "leave out --plan, or ratio"),
        (("--ratio", "2"), 2, "a ratio is a share from 0 to 1, got 2.0"),
        (("--weights", "none.pt"), 2, "there is no checkpoint"),
        (("--latency", "0.5", "--plan", "p.json"), 2, "leave out --plan, or latency"),
        (("--latency", "0.5", "--ratio", "0.5"), 2, "ratio and latency exclude each other"),
        (("--latency", "2"), 2, "a budget of latency is above 0 and up to 1, got 2.0"),
        (("--allow-pickle",), 2, "--allow-pickle has no effect without --weights"),
        (("--plan", "none.json"), 2, "none.json"),
        (("--ratio", "cnv.*=0.5"), 2, "ratio: 'cnv.*' matches no weight of a layer"),
        (("--ratio", "0.5", "--exclude", "zzz*"), 2, "exclude: 'zzz*' matches no weight"),
        (("--ratio", "0.5", "--min-width", "0"), 2, "min_width is a whole number"),
        (("--ratio", "0.5", "--criterion", "l3"), 2, "there is no criterion 'l3'"),
        (("--batch", "0", "--ratio", "0.5"), 2, "at least 1"),
        (("--ratio", "0.01"), 1, "a ratio of 0.01 removes no channel"),
    ],
)
def test_compile_refuses_and_writes_nothing(nets, run, words, code, message):
    got, out, err = run("compile", f"{nets}:small", *INPUT, "-o", "out", *words)
    assert (got, out) == (code, "")
    assert message in err
    assert "Traceback" not in err
    assert not Path("out").exists()


def test_compile_refuses_a_folder_with_other_files_before_any_work(nets, run):
    Path("out").mkdir()
    Path("out/mine.txt").write_text("mine")
    code, _, err = run("compile", "no_such_module:x", *INPUT, "-o", "out")
    assert code == 1
    assert "narrows did not write" in err
    assert [p.name for p in Path("out").iterdir()] == ["mine.txt"]


def test_compile_refuses_a_place_that_cannot_be_written(nets, run):
    Path("file").write_text("")
    code, _, err = run("compile", f"{nets}:small", *INPUT, "-o", "file/out")
    assert code == 1
    assert "is not a writable folder" in err


def test_ctrl_c_leaves_nothing_half_written(nets, run, monkeypatch: pytest.MonkeyPatch):
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("narrows.passes.fold_batch_norm.FoldBatchNorm.run", interrupt)
    words = ("-p", "eliminate-dead, fold-batch-norm", "-o", "out", "--dump")
    code, out, err = run("compile", f"{nets}:small", *INPUT, *words)
    assert (code, out, err) == (130, "", "interrupted\n")
    assert not Path("out").exists()
    assert [s["name"] for s in Dump.open("out.dump").stages] == ["capture", "eliminate-dead"]


def test_a_mistake_in_a_pass_is_told_without_a_traceback(nets, run, monkeypatch):
    def fail(*args: Any) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("narrows.passes.fold_batch_norm.FoldBatchNorm.run", fail)
    words = ("compile", f"{nets}:small", *INPUT, "-p", "fold-batch-norm", "-o", "out")
    code, _, err = run(*words)
    assert code == 1
    assert err.startswith("narrows failed: ZeroDivisionError: by zero\n")
    assert "Traceback" not in err
    code, _, err = run(*words, "--traceback")
    assert code == 1
    assert "Traceback" in err


def test_an_error_is_json_too(nets, run):
    code, out, err = run("compile", f"{nets}:smal", *INPUT, "-o", "out", "--json")
    assert code == 2
    error = json.loads(out)["error"]
    assert error["kind"] == "UsageError"
    assert error["hint"] == "did you mean 'small'?"
    assert error["what"] in err


# ------------------------------------------------------------------ plan


LOSS = """
def loss(outputs, batch):
    return outputs.square().sum()


word = 3
"""


def test_plan_goes_by_data_and_a_loss(nets, run):
    np.save("x.npy", np.random.default_rng(0).standard_normal((5, 3, 8, 8), dtype=np.float32))
    Path("losses.py").write_text(LOSS)
    words = [f"{nets}:small", *INPUT, "--ratio", "0.5", "--criterion", "taylor"]
    code, out, err = run("plan", *words, "--data", "x.npy", "-o", "p.json", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["options"]["data"] == "x.npy"
    lossy = [*words, "--data", "x.npy", "--criterion-loss", "losses.py:loss"]
    assert run("plan", *lossy, "-o", "q.json")[0] == 0
    assert run("compile", *lossy, "-o", "out")[0] == 0
    for more, told in (
        ([], "taylor scores by data, and there is none"),
        (["--data", "y.npy"], "cannot read the data y.npy"),
        (["--data", "x.npy", "--criterion-loss", "losses"], "'losses' names no function"),
        (["--data", "x.npy", "--criterion-loss", "losses.py:lss"], "has no 'lss'"),
        (["--data", "x.npy", "--criterion-loss", "losses.py:word"], "a loss is a function"),
    ):
        code, _, err = run("plan", *words, *more, "-o", "p.json")
        assert code == 2
        assert told in err


def test_plan_saves_and_says_what_is_kept(nets, run):
    words = [
        "--ratio",
        "0.5",
        "--no-constrained",
        "--side",
        "output",
        "--scope",
        "global",
        "--exclude",
        "last.*",
    ]
    code, out, err = run("plan", f"{nets}:small", *INPUT, *words, "-o", "p.json", "--json")
    assert code == 0, err
    data = json.loads(out)
    assert data["plan"] == "p.json"
    assert data["outputs"] == {"conv.weight": 2}
    assert json.loads(Path("p.json").read_text())
    code, out, _ = run("plan", f"{nets}:small", *INPUT, "--ratio", "0.5", "-o", "q.json")
    assert code == 0
    assert out.splitlines()[-1] == "q.json"
    assert " keeps " in out
    code, out, _ = run("plan", f"{nets}:small", *INPUT, "-o", "r.json")
    assert code == 0
    assert "note: small: the plan removes nothing" in out


def test_plan_aims_at_a_latency(nets, run):
    words = ("--latency", "0.8", "-t", "onnx", "-o", "p.json")
    code, out, err = run("plan", f"{nets}:wide", "-i", "f32[2,3,16,16]", *words)
    assert code == 0, err
    assert "of the unpruned" in out
    assert "of the score mass kept" in out


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (("--ratio", "0.5"), {"conv.weight": 2}),
        (("--ratio", "0.5", "--ratio", "conv.*=0.75"), {"conv.weight": 1}),
        (("--ratio", "conv.*=0.75"), {"conv.weight": 1}),
        (("--ratio", "c*=0.25", "--ratio", "conv.*=0.75"), {"conv.weight": 3}),
    ],
)
def test_ratios_by_name(nets, run, words, kept):
    words = (*words, "--side", "both", "-o", "p.json", "--json")
    code, out, err = run("plan", f"{nets}:small", *INPUT, *words)
    assert code == 0, err
    assert json.loads(out)["outputs"] == kept


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--ratio", "half"), "--ratio half: 'half' is no number"),
        (("--ratio", "conv.*="), "'' is no number"),
        (("--ratio", "0.5", "--ratio", "0.6"), "there is one for '*' already"),
        (("--ratio", "0.5", "-o", "no/folder/p.json"), "the plan's folder does not exist"),
        (("--scope", "layer"), "invalid choice: 'layer'"),
        (("--latency", "half"), "--latency half: 'half' is no number"),
        (("--latency", "0.5", "-t", "onx"), "there is no target 'onx'"),
        (("-t", "onnx"), "a plan has a target only if it has a latency or a ratio"),
    ],
)
def test_plan_refuses(nets, run, words, message):
    words = words if "-o" in words else (*words, "-o", "p.json")
    code, _, err = run("plan", f"{nets}:small", *INPUT, *words)
    assert code == 2
    assert message in err
    assert not Path("p.json").exists()
