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

FORMATS = FP32, INT8 = "fp32", "int8"


def add_measured(group: Any) -> None:
    """Add the flags that say which target's costs are measured, and of what programs."""
    from narrows.cli.emitted import measured

    group.add_argument(
        "--runtime", choices=measured(), default="onnx", help="what to measure (onnx)"
    )
    group.add_argument(
        "--format", choices=FORMATS, default=FP32, help="what programs compute in there (fp32)"
    )


def calibrate(arguments: argparse.Namespace) -> int:
    """Measure the runtime, and a model's own operators if one is named; keep the table."""
    say = teller(arguments, Path(arguments.output) if arguments.output else None)
    costs, helps = _measuring(arguments)
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
    own = getattr(costs, "measure_program", None) or getattr(costs, "measure_works", None)
    if arguments.calibrate and own is None:
        raise UsageError(
            f"a model's own operators are measured in onnxruntime, not in {tables.runtime}",
            hint=f"--calibrate --runtime {arguments.runtime} measures the usual sizes",
        )
    program = _program(arguments) if arguments.calibrate else None
    start = time.perf_counter()
    table, complete = costs.calibrate(quick=arguments.quick, tell=_progress("operators"), **helps)
    if program is not None and own is not None and complete:
        tell = _progress("the model's own")
        if helps:
            table, complete = own(table, program, lower=helps["lower"], tell=tell)
        else:
            table, complete = own(table, _works(program), tell=tell)
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


def _measuring(arguments: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Return the module that measures a target, and what that asks for beyond the usual."""
    kind = target_type(arguments.runtime)
    integers = arguments.format == INT8
    module = kind.measuring_integers if integers else kind.measuring
    if not module:
        raise UsageError(
            f"nothing measures {arguments.format} in {arguments.runtime}",
            hint=f"--calibrate --runtime onnx --format {arguments.format}",
        )
    helps = {"capture": _captured, "lower": _lowered} if integers else {}
    return importlib.import_module(module), helps


def _captured(network: Any, inputs: Any) -> Any:
    from narrows import api

    return api.capture(network, inputs)


def _lowered(program: Any) -> Any:
    """Return the artifact of a program in integers, of whatever grids: they take no time."""
    from narrows import api

    quantized = api.quantize(program, [program.examples], check=False)
    return api.lower(quantized.program, check=False)


def _program(arguments: argparse.Namespace) -> Any:
    from narrows.cli.model import capture_model

    arguments.model = arguments.calibrate
    return capture_model(arguments)


def _works(program: Any) -> list:
    from narrows.ir.workload import work_of

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
