"""The cost table against the clock: predicted and measured latency of whole models.

    python -m benchmarks.cost_model [--models resnet18 ...] [--amounts 0.3] [--batch 1] [--json F]

Every model is lowered as it is, and pruned to whatever widths come out: by one mask
for all that must agree (``constrained``), and by random masks of each consumer (``input``), which
leave copies. Predicted is what the cost table of the target makes of the program's nodes; measured
is the CPU time of one thread in ONNX Runtime, of the moments in which the machine was quietest. The
last column is what a compiler decides by: predicted relative to the unpruned model, over measured
relative to the unpruned model.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import narrows
from benchmarks.machine import table, write
from narrows import api
from narrows.backends import lower, make_target
from narrows.backends.onnx.calibrate import cpu_time
from narrows.backends.onnx.session import MODEL
from narrows.backends.onnx.steady import Quiet
from narrows.errors import NarrowsError
from narrows.ir.costfiles import load_costs
from narrows.ir.program import Program
from tests.networks import random_masks
from tests.networks.zoo import MODELS

NAMES = (
    "resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0", "efficientnet_v2_s", "densenet121",
    "googlenet", "inception_v3", "shufflenet_v2_x1_0", "regnet_y_400mf", "mobilenet_v3_small",
    "convnext_tiny", "resnext50_32x4d", "vit_b_16",
)  # fmt: skip
SIZES = {"inception_v3": 299}
OPTIONS = {"vit_b_16": ()}  # the zoo's is made for small images
FORMS = ("constrained", "input")
PASSES = "prune-channels, fold-batch-norm, eliminate-dead"  # no rounding, no reordering
ROUNDS = 10


@dataclass
class Result:
    """One form of one model, in milliseconds.

    Attributes:
        relative: Predicted over measured, both relative to the unpruned model.
        failure: The first line of an error, if there was one.
    """

    model: str
    form: str
    batch: int
    predicted: float = math.nan
    measured: float = math.nan
    relative: float = math.nan
    failure: str = ""

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted / self.measured


def programs(name: str, options: argparse.Namespace) -> Iterator[tuple[str, Program, Any]]:
    """Yield the forms of a model: their name, program and plan."""
    model = dataclasses.replace(
        MODELS[name],
        size=SIZES.get(name, 224),
        options=OPTIONS.get(name, MODELS[name].options),
    )
    program = narrows.capture(
        model.build(torch.float32, seed=options.seed), model.inputs(2, dtype=torch.float32)
    )
    yield "unpruned", program, None
    for amount in options.amounts:
        for form in options.forms:
            if form == "constrained":
                plan = narrows.plan(program, ratio=amount, zeros=False)
            else:
                keep, _ = random_masks(program, amount, "input", options.seed)
                plan = narrows.plan(program, keep_inputs=keep, zeros=False)
            yield f"{form} {amount}", program, plan


def run(options: argparse.Namespace) -> Iterator[Result]:
    """Yield a result per model and form."""
    costs = load_costs(options.table) if options.table else make_target("onnx").costs()
    assert costs is not None
    quiet = Quiet()
    for name in options.models:
        base: Result | None = None
        for form, program, plan in programs(name, options):
            result = Result(name, form, options.batch)
            try:
                passes = PASSES if plan is not None else "fold-batch-norm, eliminate-dead"
                done = api.rewrite(program, plan, pipeline=passes).program
                artifact = lower(done, "onnx", check=False)
            except NarrowsError as error:
                result.failure = error.what
                yield result
                continue
            result.predicted = 1e3 * sum(s for _, s in costs.predict(done, options.batch))
            file = Path(artifact.folder) / MODEL
            seconds = cpu_time(file, rounds=options.rounds, batch=options.batch, quiet=quiet)
            result.measured = 1e3 * seconds
            base = base or result
            result.relative = result.ratio / base.ratio
            text = f"{result.predicted:.2f} ms predicted, {result.measured:.2f} measured"
            print(f"{name} {form}: {text}", file=sys.stderr)
            yield result


def report(results: list[Result]) -> str:
    """Return the markdown table and a line that sums it up."""
    rows = [
        [
            r.model,
            r.form,
            r.failure or f"{r.predicted:.2f}",
            f"{r.measured:.2f}",
            f"{r.ratio:.2f}",
            f"{r.relative:.2f}",
        ]
        for r in results
    ]
    header = ["model", "form", "predicted ms", "measured ms", "ratio", "ratio of the change"]
    good = [r for r in results if not r.failure]
    whole = [abs(math.log(r.ratio)) for r in good if r.form == "unpruned"]
    change = [abs(math.log(r.relative)) for r in good if r.form != "unpruned"]
    lines = [table(header, rows), ""]
    for what, values in (("unpruned", whole), ("change", change)):
        if values:
            mean, worst = math.expm1(sum(values) / len(values)), math.expm1(max(values))
            lines.append(f"{what}: off by {mean:.1%} in the mean, {worst:.1%} at most")
    return "\n".join(lines)


def main() -> int:
    """Run the benchmark; the exit code is 1 when a model fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=NAMES, default=NAMES, metavar="MODEL")
    parser.add_argument("--amounts", nargs="+", type=float, default=[0.3])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", metavar="FILE", help="a cost table; the target's by default")
    parser.add_argument("--json", help="also write the results here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: list[Result] = []
    try:
        for result in run(options):
            results.append(result)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    print(report(results))
    write(options.json, [{**asdict(r), "ratio": r.ratio} for r in results])
    return int(any(r.failure for r in results))


if __name__ == "__main__":
    sys.exit(main())
