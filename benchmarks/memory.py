"""Peak memory of `narrows.compile`, in times of the model's weights, beyond torch's own.

    python -m benchmarks.memory [--models resnet50 vit_b_16] [--work compile ...] [--plan JSON]

What is counted is the largest resident set (``VmHWM``) of a process that builds the model and does
one thing with it, example inputs of a batch of 2 included:

* export: ``torch.export.export``, which is torch's own part of a compile;
* onnx: ``torch.onnx.export`` and writing its file, for comparison;
* compile: ``narrows.compile`` to ONNX with all that is on by default: every pass checked, the file
  compared in ONNX Runtime;
* unchecked: the same without the checks, of passes and of the file.

Each process is forked from one that has done all of it with a network of two layers, so that what
the libraries themselves take counts for none of them; freed memory that the C library has not given
back counts. The last columns are (peak - export's peak) / bytes of the weights. Linux only. One
thread.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import narrows
from benchmarks.machine import table, write
from narrows.backends import make_target
from tests.networks.zoo import MODELS, Model

MIB = 2**20
BATCH = 2


def build(model: Model) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """Return a model in float32, and its inputs."""
    return model.build(torch.float32), model.inputs(BATCH, dtype=torch.float32)


def tiny(*_: Any) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """Return the network that the libraries are warmed up with."""
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)
    return nn.Sequential(*layers).eval(), (torch.randn(BATCH, 3, 8, 8),)


def export(module: nn.Module, inputs: Any, plan: Any) -> Any:
    """Export with torch alone."""
    with torch.no_grad():
        return torch.export.export(module, inputs)


def onnx(module: nn.Module, inputs: Any, plan: Any) -> Any:
    """Export with torch to an ONNX file."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        made = torch.onnx.export(module, inputs, dynamo=True, verbose=False)
        assert made is not None
        made.save(Path(folder) / "model.onnx")
        return made


def compiled(module: nn.Module, inputs: Any, plan: Any) -> Any:
    """Compile with all checks."""
    return narrows.compile(module, inputs, plan)


def unchecked(module: nn.Module, inputs: Any, plan: Any) -> Any:
    """Compile without checks."""
    target = make_target("onnx", check=False)
    return narrows.compile(module, inputs, plan, target, check=False)


WORK: dict[str, Callable[[nn.Module, Any, Any], Any]] = {
    "export": export, "onnx": onnx, "compile": compiled, "unchecked": unchecked,
}  # fmt: skip


def peak_of(work: Callable[[], Any]) -> int:
    """Return the largest resident set, in bytes, of a forked process that does ``work``."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
            held = work()
            os.write(theirs, str(_resident("VmHWM")).encode())
            code = 0 if held is not None else 1
        finally:
            os._exit(code)
    os.close(theirs)
    with os.fdopen(ours) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    if not text:
        raise SystemExit("the forked process failed")
    return int(text)


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def measure(model: Model, options: argparse.Namespace) -> dict[str, int]:
    """Return the peaks of a model, and the bytes of its weights."""
    module, _ = build(model)
    weights = sum(t.numel() * t.element_size() for t in module.state_dict().values())
    del module
    works = {"export": WORK["export"], **{name: WORK[name] for name in options.work}}
    peaks = {name: peak_of(lambda w=w: w(*build(model), options.plan)) for name, w in works.items()}
    return {"weights": weights, **peaks}


def report(results: dict[str, dict[str, int]]) -> str:
    """Return the peaks in MiB, and those beyond torch's in times of the weights."""
    kinds = [kind for kind in WORK if all(kind in found for found in results.values())]
    rows = []
    for name, found in results.items():
        sizes = [f"{found[k] / MIB:.0f}" for k in ("weights", *kinds)]
        beyond = [(found[k] - found["export"]) / found["weights"] for k in kinds[1:]]
        rows.append([name, *sizes, *(f"{b:.2f}" for b in beyond)])
    sizes, times = (f"{k} MiB" for k in ("weights", *kinds)), (f"{k} x" for k in kinds[1:])
    return table(["model", *sizes, *times], rows)


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), metavar="MODEL",
                        default=["resnet50", "vit_b_16"])  # fmt: skip
    parser.add_argument("--plan", type=json.loads, help="options of narrows.plan, as JSON")
    parser.add_argument("--work", nargs="+", choices=list(WORK), default=list(WORK)[1:])
    parser.add_argument("--json", help="also write the results here")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    for work in WORK.values():
        work(*tiny(), None)
    results = {}
    for name in options.models:
        results[name] = measure(MODELS[name], options)
        print(report({name: results[name]}), file=sys.stderr)
    print(report(results))
    write(options.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
