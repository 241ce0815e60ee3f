"""Artifacts that are code run for whoever trusts them, and what this process made runs anyway."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import narrows
from narrows.backends import store
from narrows.backends.c.compiler import find_compiler
from narrows.backends.sessions import SESSIONS, runtime_of
from narrows.backends.store import MANIFEST, describe_files, encode_manifest
from narrows.cli import main
from narrows.errors import ArtifactError
from tests.builder import Builder

needs_compiler = pytest.mark.skipif(not find_compiler(), reason="there is no C compiler")
X = np.zeros((1, 2, 4, 4), np.float32)


def seal(folder: Path, **changes: Any) -> None:
    """Make the manifest fit the files, as a stranger would."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"] = describe_files(folder, list(manifest["files"]))
    (folder / MANIFEST).write_text(encode_manifest({**manifest, **changes}))


@pytest.fixture(scope="module")
def in_c() -> Any:
    b = Builder((2, 2, 4, 4))
    program = b.program(b.conv(b.inputs[0], "first", 3, 2, bias=True))
    program = narrows.quantize(program, [program.examples[0]], check=False).program
    return narrows.lower(program, "c", check=False)


@pytest.fixture
def evil_c(in_c: Any, tmp_path: Path) -> Path:
    """Return a C artifact whose model and runner leave traces when they run."""
    folder = in_c.save(tmp_path / "out")
    trace = (
        "#include <stdio.h>\n__attribute__((constructor)) static void evil(void)"
        '{{ fclose(fopen("{}", "w")); }}\n'
    )
    for name in ("runner.c", "model.c"):
        path = folder / name
        path.write_text(trace.format(tmp_path / f"{name} ran") + path.read_text())
    seal(folder)
    return folder


def traces(folder: Path) -> set[str]:
    return {p.name for p in folder.parent.iterdir() if p.name.endswith(" ran")}


def test_every_target_that_runs_is_data_or_code():
    assert {name for name in SESSIONS.builtin if not runtime_of(name).code} == {"onnx", "openvino"}


@needs_compiler
def test_c_of_a_stranger_does_not_run(evil_c: Path, capsys):
    loaded = narrows.load(evil_c)
    assert "first" in loaded.report or loaded.report
    with pytest.raises(ArtifactError) as caught:
        loaded.run(X)
    assert str(caught.value) == (
        f"the artifact at {evil_c} is code, and is not trusted\n"
        "  because its C files are compiled here and run, with all that you may do\n"
        "  try: narrows.load(path, trust=True), or --trust, if you trust who made it"
    )
    assert main(["check", str(evil_c)]) == 1
    assert "its files are whole; it was not run, as it is code" in capsys.readouterr().out
    assert main(["bench", str(evil_c), "--rounds", "1"]) == 1
    assert traces(evil_c) == set()


@needs_compiler
def test_trusted_c_runs_with_our_runner(evil_c: Path, capsys):
    assert main(["check", str(evil_c), "--trust"]) == 0
    assert "bit for bit" in capsys.readouterr().out
    assert narrows.load(evil_c, trust=True).run(X).shape[0] == 1
    assert traces(evil_c) == {"model.c ran"}


@needs_compiler
def test_what_this_process_made_is_trusted(in_c: Any, tmp_path: Path):
    folder = in_c.save(tmp_path / "out")
    assert np.array_equal(narrows.load(folder).run(X), in_c.run(X))
    again = narrows.load(folder).save(tmp_path / "again")
    assert narrows.load(again).trusted
    seal(folder, name="another")
    assert not narrows.load(folder).trusted


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_pickle_in_a_pt2_file_does_not_run(tmp_path: Path):
    program = narrows.capture(nn.Linear(4, 3).eval(), (torch.randn(2, 4),))
    folder = narrows.lower(program, "torch", check=False).save(tmp_path / "out")
    whole = (folder / "model.pt2").read_bytes()
    with zipfile.ZipFile(folder / "model.pt2") as read:
        held = {name: read.read(name) for name in read.namelist()}
    with zipfile.ZipFile(folder / "model.pt2", "w") as written:
        for name, data in held.items():
            sample = "sample_inputs" in name
            written.writestr(name, pickle.dumps(Payload(tmp_path / "a ran")) if sample else data)
    assert (folder / "model.pt2").read_bytes() != whole
    seal(folder)
    with pytest.raises(ArtifactError, match="is code, and is not trusted"):
        narrows.load(folder).run(np.zeros((2, 4), np.float32))
    assert main(["check", str(folder)]) == 1
    assert traces(folder) == set()


def test_a_library_of_a_stranger_is_not_loaded(tmp_path: Path, monkeypatch):
    program = narrows.capture(nn.Linear(4, 3).eval(), (torch.randn(2, 4),))
    folder = narrows.lower(program, check=False).save(tmp_path / "out")
    seal(folder, target="tvm", device={"name": "llvm", "runs_on": "cpu", "runs_here": True})
    monkeypatch.setattr("narrows.backends.tvm.session.open_session", None)  # would be called
    with pytest.raises(ArtifactError, match="its library is loaded into the process"):
        narrows.load(folder).run(np.zeros((2, 4), np.float32))


def test_an_artifact_has_one_identity(in_c: Any, tmp_path: Path):
    folder = in_c.save(tmp_path / "out")
    manifest = store.read_manifest(folder)
    assert narrows.load(folder).identity == in_c.identity == store.identity(manifest)
    assert store.identity({**manifest, "dump": {}}) == in_c.identity
    assert store.identity({**manifest, "name": "another"}) != in_c.identity


# ------------------------------------------------------------------ names

NAMES = ["a\n#error owned\n", "*/ int evil(void){return 1;} /*", "\u202e\ud800", "x" * 10_000]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target", ["onnx", "c"])
def test_a_name_is_no_code(name: str, target: str, tmp_path: Path, in_c: Any):
    b = Builder((2, 2, 4, 4))
    program = b.program(b.conv(b.inputs[0], "first", 3, 2, bias=True)).replace(name=name)
    made = narrows.quantize(program, [program.examples[0]], check=False).program
    assert made.name == name
    folder = narrows.lower(made, target, samples=1).save(tmp_path / "out")  # compiled, with -Werror
    assert narrows.load(folder).name == name
    assert "\n" not in narrows.load(folder).report.partition(f": {target}, ")[0]
    if target == "c":
        head, _, rest = (folder / "model.c").read_text().partition("\n")
        assert head.startswith("/* ")
        assert head.endswith(" */")
        assert rest == (in_c.folder / "model.c").read_text().partition("\n")[2]


@pytest.mark.parametrize("prefix", ["int", "main", "for", "x" * 48])
@needs_compiler
def test_a_prefix_that_is_a_word_of_c(prefix: str):
    b = Builder((2, 2, 4, 4))
    program = b.program(b.conv(b.inputs[0], "first", 3, 2, bias=True))
    made = narrows.quantize(program, [program.examples[0]], check=False).program
    artifact = narrows.lower(made, "c", samples=1, prefix=prefix)
    assert f"int {prefix}_run(" in (artifact.folder / "model.h").read_text()
