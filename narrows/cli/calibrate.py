"""``narrows bench --calibrate``: measures what operators cost on this machine."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path
from typing import Any

from narrows.backends import target_type
from narrows.cli.commands import print_json, teller
from narrows.cli.flags import refuse_idle
from narrows.cli.model import SOURCE
from narrows.errors import UsageError


def calibrate(arguments: argparse.Namespace) -> int:
    """Measure the runtime, and a model's own operators if one is named; keep the table."""
    say = teller(arguments, Path(arguments.output) if arguments.output else None)
    costs: Any = importlib.import_module(target_type(arguments.runtime).measuring)
    tables = costs.TABLES
    if arguments.artifact is not None:
        raise UsageError("--calibrate times no artifact", hint="run it on its own")
    timing = ("against", "batch", "rounds", "threads", "profile", "trust")
    refuse_idle(arguments, timing, "--calibrate times no artifact")
    if not arguments.calibrate:
        refuse_idle(arguments, SOURCE, "no model is named: --calibrate MODULE:FACTORY")
    if not tables.version():
        raise UsageError(
            f"there is no {tables.runtime} to measure", hint=f"pip install {tables.runtime}"
        )
    if arguments.calibrate and not hasattr(costs, "measure_works"):
        raise UsageError(
            f"a model's own operators are measured in onnxruntime, not in {tables.runtime}",
            hint=f"--calibrate --runtime {arguments.runtime} measures the usual sizes",
        )
    works = _works(arguments) if arguments.calibrate else []
    start = time.perf_counter()
    table, complete = costs.calibrate(quick=arguments.quick, tell=_progress("operators"))
    if works and complete:
        table, complete = costs.measure_works(table, works, tell=_progress("the model's own"))
    path = tables.keep(table, Path(arguments.output) if arguments.output else None)
    took = time.perf_counter() - start
    if not complete:
        print("interrupted: what was measured is kept", file=sys.stderr)
    if arguments.json:
        facts = {"grids": len(table.grids), "works": len(table.works), "complete": complete}
        print_json({"table": str(path), "cpu": table.cpu, "runtime": table.runtime, **facts})
    else:
        say(f"{table.name} {table.runtime} on {table.cpu}, {took:.0f} s")
        say(f"{len(table.grids)} grids, {len(table.works)} exact works, saved in {path}")
    return 0 if complete else 130


def _works(arguments: argparse.Namespace) -> list:
    from narrows.cli.model import capture_model
    from narrows.ir.workload import work_of

    arguments.model = arguments.calibrate
    program = capture_model(arguments)
    found = (work_of(node) for node in program.graph.nodes)
    return list(dict.fromkeys(work for work in found if work is not None))


def _progress(what: str):
    """Return what tells how far it is, where a person is looking."""
    shown = sys.stderr.isatty()

    def tell(done: int, total: int) -> None:
        if shown:
            end = "\n" if done == total else ""
            print(f"\r{what}: {done} of {total}", end=end, file=sys.stderr, flush=True)

    return tell
