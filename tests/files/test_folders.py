"""A folder is replaced as one thing, and readers keep the one they opened."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from narrows.errors import ArtifactError
from narrows.files import folders, locks, writing
from narrows.files.folders import Held, claimed, drop, exchange, replacing, scratch, temporary


def replace(target: Path, text: str, error: BaseException | None = None) -> None:
    with replacing(target) as fresh:
        (fresh / "file").write_text(text)
        if error is not None:
            raise error


@pytest.fixture(params=["one step", "two renamings"])
def target(request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if request.param == "two renamings":
        monkeypatch.setattr(folders, "_exchanger", lambda: None)
    return tmp_path / "out"


def test_a_folder_is_made_and_replaced(target: Path):
    for text in ("one", "two", "three"):
        replace(target, text)
        assert (target / "file").read_text() == text
        assert os.listdir(target.parent) == ["out"]


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_an_error_leaves_the_older_one(target: Path, error: BaseException, monkeypatch):
    replace(target, "older")
    with pytest.raises(type(error)):
        replace(target, "half", error)
    rename, renamed = os.rename, []

    def fail(source: Path, place: Path) -> None:
        if Path(source).suffix == ".new" and Path(place) == target and renamed:
            raise error
        renamed.append(source)
        rename(source, place)

    monkeypatch.setattr(folders, "exchange", lambda one, other: False)
    monkeypatch.setattr(os, "rename", fail)
    renamed.append(target)
    with pytest.raises(type(error)):
        replace(target, "newer")
    monkeypatch.undo()
    assert (target / "file").read_text() == "older"
    assert os.listdir(target.parent) == ["out"]


def test_without_locks_nothing_is_left_either(target: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", fail)
    for text in ("one", "two"):
        replace(target, text)
        assert (target / "file").read_text() == text
        assert os.listdir(target.parent) == ["out"]
    held = Held(target)
    replace(target, "three")
    with pytest.raises(ArtifactError, match="was replaced or removed"):
        held.read(lambda folder: None)


def test_two_paths_change_places(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system has no step for it")
    assert os.listdir(tmp_path / "a") == ["b"]
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "a", tmp_path / "none")


def test_a_reader_keeps_what_it_opened(target: Path):
    replace(target, "older")
    held = Held(target)
    replace(target, "newer")
    assert held.read(lambda folder: (folder / "file").read_text()) == "older"
    assert (target / "file").read_text() == "newer"
    assert len(os.listdir(target.parent)) == 2
    del held
    assert os.listdir(target.parent) == ["out"]


def test_a_reader_that_meets_a_writer_reads_again(target: Path):
    replace(target, "older")
    held, seen = Held(target), []

    def reader(folder: Path) -> str:
        seen.append(folder)
        if len(seen) == 1:
            replace(target, "newer")
            raise ArtifactError("it has another manifest by now")
        return (folder / "file").read_text()

    assert held.read(reader) == "older"
    assert len(seen) == 2


def test_a_reader_says_what_is_gone(target: Path):
    replace(target, "older")
    held = Held(target)
    (target / "file").unlink()
    target.rmdir()
    with pytest.raises(ArtifactError, match="was replaced or removed since it was opened"):
        held.read(lambda folder: None)


def test_a_reader_waits_for_the_second_renaming(target: Path, monkeypatch):
    replace(target, "older")
    old = target.with_name(".out.00000000.old")
    target.rename(old)
    monkeypatch.setattr(folders.time, "sleep", lambda seconds: old.rename(target))
    assert Held(target).read(lambda folder: (folder / "file").read_text()) == "older"
    with pytest.raises(FileNotFoundError):
        Held(target.with_name("none"))


def test_temporary_folders_of_the_dead_are_swept(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(folders.tempfile, "gettempdir", lambda: str(tmp_path))
    dead = tmp_path / f"{folders.SCRATCH}0a1b2c3d"
    dead.mkdir()
    (tmp_path / "other").mkdir()
    mine = scratch()
    again = scratch()
    assert sorted(tmp_path.iterdir()) == sorted([mine, again, tmp_path / "other"])
    assert mine.stat().st_mode & 0o777 == 0o700
    drop(mine)
    drop(again)
    assert os.listdir(tmp_path) == ["other"]


def test_a_folder_is_claimed_by_one(tmp_path: Path):
    with claimed(tmp_path / "d") as first, claimed(tmp_path / "d") as second:
        assert first == tmp_path / "d"
        assert second != first
        assert second.parent == first.parent
    with claimed(tmp_path / "d") as third:
        assert third == first


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EDQUOT])
def test_temporary_files_that_do_not_fit_are_told(number: int):
    told = pytest.raises(ArtifactError, match=r"(?s)no room for files.*TMPDIR")
    with told, temporary() as folder:
        raise OSError(number, os.strerror(number))
    assert not folder.exists()


def test_other_errors_of_the_system_come_through():
    with pytest.raises(PermissionError), temporary():
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def test_no_folder_for_temporary_files_is_told(monkeypatch: pytest.MonkeyPatch):
    def none() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr("tempfile.gettempdir", none)
    with pytest.raises(ArtifactError, match=r"(?s)no folder for temporary files.*TMPDIR"):
        scratch()


@pytest.mark.parametrize("read", [False, True])
def test_a_writer_killed_between_two_renamings_loses_nothing(
    tmp_path: Path, read: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(folders, "GAP", 0.0)
    target = tmp_path / "out"
    replace(target, "older")
    os.rename(target, writing.mark(target, "old"))
    writing.mark(target, "new").mkdir()
    if read:
        assert (Held(target).path / "file").read_text() == "older"
        return
    with pytest.raises(ZeroDivisionError):
        replace(target, "newer", ZeroDivisionError())
    assert (target / "file").read_text() == "older"
    assert os.listdir(tmp_path) == ["out"]
