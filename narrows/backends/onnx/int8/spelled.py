"""Operators as integer programs spell them: what became of each node of a network in its file.

A network is quantized and lowered like any other. In the runtime's own account every node of the
file is called by the program's node that it belongs to, so their times add up to the operator's.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from narrows.backends.measured.sizes import sizes_of
from narrows.backends.measured.sizes import window as window_of
from narrows.backends.onnx.calibrate import LEAST, profile, single_thread
from narrows.backends.onnx.session import MODEL
from narrows.backends.onnx.steady import Quiet
from narrows.files.folders import temporary
from narrows.ir.program import Program
from narrows.ir.work import SUMMING, Work
from narrows.ir.workload import works_of

CHANNELS = 64
PART = re.compile(r"(_token_\d+)?([./].*)?$")  # of a name, what the file and the runtime add


class Lowered(Protocol):
    """An artifact, as far as it is asked for."""

    @property
    def folder(self) -> Path:
        """Where its files lie."""
        ...


# Captures a module on inputs; makes the artifact of a program in integers.
Capture = Callable[[Any, Any], Program]
Lower = Callable[[Program], Lowered]


def observed(
    program: Program, artifact: Lowered, *, rounds: int, bias: float, quiet: Quiet
) -> dict[Work, float]:
    """Return what the works of a program take in its integers' file, in microseconds.

    An operator pays for the transpositions around it: the file's convolutions have the channels
    last, and not every other operator can.

    Args:
        program: The program in floats.
        artifact: What became of it.
        rounds: How many runs count.
        bias: The microseconds that profiling adds to a node.
        quiet: Tells which runs were disturbed.
    """
    works = works_of(program)
    named = {n.name: w for n in program.nodes if (w := works[n]) is not None and w.kind != "view"}
    path = artifact.folder / MODEL
    beside = _beside_transposes(path, named)
    spent: dict[str, float] = defaultdict(float)
    for node in profile(path, rounds=rounds, batch=_batch(program), quiet=quiet):
        us = max(LEAST, node.typical - bias)
        for owner in beside.get(node.name, (PART.sub("", node.name),)):
            spent[owner] += us
    # What is in no node of the file was made one with another operator.
    return {work: spent.get(name, LEAST) for name, work in named.items()}


def _batch(program: Program) -> int:
    shapes: list[Any] = [getattr(example, "shape", ()) for example in program.examples]
    return next((shape[0] for shape in shapes if len(shape)), 1)


def _beside_transposes(path: Path, named: dict[str, Work]) -> dict[str, tuple[str, ...]]:
    """Return, per transposition that the runtime adds, the operators that it is for."""
    import onnx
    import onnxruntime

    with temporary() as folder:
        options = single_thread()
        options.optimized_model_filepath = str(folder / "optimized.onnx")
        options.log_severity_level = 4
        onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
        nodes = list(onnx.load(options.optimized_model_filepath).graph.node)
    maker = {name: node for node in nodes for name in node.output}
    readers: dict[str, list[Any]] = defaultdict(list)
    for node in nodes:
        for name in node.input:
            readers[name].append(node)
    found = {}
    for node in nodes:
        if node.op_type == "Transpose" and PART.sub("", node.name) not in named:
            around = [*readers[node.output[0]], maker.get(node.input[0])]
            owners = {PART.sub("", n.name) for n in around if n is not None}
            found[node.name] = tuple(
                o for o in sorted(owners) if o in named and named[o].kind not in SUMMING
            )
    return found


# ---------------------------------------------------------------------- what is observed


def points(capture: Capture, lower: Lower, quick: bool, **how: Any) -> Iterator[dict[str, Any]]:
    """Yield microseconds by grid and elements, of one network after another.

    Args:
        capture: Captures a module.
        lower: Makes an artifact in integers.
        quick: Whether to measure few sizes.
        **how: As for `observed`.
    """
    for network, inputs in networks(quick):
        program = capture(network, inputs)
        found: dict[str, Any] = defaultdict(dict)
        for work, us in observed(program, lower(program), **how).items():
            if work.kind not in SUMMING:
                found[grid_of(work)][(sizes_of(work)["elements"],)] = us
        yield found


def grid_of(work: Work) -> str:
    """Return the name of the grid of an operator that sums over no weight."""
    if work.kind == "pool":
        return f"pool {work.op} {window_of(work)}"
    return f"pointwise {work.op}" if work.kind == "pointwise" else work.kind


def count(quick: bool) -> int:
    """Return how many networks there are."""
    return 2 if quick else 5


def networks(quick: bool) -> Iterator[tuple[Any, Any]]:
    """Yield networks that hold one operator of a kind each, and their inputs."""
    import torch

    for side in (14,) if quick else (7, 28, 56):
        yield _images(side), torch.randn(1, 16, side, side)
    for rows in (197,) if quick else (49, 785):
        yield _tokens(), torch.randn(1, rows, CHANNELS)


def _images(side: int) -> Any:
    """Return a network of images: each operator between two convolutions."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    order = torch.randperm(2 * CHANNELS, generator=torch.Generator().manual_seed(0))[:CHANNELS]
    one: list[Callable[[Any], Any]] = [
        F.silu, F.hardswish, F.sigmoid, F.hardsigmoid, F.gelu, F.tanh, F.elu, F.leaky_relu,
        lambda x: F.max_pool2d(x, 3, 2, 1), lambda x: F.max_pool2d(x, 2),
        lambda x: F.avg_pool2d(x, 2), lambda x: F.adaptive_avg_pool2d(x, 1),
        lambda x: x.mean((2, 3), keepdim=True), lambda x: F.interpolate(x, scale_factor=2),
        lambda x: x[:, 4:], lambda x: x * x.mean((2, 3), keepdim=True),
    ]  # fmt: skip

    class Images(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.Conv2d(16, CHANNELS, 1) for _ in range(2))
            self.heads = nn.ModuleList(nn.Conv2d(CHANNELS, 16, 1) for _ in range(len(one) + 2))
            self.wide = nn.Conv2d(2 * CHANNELS, 2 * CHANNELS, 1)
            self.cut = nn.Conv2d(CHANNELS - 4, 16, 1)

        def forward(self, x: Any) -> Any:
            a, b = self.first(x), self.second(x)
            results = []
            for i, act in enumerate(one):
                y = act(a)
                results.append((self.cut if y.shape[1] < CHANNELS else self.heads[i])(y))
            results.append(self.heads[-1](F.relu(a + b)))
            both = self.wide(torch.cat([a, b], 1))
            results.append(self.heads[-2](both[:, order]))
            return tuple(results)

    return Images().eval()


def _tokens() -> Any:
    """Return a network of tokens: each operator between two linear layers."""
    import torch.nn.functional as F
    from torch import nn

    one: list[Callable[[Any], Any]] = [
        lambda x: F.layer_norm(x, (CHANNELS,)), lambda x: F.softmax(x, -1), F.gelu, F.silu,
    ]  # fmt: skip

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(CHANNELS, CHANNELS)
            self.heads = nn.ModuleList(nn.Linear(CHANNELS, 16) for _ in one)

        def forward(self, x: Any) -> Any:
            a = self.first(x)
            return tuple(head(act(a)) for act, head in zip(one, self.heads, strict=True))

    return Tokens().eval()
