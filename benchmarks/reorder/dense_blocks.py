"""Compile time over the depth of a dense block, narrows beside apple-upscale and Torch-Pruning.

Every layer reads all layers before it, so a block of n layers has about n * n / 2 reads: an
exponent of 2 in the layers is linear in the size of the graph. The peers' time grows about as the
cube of the layers; they get a limit of seconds and no larger block once they have exceeded it.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.machine import table
from benchmarks.reorder.apart import apart
from benchmarks.reorder.case import drawn, maskable

SIZES = (16, 32, 64, 128, 256)
GROWTH, IMAGE, AMOUNT = 16, 8, 0.3
ROUNDS = 3  # after one to warm up


class DenseBlock(nn.Module):
    """Layers of BatchNorm, ReLU and convolution, each on the concatenation of all before it."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, GROWTH, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(GROWTH * i), nn.ReLU(), nn.Conv2d(GROWTH * i, GROWTH, 3, padding=1)
            )
            for i in range(1, depth + 1)
        )
        self.head = nn.Conv2d(GROWTH * (depth + 1), 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return ten maps."""
        made = [self.stem(x)]
        for layer in self.layers:
            made.append(layer(torch.cat(made, 1)))
        return self.head(torch.cat(made, 1))


def build(depth: int) -> tuple[DenseBlock, Any, Any]:
    """Return a block in eval mode, an input and random masks."""
    torch.manual_seed(0)
    block = DenseBlock(depth).eval()
    inputs = (torch.randn(2, 3, IMAGE, IMAGE),)
    return block, inputs, drawn(maskable(block, inputs), AMOUNT)


def time_narrows(depth: int) -> dict[str, float]:
    """Return the CPU seconds of plan and rewrite, with every pass of the usual pipeline."""
    import narrows

    block, inputs, keep = build(depth)
    program = narrows.capture(block, inputs)
    seconds = []
    for _ in range(ROUNDS + 1):
        fresh = program.copy()
        start = time.thread_time()
        narrows.apply(fresh, narrows.plan(fresh, keep_inputs=keep, zeros=False), check=False)
        seconds.append(time.thread_time() - start)
    return {"seconds": statistics.median(seconds[1:])}


def time_upscale(depth: int) -> dict[str, float]:
    """Return the CPU seconds of ``compute()`` and ``prune()``."""
    from benchmarks.reorder.peers import upscale

    block, inputs, keep = build(depth)
    return upscale(block, inputs, keep)


def time_torch_pruning(depth: int) -> dict[str, float]:
    """Return the CPU seconds of building the pruner, its trace included, and of ``step()``."""
    from benchmarks.reorder.peers import torch_pruning

    block, inputs, _ = build(depth)
    start = time.thread_time()
    torch_pruning(block, inputs, AMOUNT, None)
    return {"seconds": time.thread_time() - start}


TOOLS: dict[str, Callable[[int], dict[str, float]]] = {
    "narrows": time_narrows,
    "apple-upscale": time_upscale,
    "torch-pruning": time_torch_pruning,
}


def dense_blocks(sizes: Sequence[int], limit: float) -> tuple[str, list[dict[str, Any]]]:
    """Return a table of CPU seconds per depth with the exponent of their growth, and the data."""
    results: list[dict[str, Any]] = []
    given_up: dict[str, dict[str, Any]] = {}
    for depth in sorted(sizes):
        result: dict[str, Any] = {"depth": depth}
        for name, tool in TOOLS.items():
            found = given_up.get(name) or apart(tool, depth, limit=limit)
            if "failure" in found:
                given_up[name] = found
            result[name] = found
        results.append(result)
    lines = []
    for i, result in enumerate(results):
        before = results[i - 1] if i else {}
        cells = [f(before, result, name) for name in TOOLS for f in (_seconds, _exponent)]
        depth = result["depth"]
        lines.append([str(depth), str((depth + 1) * (depth + 2) // 2), *cells])
    header = ["layers", "reads", *(h for name in TOOLS for h in (f"{name} s", "exponent"))]
    return table(header, lines), results


def _seconds(_: dict[str, Any], result: dict[str, Any], name: str) -> str:
    found = result[name]
    return f"{found['seconds']:.3f}" if "seconds" in found else found["failure"][:40]


def _exponent(before: dict[str, Any], result: dict[str, Any], name: str) -> str:
    """Return p where time grew as depth to the p since the depth before."""
    old, new = before.get(name, {}), result[name]
    if "seconds" not in old or "seconds" not in new:
        return "-"
    grown = math.log(new["seconds"] / old["seconds"])
    return f"{grown / math.log(result['depth'] / before['depth']):.1f}"
