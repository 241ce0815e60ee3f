"""Which tests run which lines, measured once for a state of the tree.

A test file is run under coverage with the test's name as the context, at most `SAMPLE` cases of
each test function. What comes out is kept under the hash of narrows, of what tests share, and of
the file itself: a test file that is written anew is measured anew, the others are not.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.machine import digest, sources
from benchmarks.mutants.apart import PASSED, run
from benchmarks.mutants.inside import Noted, Sampled, function

SAMPLE = 200
WHOLE = {"tests/ir/test_op_rows.py"}  # every row has cases of its own
LIMIT = 1800.0  # seconds a test file may take

Say = Callable[[str], None]


class Cover:
    """What the tests of some files run."""

    def __init__(self, tree: Path, suites: Iterable[str], kept: Path, say: Say) -> None:
        kept.mkdir(parents=True, exist_ok=True)
        now = state(tree)
        self.data: list[Path] = []
        self.tests: dict[str, dict[str, Any]] = {}
        self._lines: dict[str, dict[int, list[str]]] = {}
        suites = list(suites)
        for i, name in enumerate(suites):
            key = f"{Path(name).stem}-{digest(tree, [tree / name])}-{now}"
            data, notes = kept / f"{key}.coverage", kept / f"{key}.json"
            if not notes.exists():
                say(f"measuring {i + 1} of {len(suites)}: {name}")
                _measure(tree, name, data, notes)
            told = json.loads(notes.read_text(encoding="utf-8"))
            self.tests |= {t: n for t, n in told.items() if n["passed"]}
            self.data.append(data)

    def lines(self, name: str) -> dict[int, list[str]]:
        """Return the tests per line of a file; a line that ran at import only has none."""
        if name not in self._lines:
            from coverage import CoverageData

            found: dict[int, list[str]] = defaultdict(list)
            for path in self.data:
                if not path.exists():
                    continue
                data = CoverageData(str(path))
                data.read()
                for line, contexts in data.contexts_by_lineno(name).items():
                    found[line] += [c for c in contexts if c in self.tests]
            self._lines[name] = dict(found)
        return self._lines[name]

    def with_kernel(self, name: str) -> list[str]:
        """Return the tests that compile a kernel."""
        return [t for t, n in self.tests.items() if name in n["kernels"]]

    def with_row(self, row: str) -> list[str]:
        """Return the tests that look a row up."""
        return [t for t, n in self.tests.items() if row in n["rows"]]

    def seconds(self, tests: Iterable[str]) -> float:
        """Return how long tests took."""
        return sum(self.tests[t]["seconds"] if t in self.tests else 1.0 for t in tests)

    def chosen(self, tests: Iterable[str], file: str, most: int, seconds: float) -> list[str]:
        """Return at most so many tests, as different as can be, the fastest first.

        Half of them are of test files that are named like the file or its folder, if there are.
        """
        path = Path(file)
        named = re.compile(rf"test_(\w+_)?({path.stem}|{path.parent.name})(_|\.)")
        near, far = [], []
        for queue in self._by_function(tests):
            (near if named.search(queue[0]) else far).append(queue)
        chosen: list[str] = []
        for queues, count in ((near, most // 2), (far, most), (near, most)):
            total = self.seconds(chosen)
            for test in _turns(queues):
                if test in chosen:
                    continue
                total += self.tests[test]["seconds"]
                if len(chosen) >= count or (chosen and total > seconds * count / most):
                    break
                chosen.append(test)
        return sorted(chosen, key=lambda t: (self.tests[t]["seconds"], t))

    def _by_function(self, tests: Iterable[str]) -> list[list[str]]:
        found: dict[str, list[str]] = defaultdict(list)
        for test in sorted(set(tests), key=lambda t: (self.tests[t]["seconds"], t)):
            found[function(test)].append(test)
        return list(found.values())


def _turns(queues: list[list[str]]) -> Iterator[str]:
    for turn in range(max(map(len, queues), default=0)):
        yield from (queue[turn] for queue in queues if turn < len(queue))


def state(tree: Path) -> str:
    """Return the hash of narrows and of what tests share."""
    shared = [p for p in sources(tree, "tests") if p.suffix == ".py"]
    tests = [p for p in shared if not p.name.startswith("test_")]
    return digest(tree, [*sources(tree, "narrows"), *tests])


def _measure(tree: Path, name: str, data: Path, notes: Path) -> None:
    made, lines = tree.parent / "notes.json", tree.parent / "lines.coverage"
    made.unlink(missing_ok=True)
    lines.unlink(missing_ok=True)

    @contextlib.contextmanager
    def around() -> Iterator[None]:
        coverage.start()
        try:
            yield
        finally:
            coverage.stop()
            coverage.save()

    from coverage import Coverage

    os.environ.pop("COVERAGE_RCFILE", None)
    coverage = Coverage(data_file=str(lines), config_file=False, source=[str(tree / "narrows")])
    coverage.set_option("run:relative_files", True)
    sampled = [] if name in WHOLE else [Sampled(SAMPLE)]
    plugins = [*sampled, Noted(coverage.switch_context, made)]
    # Relative to the tree: the process is there when it saves.
    here = Path.cwd()
    os.chdir(tree)
    try:
        ran = run(tree, [name], lambda _: plugins, LIMIT, around, stop=False)
    finally:
        os.chdir(here)
    # Where some failed, the others count.
    whole = ran.how == PASSED or "pytest ended with 1:" in ran.text
    if not whole or not made.exists():
        raise SystemExit(f"{name} cannot be measured: {ran.how}, {ran.text}")
    for found, place in ((lines, data), (made, notes)):  # another call may look at the same time
        if found.exists():
            shutil.copy(found, f"{place}.{os.getpid()}")
            os.replace(f"{place}.{os.getpid()}", place)
