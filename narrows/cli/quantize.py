"""``narrows quantize``: a model and calibration data become an integer artifact."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from narrows.cli.commands import parse_target, print_json, refuse_output
from narrows.cli.model import capture_model
from narrows.errors import UsageError

if TYPE_CHECKING:
    from narrows.ir.program import Program
    from narrows.passes.quantization import Quantized

BATCH = 32  # samples of a data file that run at once


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
    if arguments.json:
        found = {"artifact": str(output), "bytes": artifact.size, "fidelity": artifact.fidelity}
        floats = dict(quantized.plan.floats)
        print_json({**found, "floats": floats, "error": _error(program, quantized)})
        return 0
    print(artifact.report)
    for name, reason in quantized.plan.floats.items():
        print(f"float: {name}: {reason}")
    print(f"\nerror against the float model on the example: {_error(program, quantized):.2g}")
    print(f"saved in {output}")
    return 0


def _error(program: Program, quantized: Quantized) -> float:
    from narrows.passes.instruments import compare

    return compare(quantized.program, program)


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `narrows.quantize` that the command line gives."""
    from narrows.passes.calibrate import Settings

    given = {
        "weights": parse_bits(arguments.weight_bits, "--weight-bits"),
        "activations": parse_bits(arguments.activation_bits, "--activation-bits"),
        "method": arguments.method,
        "rounding": arguments.rounding,
        "skip": tuple(arguments.skip or ()),
        "strict": arguments.strict or None,
    }
    settings = {name: value for name, value in given.items() if value is not None}
    Settings(**settings)
    return settings


def parse_bits(texts: list[str] | None, option: str) -> int | dict[str, int] | None:
    """Return bits for all, or per glob; those without a glob are for the rest."""
    if not texts:
        return None
    bits: dict[str, int] = {}
    for text in texts:
        glob, equals, number = text.rpartition("=")
        if not number.isdigit():
            raise UsageError(f"{option} {text}: {number!r} is no number", hint=f"{option} 8")
        bits[glob if equals else "*"] = int(number)
    if list(bits) == ["*"]:
        return bits["*"]
    return {**bits, "*": bits.pop("*", 8)}  # the first glob that matches counts


def batches(path: Path, program: Program) -> Iterator[tuple[Any, ...]]:
    """Return the inputs in a data file, ``BATCH`` samples at a time.

    Args:
        path: A ``.npy`` file for the one input, or a ``.npz`` file with an array per input, by the
            input's name or in order. Axis 0 counts the samples.
        program: What they are for.
    """
    import numpy as np
    import torch

    try:
        loaded = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read the data {path}", why=str(error)) from error
    arrays = [loaded] if isinstance(loaded, np.ndarray) else _named(dict(loaded), program)
    holders = program.placeholders
    if len(arrays) != len(holders):
        raise UsageError(
            f"{path} holds {len(arrays)} arrays, the model takes {len(holders)} inputs"
        )
    counts = {len(a) for a in arrays}
    if len(counts) != 1:
        raise UsageError(f"the arrays of {path} have different numbers of samples")
    fixed = program.examples[0].shape[0] if not program.dynamic_batch else None
    step, (count,) = fixed or BATCH, counts

    def chunks() -> Iterator[tuple[Any, ...]]:
        for start in range(0, count - (fixed or 1) + 1, step):
            parts = (a[start : start + step] for a in arrays)
            yield tuple(
                torch.from_numpy(np.ascontiguousarray(p)).to(e.dtype)
                for p, e in zip(parts, program.examples, strict=True)
            )

    return chunks()


def _named(arrays: dict[str, Any], program: Program) -> list[Any]:
    names = [n.name for n in program.placeholders]
    return [arrays[n] for n in names] if set(names) == set(arrays) else list(arrays.values())
