"""A zoo of models without a plan and with random masks: does any pass stumble, is any number wrong?

    python -m benchmarks.zoo [--models 'test_*' resnet18] [--most 30] [--size 96] [--json zoo.json]

Every model of timm whose name fits, without trained weights, in float64: captured, rewritten
without a plan and compared with the model, sorted into couplings, and pruned by random masks on
both sides and compared with the masked model. A line a model, as soon as it is done; ``exact``,
``refused`` with the reason, ``wrong`` or ``crash``. Ctrl-C sums up what is there so far.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections import Counter
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase

import torch

import narrows
from benchmarks.fuzz.judge import found_by_itself
from benchmarks.machine import write
from narrows.errors import NarrowsError
from narrows.ir.compare import relative_error
from narrows.passes.base import TOLERANCE, Fidelity
from tests.networks import random_masks
from tests.networks.zoo import import_timm, timm_model

EXACT = TOLERANCE[Fidelity.EXACT][torch.float64]


@dataclass
class Result:
    """What came of one model.

    Attributes:
        model: Its name.
        verdict: ``exact``, ``refused``, ``wrong`` or ``crash``.
        step: The last step that was begun.
        error: The largest relative error.
        left: The share of parameters that the masks leave.
        seconds: What it took.
        why: What was said, and where.
    """

    model: str
    verdict: str = "exact"
    step: str = ""
    error: float = 0.0
    left: float = 1.0
    seconds: float = 0.0
    why: str = ""


def measure(name: str, options: argparse.Namespace) -> Result:
    """Return what comes of a model."""
    result = Result(name)
    start = time.perf_counter()
    try:
        _steps(result, options)
    except NarrowsError as error:
        caught = found_by_itself(error)
        result.verdict = "wrong" if caught else "refused"
        result.why = str(error).replace("\n", " | ")
    except Exception as error:
        result.verdict, result.why = "crash", f"{type(error).__name__}: {error}{_where(error)}"
    result.seconds = time.perf_counter() - start
    if result.verdict == "exact" and not result.error <= EXACT:
        result.verdict = "wrong"
    return result


def _steps(result: Result, options: argparse.Namespace) -> None:
    result.step = "build"
    model, inputs = timm_model(result.model, options.size, options.seed)
    generator = torch.Generator().manual_seed(options.seed + 1)
    fresh = tuple(torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in inputs)
    result.step = "capture"
    program = narrows.capture(model, inputs)
    result.step = "apply(None)"
    made = narrows.apply(program)
    with torch.no_grad():
        result.error = relative_error(made(*fresh), model(*fresh))
    result.step = "couplings"
    program.couplings()
    result.step = "masks"
    masks = random_masks(program, options.amount, "both", options.seed)
    plan = narrows.plan(program, *masks, zeros=False)
    small = narrows.apply(program, plan)
    result.error = max(result.error, relative_error(small(*fresh), plan.masked(program)(*fresh)))
    result.left = small.parameter_count / program.parameter_count
    result.step = ""


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if f"{os.sep}narrows{os.sep}" in f.filename]
    return f" at {os.path.basename(ours[-1].filename)}:{ours[-1].lineno}" if ours else ""


def chosen(options: argparse.Namespace) -> list[str]:
    """Return the models whose names fit and that have no more than so many parameters."""
    timm = import_timm()
    names = [n for n in timm.list_models() if any(fnmatchcase(n, g) for g in options.models)]
    return [n for n in names if _millions(timm, n) <= options.most]


def _millions(timm: object, name: str) -> float:
    with torch.device("meta"):
        try:
            model = timm.create_model(name, pretrained=False)  # type: ignore[attr-defined]
        except Exception:  # it cannot be built without data, so it is tried
            return 0.0
    return sum(p.numel() for p in model.parameters()) / 1e6


def main() -> int:
    """Run the sweep; the exit code is 1 when a model crashes or is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["test_*"], metavar="GLOB")
    parser.add_argument("--most", type=float, default=30.0, help="millions of parameters")
    parser.add_argument("--size", type=int, default=96, help="the largest image")
    parser.add_argument("--amount", type=float, default=0.3, help="the share that is masked")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="also write the results here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: list[Result] = []
    try:
        for name in chosen(options):
            r = measure(name, options)
            results.append(r)
            said = f"  {r.step}: {r.why}" if r.why else f"  {100 * r.left:.0f} % left"
            print(f"{name:40} {r.verdict:8} {r.error:.1e} {r.seconds:6.1f} s{said}", flush=True)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    counts = Counter(r.verdict for r in results)
    print(f"{len(results)} models: {', '.join(f'{k} {n}' for k, n in sorted(counts.items()))}")
    write(options.json, [asdict(r) for r in results])
    return int(any(r.verdict in ("wrong", "crash") for r in results))


if __name__ == "__main__":
    sys.exit(main())
