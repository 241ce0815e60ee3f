"""Each loss against its formula, computed directly."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from narrows import training
from narrows.errors import UsageError


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_distillation_is_the_divergence_of_softened_logits() -> None:
    s, t = randn(3, 4), randn(3, 4, seed=1)
    total = 0.0
    for n in range(3):
        q, p = (torch.softmax(x[n] / 2.5, 0) for x in (s, t))
        total += sum(float(p[c] * (p[c] / q[c]).log()) for c in range(4))
    assert math.isclose(float(training.distillation(s, t, 2.5)), 2.5**2 * total / 3)
    assert abs(float(training.distillation(s, s))) < 1e-12


def test_distillation_teaches_the_student_alone() -> None:
    s, t = randn(3, 4).requires_grad_(), randn(3, 4, seed=1).requires_grad_()
    training.distillation(s, t, 2.0).backward()
    assert t.grad is None
    expected = 2.0 * (torch.softmax(s / 2, 1) - torch.softmax(t / 2, 1)) / 3
    assert torch.allclose(s.grad, expected)  # type: ignore[arg-type]


def test_stability_is_one_less_the_variance_within_classes() -> None:
    logits, labels = randn(7, 3), torch.tensor([0, 0, 0, 1, 1, 2, 2])
    p = torch.softmax(logits, 1)
    variances = []
    for c in range(3):
        own = p[labels == c]
        mean = own.sum(0) / len(own)
        variances.append(sum(float(((q - mean) ** 2).sum()) for q in own) / len(own))
    expected = 1 - sum(variances) / 3
    assert math.isclose(training.stability(logits, labels), expected)
    # A smoothed teacher says the same for all inputs of a class.
    assert training.stability(torch.eye(3)[labels], labels) == 1.0
    assert training.stability(logits, labels) < 1.0
    with pytest.raises(UsageError, match="stability has no input"):
        training.stability(logits, labels + 9)


def test_channel_wise_compares_where_each_channel_looks() -> None:
    s, t = randn(2, 3, 2, 2), randn(2, 3, 2, 2, seed=1)
    total = 0.0
    for n in range(2):
        for c in range(3):
            q, p = (torch.softmax(x[n, c].flatten() / 3.0, 0) for x in (s, t))
            total += float((p * (p.log() - q.log())).sum())
    assert math.isclose(float(training.channel_wise(s, t, 3.0)), 9.0 * total / 3 / 2)
    assert abs(float(training.channel_wise(t + randn(2, 3, 1, 1), t))) < 1e-12


def test_spatial_attention_compares_maps_over_levels() -> None:
    ours = [randn(2, 3, 2, 2), randn(2, 5, 4, 1, seed=1)]
    theirs = [randn(2, 4, 2, 2, seed=2), randn(2, 5, 4, 1, seed=3)]
    total = 0.0
    for a, b in zip(ours, theirs, strict=True):
        for n in range(2):
            maps = [(x[n].abs() ** 1.5).sum(0).flatten() / 0.7 for x in (a, b)]
            p, q = (m.exp() / m.exp().sum() for m in maps)
            total += float((p - q).square().sum().sqrt()) / 2
    found = training.spatial_attention(ours, theirs, power=1.5, temperature=0.7)
    assert math.isclose(float(found), total)
    one = training.spatial_attention(ours[0], theirs[0])
    assert float(one) > 0


def test_self_supervised_is_the_cross_entropy_to_the_teacher() -> None:
    s, t = randn(3, 4), randn(3, 4, seed=1)
    p, q = torch.softmax(t / 0.2, 1), torch.softmax(s / 0.2, 1)
    expected = -(p * q.log()).sum() / 3
    assert torch.allclose(training.self_supervised(s, t), expected)
    entropy = -(p * p.log()).sum() / 3
    divergence = (p * (p / q).log()).sum() / 3
    assert torch.allclose(training.self_supervised(s, t) - entropy, divergence)


BAD: tuple[tuple[Callable[[], Any], str], ...] = (
    (lambda: training.distillation(randn(2, 3), randn(2, 4)), "a student of shape"),
    (lambda: training.distillation(randn(2, 3), randn(2, 3), 0.0), "the temperature 0"),
    (lambda: training.channel_wise(randn(2, 3), randn(2, 3)), "of 3 axes or more"),
    (lambda: training.self_supervised(randn(3), randn(3)), "of 2 axes or more"),
    (lambda: training.spatial_attention(randn(1, 3, 2), randn(1, 4, 3)), "but for the channels"),
    (lambda: training.spatial_attention([randn(1, 3, 2)], []), "1 levels of the student"),
    (lambda: training.stability(randn(3, 2), torch.zeros(2)), "stability got logits"),
)


@pytest.mark.parametrize(("call", "text"), BAD)
def test_what_does_not_fit_is_told(call: Callable[[], Any], text: str) -> None:
    with pytest.raises(UsageError, match=text) as error:
        call()
    assert all((error.value.where, error.value.why, error.value.hint))
