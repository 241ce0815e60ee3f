"""Which layers of a pruned network to train, and how fast: an evolutionary search.

Partial transfer (Z. Shen et al., AAAI 2021) trains a network for a new task with a learning rate of
its own for each part, zero among them. `search` finds them on a few batches; `narrows.training.
follow` carries what is said of the unpruned model to the pruned one.

Run it: ``python examples/partial_transfer.py``
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import narrows
from narrows import training
from narrows.ir.program import Program

RATES = (0.0, 0.003, 0.01, 0.03)
Genes = tuple[float, ...]


def search(
    score: Callable[[Genes], float],
    parts: int,
    rounds: int = 4,
    population: int = 6,
    seed: int = 0,
) -> tuple[Genes, float]:
    """Return the best learning rates per part and their score.

    Args:
        score: Gives a number, the higher the better, for a rate per part.
        parts: How many parts there are.
        rounds: How often the better half has children: a crossing of two, one gene drawn anew.
        population: How many vectors live at a time.
        seed: What draws.
    """
    draw = random.Random(seed)
    known: dict[Genes, float] = {}

    def scored(genes: Genes) -> float:
        if genes not in known:
            known[genes] = score(genes)
        return known[genes]

    living = [tuple(draw.choice(RATES) for _ in range(parts)) for _ in range(population)]
    for _ in range(rounds):
        best = sorted(set(living), key=scored, reverse=True)[: max(2, population // 2)]
        living = list(best)
        while len(living) < population:
            mother, father = draw.choice(best), draw.choice(best)
            child = [draw.choice(pair) for pair in zip(mother, father, strict=True)]
            child[draw.randrange(parts)] = draw.choice(RATES)
            living.append(tuple(child))
    winner = max(known, key=lambda genes: known[genes])
    return winner, known[winner]


def groups_of(parts: Sequence[str], genes: Genes) -> list[dict[str, Any]]:
    """Return parameter groups of the unpruned model for a rate per part."""
    return [{"names": [part], "lr": rate} for part, rate in zip(parts, genes, strict=True)]


def trained_score(
    program: Program,
    pruned: Program,
    parts: Sequence[str],
    genes: Genes,
    batch: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    steps: int = 10,
) -> float:
    """Return minus the held-out loss of the pruned network after a few steps with these rates."""
    module = pruned.to_module(train=True)
    groups = training.follow(groups_of(parts, genes), program, pruned, module)
    if groups:
        optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(module(batch[0]), batch[1]).backward()
            optimizer.step()
    module.eval()
    with torch.no_grad():
        return -float(F.cross_entropy(module(held_out[0]), held_out[1]))


def main() -> None:
    """Search rates for the three parts of a small pruned network on a new task."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)
    )
    program = narrows.capture(model.eval(), (torch.randn(4, 8),))
    pruned = narrows.apply(program, {"ratio": 0.5})
    inputs = torch.randn(192, 8)
    labels = (inputs @ torch.randn(8, 4)).argmax(1)
    batch, held_out = (inputs[:128], labels[:128]), (inputs[128:], labels[128:])
    parts = ["0.*", "2.*", "4.*"]
    rates, found = search(
        lambda genes: trained_score(program, pruned, parts, genes, batch, held_out), len(parts)
    )
    everything = trained_score(program, pruned, parts, (0.01,) * 3, batch, held_out)
    print(f"rates {dict(zip(parts, rates, strict=True))}: loss {-found:.3f}")
    print(f"one rate for all: loss {-everything:.3f}")


if __name__ == "__main__":
    main()
