"""The tests under the conditions of other machines, one condition after the other.

    python -m benchmarks.machines --list
    python -m benchmarks.machines [--only sse dear] [--json results.json]
    python -m benchmarks.machines --only odd --parts tests/passes -- -k forms

A condition changes what a processor or a developer's machine decides: the instructions that torch,
oneDNN and MKL may use, the number of threads, the layout of ONNX Runtime, the cost tables that
forms are chosen by. Without ``--parts`` the tests run that a runtime, a training run or a table
could sway. Prints a line per condition and the tests that failed under it; the exit code is 1 if
any did.

ONNX Runtime cannot be told which instructions to use: it asks the processor itself. What can be
changed from outside is its layout and its threads. An emulated processor caps it, as everything
else; that condition needs ``qemu-x86_64`` and runs few tests, as it takes some ten times as long.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.machine import write
from narrows.backends.measured.table import CostTable
from narrows.backends.onnx.costs import TABLES as ONNX
from narrows.backends.tables import Tables, cpu_name
from narrows.backends.torch.costs import TABLES as TORCH

ROOT = Path(__file__).parent.parent

# What a runtime, a training run, or a choice by costs could sway.
PARTS = (
    "tests/test_demo.py", "tests/test_api.py", "tests/test_choices.py", "tests/test_properties.py",
    "tests/test_quantized_accuracy.py", "tests/test_quantized_properties.py",
    "tests/test_torch_pruning.py", "tests/backends", "tests/cli", "tests/passes",
)  # fmt: skip

# What an emulated processor, which is slow, runs.
FEW = ("tests/test_demo.py", "tests/backends/test_onnx_integer.py", "-k", "demo or large_products")

COPIES = ("gather", "pick", "slice", "copy", "concat", "reorder in", "reorder out")
SEED = 0


@dataclass(frozen=True)
class Costs:
    """Made-up cost tables: the shipped ones, changed.

    Attributes:
        copies: What the times of copies are multiplied by.
        noise: The standard deviation of the logarithm of what every grid is multiplied by.
        block: The channels of a block of ONNX Runtime; 0 leaves them.
    """

    copies: float = 1.0
    noise: float = 0.0
    block: int = 0

    def table(self, table: CostTable) -> CostTable:
        """Return a table as one that was measured here."""
        random = np.random.default_rng(SEED)
        grids = {
            name: table.grids[name].scaled(
                (self.copies if name in COPIES else 1.0)
                * float(np.exp(random.normal(0, self.noise)))
            )
            for name in sorted(table.grids)
        }
        layout = table.layout
        if self.block and layout.block > 1:
            layout = dataclasses.replace(layout, block=self.block)
        return dataclasses.replace(
            table, cpu=cpu_name(), grids=grids, layout=layout, made="made up"
        )

    def write(self, folder: Path) -> None:
        """Write the tables of every runtime into a folder, as narrows keeps them."""
        for tables in (ONNX, TORCH):
            table = dataclasses.replace(self.table(tables.shipped()), runtime=tables.version())
            tables.keep(table, folder / _name(tables))


def _name(tables: Tables) -> str:
    return tables.path().name


@dataclass(frozen=True)
class Condition:
    """What is different, and how.

    Attributes:
        about: The difference, in words.
        environment: Variables of the environment.
        options: Options of pytest.
        costs: Cost tables in place of the shipped ones.
        before: What the interpreter is started by.
        parts: The tests to run, where it cannot be all.
    """

    about: str
    environment: Mapping[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    costs: Costs | None = None
    before: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()


def _instructions(aten: str, onednn: str, mkl: str) -> dict[str, str]:
    return {"ATEN_CPU_CAPABILITY": aten, "ONEDNN_MAX_CPU_ISA": onednn, "MKL_CBWR": mkl}


CONDITIONS: dict[str, Condition] = {
    "here": Condition("this machine, one thread"),
    "sse": Condition(
        "torch, oneDNN and MKL without AVX", _instructions("default", "SSE41", "COMPATIBLE")
    ),
    "avx2": Condition(
        "torch, oneDNN and MKL up to AVX2", _instructions("avx2", "AVX2", "AVX2")
    ),
    "threads": Condition(
        "two threads in torch, four in ONNX Runtime", {"OMP_NUM_THREADS": "2"},
        ("--runtime-threads=4",),
    ),
    "plain": Condition(
        "ONNX Runtime without its blocked layout, one thread",
        options=("--no-blocks", "--runtime-threads=1"),
    ),
    "cheap": Condition("copies cost a hundredth", costs=Costs(copies=0.01)),
    "dear": Condition("copies cost a hundred times as much", costs=Costs(copies=100.0)),
    "odd": Condition("blocks of 8, every time by chance", costs=Costs(noise=1.0, block=8)),
    "emulated": Condition(
        "a processor of 2008, emulated", before=("qemu-x86_64", "-cpu", "Nehalem"),
        options=("-o", "timeout=0"), parts=FEW,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What came of a condition.

    Attributes:
        condition: Its name.
        passed: How many tests passed.
        skipped: How many were skipped.
        failed: The tests that did not.
        seconds: The time it took.
        left_out: Why it was not run.
    """

    condition: str
    passed: int = 0
    skipped: int = 0
    failed: tuple[str, ...] = ()
    seconds: float = 0.0
    left_out: str = ""

    def __str__(self) -> str:
        if self.left_out:
            return f"{self.condition:10} left out: {self.left_out}"
        counts = f"{self.passed} passed, {len(self.failed)} failed, {self.skipped} skipped"
        return "\n  ".join([f"{self.condition:10} {counts}, {self.seconds:.0f} s", *self.failed])


def run(name: str, parts: Sequence[str], more: Sequence[str]) -> Result:
    """Run tests under a condition; nothing of an earlier one is left."""
    condition = CONDITIONS[name]
    if condition.before and shutil.which(condition.before[0]) is None:
        return Result(name, left_out=f"{condition.before[0]} is not installed")
    with tempfile.TemporaryDirectory() as place:
        report, tables = Path(place) / "report.xml", Path(place) / "costs"
        command = [*condition.before, sys.executable, "-m", "pytest", "-q", f"--junitxml={report}"]
        command += [*condition.options, *(parts or condition.parts or PARTS), *more]
        if condition.costs is not None:
            condition.costs.write(tables)
            command.append(f"--costs={tables}")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **condition.environment}
        start = time.monotonic()
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode not in (0, 1):  # all passed, some failed
            return Result(name, failed=(f"pytest ended with {done.returncode}: {_last(done)}",))
        return read(name, report, time.monotonic() - start)


def read(name: str, report: Path, seconds: float) -> Result:
    """Return what a report of pytest says."""
    cases = list(xml.etree.ElementTree.parse(report).iter("testcase"))
    told = {kind: [c for c in cases if c.find(kind) is not None] for kind in ("failure", "error")}
    failed = [f"{c.get('classname')}::{c.get('name')}" for k in told.values() for c in k]
    skipped = sum(case.find("skipped") is not None for case in cases)
    failed = tuple(dict.fromkeys(failed))
    return Result(name, len(cases) - len(failed) - skipped, skipped, failed, seconds)


def _last(done: subprocess.CompletedProcess[str]) -> str:
    return ([*done.stdout.splitlines(), *done.stderr.splitlines()] or [""])[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=CONDITIONS, default=[*CONDITIONS])
    parser.add_argument("--parts", nargs="+", default=(), help="tests to run in place of the usual")
    parser.add_argument("--list", action="store_true", help="print the conditions and run none")
    parser.add_argument("--json", help="where to write the results")
    parser.add_argument("more", nargs="*", help="arguments of pytest, after --")
    options = parser.parse_args()
    if options.list:
        print("\n".join(f"{name:10} {c.about}" for name, c in CONDITIONS.items()))
        return 0
    results = []
    for name in options.only:
        results.append(run(name, options.parts, options.more))
        print(results[-1], flush=True)
    write(options.json, [dataclasses.asdict(result) for result in results])
    return int(any(result.failed for result in results))


if __name__ == "__main__":
    sys.exit(main())
