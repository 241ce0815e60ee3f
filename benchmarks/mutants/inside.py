"""What runs inside a test process: which tests, in which order, and what is noted of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

TEXT = 4000  # characters of a failure that are kept


def function(test: str) -> str:
    """Return the name of a test without its parameters."""
    return test.partition("[")[0]


class Chosen:
    """A plugin of pytest: run these tests in this order, and tell of each how it went.

    A line of JSON is written before a test and after it, so that what hung or crashed has a name.
    """

    def __init__(self, tests: Sequence[str], report: Path) -> None:
        self.rank = {test: i for i, test in enumerate(tests)}
        self.report = report

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        found = [item for item in items if item.nodeid in self.rank]
        items[:] = sorted(found, key=lambda item: self.rank[item.nodeid])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.tell(test=nodeid, how="began")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.tell(test=report.nodeid, how="failed", text=report.longreprtext[-TEXT:])

    def tell(self, **line: Any) -> None:
        with self.report.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class Sampled:
    """A plugin of pytest: run at most so many cases of every test function, always the same."""

    def __init__(self, most: int) -> None:
        self.most = most

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        def lot(item: pytest.Item) -> str:
            return hashlib.sha256(item.nodeid.encode()).hexdigest()

        taken: Counter[str] = Counter()
        kept = set()
        for item in sorted(items, key=lot):
            taken[function(item.nodeid)] += 1
            if taken[function(item.nodeid)] <= self.most:
                kept.add(item)
        items[:] = [item for item in items if item in kept]


class Noted:
    """A plugin of pytest: note of every test its time, its lines, its operators and its kernels.

    The lines go to coverage, under the test's name. The operators are those whose rows were looked
    up; the kernels those whose C text was read by a test that starts a process, as a compiler is.
    """

    def __init__(self, switch: Callable[[str], None], notes: Path) -> None:
        self.switch, self.notes = switch, notes
        self.tests: dict[str, dict[str, Any]] = {}
        self.rows: set[str] = set()
        self.kernels: set[str] = set()
        self.compiled = False

    def pytest_sessionstart(self) -> None:
        from narrows.backends.c import source
        from narrows.ir.ops import table

        names = {key: row.name for key, row in table._ROWS.items()}
        noted, kernel = self.rows, source.kernel

        class Rows(dict[int, Any]):
            def get(self, key: int, default: Any = None) -> Any:
                if key in names:
                    noted.add(names[key])
                return super().get(key, default)

        def read(name: str) -> str:
            self.kernels.add(name)
            return kernel(name)

        table._ROWS = Rows(table._ROWS)
        source.kernel = read
        sys.addaudithook(self.heard)

    def heard(self, event: str, _args: tuple[Any, ...]) -> None:
        self.compiled |= event == "subprocess.Popen"

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.rows.clear()
        self.kernels.clear()
        self.compiled = False
        self.tests[item.nodeid] = {"passed": False}
        begun = sum(os.times()[:4])  # of the processor, so that other work does not count
        self.switch(item.nodeid)
        try:
            return (yield)
        finally:
            self.switch("")
            self.tests[item.nodeid] |= {
                "seconds": sum(os.times()[:4]) - begun,
                "rows": sorted(self.rows),
                "kernels": sorted(self.kernels) if self.compiled else [],
            }

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        told = self.tests[report.nodeid]
        if report.when == "call":
            told["passed"] = report.passed
        elif not report.passed:
            told["passed"] = False

    def pytest_sessionfinish(self) -> None:
        self.notes.write_text(json.dumps(self.tests), encoding="utf-8")


class Claimed:
    """A plugin of pytest: one row of the op table claims something else of its operator."""

    def __init__(self, row: str, number: int) -> None:
        self.row, self.number = row, number

    def pytest_sessionstart(self) -> None:
        from benchmarks.mutants.claims import others
        from narrows.ir.ops import table

        key, row = next((k, r) for k, r in table._ROWS.items() if r.name == self.row)
        trait, value, _ = list(others(row))[self.number]
        table._ROWS[key] = dataclasses.replace(row, **{trait: value})
