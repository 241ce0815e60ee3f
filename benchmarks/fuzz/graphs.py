"""What is drawn: a network as plain data, and the masks it gets. A seed decides all of it."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import narrows
from narrows.ir.program import Program
from narrows.passes.plans.plan import ChannelPlan
from tests.networks import KINDS, draw_masks, randomise
from tests.networks.generated import BLOCKS, HEADS, SIZES, Generated, Size, Step

FORMS = ("none", "onnx", "torch")
# What the planner chooses by itself, beside the masks that are given.
PLANNED = ("planned", "planned input", "planned output", "planned both")
NOTHING = "nothing"


@dataclass(frozen=True)
class Mask:
    """How a plan is made: a kind of `tests.networks.KINDS` or of `PLANNED`, or `NOTHING`."""

    kind: str
    seed: int = 0

    def plan(self, program: Program) -> ChannelPlan | None:
        """Return the plan for a program."""
        if self.kind == NOTHING:
            return None
        if self.kind not in PLANNED:
            inputs, outputs = draw_masks(program, self.kind, self.seed)
            return narrows.plan(program, keep_inputs=inputs, keep_outputs=outputs, zeros=False)
        ratio = random.Random(f"ratio {self.seed}").choice((0.25, 0.5, 0.75))
        side = self.kind.partition(" ")[2]
        options: dict[str, Any] = {"side": side, "constrained": False} if side else {}
        return narrows.plan(program, ratio=ratio, **options)


@dataclass(frozen=True)
class Graph:
    """A generated network.

    Attributes:
        seed: Decides its weights.
        steps: The blocks; see `tests.networks.generated`.
        head: What it ends in.
        size: Height and width of its images.
        quantized: Whether it is made of integers as well.
    """

    seed: int
    steps: tuple[Step, ...]
    head: str = "map"
    size: Size = (8, 8)
    quantized: bool = False

    @staticmethod
    def drawn(seed: int, quantized: float = 0.1) -> Graph:
        """Return the network of a seed; ``quantized`` is the share that becomes integers."""
        draw = random.Random(f"graph {seed}")
        kinds = sorted(BLOCKS)
        steps = tuple(
            (draw.choice(kinds), draw.randrange(10), draw.randrange(10))
            for _ in range(draw.randint(1, 6))
        )
        head, size = draw.choice(HEADS), draw.choice(SIZES)
        return Graph(seed, steps, head, size, draw.random() < quantized)

    def build(self) -> Generated:
        """Return the module, in float64 and eval mode."""
        torch.manual_seed(self.seed)
        module = Generated(self.steps, self.head).double()
        randomise(module, self.seed, (self.images(4),))
        return module

    def images(self, batch: int, seed: int | None = None) -> Tensor:
        """Return images, by default those that decide the statistics of the norms."""
        generator = torch.Generator().manual_seed(self.seed if seed is None else seed)
        return torch.randn(batch, 3, *self.size, generator=generator, dtype=torch.float64)

    def masks(self, count: int) -> list[Mask]:
        """Return `NOTHING` and so many masks, of kinds that take turns from seed to seed."""
        kinds = [*KINDS, *PLANNED]
        draw = random.Random(f"masks {self.seed}")
        draw.shuffle(kinds)
        drawn = [Mask(kinds[i % len(kinds)], draw.randrange(1000)) for i in range(count)]
        return [Mask(NOTHING), *drawn]


def to_line(graph: Graph, mask: Mask, form: str) -> str:
    """Return what ``--repro`` takes."""
    data = {
        "steps": graph.steps, "head": graph.head, "size": graph.size, "seed": graph.seed,
        "quantized": graph.quantized, "mask": [mask.kind, mask.seed], "form": form,
    }  # fmt: skip
    return json.dumps(data)


def from_line(text: str) -> tuple[Graph, Mask, str]:
    """Return what `to_line` wrote."""
    data = json.loads(text)
    steps = tuple((kind, a, b) for kind, a, b in data["steps"])
    graph = Graph(data["seed"], steps, data["head"], tuple(data["size"]), data["quantized"])
    return graph, Mask(*data["mask"]), data["form"]


def smaller(graph: Graph) -> Iterator[Graph]:
    """Yield networks that are simpler in one respect, the most promising first."""

    def but(**changes: Any) -> Graph:
        return Graph(**{**vars(graph), **changes})

    if len(graph.steps) > 1:
        for i in range(len(graph.steps)):
            yield but(steps=graph.steps[:i] + graph.steps[i + 1 :])
    if graph.head != "map":
        yield but(head="map")
    if graph.size != (8, 8):
        yield but(size=(8, 8))
    for i, (kind, a, b) in enumerate(graph.steps):
        lower = [(0, b), (a, 0), (a // 2, b), (a, b // 2), (a - 1, b), (a, b - 1)]
        for x, y in dict.fromkeys(lower):
            if (x, y) != (a, b) and min(x, y) >= 0:
                yield but(steps=(*graph.steps[:i], (kind, x, y), *graph.steps[i + 1 :]))
