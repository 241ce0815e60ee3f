"""Weights as sums of powers of two."""

from __future__ import annotations

import numpy as np
import pytest

from narrows.backends.c.powers import MOST_TERMS, power_digits


def value(digits: np.ndarray) -> np.ndarray:
    size = np.where(digits != 0, 2.0 ** (np.abs(digits.astype(int)) - 1), 0)
    return (np.sign(digits) * size).sum(0)


def test_sums_of_two_powers_are_found_and_no_others() -> None:
    powers = [0, *(2**k for k in range(8)), *(-(2**k) for k in range(8))]
    sums = {a + b for a in powers for b in powers}
    for code in range(-128, 128):
        digits = power_digits(np.asarray([code, 1]))
        assert (digits is not None) == (code in sums)
        if digits is not None:
            assert value(digits).tolist() == [code, 1]


@pytest.mark.parametrize(("codes", "terms"), [([0, 0], 1), ([4, -8], 1), ([7, 1], 2)])
def test_there_are_as_few_terms_as_can_be(codes: list[int], terms: int) -> None:
    digits = power_digits(np.asarray(codes))
    assert digits is not None
    assert len(digits) == terms <= MOST_TERMS
