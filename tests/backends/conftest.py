"""What the tests of backends share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep a test's measurements in a folder of its own."""
    monkeypatch.setenv("NARROWS_CACHE", str(tmp_path / "cache"))
