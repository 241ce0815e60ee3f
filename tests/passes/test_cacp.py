"""A policy for all budgets: what it is told, how it learns, and the plans that it makes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

import narrows
from narrows.errors import PlanUsageError
from narrows.ir.program import Program
from narrows.passes.choosing.allocators import cacp
from narrows.passes.choosing.allocators.base import limits_of
from narrows.passes.choosing.allocators.cacp import Asked, Cacp, Policy, features, surprise
from narrows.passes.choosing.budgets.base import Goal
from narrows.passes.choosing.budgets.catalog import find
from tests.passes.residual import images, left, settled
from tests.passes.test_allocating import candidates_of

DATA = [images(32, 1), images(32, 2)]


@pytest.fixture
def program() -> Program:
    return settled()


def test_what_gains_more_becomes_likelier_by_the_formula_of_reinforce():
    means = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    noise = torch.tensor([[0.1, -0.2, 0.0], [0.3, 0.1, -0.1]], dtype=torch.float64)
    rewards = np.array([[-1.0, -3.0], [-2.0, -1.0]])
    surprise(means, noise, rewards).backward()
    # The gradient of a normal distribution's log-likelihood by its mean is noise / variance.
    advantages = np.array([1.0, -0.5]) / 0.75
    wanted = -advantages[:, None] * noise.numpy() / cacp.SPREAD**2 / 2
    assert means.grad is not None
    assert np.allclose(means.grad.numpy(), wanted)
    assert surprise(means, noise, np.zeros((2, 2))) == 0


def test_a_policy_is_told_where_a_layer_stands_and_what_it_costs(program: Program):
    candidates = candidates_of(program)
    limits = limits_of(candidates, [Goal(find("macs"), 0.5)])
    known = features(candidates, limits).numpy()
    assert known.shape == (len(candidates.full), 4)
    assert known[:, 0].tolist() == np.linspace(0, 1, len(known)).tolist()
    assert np.allclose(known[:, 1:3].mean(0), 0)
    assert np.all((known[:, 3] >= 0.5) & (known[:, 3] <= 1))  # the better half has at least half
    without = [*candidates.full]
    without[2] = candidates.least[2]
    saved = [math.log(1 - limits[0].left(without))]
    assert np.sign(known[2, 2]) == np.sign(saved[0] - np.mean(_saved(candidates, limits)))


def _saved(candidates: Any, limits: Any) -> list[float]:
    found = []
    for i, least in enumerate(candidates.least):
        without = [*candidates.full]
        without[i] = least
        found.append(math.log(max(1 - limits[0].left(without), 1e-9)))
    return found


def test_it_learns_which_candidates_the_outputs_miss(program: Program, monkeypatch: Any):
    """Here they miss the first alone, and half of it at most."""
    candidates = candidates_of(program)
    goals = [Goal(find("macs"), 0.5)]
    limits = limits_of(candidates, goals)
    asked: list[Sequence[Sequence[int]]] = []

    def apart(*_: Any) -> Any:
        def far(several: Sequence[Sequence[int]]) -> list[float]:
            asked.append(several)
            return [1 - widths[0] / candidates.full[0] for widths in several]

        return far

    monkeypatch.setattr(cacp, "apart", apart)
    before = cacp.scaled(candidates, limits, np.ones(len(candidates.full)))
    found = Asked(Cacp(steps=30, pairs=4), [0.5]).widths(candidates, limits)
    assert limits[0].meets(found)
    assert found[0] > before[0]
    assert len(asked) == 30
    assert all(len(several) == 8 for several in asked)


def test_one_policy_makes_a_family_within_every_budget(program: Program, monkeypatch: Any):
    trained: list[Policy] = []
    train = Asked._train
    monkeypatch.setattr(Asked, "_train", lambda *a: trained.append(train(*a)) or trained[-1])
    shares = [0.9, 0.7, 0.5]
    how = "cacp{steps=1, pairs=1}"
    plans = narrows.family(program, macs=shares, data=iter(DATA), allocator=how)
    assert len(trained) == 1
    for plan, share in zip(plans, shares, strict=True):
        rest = left(narrows.apply(program, plan)) / left(program)
        assert share - 0.1 < rest <= share * (1 + 1e-9)
    alone = narrows.plan(program, macs=0.5, data=DATA, allocator=how)
    assert alone.inputs == plans[-1].inputs  # the seed decides, and the smallest budget


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"allocator": "cacp"}, "'cacp' tries plans on data"),
        ({"allocator": "cacp{steps=0}"}, "steps is a whole number of at least 1, got 0"),
        ({"allocator": "cacp{pairs=0}"}, "pairs is a whole number of at least 1, got 0"),
    ],
)
def test_what_is_refused(program: Program, options: dict[str, Any], message: str):
    with pytest.raises(PlanUsageError, match=message):
        narrows.plan(program, macs=0.5, **options)


def test_not_every_allocator_makes_a_family(program: Program):
    with pytest.raises(PlanUsageError, match="'uniform' makes no family"):
        narrows.family(program, macs=[0.9, 0.5], data=DATA, allocator="uniform")
