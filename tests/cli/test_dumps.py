"""A dump is of its artifact, and of no other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from narrows.backends.artifact import load
from narrows.files.folders import claimed
from narrows.ir.dump import Dump

INPUT = ("-i", "f32[2,3,8,8]")


def compile_(run, nets: str, *words: str) -> None:
    code, _, err = run("compile", f"{nets}:small", *INPUT, *words)
    assert code == 0, err


ASK = {
    "why": ("why", "out", "conv"),
    "show": ("show", "out"),
    "diff": ("diff", "out@0", "out"),
    "couplings": ("couplings", "out"),
}


def test_recompiling_without_a_dump_leaves_none(nets, run):
    compile_(run, nets, "--ratio", "0.25", "-o", "out", "--dump")
    for words in ASK.values():
        code, out, err = run(*words)
        assert code in (0, 1)  # `diff` ends with 1 where there is a difference
        assert out
        assert "has no dump" not in err
    compile_(run, nets, "--ratio", "0.75", "-o", "out")
    for words in ASK.values():
        code, out, err = run(*words)
        assert (code, out) == (1, "")
        assert "the artifact at out has no dump" in err
    assert not Path("out.dump").exists()


def test_a_dump_of_another_artifact_is_refused(nets, run):
    compile_(run, nets, "--ratio", "0.25", "-o", "out", "--dump", "out.dump")
    assert run("why", "out.dump", "conv")[0] == 0
    compile_(run, nets, "--ratio", "0.75", "-o", "out")
    code, _, err = run("why", "out.dump", "conv")
    assert code == 1
    assert "out.dump is not the dump of out" in err
    shutil.move("out.dump", "older")
    assert run("why", "older", "conv")[0] == 0
    compile_(run, nets, "-o", "b", "--dump")
    shutil.copytree("b/dump", "kept")
    compile_(run, nets, "--ratio", "0.5", "-o", "b", "--dump")
    shutil.rmtree("b/dump")
    shutil.copytree("kept", "b/dump")
    code, _, err = run("show", "b")
    assert code == 1
    assert "is corrupt" in err


def test_a_forged_dump_is_refused(nets, run):
    from narrows.backends.store import MANIFEST, describe_files, encode_manifest

    compile_(run, nets, "-o", "out", "--dump")
    Dump.open("out/dump").seal("0" * 64)
    manifest = json.loads(Path("out", MANIFEST).read_text())
    manifest["dump"] = describe_files(Path("out/dump"), list(manifest["dump"]))
    Path("out", MANIFEST).write_text(encode_manifest(manifest))
    code, _, err = run("why", "out", "conv")
    assert code == 1
    assert "the dump in out is of another artifact" in err


def test_the_dump_of_a_failed_compile_stays_beside(nets, run, monkeypatch: pytest.MonkeyPatch):
    compile_(run, nets, "--ratio", "0.25", "-o", "out")

    def fail(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("by zero")

    with monkeypatch.context() as patch:
        patch.setattr("narrows.passes.fold_batch_norm.FoldBatchNorm.run", fail)
        assert run("compile", f"{nets}:small", *INPUT, "-o", "out", "--dump")[0] == 1
    code, out, err = run("show", "out.dump")
    assert code == 0
    assert out
    assert err == "note: out.dump is of a compile that made no artifact\n"
    assert run("show", "out")[0] == 1
    compile_(run, nets, "-o", "out", "--dump")
    assert run("show", "out")[0] == 0
    assert not Path("out.dump").exists()


def test_two_compiles_at_once_have_dumps_of_their_own(nets, run):
    with claimed(Path("out.dump")):
        compile_(run, nets, "-o", "out", "--dump")
    assert run("show", "out")[0] == 0
    assert sorted(p.name for p in Path.cwd().iterdir() if "dump" in p.name) == ["out.dump"]


def test_a_dump_goes_where_its_artifact_goes(nets, run):
    compile_(run, nets, "-o", "out", "--dump")
    loaded = load("out")
    loaded.save("copy")
    shutil.rmtree("out/dump")
    assert run("show", "copy")[0] == 0
    assert load("copy").identity == load("out").identity == loaded.identity
    assert load("out").size == load("copy").size
    code, _, err = run("show", "out")
    assert code == 1
    assert "misses 000_capture.json" in err
    load("out").save("bare")  # without what is not there any more
    assert "has no dump" in run("show", "bare")[2]
    compile_(run, nets, "-o", "out")
    assert not Path("out/dump").exists()


def test_a_file_in_the_dump_that_narrows_did_not_write_is_kept(nets, run):
    compile_(run, nets, "-o", "out", "--dump")
    Path("out/dump/notes.txt").write_text("mine")
    code, _, err = run("compile", f"{nets}:small", *INPUT, "-o", "out")
    assert code == 1
    assert "it holds 'dump/notes.txt', which narrows did not write" in err


def test_a_report_carries_the_identity(nets, run):
    import numpy as np

    np.save("x.npy", np.random.default_rng(0).standard_normal((4, 3, 8, 8)).astype(np.float32))
    words = ("--data", "x.npy", "-o", "out", "--report")
    code, _, err = run("quantize", f"{nets}:small", *INPUT, *words)
    assert code == 0, err
    identity = load("out").identity
    assert json.loads(Path("out.report/report.json").read_text())["artifact"] == identity
    assert f"artifact {identity}" in Path("out.report/report.txt").read_text()
    assert identity[:12] in Path("out.report/report.html").read_text()


# ------------------------------------------------------------------ standard output


def test_a_plan_goes_to_standard_output(nets, run):
    code, out, err = run("plan", f"{nets}:small", *INPUT, "--ratio", "0.5", "-o", "-")
    assert code == 0, err
    assert json.loads(out)["format"] == "narrows-plan"
    assert "keeps" in err
    code, _, err = run("plan", f"{nets}:small", *INPUT, "--ratio", "0.5", "-o", "-", "--json")
    assert code == 2
    assert "and so does a file called -" in err
    assert not Path("-").exists()


@pytest.mark.parametrize("place", ["/dev/full", "."])
def test_a_plan_replaces_nothing_that_is_no_file(nets, run, place: str):
    code, _, err = run("plan", f"{nets}:small", *INPUT, "--ratio", "0.5", "-o", place)
    assert code == 1
    assert f"cannot write {place}" in err
    assert not Path(place).is_file()


def test_an_artifact_is_no_stream(nets, run):
    code, _, err = run("compile", f"{nets}:small", *INPUT, "-o", "-")
    assert code == 1
    assert "an artifact is a folder" in err
