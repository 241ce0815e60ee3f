"""Addresses: what only moves elements is a view, or few loops."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from narrows.backends.c.layout import (
    Buffer,
    Loop,
    View,
    channels_last,
    copy_loops,
    factored,
    packed,
    row_major,
    viewed,
)

SHAPE = (1, 6, 4, 5)


def image() -> View:
    return View(Buffer("x", 120), 0, SHAPE, packed(SHAPE, channels_last(4)))


@pytest.mark.parametrize(
    "move",
    [
        lambda x: x.permute(0, 2, 3, 1), lambda x: x[:, 1:4], lambda x: x[0, :, ::2],
        lambda x: x.flip(3), lambda x: x.flatten(2),
        lambda x: x.unsqueeze(1).expand(1, 3, *x.shape[1:]),
    ],
)  # fmt: skip
def test_views_cost_nothing(move: Callable[[Tensor], Tensor]) -> None:
    addresses = move(image().addresses())
    found = viewed(image().buffer, addresses)
    assert found is not None
    assert torch.equal(found.addresses(), addresses)


def run(target: View, first: int, loops: list[Loop]) -> np.ndarray:
    """Copy addresses as the C code would."""
    y = np.full(target.size, -1)
    places = [(target.offset, first)]
    for loop in loops:
        steps = loop.table or [i * loop.steps[1] for i in range(loop.count)]
        places = [(a + i * loop.steps[0], b + s) for a, b in places for i, s in enumerate(steps)]
    for a, b in places:
        y[a] = b
    return y


@pytest.mark.parametrize(
    ("move", "tables"),
    [
        (lambda x: x.flatten(1), 0), (lambda x: x.repeat(1, 1, 2, 1), 0),
        (lambda x: torch.pixel_shuffle(x[:, :4], 2), 0), (lambda x: x.roll(2, 3), 1),
        (lambda x: torch.channel_shuffle(x, 3), 0), (lambda x: x[:, [5, 0, 3]], 1),
        (lambda x: x.repeat_interleave(2, 1), 0), (lambda x: x.reshape(1, 5, 4, 6), 1),
    ],
)  # fmt: skip
def test_other_moves_are_loops(move: Callable[[Tensor], Tensor], tables: int) -> None:
    addresses = move(image().addresses())
    target = View(Buffer("y", addresses.numel()), 0, tuple(addresses.shape),
                  packed(addresses.shape, row_major(addresses.dim())))  # fmt: skip
    first, loops = copy_loops(target, addresses)
    assert (run(target, first, loops) == addresses.reshape(-1).numpy()).all()
    assert sum(loop.table is not None for loop in loops) == tables


def test_sequences_are_taken_apart() -> None:
    assert factored(np.arange(12)) == [(12, 1)]
    assert factored(np.asarray([0, 0, 3, 3, 6, 6])) == [(3, 3), (2, 0)]
    assert factored(np.asarray([0, 2, 1])) is None
