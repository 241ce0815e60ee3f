"""What calibration remembers of large tensors, held to counts of every number."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from narrows.passes.quant.observe import BINS, LARGE, TAIL, Histogram


def drawn(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, 96, 29, 37, generator=generator)  # no multiple of a block
    if kind == "relu":
        return x.relu()
    if kind == "outliers":  # one channel of a hundred, and one number of that
        x[:, 17] *= 40.0
        x[1, 17, 3, 4] = -700.0
    if kind == "heavy":
        x = x.sign() * x.abs() ** 4
    if kind == "steps":  # few numbers, many times each
        x = x.round()
    return x


def both(x: Tensor) -> tuple[Histogram, Histogram]:
    assert x.numel() >= LARGE
    sampled, whole = Histogram(), Histogram(whole=True)
    for part in (x, x * 1.5):  # the second lets the bins grow
        sampled.add(part)
        whole.add(part)
    return sampled, whole


@pytest.mark.parametrize("kind", ["normal", "relu", "outliers", "heavy", "steps"])
def test_large_tensor_has_the_range_and_the_tail_of_every_number(kind: str) -> None:
    sampled, whole = both(drawn(kind))
    assert (sampled.low, sampled.high, sampled.power) == (whole.low, whole.high, whole.power)
    assert sampled.total == pytest.approx(whole.total, rel=1e-9)
    # The largest are exact as long as they are a small share; half of it, as a share is estimated.
    beyond = whole.counts.sum(0).flip(0).cumsum(0).flip(0)
    first = int((beyond > TAIL / 2 * whole.total).sum())
    assert first < BINS
    torch.testing.assert_close(sampled.counts[:, first:], whole.counts[:, first:])


@pytest.mark.parametrize("kind", ["normal", "relu", "outliers", "heavy", "steps"])
def test_large_tensor_gets_the_grid_of_every_number(kind: str) -> None:
    sampled, whole = both(drawn(kind))
    for bits in (4, 8, 16):
        for method in ("minmax", "mse"):
            chosen, best = sampled.grid(method, bits), whole.grid(method, bits)
            # Exponents whose errors are within the spread of the sample are as good.
            assert chosen == best or whole.error(chosen) < 1.03 * whole.error(best)
    octave = sampled._quantile(99.9) / whole._quantile(99.9)
    assert abs(math.log2(octave)) < 0.1


def test_large_tensor_is_refused_for_one_bad_number_and_zeros_are_zeros() -> None:
    for bad in (math.nan, math.inf, -math.inf):
        x = drawn("normal")
        x[0, 0, 0, 0] = bad
        seen = Histogram()
        seen.add(x)
        assert not seen.finite
    seen = Histogram()
    seen.add(torch.zeros(LARGE))
    assert (seen.zeros, seen.power, seen.constant) == (LARGE, None, True)


def test_same_numbers_are_sampled_every_time() -> None:
    first, second = (both(drawn("heavy"))[0] for _ in range(2))
    assert torch.equal(first.counts, second.counts)
