"""``narrows quantize``: a model and calibration data become an integer artifact."""

from __future__ import annotations

import argparse
from pathlib import Path

from narrows.cli import grids
from narrows.cli.commands import (
    print_json,
    refuse_missing_folder,
    refuse_output,
    report_folder,
    teller,
)
from narrows.cli.emitted import parse_target
from narrows.cli.model import capture_model
from narrows.errors import UsageError


def quantize(arguments: argparse.Namespace) -> int:
    """Quantize a model and save the artifact."""
    from narrows import api

    output = Path(arguments.output)
    refuse_output(output)
    target = parse_target(arguments.target)
    told = report_folder(output, arguments.report)
    _refuse_sources(arguments)
    plan = None if arguments.save_plan is None else Path(arguments.save_plan)
    if plan is not None:
        refuse_missing_folder(plan)
    say = teller(arguments, plan)
    settings = grids.settings_of(arguments)  # what is wrong with them shows before any work is done
    program = capture_model(arguments)
    if arguments.channels is not None:
        program = api.apply(program, arguments.channels)
    images = None if arguments.data is None else Path(arguments.data)
    data = None if images is None else grids.batches(images, program)
    quantized = api.quantize(program, data, plan=arguments.plan, **settings)
    artifact = api.lower(quantized.program, target)
    artifact.save(output)
    if plan is not None:
        quantized.plan.save(plan)
    found = grids.findings(program, quantized)
    if told is not None and images is not None:
        found |= grids.report(quantized, grids.batches(images, program), told, artifact)
    if arguments.json:
        facts = {"artifact": str(output), "bytes": artifact.size, "fidelity": artifact.fidelity}
        print_json({**facts, **found})
        return 0
    say(artifact.report)
    say(grids.describe(found))
    say(f"\nsaved in {output}")
    return 0


def _refuse_sources(arguments: argparse.Namespace) -> None:
    """Raise unless grids have one source, and a report has data."""
    if arguments.data is None and arguments.report is not None:
        raise UsageError("a report is measured on data", hint="--data images.npy")
    both = arguments.data is not None and arguments.plan is not None and arguments.report is None
    if both or (arguments.data is None and arguments.plan is None):
        raise UsageError(
            "quantize takes either data or a plan",
            why="grids are measured on data, or read from a plan",
            hint="--data images.npy, or --plan quant.json; both only with --report",
        )
