"""The command that runs the tests as other machines would."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks import machines
from benchmarks.machines import CONDITIONS, Costs
from narrows.backends.onnx.costs import TABLES

REPORT = """<testsuites><testsuite>
<testcase classname="tests.a" name="one"/>
<testcase classname="tests.a" name="two[x]"><failure message="no"/></testcase>
<testcase classname="tests.a" name="three"><error message="no"/></testcase>
<testcase classname="tests.b" name="four"><skipped message="no"/></testcase>
</testsuite></testsuites>"""


def test_made_up_tables_are_taken_for_this_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NARROWS_CACHE", str(tmp_path))
    Costs(copies=100.0, block=8).write(tmp_path)
    table, shipped = TABLES.current(), TABLES.shipped()
    assert table.made == "made up"
    assert table.layout.block == 8
    assert table.copy_seconds("gather", 64, 64, (28, 28)) > 50 * shipped.copy_seconds(
        "gather", 64, 64, (28, 28)
    )


def test_a_report_is_read(tmp_path: Path) -> None:
    (tmp_path / "r.xml").write_text(REPORT)
    result = machines.read("here", tmp_path / "r.xml", 1.0)
    assert (result.passed, result.skipped) == (1, 1)
    assert result.failed == ("tests.a::two[x]", "tests.a::three")
    assert str(result).splitlines() == [
        "here       1 passed, 2 failed, 1 skipped, 1 s", "  tests.a::two[x]", "  tests.a::three",
    ]  # fmt: skip


def test_what_is_not_there_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    result = machines.run("emulated", (), ())
    assert str(result) == "emulated   left out: qemu-x86_64 is not installed"


def test_a_run_that_cannot_begin_has_failed() -> None:
    result = machines.run("here", ["tests/no_such_test.py"], ())
    assert len(result.failed) == 1
    assert "pytest ended with 4" in result.failed[0]


def test_the_suite_does_not_read_what_was_measured_here(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--costs") is None:
        assert TABLES.current() is TABLES.shipped()
    assert {"sse", "avx2", "threads", "emulated"} <= set(CONDITIONS)
