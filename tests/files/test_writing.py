"""One file, whole or as it was, and nothing replaced that is no file."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from narrows.errors import ArtifactError, PlanError
from narrows.files import locks, writing
from narrows.files.writing import replacing, write_text


def test_a_file_is_written_with_the_mode_of_the_umask(tmp_path: Path):
    old = os.umask(0o027)
    try:
        assert write_text("ä", tmp_path / "a") == tmp_path / "a"
    finally:
        os.umask(old)
    assert (tmp_path / "a").read_text(encoding="utf-8") == "ä"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_a_file_that_stands_there_keeps_its_mode(tmp_path: Path):
    path = tmp_path / "a"
    path.write_text("older")
    path.chmod(0o600)
    write_text("newer", path)
    assert path.read_text() == "newer"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_followed(tmp_path: Path, there: bool):
    (tmp_path / "store").mkdir()
    real, link = tmp_path / "store" / "real", tmp_path / "link"
    if there:
        real.write_text("older")
    link.symlink_to(Path("store") / "real")
    write_text("newer", link)
    assert link.is_symlink()
    assert real.read_text() == "newer"
    assert os.listdir(tmp_path / "store") == ["real"]


def test_a_link_to_itself_is_refused(tmp_path: Path):
    (tmp_path / "a").symlink_to(tmp_path / "a")
    with pytest.raises(ArtifactError, match=r"(?s)cannot write .*symbolic links"):
        write_text("x", tmp_path / "a")
    assert (tmp_path / "a").is_symlink()


def test_a_folder_is_refused(tmp_path: Path):
    with pytest.raises(PlanError, match=r"(?s)cannot write .*it is a folder"):
        write_text("x", tmp_path, PlanError)


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="there is no /dev/full")
def test_a_device_is_written_to_not_replaced():
    write_text("x", "/dev/null")
    with pytest.raises(ArtifactError, match=r"(?s)cannot write /dev/full.*No space left"):
        write_text("x", "/dev/full")
    assert Path("/dev/null").is_char_device()
    assert Path("/dev/full").is_char_device()


def test_a_pipe_is_written_to_if_somebody_reads(tmp_path: Path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ArtifactError, match="cannot write"):
        write_text("x", pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    while True:
        try:
            write_text("through", pipe)
            break
        except ArtifactError:  # the reader is not there yet
            continue
    reader.join()
    assert read == ["through"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_dash_is_standard_output(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_text("text\n", "-")
    assert capsys.readouterr().out == "text\n"
    assert os.listdir(tmp_path) == []


def test_what_the_shell_writes_to_is_not_replaced(tmp_path: Path):
    code = (
        "from narrows.files.writing import write_text\n"
        "print('one', flush=True); write_text('two\\n', '/dev/stdout'); print('three')"
    )
    with open(tmp_path / "out", "wb") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
    assert (tmp_path / "out").read_text() == "one\ntwo\nthree\n"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anything")
def test_a_read_only_file_is_refused(tmp_path: Path):
    (tmp_path / "a").write_text("older")
    (tmp_path / "a").chmod(0o400)
    with pytest.raises(ArtifactError, match="it is read-only"):
        write_text("newer", tmp_path / "a")


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        (None, ArtifactError, "is a path, got NoneType"),
        (b"bytes", ArtifactError, "is a path, got bytes"),
        ("a\0b", ArtifactError, "no path holds a zero byte"),
        ("x" * 5000, PlanError, "File name too long"),
    ],
)
def test_what_is_no_path_is_refused(path, error, message: str):
    with pytest.raises(error, match=message):
        write_text("x", path, error)


def write_half(path: Path, cause: BaseException) -> None:
    with replacing(path) as file:
        file.write(b"half")
        raise cause


@pytest.mark.parametrize("cause", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_error_leaves_the_older_file_alone(tmp_path: Path, cause: BaseException):
    (tmp_path / "a").write_text("older")
    with pytest.raises((ArtifactError, KeyboardInterrupt)):
        write_half(tmp_path / "a", cause)
    assert (tmp_path / "a").read_text() == "older"
    assert os.listdir(tmp_path) == ["a"]


def test_what_killed_writers_left_is_swept_and_what_living_ones_hold_is_not(tmp_path: Path):
    left, held = (tmp_path / f".a.0000000{i}.part" for i in range(2))
    other = tmp_path / ".b.00000000.part"
    for path in (left, held, other):
        path.write_text("half")
    descriptor = locks.open_held(held)
    assert descriptor is not None
    write_text("x", tmp_path / "a")
    assert sorted(os.listdir(tmp_path)) == [held.name, other.name, "a"]
    os.close(descriptor)
    write_text("x", tmp_path / "a")
    assert sorted(os.listdir(tmp_path)) == [other.name, "a"]


def test_without_locks_age_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(locks, "fcntl", None)
    left = tmp_path / ".a.00000000.part"
    left.write_text("half")
    write_text("x", tmp_path / "a")
    assert left.exists()
    os.utime(left, (0, 0))
    write_text("x", tmp_path / "a")
    assert os.listdir(tmp_path) == ["a"]


def test_a_long_name_has_room_for_its_mark(tmp_path: Path):
    name = "ä" * 120
    write_text("x", tmp_path / name)
    assert len(writing.mark(tmp_path / name, "part").name.encode()) <= 255
