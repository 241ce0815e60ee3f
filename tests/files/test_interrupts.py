"""Ctrl-C while files and folders are written: nothing is left over, whenever it comes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from narrows.files import folders, writing
from narrows.files.interrupts import surely, uninterrupted

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is no signal there")


@pytest.fixture(autouse=True)
def hears_ctrl_c() -> Iterator[None]:
    """Let Ctrl-C come through in the background of a shell as well, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def interrupting(call: Callable[..., Any], moment: str) -> Callable[..., Any]:
    """Return a function that is interrupted once, before or after what it does."""
    left = [moment]

    def do(*args: Any, **kwargs: Any) -> Any:
        if left == ["before"]:
            left.clear()
            interrupt()
        result = call(*args, **kwargs)
        if left == ["after"]:
            left.clear()
            interrupt()
        return result

    return do


def replace_folder(place: Path) -> None:
    with folders.replacing(place) as fresh:
        (fresh / "part").write_text("newer")


def replace_file(place: Path) -> None:
    writing.write_text("newer", place)


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize(
    "step", ["_new_folder", "open_held", "_put", "exchange", "remove_left_over", "remove_folder"]
)
def test_a_folder_that_is_replaced(tmp_path: Path, monkeypatch, step: str, moment: str):
    place = tmp_path / "out"
    replace_folder(place)
    monkeypatch.setattr(folders, step, interrupting(getattr(folders, step), moment))
    if step == "remove_folder":  # it is called where the block failed
        with pytest.raises((KeyboardInterrupt, ValueError)), folders.replacing(place):
            raise ValueError
    else:
        with pytest.raises(KeyboardInterrupt):
            replace_folder(place)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (place / "part").read_text() == "newer"


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("step", ["_part_of", "hold", "become", "sync"])
def test_a_file_that_is_replaced(tmp_path: Path, monkeypatch, step: str, moment: str):
    place = tmp_path / "out"
    place.write_text("older")
    monkeypatch.setattr(writing, step, interrupting(getattr(writing, step), moment))
    with pytest.raises(KeyboardInterrupt):
        replace_file(place)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("step", ["_new_folder", "remove_folder"])
def test_a_temporary_folder(tmp_path: Path, monkeypatch, step: str, moment: str):
    monkeypatch.setattr(folders.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(folders, step, interrupting(getattr(folders, step), moment))
    with pytest.raises(KeyboardInterrupt), folders.temporary() as folder:
        (folder / "part").write_text("x")
    assert not [*tmp_path.iterdir()]


def test_it_comes_when_the_block_is_over():
    done = []

    def work() -> None:
        with uninterrupted():
            interrupt()
            done.append(1)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_in_a_block_of_a_block_it_comes_when_both_are_over():
    done = []

    def work() -> None:
        with uninterrupted():
            with uninterrupted():
                interrupt()
            done.append(1)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == [1]


def test_another_thread_is_left_alone():
    done = []

    def work() -> None:
        with uninterrupted():
            done.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [signal.default_int_handler]


def test_a_last_step_is_taken_though_it_could_not_begin():
    done: list[int] = []

    def step() -> None:
        if not done:
            done.append(0)
            raise KeyboardInterrupt
        done.append(1)

    with pytest.raises(KeyboardInterrupt):
        surely(step)
    assert done == [0, 1]
