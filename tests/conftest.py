"""Options and fixtures of the whole suite."""

from __future__ import annotations

import difflib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite tests/golden/*.txt with what came out"
    )
    machine = parser.getgroup("other machines", "what `python -m benchmarks.machines` changes")
    machine.addoption("--costs", help="a folder of cost tables, as if they were measured here")
    machine.addoption("--runtime-threads", type=int, help="threads of ONNX Runtime's sessions")
    machine.addoption("--no-blocks", action="store_true", help="ONNX Runtime without blocks")


def pytest_configure(config: pytest.Config) -> None:
    """Keep what was measured on this machine out of the tests: they run with what is shipped."""
    os.environ["NARROWS_CACHE"] = config.getoption("--costs") or tempfile.mkdtemp(
        prefix="narrows-tests-"
    )


def pytest_unconfigure(config: pytest.Config) -> None:
    if not config.getoption("--costs"):
        shutil.rmtree(os.environ["NARROWS_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def _runtime(request: pytest.FixtureRequest) -> Iterator[None]:
    """Make ONNX Runtime what the options say that it is on another machine."""
    with pytest.MonkeyPatch.context() as patch:
        if threads := request.config.getoption("--runtime-threads"):
            _limit_threads(patch, threads)
        if request.config.getoption("--no-blocks"):
            _leave_out_blocks(patch)
        yield


def _limit_threads(patch: pytest.MonkeyPatch, threads: int) -> None:
    from narrows.backends.onnx import session

    usual = session.session_options
    patch.setattr(
        session, "session_options", lambda n=None, optimize=True: usual(n or threads, optimize)
    )


def _leave_out_blocks(patch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    class Plain(onnxruntime.InferenceSession):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, disabled_optimizers=["NchwcTransformer"], **options)

    patch.setattr(onnxruntime, "InferenceSession", Plain)


@pytest.fixture(autouse=True)
def _no_contest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let predictions decide on forms: no test depends on how fast the machine is just now."""
    from narrows.api import contest

    monkeypatch.setattr(contest, "LARGEST", -1)


@pytest.fixture
def shipped_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose forms by the tables that narrows ships, whatever was measured here."""
    monkeypatch.setenv("NARROWS_CACHE", str(tmp_path / "nothing-measured"))


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare text with a file of tests/golden; ``--update-golden`` writes the file."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / f"{name}.txt"
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        expected = path.read_text(encoding="utf-8") if path.exists() else ""
        if text != expected:
            lines = difflib.unified_diff(
                expected.splitlines(), text.splitlines(), str(path), "got", lineterm=""
            )
            pytest.fail(
                "\n".join(lines) + "\nif this is meant: pytest --update-golden", pytrace=False
            )

    return compare


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
