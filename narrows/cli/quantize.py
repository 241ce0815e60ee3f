"""``narrows quantize``, ``quantize-weights``: a model and data become an artifact in few bits."""

from __future__ import annotations

import argparse
from pathlib import Path

from narrows.cli import grids
from narrows.cli.commands import (
    facts_of,
    print_json,
    refuse_missing_folder,
    refuse_output,
    report_folder,
    teller,
)
from narrows.cli.emitted import parse_target
from narrows.cli.flags import given
from narrows.cli.model import capture_model
from narrows.errors import UsageError
from narrows.options import to_json
from narrows.passes.quant.options import Quantization, WeightOnly


def quantize(arguments: argparse.Namespace) -> int:
    """Quantize a model and save the artifact."""
    from narrows import api

    output = Path(arguments.output)
    refuse_output(output)
    target = parse_target(arguments.target, arguments)
    told = report_folder(output, arguments.report)
    _refuse_sources(arguments)
    plan = None if arguments.save_plan is None else Path(arguments.save_plan)
    if plan is not None:
        refuse_missing_folder(plan)
    say = teller(arguments, plan)
    settings = grids.settings_of(arguments)  # what is wrong with them shows before any work is done
    program = capture_model(arguments)
    if arguments.channels is not None:
        program = api.apply(program, arguments.channels, target=target, integers=True)
    images = None if arguments.data is None else Path(arguments.data)
    data = None if images is None else grids.batches(images, program)
    calibration = data if arguments.plan is None else None  # then the data is for the report
    quantized = api.quantize(program, calibration, plan=arguments.plan, **settings)
    artifact = api.lower(quantized.program, target)
    artifact.save(output)
    if plan is not None:
        quantized.plan.save(plan)
    found = grids.findings(program, quantized)
    if told is not None and images is not None:
        found |= grids.report(quantized, grids.batches(images, program), told, artifact)
    if arguments.json:
        asked = to_json(Quantization(**settings)) if arguments.plan is None else None
        print_json({**facts_of(artifact, output), "options": asked, **found})
        return 0
    say(artifact.report)
    say(grids.describe(found))
    say(f"\nsaved in {output}")
    return 0


def quantize_weights(arguments: argparse.Namespace) -> int:
    """Hold the weights of a model's linear layers in a few bits, and save the artifact."""
    from narrows import api
    from narrows.passes.instruments import compare

    output = Path(arguments.output)
    refuse_output(output)
    target = parse_target(arguments.target, arguments)
    asked = given(arguments, WeightOnly)
    options = WeightOnly(**asked)  # what is wrong with them shows before any work is done
    hint = "--data tokens.npy, or --method nearest --groups input"
    options.check_data(arguments.data, hint)
    program = capture_model(arguments)
    data = None if arguments.data is None else grids.batches(Path(arguments.data), program)
    smaller = api.quantize_weights(program, data, **asked)
    artifact = api.lower(smaller, target)
    artifact.save(output)
    error = compare(smaller, program)
    if arguments.json:
        facts = facts_of(artifact, output)
        print_json({**facts, "options": to_json(options), "error": error})
        return 0
    print(artifact.report)
    print(f"error against the float model on the example: {error:.2g}")
    print(f"\nsaved in {output}")
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
