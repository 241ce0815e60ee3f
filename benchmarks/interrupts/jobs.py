"""The commands that are cut off, and what each leaves."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import narrows
from narrows.backends.onnx.staircase import StairTable
from narrows.cli.dumps import open_dump
from narrows.passes.plans.plan import ChannelPlan
from narrows.passes.quant.plan import QuantPlan

NETS = """
import torch
from torch import nn


def net():
    torch.manual_seed(0)
    widths = [3, 16, 32, 32]
    layers = []
    for i, o in zip(widths, widths[1:]):
        layers += [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 64, 10))
"""
MODEL = ("net.py:net", "-i", "f32[2,3,8,8]")
X = np.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8).astype(np.float32)


# ------------------------------------------------------------------ what is run


@dataclass(frozen=True)
class Job:
    """A command, and what it leaves.

    Attributes:
        name: What it is called.
        words: The two command lines that replace what the other one wrote.
        state: Returns what there is now, read as its readers read it; raises if that is not whole.
        output: The names of what it writes.
    """

    name: str
    words: tuple[tuple[str, ...], tuple[str, ...]]
    state: Callable[[], Any]
    output: tuple[str, ...]


def artifact(name: str = "out", *, dump: bool = False, trust: bool = False) -> Any:
    """Return the identity of an artifact that runs."""
    found = narrows.load(name, trust=trust)
    found.run(X[:1] if trust else X, threads=1)
    if dump:
        made, _held = open_dump(name)
        made.snapshot()
    return found.identity


def quantized() -> Any:
    """Return what ``quantize`` left: an artifact, and the plan, which is written after it."""
    plan = Path("q.json")
    return artifact(), QuantPlan.load(plan).to_json() if plan.exists() else None


def reported() -> Any:
    """Return what ``quantize --report`` left: the artifact, the plan, and the files of the report,
    each of which names the artifact that it is about, and is whole to its last line."""
    folder = Path("out.report")
    found = {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*"))}
    if set(found) != {"report.txt", "report.json", "report.html"}:
        raise ValueError(f"the report holds {', '.join(found) or 'nothing'}")
    about = json.loads(found["report.json"])["artifact"]
    if not found["report.html"].rstrip().endswith("</html>"):
        raise ValueError("the page of the report ends early")
    return (*quantized(), about, *(found[name] for name in sorted(found)))


def calibrated() -> Any:
    """Return what ``bench --calibrate`` left, but for the times, which no two runs have in common:
    what was measured, and at which sizes."""
    table = StairTable.load("table.json")
    grids = {str(key): grid.axes for key, grid in table.grids.items()}
    return table.runtime, table.cpu, table.threads, grids, sorted(map(str, table.works))


def jobs() -> list[Job]:
    """Return the commands; the current folder holds the model and its data."""
    quantize = ("quantize", *MODEL, "--data", "x.npy", "-o", "out", "--save-plan", "q.json")
    learn = ("quantize", *MODEL, "--data", "x.npy", "-o", "out", "--method", "rapq")
    pruned = ("compile", *MODEL, "-o", "out")
    plan = ("plan", *MODEL, "-o", "plan.json")
    return [
        Job("plan", ((*plan, "--ratio", "0.3"), (*plan, "--ratio", "0.6")),
            lambda: ChannelPlan.load("plan.json").to_json(), ("plan.json",)),
        Job("compile", ((*pruned, "--ratio", "0.3"), (*pruned, "--ratio", "0.6")),
            artifact, ("out",)),
        Job("compile --dump", ((*pruned, "--ratio", "0.3", "--dump"),
                               (*pruned, "--ratio", "0.6", "--dump")),
            lambda: artifact(dump=True), ("out", "out.dump")),
        Job("compile -t c", tuple((*pruned, "-t", "c", "--quantize", "x.npy", "--ratio", r)
                                  for r in ("0.3", "0.6")),  # type: ignore[arg-type]
            lambda: artifact(trust=True), ("out",)),
        Job("quantize", (quantize, (*quantize, "--weight-bits", "6")),
            quantized, ("out", "q.json")),
        Job("quantize --report", ((*quantize, "--report"),
                                  (*quantize, "--weight-bits", "6", "--report")),
            reported, ("out", "out.report", "q.json")),
        Job("rapq", ((*learn, "--budget", "60"), (*learn, "--budget", "60", "--weight-bits", "5")),
            artifact, ("out",)),
        Job("calibrate", (("bench", "--calibrate", "--quick", "-o", "table.json"),) * 2,
            calibrated, ("table.json",)),
    ]  # fmt: skip
