"""Exactness on real models: random unconstrained masks, and the error against the masked model.

    python -m benchmarks.exactness [--quick] [--models resnet18 swin_t] [--json results.json]

Every torchvision model of the list, random weights and BatchNorm statistics, masks at three
amounts on the input side, the output side and both, in float64. Prints a markdown table; its last
columns say which channels stay although they are masked, because exactness needs them. Ctrl-C
prints what is there so far.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import torch

import narrows
from benchmarks.machine import table, write
from narrows.errors import NarrowsError
from narrows.ir.compare import relative_error
from narrows.ir.program import Program
from narrows.ir.verify import verify
from narrows.passes.base import TOLERANCE, Fidelity
from tests.networks import Masks, contractions, random_masks
from tests.networks.zoo import MODELS, Model

EXACT = TOLERANCE[Fidelity.EXACT][torch.float64]
QUICK = ("resnet18", "mobilenet_v3_small", "shufflenet_v2_x1_0", "densenet121", "swin_t")


@dataclass
class Result:
    """One model under one set of masks; channels count both sides of every contracted weight.

    Attributes:
        error: The largest relative error over two batch sizes.
        channels: How many channels the model has.
        masked: How many the masks take away.
        removed: How many are gone from the result; it can exceed ``masked``.
        kept: How many masked channels stay, by the notes' reasons.
        parameters: The share of parameters that is left.
        seconds: Plan and rewrite, without the capture.
        failure: The first line of an error, if there was one.
    """

    model: str
    side: str
    amount: float
    error: float = float("nan")
    channels: int = 0
    masked: int = 0
    removed: int = 0
    kept: dict[str, int] = field(default_factory=dict)
    parameters: float = float("nan")
    seconds: float = float("nan")
    failure: str = ""


def measure(model: Model, program: Program, side: str, amount: float, seed: int) -> Result:
    """Return the result for one set of random masks."""
    result = Result(model.name, side, amount)
    inputs, outputs = random_masks(program, amount, side, seed)
    result.channels, result.masked = counted(program, inputs, outputs)
    try:
        start = time.perf_counter()
        plan = narrows.plan(program, keep_inputs=inputs, keep_outputs=outputs, zeros=False)
        pruned = narrows.apply(program, plan, check=False)
        result.seconds = time.perf_counter() - start
        verify(pruned)
    except NarrowsError as error:
        result.failure = error.what
        return result
    except Exception as error:
        result.failure = (
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        )
        return result
    masked = plan.masked(program)
    result.error = max(
        relative_error(pruned(*x), masked(*x))
        for x in (model.inputs(2, seed + 1), model.inputs(3, seed + 2))
    )
    result.removed = result.channels - counted(pruned, {}, {})[0]
    reasons: Counter[str] = Counter()
    for note in pruned.notes:
        reasons[note.reason] += note.channels
    result.kept = {reason: count for reason, count in sorted(reasons.items()) if count}
    result.parameters = pruned.parameter_count / program.parameter_count
    return result


def counted(program: Program, inputs: Masks, outputs: Masks) -> tuple[int, int]:
    """Return how many channels the contracted weights have, and how many the masks leave out."""
    total = masked = 0
    for entry in contractions(program):
        total += entry.inputs + entry.outputs
        masked += entry.inputs - len(inputs.get(entry.weight, range(entry.inputs)))
        masked += entry.outputs - len(outputs.get(entry.weight, range(entry.outputs)))
    return total, masked


def run(options: argparse.Namespace) -> Iterator[Result]:
    """Yield a result per model, side and amount."""
    for name in options.models:
        model = MODELS[name]
        start = time.perf_counter()
        try:
            program = narrows.capture(model.build(seed=options.seed), model.inputs())
        except NarrowsError as error:
            yield Result(name, "-", 0.0, failure=f"capture: {error.what}")
            continue
        print(f"{name}: captured in {time.perf_counter() - start:.1f} s", file=sys.stderr)
        for side in options.sides:
            for amount in options.amounts:
                result = measure(model, program, side, amount, options.seed)
                verdict = result.failure or f"{result.error:.1e} in {result.seconds:.2f} s"
                print(f"  {side} {amount}: {verdict}", file=sys.stderr)
                yield result


def report(results: list[Result]) -> str:
    """Return the markdown table and a line that sums it up."""
    rows = []
    for r in results:
        share = max(r.channels, 1)
        rows.append(
            [
                r.model,
                r.side,
                f"{r.amount:.1f}",
                r.failure or f"{r.error:.1e}",
                f"{100 * r.masked / share:.1f}",
                f"{100 * r.removed / share:.1f}",
                f"{100 * r.parameters:.1f}",
                ", ".join(f"{k} {100 * c / share:.2f}" for k, c in r.kept.items()) or "-",
                f"{r.seconds:.2f}",
            ]
        )
    header = [
        "model", "side", "amount", "relative error", "masked %", "removed %", "parameters left %",
        "kept % of channels, by reason", "s",
    ]  # fmt: skip
    good = sum(not r.failure and r.error <= EXACT for r in results)
    worst = max((r.error for r in results if not r.failure), default=float("nan"))
    summary = f"{good} of {len(results)} within {EXACT:.0e}; largest error {worst:.1e}"
    return f"{table(header, rows)}\n\n{summary}"


def main() -> int:
    """Run the benchmark; the exit code is 1 when a model fails or is not exact."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), metavar="MODEL")
    parser.add_argument("--amounts", nargs="+", type=float, default=[0.3, 0.5, 0.9])
    parser.add_argument("--sides", nargs="+", default=["input", "output", "both"])
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="also write the results here")
    options = parser.parse_args()
    options.models = options.models or list(QUICK if options.quick else MODELS)
    torch.set_num_threads(1)
    results: list[Result] = []
    try:
        for result in run(options):
            results.append(result)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    print(report(results))
    write(options.json, [asdict(r) for r in results])
    return int(any(r.failure or not r.error <= EXACT for r in results))


if __name__ == "__main__":
    sys.exit(main())
