"""The artifacts that the demo compares: how each is made, checked and timed."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from narrows import api
from narrows.backends.artifact import Artifact, load
from narrows.backends.c.compiler import HINT, MISSING, find_compiler
from narrows.demo.digits import Split, progress
from narrows.ir.program import Program
from narrows.passes.pipeline import Instrument
from narrows.passes.plans.plan import ChannelPlan
from narrows.passes.quant.quantization import Quantized


@dataclass(frozen=True)
class Candidate:
    """One of the artifacts that the demo compares.

    Attributes:
        name: ``unpruned``, ``pruned``, ``tuned`` or ``quantized``.
        program: What was lowered.
        artifact: What came out.
        accuracy: The artifact's accuracy on the test images, run in ONNX Runtime, 0..1.
    """

    name: str
    program: Program
    artifact: Artifact
    accuracy: float


def lower(
    name: str, program: Program, test: Split, folder: Path, plan: ChannelPlan | None = None
) -> Candidate:
    """Return the program as an artifact saved in ``folder / name``, with its accuracy."""
    progress(f"lowering the {name} program")
    api.lower(program, "onnx", plan=plan).save(folder / name)
    progress("")
    artifact = load(folder / name)  # what is measured is what was written
    return Candidate(name, program, artifact, test.accuracy(artifact.run))


def quantize(program: Program, training: Split, watches: Sequence[Instrument]) -> Quantized:
    """Return the program in 8-bit integers and shifts, calibrated on the training images."""
    progress("calibrating")
    quantized = api.quantize(program, training.images.split(64), instruments=watches)
    progress("")
    return quantized


def count_differing(candidate: Candidate, images: Tensor) -> int:
    """Return how many outputs differ between an artifact and the program it was lowered from.

    Both compare with ``==``: the artifact runs with the runtime's optimizations, and without.
    """
    expected = candidate.program(images)
    runs = [candidate.artifact.run_flat([images], optimize=optimize) for optimize in (True, False)]
    return sum(int((torch.as_tensor(got) != expected).sum()) for (got,) in runs)


def lower_to_c(quantized: Candidate, images: Tensor, folder: Path) -> dict[str, Any]:
    """Return what the program takes in C, and how many outputs differ from the interpreter's.

    The C files are saved in ``folder / "c"``. Without a compiler they are only written; the result
    has the reason as ``skipped``.
    """
    progress("writing C")
    api.lower(quantized.program, "c", check=False).save(folder / "c")
    artifact = load(folder / "c")
    facts = {k: artifact.manifest["c"][k] for k in ("arena", "bound", "constants")}
    if not find_compiler():
        return facts | {"skipped": f"{MISSING}; {HINT}"}
    progress("compiling C")
    name = artifact.inputs[0].name
    session: Any = artifact.session
    results = session.run_many([{name: image[None].numpy()} for image in images])
    progress("")
    got = torch.cat([torch.from_numpy(result[0]) for result in results])
    return facts | {"differing": int((got != quantized.program(images)).sum())}


def measure_latency(
    candidates: Sequence[Candidate], images: Tensor, rounds: int
) -> dict[str, dict[str, float]]:
    """Return per candidate the median ``seconds`` of a run and the ``speedup`` over the first one.

    One thread. The candidates take turns, so that a machine that changes its speed does so for all
    of them; the speedup is the median of the ratios of neighbouring runs.
    """
    array = images.numpy()
    runs = {
        c.name: functools.partial(
            c.artifact.open(threads=1).run, {c.artifact.inputs[0].name: array}
        )
        for c in candidates
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 3):
        for name, run in runs.items():
            start = time.perf_counter()
            for _ in range(8):
                run()
            if turn >= 3:  # the first turns warm caches and clocks
                times[name].append((time.perf_counter() - start) / 8)
    base = times[candidates[0].name]
    return {
        name: {
            "seconds": statistics.median(own),
            "speedup": statistics.median(b / o for b, o in zip(base, own, strict=True)),
        }
        for name, own in times.items()
    }
