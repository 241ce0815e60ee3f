"""`narrows.registry`: what is installed is read once, and again when something else is."""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path

import pytest

from narrows import registry

GROUP = "narrows.tried"


def install(folder: Path, name: str, later: int) -> None:
    """Put a package's entry point into a folder, as pip does, at a time that no other has."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{name} = some:{name}\n")
    os.utime(folder, (later, later))


def test_what_is_installed_meanwhile_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert registry.installed(GROUP) == ()
    monkeypatch.syspath_prepend(tmp_path)
    os.utime(tmp_path, (1, 1))
    assert registry.installed(GROUP) == ()
    for count, name in enumerate(("first", "second"), start=1):
        install(tmp_path, name, later=1 + count)
        assert len(registry.installed(GROUP)) == count
        with monkeypatch.context() as watched:
            watched.setattr(metadata, "entry_points", lambda **given: pytest.fail("read again"))
            assert len(registry.installed(GROUP)) == count
    assert {entry.value for entry in registry.installed(GROUP)} == {"some:first", "some:second"}


def test_a_place_that_is_no_folder_holds_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend("missing")
    assert registry.installed(GROUP) == ()
