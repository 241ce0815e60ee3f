"""`Statistics`: what a network's layers see, and how much their errors matter, without labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from narrows.errors import PlanUsageError
from narrows.ir.meta import Meta
from narrows.ir.program import Program
from narrows.passes.choosing.divergence import Divergence
from narrows.passes.choosing.gradients import leaf, send_back
from narrows.passes.choosing.products import ON_THE_WAY, Product, gram, refuse_infinite
from narrows.passes.choosing.reads import Reads

Batch = Sequence[Any]

PIECE = 32  # examples that run at once


@dataclass(frozen=True)
class Statistics:
    """What was measured of every layer.

    Attributes:
        grams: ``mean(x x^T)`` over examples and positions of the patches that it multiplies,
            ``[groups, columns + 1, columns + 1]``, float64; ``None`` for a layer that keeps all.
        sensitivities: What a squared error of each output costs at any position: the Gauss-Newton
            diagonal of the divergence, mean over examples, ``[groups, outputs]``.
    """

    grams: tuple[Tensor | None, ...]
    sensitivities: tuple[Tensor, ...]

    @staticmethod
    def mean(parts: Sequence[Statistics]) -> Statistics:
        """Return what was measured on several parts of the data together."""

        def mean(values: tuple[Tensor | None, ...]) -> Any:
            known = [v for v in values if v is not None]
            return torch.stack(known).mean(0) if known else None

        grams = tuple(map(mean, zip(*(p.grams for p in parts), strict=True)))
        return Statistics(
            grams, tuple(map(mean, zip(*(p.sensitivities for p in parts), strict=True)))
        )


def measured(
    program: Program, reads: Reads, batches: Sequence[Batch], divergence: Divergence, seed: int = 0
) -> Statistics:
    """Measure the layers of a program: one forward and one backward pass over data.

    Args:
        program: The program, prepared.
        reads: Its reads.
        batches: Flat inputs, batch by batch.
        divergence: How outputs are compared.
        seed: Of the probe.

    Raises:
        PlanError: What a layer sees is not finite, or no gradient reaches the layers.
    """
    return _Measuring(program, reads, batches, divergence).run(seed)


class _Measuring:
    """Sums over batches, layer by layer; nothing else is kept from one to the next."""

    def __init__(
        self, program: Program, reads: Reads, batches: Sequence[Batch], divergence: Divergence
    ) -> None:
        self.program, self.reads, self.batches = program, reads, batches
        self.divergence = divergence
        self.examples = counted(program, batches)
        self.number = {p.layer.node: j for j, p in enumerate(reads.products)}
        self.read = {p.contraction.x for p in reads.products}
        self.wanted = [bool(reads.free[own].any()) for own in reads.of_layer]
        self.grams: list[Tensor | None] = [None for _ in reads.products]
        self.rows = [0 for _ in reads.products]
        self.squares = [
            torch.zeros(p.groups, p.outputs, dtype=torch.float64) for p in reads.products
        ]

    def run(self, seed: int) -> Statistics:
        """Go through all batches."""
        generator = torch.Generator().manual_seed(seed)
        for turn, batch in enumerate(self.batches):
            self._add(batch, turn, generator)
        for product, found, squares in zip(
            self.reads.products, self.grams, self.squares, strict=True
        ):
            refuse_infinite(product, squares, *([] if found is None else [found]))
        grams = (None if g is None else g / n for g, n in zip(self.grams, self.rows, strict=True))
        return Statistics(tuple(grams), tuple(s / self.examples for s in self.squares))

    def _add(self, batch: Batch, turn: int, generator: torch.Generator) -> None:
        made: dict[int, Tensor] = {}
        fed: dict[fx.Node, Tensor] = {}

        def observe(node: fx.Node, value: Any) -> None:
            if node in self.read:
                fed[node] = value.detach()
            if node in self.number and value.is_floating_point():
                # The first layers' results begin the recording: no weight needs a gradient.
                if value.requires_grad:
                    value.retain_grad()
                else:
                    value.requires_grad_()
                made[self.number[node]] = value

        with torch.inference_mode(False), torch.enable_grad():
            weights = {n: leaf(w) for n, w in self.program.weights.items()}
            given = [leaf(v) if isinstance(v, Tensor) else v for v in batch]
            outputs = self.program.run_flat(given, weights, observe)
            send_back(self.program, self.divergence.probe(outputs, generator))
        for j, y in made.items():
            product = self.reads.products[j]
            if y.grad is not None:
                self.squares[j] += _squares(product, y.grad)
            if self.wanted[j]:
                places = product.places(y, self.examples, turn, ON_THE_WAY)
                lines, _ = product.rows(fed[product.contraction.x], y.detach(), places)
                found, known = gram(lines), self.grams[j]
                self.grams[j] = found if known is None else known + found
                self.rows[j] += lines.shape[2]


def _squares(product: Product, grad: Tensor) -> Tensor:
    own = grad.movedim(product.contraction.y_axis, 0).flatten(1)
    return own.double().square().sum(1).reshape(product.groups, -1)


def examples_of(program: Program, batch: Batch) -> int:
    """Return how many examples a batch holds: the length of an input that may have any, or of the
    first one."""
    holders = zip(program.placeholders, batch, strict=True)
    tensors = [(n, t) for n, t in holders if isinstance(t, Tensor) and t.dim()]
    sized = [(0 in Meta(n).dynamic, t.shape[0]) for n, t in tensors]
    return next((length for free, length in sized if free), sized[0][1] if sized else 1)


def counted(program: Program, batches: Sequence[Batch]) -> int:
    """Return how many examples there are in all batches."""
    return sum(examples_of(program, batch) for batch in batches)


def takes_any(program: Program) -> bool:
    """Return whether a program takes any number of examples, so that batches may be cut."""
    return any(0 in Meta(node).dynamic for node in program.placeholders)


def at_least(program: Program, batches: Sequence[Batch], examples: int) -> list[Batch]:
    """Return batches spread over all that hold so many examples, or all of them."""
    step = max(1, counted(program, batches) // examples)
    while step > 1 and counted(program, batches[::step]) < examples:
        step -= 1
    return [*batches[::step]]


def first(program: Program, batches: Iterable[Batch], examples: int) -> list[Batch]:
    """Return the first batches that hold so many examples, the last of them cut if it may be."""
    result: list[Batch] = []
    seen = 0
    for batch in batches:
        if seen >= examples:
            break
        length = examples_of(program, batch)
        some = min(length, examples - seen) if takes_any(program) else length
        result.append(part(program, batch, 0, some))
        seen += some
    return result


def pieces(program: Program, batches: Sequence[Batch], size: int = PIECE) -> list[Batch]:
    """Return batches of at most so many examples, where the program takes any number of them."""
    if not takes_any(program):
        return list(batches)
    return [
        part(program, batch, start, start + size)
        for batch in batches
        for start in range(0, examples_of(program, batch), size)
    ]


def split(program: Program, batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Return data in two halves: what is measured on one is held to the other.

    Raises:
        PlanUsageError: There is one example, or one batch that cannot be cut.
    """
    if len(batches) > 1:
        return list(batches[::2]), list(batches[1::2])
    (batch,) = batches
    examples = examples_of(program, batch)
    if not takes_any(program):
        raise PlanUsageError(
            "there is one batch to choose by",
            why="what is measured on some of the data is held to the rest, and the program takes "
            f"{examples} examples at a time",
            hint="more batches, or capture with dynamic_batch=True",
        )
    if examples < 2:
        raise PlanUsageError(
            "there is one example to choose by",
            why="what is measured on some of the data is held to the rest",
            hint="data=[images], some hundred of them",
        )
    half = examples // 2
    return [part(program, batch, 0, half)], [part(program, batch, half, examples)]


def part(program: Program, batch: Batch, start: int, end: int) -> Batch:
    """Return some examples of a batch, of a program that takes any number of them."""
    return [
        v[start:end] if isinstance(v, Tensor) and v.dim() and 0 in Meta(n).dynamic else v
        for n, v in zip(program.placeholders, batch, strict=True)
    ]


__all__ = [
    "PIECE",
    "Batch",
    "Statistics",
    "at_least",
    "counted",
    "examples_of",
    "first",
    "measured",
    "part",
    "pieces",
    "split",
    "takes_any",
]  # fmt: skip
