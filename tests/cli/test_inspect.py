"""The commands that look: passes, ops, couplings, show, diff, why, check."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

INPUT = ("-i", "f32[2,3,8,8]")


def test_passes(run):
    code, out, _ = run("passes")
    assert code == 0
    lines = {line.split()[0].partition("{")[0]: line for line in out.splitlines()}
    assert {"prune-channels", "fold-batch-norm", "eliminate-dead"} <= lines.keys()
    assert "exact" in lines["fold-batch-norm"]
    data = {p["name"]: p for p in json.loads(run("passes", "--json")[1])}
    assert data["prune-channels"]["options"]["plan"] == "none"
    assert data["fold-batch-norm"]["summary"].startswith("Folds each batch norm")


def test_criteria(run):
    code, out, _ = run("criteria")
    assert code == 0
    lines = {line.split()[0].partition("{")[0]: line for line in out.splitlines()}
    assert {"l1", "random", "bn-scale"} <= lines.keys()
    assert "weights" in lines["l1"]
    data = {c["name"]: c for c in json.loads(run("criteria", "--json")[1])}
    assert data["random"]["options"] == {"seed": "0"}
    assert data["taylor"]["data"] == "gradients"
    assert data["udfc"]["sides"] == ["outputs"]
    assert all(c["paper"] and c["summary"].endswith(".") for c in data.values())


@pytest.mark.parametrize(
    ("command", "known"),
    [("budgets", {"macs", "params", "measured"}), ("allocators", {"descent", "bisection"})],
)
def test_budgets_and_allocators(run, command: str, known: set[str]):
    code, out, _ = run(command)
    assert code == 0
    assert known <= {line.split()[0].partition("{")[0] for line in out.splitlines()}
    data = {entry["name"]: entry for entry in json.loads(run(command, "--json")[1])}
    assert known <= data.keys()
    assert all(entry["summary"].endswith((".", ";")) for entry in data.values())


def test_ops(nets, run):
    code, out, _ = run("ops")
    assert code == 0
    assert any(line.startswith("conv2d.default ") for line in out.splitlines())
    rows = json.loads(run("ops", "--json")[1])
    assert {"name", "kind", "summary"} == rows[0].keys()
    code, _, err = run("ops", *INPUT)
    assert code == 2
    assert err.startswith("--input would have no effect")
    assert run("ops", "--fixed-batch")[0] == 2
    assert run("ops", f"{nets}:small", *INPUT, "--markdown")[0] == 2


def test_ops_of_a_model_lists_all_that_the_table_lacks(nets, run):
    code, out, _ = run("ops", f"{nets}:Odd", *INPUT)
    assert code == 1
    assert out.startswith("special_i1e.default")
    code, out, _ = run("ops", f"{nets}:Odd", *INPUT, "--json")
    assert code == 1
    assert list(json.loads(out)["missing"]) == ["special_i1e.default"]


def test_couplings_of_a_model_and_of_a_dump_agree(nets, run, compiled: Path):
    code, out, err = run("couplings", f"{nets}:small", *INPUT, "--json")
    assert code == 0, err
    model = json.loads(out)
    assert {m["weight"] for c in model for m in c["members"]} >= {"conv.weight", "last.weight"}
    code, out, _ = run("couplings", compiled / "out", "--json")
    assert code == 0
    assert json.loads(out) == model
    code, out, _ = run("couplings", compiled / "out", "norm")
    assert code == 0
    assert "4 channels" in out
    # The node may stand before the options of a model or after them.
    assert run("couplings", f"{nets}:small", "norm", *INPUT) == (0, out, "")
    assert run("couplings", f"{nets}:small", *INPUT, "norm") == (0, out, "")
    assert run("couplings", f"{nets}:small", *INPUT, "norm", "conv")[0] == 2
    assert run("couplings", f"{nets}:small", *INPUT, "--nod")[0] == 2
    assert "last.weight" in out


def test_couplings_refuse(nets, run, compiled: Path):
    code, _, err = run("couplings", compiled / "out", "nrm")
    assert code == 2
    assert "there is no node 'nrm'" in err
    assert "did you mean 'norm'?" in err
    assert run("couplings", compiled / "out", *INPUT)[0] == 2
    assert run("couplings", compiled / "out", "--fixed-batch")[0] == 2


def test_show(run, compiled: Path):
    code, out, _ = run("show", compiled / "out")
    assert code == 0
    assert out.startswith("program small  after eliminate-dead")
    code, out, _ = run("show", f"{compiled / 'out'}@capture", "--only", "conv*", "--weights")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines() if line.startswith("  ")] == [
        "conv",
        "conv.weight",
        "conv.bias",
    ]
    code, out, _ = run("show", f"{compiled / 'out'}@0", "--only", "conv", "--json")
    assert [n["name"] for n in json.loads(out)["nodes"]] == ["conv"]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("nothing",), 2, "there is no dump here"),
        (("{}@fold",), 2, "the dump has no pass 'fold'"),
        (("{}", "--only", "con"), 2, "no node fits 'con'"),
    ],
)
def test_show_refuses(run, compiled: Path, words, code, message):
    got, _, err = run("show", *(w.format(compiled / "out") for w in words))
    assert got == code
    assert message in err


def test_diff(run, compiled: Path):
    dump = compiled / "out"
    code, out, _ = run("diff", f"{dump}@capture", f"{dump}@fold-batch-norm")
    assert code == 1
    assert "- norm" in out
    code, out, _ = run("diff", dump, dump)
    assert code == 0
    assert "no difference" in out
    code, out, _ = run("diff", f"{dump}@0", dump, "--json")
    assert code == 1
    assert [n["name"] for n in json.loads(out)["removed"]] == ["norm"]


def test_why(run, compiled: Path):
    code, out, _ = run("why", compiled / "out", "norm")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith("norm  batch_norm  (")
    assert "cli_nets.py" in lines[0]
    assert any(line.split()[:2] == ["fold-batch-norm", "gone"] for line in lines)
    assert "couplings, as captured" in out
    code, out, _ = run("why", compiled / "out", "conv.weight", "--json")
    assert code == 0
    story = json.loads(out)
    assert [n["name"] for n in story["nodes"]] == ["conv"]
    assert story["couplings"]


def test_why_of_something_unknown(run, compiled: Path):
    code, _, err = run("why", compiled / "out", "cnv")
    assert code == 2
    assert "there is no node or weight 'cnv'" in err
    assert "did you mean 'conv'?" in err


def test_check(run, compiled: Path, tmp_path: Path):
    code, out, err = run("check", compiled / "out")
    assert code == 0, err
    assert out.endswith("ok: hashes, batches of 1 and 3\n")
    assert json.loads(run("check", compiled / "out", "--json")[1])["findings"] == []
    shutil.copytree(compiled / "out", tmp_path / "bad")
    with open(tmp_path / "bad" / "model.onnx", "ab") as file:
        file.write(b"x")
    code, _, err = run("check", tmp_path / "bad")
    assert code == 1
    assert "is corrupt" in err
    assert run("check", tmp_path / "none")[0] == 2


def test_dumps_and_artifacts_are_read_without_torch(compiled: Path):
    out = compiled / "out"
    lines = [["show", out], ["diff", f"{out}@0", out], ["why", out, "conv"], ["check", out]]
    code = (
        "import sys; from narrows.cli import main\n"
        f"codes = [main(words) for words in {[[str(w) for w in words] for words in lines]!r}]\n"
        "assert codes == [0, 1, 0, 0], codes\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
