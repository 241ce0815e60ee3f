"""Floating-point numbers in whole numbers, as the C code of a norm has them: what IEEE 754 says."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from narrows.backends.c.compiler import build, find_compiler
from narrows.backends.c.source import kernel

pytestmark = pytest.mark.skipif(not find_compiler(), reason="there is no C compiler")

RNG = np.random.default_rng(0)
COUNT = 4000

SPREADS = """
int main(void)
{
    unsigned long long above, count, m;
    int e;

    while (scanf("%llu %llu %llu %d", &above, &count, &m, &e) == 4) {
        struct binary eps = {0, 0, 0}, made;
        eps.m = m;
        eps.e = e;
        made = spread_of(above, count, eps);
        printf("%llu %d\\n", (unsigned long long)made.m, made.e);
    }
    (void)normalise;
    return 0;
}
"""
STEPS = """
int main(void)
{
    unsigned a, b, c;

    while (scanf("%u %u %u", &a, &b, &c) == 3)
        printf("%d\\n", (int)whole(plus(times(binary32(a), binary32(b), 24), binary32(c), 24)));
    return 0;
}
"""


def run(folder: Path, parts: tuple[str, ...], main: str, rows: np.ndarray) -> np.ndarray:
    """Return what a program prints for lines of numbers."""
    head = "#include <stdint.h>\n#include <stdio.h>\ntypedef int32_t number;\n"
    (folder / "main.c").write_text(head + "\n".join(map(kernel, parts)) + main)
    build([folder / "main.c"], folder / "main", ("-O1",))
    text = "\n".join(" ".join(map(str, row)) for row in rows.tolist())
    done = subprocess.run([folder / "main"], input=text, capture_output=True, text=True, check=True)
    return np.array([line.split() for line in done.stdout.splitlines()], dtype=np.int64)


def test_the_spread_of_a_row_is_that_of_binary64(tmp_path: Path) -> None:
    count = RNG.integers(1, 2 ** RNG.integers(1, 19, COUNT))
    above = (RNG.random(COUNT) ** 8 * 128.0**2 * count.astype(float) ** 2).astype(np.int64)
    above[::50] = 0
    eps = np.exp2(RNG.uniform(-200, 60, COUNT))
    mantissa, exponent = np.frexp(eps)
    rows = np.stack([above, count, (mantissa * 2.0**53).astype(np.int64), exponent - 53], 1)
    parts = ("settled", "binary", "whole_half_even", "spread", "normalise")
    made = run(tmp_path, parts, SPREADS, rows)
    variance = above.astype(float) / (count.astype(float) ** 2) + eps
    wanted = (1.0 / (np.sqrt(variance) * count.astype(float))).astype(np.float32)
    np.testing.assert_array_equal(np.ldexp(made[:, 0].astype(np.float32), made[:, 1]), wanted)


@pytest.mark.parametrize("rounding", ["half_even", "half_up"])
def test_products_sums_and_codes_are_those_of_binary32(rounding: str, tmp_path: Path) -> None:
    a, b = (RNG.normal(size=COUNT).astype(np.float32) for _ in range(2))
    c = np.exp2(RNG.uniform(-20, 12, COUNT)).astype(np.float32) * RNG.choice([-1, 1], COUNT)
    c[::3] = RNG.integers(-600, 600, len(c[::3])) / 4  # near and on ties
    a[::6] = 0.0
    b[1::6] = 2.0**-26
    a[2::6], b[2::6] = 2.0**20, 3.0e5
    a[3::12], b[3::12] = 1.0, -c[3::12]  # nothing is left
    c = c.astype(np.float32)
    c[4::200] = np.nextafter(np.float32(0.5), np.float32(0))
    a[4::200] = 0.0
    rows = np.stack([v.view(np.uint32) for v in (a, b, c)], 1)
    made = run(tmp_path, ("binary", f"whole_{rounding}"), STEPS, rows).ravel()
    y = a * b + c
    whole = np.rint(y) if rounding == "half_even" else np.floor(y + np.float32(0.5))
    np.testing.assert_array_equal(made, whole.clip(-65536, 65536).astype(np.int64))
