"""Artifacts on disk: all or nothing, and only what was written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from narrows.backends import lower, store
from narrows.backends.artifact import Artifact, load
from narrows.backends.store import MANIFEST, encode_manifest
from narrows.errors import ArtifactError
from narrows.frontend import capture

X = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    torch.manual_seed(0)
    program = capture(nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval(), (torch.randn(2, 4),))
    return lower(program, plan_json={"inputs": {}}, samples=1)


@pytest.fixture
def saved(artifact: Artifact, tmp_path: Path) -> Path:
    return artifact.save(tmp_path / "out")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ------------------------------------------------------------------ saving and loading


def test_a_saved_artifact_is_the_same_one(artifact: Artifact, saved: Path):
    again = load(saved)
    assert names(saved) == {"model.onnx", MANIFEST}
    assert np.array_equal(again.run(X), artifact.run(X))
    assert again.plan == {"inputs": {}}
    assert {k: v for k, v in again.manifest.items() if k != "checksum"} == artifact.manifest
    assert again.size == (saved / "model.onnx").stat().st_size


def test_a_loaded_artifact_can_be_saved_again(saved: Path, tmp_path: Path):
    twice = load(saved).save(tmp_path / "deeper" / "copy")
    assert np.array_equal(load(twice).run(X), load(saved).run(X))
    assert (twice / MANIFEST).read_bytes() == (saved / MANIFEST).read_bytes()


def test_saving_over_an_artifact_replaces_it(artifact: Artifact, saved: Path):
    (saved / "model.onnx").write_bytes(b"older")
    artifact.save(saved)
    assert np.array_equal(load(saved).run(X), artifact.run(X))
    assert names(saved.parent) == {"out"}


def test_saving_into_an_empty_folder_or_over_itself(artifact: Artifact, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    folder = artifact.save(tmp_path / "empty")
    load(folder).save(folder)
    assert np.array_equal(load(folder).run(X), artifact.run(X))


def test_saving_through_a_link_writes_where_it_points(artifact: Artifact, tmp_path: Path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    artifact.save(tmp_path / "link")
    assert names(tmp_path / "real") == {"model.onnx", MANIFEST}
    assert (tmp_path / "link").is_symlink()


def test_files_follow_the_umask(artifact: Artifact, tmp_path: Path):
    old = os.umask(0o022)
    try:
        folder = artifact.save(tmp_path / "out")
    finally:
        os.umask(old)
    assert folder.stat().st_mode & 0o777 == 0o755
    assert (folder / "model.onnx").stat().st_mode & 0o777 == 0o644


def test_an_artifact_that_was_not_saved_leaves_no_files():
    program = capture(nn.ReLU().eval(), (torch.randn(2, 3),))
    artifact = lower(program, check=False)
    folder = artifact.folder
    assert folder.is_dir()
    del artifact
    assert not folder.exists()


# ------------------------------------------------------------------ all or nothing


ERRORS = [OSError(28, "No space left on device"), KeyboardInterrupt()]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("call", range(5))
def test_an_interrupted_save_leaves_nothing(
    artifact: Artifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    call: int,
):
    # The model, the manifest, the folder twice, and, after the renaming, the parent folder.
    interrupt(monkeypatch, error, call)
    with pytest.raises((ArtifactError, KeyboardInterrupt)):
        artifact.save(tmp_path / "out")
    monkeypatch.undo()
    if call < 4:
        assert names(tmp_path) == set()
    else:
        assert names(tmp_path) == {"out"}
        assert np.array_equal(load(tmp_path / "out").run(X), artifact.run(X))


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("call", range(4))
def test_an_interrupted_save_keeps_the_older_artifact(
    artifact: Artifact,
    saved: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    call: int,
):
    before = (saved / MANIFEST).read_bytes()
    interrupt(monkeypatch, error, call)
    with pytest.raises((ArtifactError, KeyboardInterrupt)):
        artifact.save(saved)
    monkeypatch.undo()
    assert names(saved.parent) == {"out"}
    assert (saved / MANIFEST).read_bytes() == before
    load(saved)


def interrupt(monkeypatch: pytest.MonkeyPatch, error: BaseException, call: int) -> None:
    """Raise ``error`` when a file or folder is forced to the disk for the ``call``-th time."""
    sync, calls = os.fsync, iter(range(100))

    def fail(descriptor: int) -> None:
        if next(calls) == call:
            raise error
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)


@pytest.mark.parametrize("private", [False, True])
def test_saving_over_an_artifact_keeps_its_modes(artifact: Artifact, saved: Path, private: bool):
    if private:
        saved.chmod(0o700)
        (saved / "model.onnx").chmod(0o600)
        (saved / MANIFEST).chmod(0o640)
    modes = [p.stat().st_mode for p in (saved, saved / "model.onnx", saved / MANIFEST)]
    artifact.save(saved)
    assert [p.stat().st_mode for p in (saved, saved / "model.onnx", saved / MANIFEST)] == modes


# ------------------------------------------------------------------ readers and writers


def test_what_was_loaded_runs_after_it_was_replaced(artifact: Artifact, saved: Path):
    older, wanted = load(saved), artifact.run(X)
    other = lower(capture(nn.Sequential(nn.Linear(4, 5)).eval(), (torch.randn(2, 4),)), samples=1)
    other.save(saved)
    assert load(saved).run(X).shape == (2, 5)
    assert np.array_equal(older.run(X), wanted)
    assert names(saved.parent) > {"out"}  # somebody reads the older one
    del older
    assert names(saved.parent) == {"out"}


def test_what_was_removed_cannot_be_run(saved: Path):
    loaded = load(saved)
    shutil.rmtree(saved)
    with pytest.raises(ArtifactError, match=r"was replaced or removed since it was opened"):
        loaded.run(X)


WRITER = """
import sys
from narrows.backends.artifact import load
artifact = load(sys.argv[1])
for _ in range(int(sys.argv[3])):
    artifact.save(sys.argv[2])
"""


def test_readers_and_writers_never_meet(artifact: Artifact, saved: Path, tmp_path: Path):
    other = lower(capture(nn.Sequential(nn.Linear(4, 5)).eval(), (torch.randn(2, 4),)), samples=1)
    sources = [artifact.save(tmp_path / "a"), other.save(tmp_path / "b")]
    known = {a.identity: a.run(X) for a in (artifact, other)}
    line = [sys.executable, "-c", WRITER]
    writers = [subprocess.Popen([*line, str(s), str(saved), "40"]) for s in sources]
    rounds = 0
    while rounds < 50 or any(w.poll() is None for w in writers):
        loaded = load(saved)
        if rounds % 10 == 0:
            assert np.array_equal(loaded.run(X), known[loaded.identity])
        rounds += 1
    del loaded
    assert [w.wait() for w in writers] == [0, 0]
    assert names(tmp_path) == {"a", "b", "out"}


def test_what_killed_writers_left_is_swept(artifact: Artifact, saved: Path):
    left = saved.with_name(".out.0a1b2c3d.new")
    left.mkdir()
    (left / "model.onnx").write_bytes(b"half")
    held = store.hold(left)  # by a writer that is not done
    artifact.save(saved)
    assert left.is_dir()
    del held
    artifact.save(saved)
    assert names(saved.parent) == {"out"}


# ------------------------------------------------------------------ refusing


def test_a_folder_with_something_else_is_refused(artifact: Artifact, tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match=r"(?s)will not replace .*narrows did not write it"):
        artifact.save(tmp_path)
    assert names(tmp_path) == {"thesis.tex"}


def test_an_artifact_with_a_foreign_file_is_refused(artifact: Artifact, saved: Path):
    (saved / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"it holds 'notes.txt', which narrows did not write"):
        artifact.save(saved)
    assert names(saved) == {"model.onnx", MANIFEST, "notes.txt"}


def test_a_file_in_the_way_is_refused(artifact: Artifact, tmp_path: Path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ArtifactError, match=r"(?s)cannot write .*it is not a folder"):
        artifact.save(tmp_path / "out")
    with pytest.raises(
        ArtifactError, match=r"(?s)cannot write .*(File exists|Not a directory): .*out$"
    ):
        artifact.save(tmp_path / "out" / "deeper")
    assert (tmp_path / "out").read_text() == "a file"


# ------------------------------------------------------------------ corrupt and foreign files


def test_a_missing_folder(tmp_path: Path):
    with pytest.raises(ArtifactError, match=r"there is no artifact at .*nowhere"):
        load(tmp_path / "nowhere")


def test_a_folder_without_manifest(tmp_path: Path):
    with pytest.raises(ArtifactError, match=r"(?s)is not an artifact.*it has no manifest.json"):
        load(tmp_path)


@pytest.mark.parametrize("text", ["{", "", "\x00\x01", '{"format": "narrows-artifact", '])
def test_a_manifest_that_is_not_json(saved: Path, text: str):
    (saved / MANIFEST).write_text(text)
    with pytest.raises(ArtifactError, match=r"(?s)manifest.json is corrupt.*it is not JSON"):
        load(saved)


def test_a_manifest_that_is_not_text(saved: Path):
    (saved / MANIFEST).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ArtifactError, match=r"(?s)manifest.json is corrupt.*it is not text"):
        load(saved)


@pytest.mark.parametrize("data", [[], {}, {"format": "npm"}, 3])
def test_somebody_elses_manifest(saved: Path, data: object):
    (saved / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match=r"(?s)is not an artifact.*is not from narrows"):
        load(saved)


def test_a_manifest_of_another_version(saved: Path):
    rewrite(saved, version=99, narrows="7.0")
    with pytest.raises(ArtifactError, match=r"(?s)format version 99.*version 1.*use narrows 7\.0"):
        load(saved)


def test_a_changed_manifest(saved: Path):
    text = (saved / MANIFEST).read_text()
    (saved / MANIFEST).write_text(text.replace('"float32"', '"float64"', 1))
    with pytest.raises(ArtifactError, match=r"(?s)manifest.json is corrupt.*checksum differs"):
        load(saved)


@pytest.mark.parametrize("key", ["inputs", "structure", "files", "notes"])
def test_a_manifest_without_a_part(saved: Path, key: str):
    rewrite(saved, **{key: None})
    with pytest.raises(ArtifactError, match=rf"(?s)manifest.json is malformed.*{key}: expected"):
        load(saved)


def test_a_manifest_whose_parts_do_not_fit(saved: Path):
    rewrite(saved, structure={"inputs": "*"})
    with pytest.raises(ArtifactError, match=r"(?s)is malformed.*structure: .*field output"):
        load(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"axes": [1, 1]}, "its axes ascend"),
        ({"sizes": [2]}, "one size per axis"),
        ({"kept": [0, 1, 2, 6]}, "of the whole ones"),
        ({"kept": [0, 1, 1, 2]}, "as many places as it has"),
        ({"kept": None}, "as many places as it has"),
        ({"kept": None, "whole": [1 << 40] * 2, "sizes": [1 << 40] * 2}, None),
        ({"kept": [0, -1, 2, 3]}, "expected"),
        ({}, None),
    ],
)
def test_a_manifest_whose_states_do_not_fit(saved: Path, change: dict, message: str | None):
    state = {"name": "x", "output": 0, "axes": [1, 3], "whole": [2, 3], "sizes": [2, 2]}
    rewrite(saved, states=[{**state, "kept": [0, 1, 3, 5], **change}])
    if message is None:
        load(saved)
        return
    with pytest.raises(ArtifactError, match=rf"(?s)is malformed.*{message}"):
        load(saved)


def test_a_manifest_that_points_outside(saved: Path):
    rewrite(saved, files={"../secret": {"size": 1, "sha256": ""}})
    with pytest.raises(ArtifactError, match=r"(?s)is malformed.*files: .*regex"):
        load(saved)


def test_a_missing_model(saved: Path):
    (saved / "model.onnx").unlink()
    with pytest.raises(ArtifactError, match=r"misses model.onnx"):
        load(saved)


def test_a_truncated_model(saved: Path):
    data = (saved / "model.onnx").read_bytes()
    (saved / "model.onnx").write_bytes(data[:-1])
    with pytest.raises(ArtifactError, match=r"(?s)model.onnx is corrupt.*bytes instead of"):
        load(saved)


def test_a_model_that_changes_after_it_was_loaded(saved: Path, tmp_path: Path):
    artifact = load(saved)
    path = saved / "model.onnx"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=r"(?s)model.onnx is corrupt.*SHA-256"):
        artifact.open()
    with pytest.raises(ArtifactError, match=r"(?s)model.onnx is corrupt.*SHA-256"):
        artifact.save(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    path.write_bytes(whole)  # touched, and the same
    assert artifact.open() is artifact.open()
    path.unlink()
    with pytest.raises(ArtifactError, match=r"misses model.onnx"):
        artifact.open(threads=1)


def test_a_changed_model(saved: Path):
    data = bytearray((saved / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (saved / "model.onnx").write_bytes(data)
    with pytest.raises(ArtifactError, match=r"(?s)model.onnx is corrupt.*SHA-256"):
        load(saved)


def test_an_artifact_of_a_target_that_is_not_here(saved: Path):
    rewrite(saved, target="vax")
    with pytest.raises(ArtifactError, match=r"(?s)the target 'vax'.*this narrows runs: .*onnx"):
        load(saved).run(X)


def rewrite(folder: Path, **changes: object) -> None:
    """Change a manifest as somebody would who also mends its checksum."""
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(encode_manifest({**manifest, **changes}))
