"""PAGCP's parts against a direct computation, and its plans."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import narrows
from narrows.errors import PlanUsageError
from narrows.passes.choosing.allocators.pagcp import Tasks, greedy, in_depth, thresholds
from tests.passes.residual import images, left, settled
from tests.passes.test_allocating import candidates_of


def test_thresholds_grow_with_depth_and_their_product_is_the_whole_rise():
    rises = thresholds(0.7, 5, 1.3)
    assert np.prod(1 + rises) == pytest.approx(np.exp(0.7))
    parts = np.log1p(rises)
    np.testing.assert_allclose(parts[1:] / parts[:-1], 1.3)


def test_each_in_turn_keeps_the_fewest_that_every_task_bears():
    """Against a scan of all widths, with two tasks that mind different layers."""
    full, least = [9, 7, 12], [1, 2, 1]
    generator = np.random.default_rng(0)
    worth = [generator.random((2, n)) for n in full]

    def losses(widths: list[int]) -> np.ndarray:
        gone = [w[:, : n - k].sum(1) for w, n, k in zip(worth, full, widths, strict=True)]
        return np.array([1.0, 3.0]) * np.exp(np.sum(gone, 0))

    rises = thresholds(4.0, 3, 1.2)
    order = [2, 0, 1]
    widths = [*full]
    for i, rise in zip(order, rises, strict=True):
        before = losses(widths)
        borne = [
            w for w in range(least[i], full[i] + 1)
            if (losses([*widths[:i], w, *widths[i + 1 :]]) <= before * (1 + rise)).all()
        ]  # fmt: skip
        widths[i] = min(borne)
    assert greedy(full, least, order, losses, rises) == widths
    assert any(w < n for w, n in zip(widths, full, strict=True))


class Both(nn.Module):
    """Logits and values, of one trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.classes, self.value = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.trunk(x).relu()
        return self.classes(y), self.value(y)


def test_a_task_is_an_output_and_its_loss_never_zero():
    """Cross-entropy to the unpruned network's classes, squared error beside the variance."""
    torch.manual_seed(0)
    program = narrows.capture(Both().double().eval(), (torch.randn(2, 6).double(),))
    found = candidates_of(program)
    batches = [[torch.randn(5, 6).double()], [torch.randn(3, 6).double()]]
    tasks = Tasks(found, "tried", batches, "auto")
    widths = [full // 2 for full in found.full]
    masked = found.plan(widths, "tried").masked(program)
    entropy = value = 0.0
    for (x,) in batches:
        (z, v), (y, u) = program(x), masked(x)
        entropy -= float((z.softmax(1) * y.log_softmax(1)).sum()) / 8
        # The scale is that of the first batch's values, as everywhere.
        spread = program(batches[0][0])[1].std(correction=0)
        value += float((((u - v) / spread).square() / 2).sum()) / 8
        value += float((((v - v.mean()) / spread).square() / 2).sum()) / 8
    np.testing.assert_allclose(tasks.losses(widths), [entropy, value], rtol=1e-9)
    assert (tasks.losses(found.full) > 0).all()


def test_a_plan_of_it_meets_its_budget():
    program, data = settled(), [images(16, 1), images(16, 2)]
    plan = narrows.plan(program, macs=0.7, data=data, allocator="pagcp{growth=1.2}")
    assert left(narrows.apply(program, plan)) <= 0.7 * left(program)
    depth = in_depth(candidates_of(program))
    assert sorted(depth) == list(range(len(depth)))
    with pytest.raises(PlanUsageError, match="growth is a factor above 0, got 0"):
        narrows.plan(program, macs=0.7, data=data, allocator="pagcp{growth=0}")
