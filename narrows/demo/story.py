"""The demo from the first image to the last measurement. Read `run` first."""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from narrows import api
from narrows.demo.candidates import (
    count_differing,
    lower,
    lower_to_c,
    measure_latency,
    quantize,
)
from narrows.demo.digits import SEED, DigitsNet, Split, load_splits, one_thread, train
from narrows.demo.report import describe
from narrows.errors import ArtifactError
from narrows.ir.compare import relative_error
from narrows.ir.meta import op_name
from narrows.ir.program import Program
from narrows.passes.instruments import Dumper
from narrows.passes.pipeline import format_table, macs
from narrows.passes.plans.plan import ChannelPlan

# What is done before more training: all but folding the norms, which train on.
TRAINABLE = "prune-channels, legalize-reads, align-channels, reorder-channels"


@dataclass(frozen=True)
class Settings:
    """How much work the demo does.

    Attributes:
        width: Channels of the network's first half; the second has twice as many.
        epochs: Epochs of training.
        more_epochs: Epochs of fine-tuning.
        ratios: The ratios to choose from, rising.
        allowed_fall: How much accuracy on the validation images the chosen ratio may cost, 0..1.
        rounds: How often each artifact is timed.
    """

    width: int
    epochs: int
    more_epochs: int
    ratios: tuple[float, ...]
    allowed_fall: float
    rounds: int


FULL = Settings(48, 20, 5, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6), 0.02, 40)
QUICK = Settings(16, 4, 1, (0.25,), 1.0, 3)


def run(folder: str | os.PathLike[str], *, quick: bool = False) -> dict[str, Any]:
    """Run the demo, write its artifacts and dump below ``folder``, and return what it measured.

    Args:
        folder: Gets ``unpruned``, ``pruned``, ``tuned``, ``quantized`` and ``c`` (artifacts),
            ``dump`` (from the trained network to the pruned one), ``dump-quantized`` (from the
            tuned one to integers), ``plan.json`` and ``quant.json``. Those of an earlier demo are
            replaced.
        quick: Train a little and measure roughly, to see that everything works.
    """
    with one_thread():
        return tell(make_folder(folder), QUICK if quick else FULL)


def tell(folder: Path, settings: Settings) -> dict[str, Any]:
    """Return what `run` does; the folder exists."""
    start = time.perf_counter()
    training, validation, test = load_splits()
    torch.manual_seed(SEED)
    model = DigitsNet(settings.width)
    seconds = train(model, training, settings.epochs, 6e-3, "training", model.sparse())
    accuracy = {"trained": test.accuracy(model)}

    program = api.capture(model, (training.images[:8],), name="digits")
    plan, ratio = choose_plan(program, validation, settings)
    plan.save(folder / "plan.json")
    masked = plan.masked(program)
    accuracy["masked"] = test.accuracy(masked)
    result = api.rewrite(
        program, plan, target="onnx", double=True, instruments=[Dumper(folder / "dump")]
    )
    error = relative_error(result.program(test.images), masked(test.images))

    trainable = api.apply(program, plan, target="onnx", pipeline=TRAINABLE).to_module()
    seconds_more = train(trainable, training, settings.more_epochs, 1e-3, "fine-tuning")
    again = api.capture(trainable, (training.images[:8],), name="digits-tuned")

    watches = [Dumper(folder / "dump-quantized")]
    tuned = api.apply(again, target="onnx", instruments=watches)
    quantized = quantize(tuned, training, watches)
    quantized.plan.save(folder / "quant.json")

    unpruned = api.apply(program, pipeline="fold-batch-norm, eliminate-dead")
    candidates = [
        lower("unpruned", unpruned, test, folder),
        lower("pruned", result.program, test, folder, plan),
        lower("tuned", tuned, test, folder),
        lower("quantized", quantized.program, test, folder),
    ]
    return {
        "images": {"train": 1197, "validation": 200, "test": 400},
        "ratio": ratio,
        "allowed_fall": settings.allowed_fall,
        "channels_removed": {"zeros": api.plan(program).removed, "plan": plan.removed},
        "accuracy": accuracy | {c.name: c.accuracy for c in candidates},
        "passes": [r.to_json() for r in (result.initial, *result.reports)],
        "table": result.table(),
        "error": error,
        "quantize_passes": [r.to_json() for r in quantized.passes],
        "quantize_table": format_table(quantized.passes),
        "floats": dict(quantized.plan.floats),
        "differing": count_differing(candidates[-1], test.images),
        "c": lower_to_c(candidates[-1], test.images, folder),
        "parameters": {c.name: c.program.parameter_count for c in candidates},
        "macs": {c.name: sum(macs(c.program).values()) for c in candidates},
        "bytes": {c.name: c.artifact.size for c in candidates},
        "copies": sum(op_name(n) == "index_select.default" for n in result.program.nodes),
        "convolutions": convolution_widths(result.program),
        "latency": {
            f"batch {n}": measure_latency(candidates, test.images[:n], settings.rounds)
            for n in (1, 64)
        },
        "seconds": {
            "training": seconds,
            "fine-tuning": seconds_more,
            "all": time.perf_counter() - start,
        },
    }


def make_folder(folder: str | os.PathLike[str]) -> Path:
    """Return the folder, made if need be; `ArtifactError` before any work if that is impossible."""
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise ArtifactError(f"cannot make {path}", why=str(cause.strerror)) from cause
    if not os.access(path, os.W_OK):
        raise ArtifactError(f"cannot write to {path}")
    return path


def choose_plan(
    program: Program, validation: Split, settings: Settings
) -> tuple[ChannelPlan, float]:
    """Return the plan of the largest ratio that costs no more than is allowed, and the ratio.

    Every consumer chooses its input channels for itself, by L1 norm; the zeros come on top.
    """
    full = validation.accuracy(program)
    best, chosen = api.plan(program, zeros=True), 0.0
    for ratio in settings.ratios:
        plan = api.plan(program, zeros=True, criterion="l1", ratio=ratio, constrained=False)
        if validation.accuracy(plan.masked(program)) < full - settings.allowed_fall:
            break
        best, chosen = plan, ratio
    return best, chosen


def convolution_widths(program: Program) -> list[tuple[int, int]]:
    """Return the input and output channels of every convolution."""
    found = [n for n in program.nodes if op_name(n) == "conv2d.default"]
    shapes = (program.tensor(n.all_input_nodes[1]).shape for n in found)
    return [(shape[1], shape[0]) for shape in shapes]


def main(arguments: argparse.Namespace) -> int:
    """Run the demo as the command line asks: ``output``, ``quick`` and ``json``."""
    report = run(arguments.output, quick=arguments.quick)
    folder = Path(arguments.output)
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if arguments.json:
        print(json.dumps(report, indent=1))
    else:
        print(describe(report))
        print(f"\nartifacts, plans, dumps and report.json: {folder}")
    return 0
