"""``narrows quantize``: a model and calibration data become an integer artifact."""

from __future__ import annotations

import argparse
from pathlib import Path

from narrows.cli.commands import parse_target, print_json, refuse_output
from narrows.cli.grids import batches, describe, findings, settings_of
from narrows.cli.model import capture_model
from narrows.errors import UsageError


def quantize(arguments: argparse.Namespace) -> int:
    """Quantize a model and save the artifact."""
    from narrows import api

    output = Path(arguments.output)
    refuse_output(output)
    target, options = parse_target(arguments.target)
    if (arguments.data is None) == (arguments.plan is None):
        raise UsageError(
            "quantize takes either data or a plan",
            why="grids are measured on data, or read from a plan",
            hint="--data images.npy, or --plan quant.json",
        )
    settings = settings_of(arguments)  # what is wrong with them shows before any work is done
    program = capture_model(arguments)
    if arguments.channels is not None:
        program = api.apply(program, arguments.channels)
    data = None if arguments.data is None else batches(Path(arguments.data), program)
    quantized = api.quantize(program, data, plan=arguments.plan, **settings)
    artifact = api.lower(quantized.program, target, **options)
    artifact.save(output)
    if arguments.save_plan is not None:
        quantized.plan.save(arguments.save_plan)
    found = findings(program, quantized)
    if arguments.json:
        told = {"artifact": str(output), "bytes": artifact.size, "fidelity": artifact.fidelity}
        print_json({**told, **found})
        return 0
    print(artifact.report)
    print(describe(found))
    print(f"\nsaved in {output}")
    return 0
