"""The operators of integer programs against integer arithmetic written independently in NumPy."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch

import narrows.ir.integer.statistics as statistics
import narrows.ir.integer.windows as windows
from narrows.errors import UsageError
from narrows.ir.integer.bounds import accumulator_bound
from narrows.ir.integer.grid import Grid, WeightGrid
from narrows.ir.integer.rounding import divide, shift
from narrows.ir.integer.slopes import slope_codes

ops = torch.ops.narrows
ROUNDINGS = ("half_even", "half_up")
RNG = np.random.default_rng(0)


def rounded(value: Fraction, rounding: str) -> int:
    return round(value) if rounding == "half_even" else math.floor(value + Fraction(1, 2))


def settled(
    values, shifts, zero: int, low: int, high: int, rounding: str, dtype: type = np.uint8
) -> np.ndarray:
    """Return codes for accumulators, one by one and in exact fractions."""
    values, shifts = np.broadcast_arrays(np.asarray(values, object), np.asarray(shifts))
    flat = [
        min(max(rounded(Fraction(int(v)) / Fraction(2) ** int(s), rounding) + zero, low), high)
        for v, s in zip(values.flat, shifts.flat, strict=True)
    ]
    return np.array(flat, dtype).reshape(values.shape)


def codes(*shape: int) -> torch.Tensor:
    return torch.from_numpy(RNG.integers(0, 256, shape).astype(np.uint8))


def whole(x: torch.Tensor, zero: int = 0) -> np.ndarray:
    return x.numpy().astype(np.int64) - zero


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_shift_is_a_rounded_quotient(rounding: str) -> None:
    values = np.concatenate([np.arange(-70, 71), RNG.integers(-(2**31), 2**31, 60)])
    for by in (-3, -1, 0, 1, 2, 3, 7, 16, 31):
        expected = [rounded(Fraction(int(v)) / Fraction(2) ** by, rounding) for v in values]
        assert shift(torch.from_numpy(values), by, rounding).tolist() == expected


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_division_is_a_rounded_quotient(rounding: str) -> None:
    values = np.arange(-300, 301)
    for by in (1, 2, 3, 7, 36, 49, 121):
        expected = [rounded(Fraction(int(v), by), rounding) for v in values]
        assert divide(torch.from_numpy(values), by, rounding).tolist() == expected


@pytest.mark.parametrize(("rounding", "zero"), [*product(ROUNDINGS, (0, 128))])
def test_conv(rounding: str, zero: int) -> None:
    x, weight = codes(2, 4, 5, 6), torch.from_numpy(RNG.integers(-127, 128, (6, 2, 3, 2), np.int8))
    bias = torch.from_numpy(RNG.integers(-3000, 3000, 6, np.int32))
    shifts = [7, 8, 6, 9, 7, 5]
    got = ops.conv(
        x, weight, bias, shifts, zero, 128, 3, 250, [2, 1], [1, 0], [1, 2], 2, rounding
    )  # fmt: skip
    padded = np.pad(whole(x, zero), ((0, 0), (0, 0), (1, 1), (0, 0)))
    out = np.zeros((2, 6, 3, 4), np.int64) + bias.numpy()[None, :, None, None]
    for n, o, i, j in product(range(2), range(6), range(3), range(4)):
        group = o // 3 * 2
        window = padded[n, group : group + 2, 2 * i : 2 * i + 3, j : j + 3 : 2]
        out[n, o, i, j] += (window * weight.numpy().astype(np.int64)[o]).sum()
    by = np.array(shifts)[:, None, None]
    np.testing.assert_array_equal(got.numpy(), settled(out, by, 128, 3, 250, rounding))


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_conv_transpose(rounding: str) -> None:
    x, weight = codes(1, 2, 3), torch.from_numpy(RNG.integers(-127, 128, (2, 3, 3), np.int8))
    got = ops.conv_transpose(x, weight, None, [8], 128, 0, 0, 255, [2], [1], [1], [1], 1, rounding)
    out = np.zeros((1, 3, 9), np.int64)
    for c, o, i, k in product(range(2), range(3), range(3), range(3)):
        out[0, o, 2 * i + k] += (whole(x, 128)[0, c, i]) * int(weight[c, o, k])
    np.testing.assert_array_equal(got.numpy(), settled(out[:, :, 1:7], 8, 0, 0, 255, rounding))


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_linear_and_matmul(rounding: str) -> None:
    x, weight = codes(2, 3, 5), torch.from_numpy(RNG.integers(-127, 128, (4, 5), np.int8))
    bias = torch.from_numpy(RNG.integers(-900, 900, 4, np.int32))
    out = whole(x, 128) @ weight.numpy().astype(np.int64).T + bias.numpy()
    got = ops.linear(x, weight, bias, [6, 7, 8, 9], 128, 128, 0, 255, rounding)
    expected = settled(out, np.array([6, 7, 8, 9]), 128, 0, 255, rounding)
    np.testing.assert_array_equal(got.numpy(), expected)
    other = codes(2, 5, 2)
    got = ops.matmul(x, other, 9, 128, 0, 128, 10, 240, rounding)
    out = whole(x, 128) @ whole(other)
    np.testing.assert_array_equal(got.numpy(), settled(out, 9, 128, 10, 240, rounding))


@pytest.mark.parametrize(("rounding", "sign"), [*product(ROUNDINGS, (1, -1))])
def test_add_aligns_to_the_finer_exponent(rounding: str, sign: int) -> None:
    a, b = codes(3, 4), codes(1, 4)
    got = ops.add(a, b, 2, 0, 3, 128, 0, 128, 0, 255, sign, rounding)
    out = whole(a, 128) * 4 + sign * whole(b)
    np.testing.assert_array_equal(got.numpy(), settled(out, 3, 128, 0, 255, rounding))


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_mul_rescale_and_concat(rounding: str) -> None:
    a, b = codes(3, 4, 2), codes(3, 1, 2)
    got = ops.mul(a, b, 7, 128, 0, 128, 0, 255, rounding)
    out = whole(a, 128) * whole(b)
    np.testing.assert_array_equal(got.numpy(), settled(out, 7, 128, 0, 255, rounding))
    got = ops.rescale(a, -1, 128, 0, 0, 192, rounding)
    np.testing.assert_array_equal(got.numpy(), settled(whole(a, 128), -1, 0, 0, 192, rounding))
    got = ops.concat([a, b], 1, [1, -2], [128, 0], 128, 0, 255, rounding)
    parts = [settled(whole(a, 128), 1, 128, 0, 255, rounding),
             settled(whole(b), -2, 128, 0, 255, rounding)]  # fmt: skip
    np.testing.assert_array_equal(got.numpy(), np.concatenate(parts, 1))


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_wide_codes(rounding: str) -> None:
    """Sums beyond 32 bits; results in int16, or back in uint8."""
    x = torch.from_numpy(RNG.integers(-(2**15), 2**15, (2, 700), np.int16))
    weight = torch.from_numpy(RNG.integers(-127, 128, (4, 700), np.int8))
    bias = torch.from_numpy(RNG.integers(-(2**30), 2**30, 4, np.int32))
    weight[0], x[0], bias[0] = 127, 32767, 0
    out = whole(x) @ weight.numpy().astype(np.int64).T + bias.numpy()
    assert out.max() > 2**31
    ends, small = (0, -(2**15), 2**15 - 1), (128, 0, 255)
    for tail, wide, dtype in ((ends, True, np.int16), (small, False, np.uint8)):
        by = [17, 9, 10, 11] if wide else [24, 17, 18, 19]
        got = ops.linear(x, weight, bias, by, 0, *tail, rounding, wide)
        assert got.dtype is (torch.int16 if wide else torch.uint8)
        expected = settled(out, np.array(by), *tail, rounding, dtype)
        np.testing.assert_array_equal(got.numpy(), expected)
    other = codes(2, 700)
    got = ops.add(x, other, 0, 8, 1, 0, 128, *ends, -1, rounding, True)
    expected = settled(whole(x) - whole(other, 128) * 256, 1, *ends, rounding, np.int16)
    np.testing.assert_array_equal(got.numpy(), expected)
    product_ = settled(whole(x) * whole(x), 16, *ends, rounding, np.int16)
    np.testing.assert_array_equal(ops.mul(x, x, 16, 0, 0, *ends, rounding, True), product_)
    got = ops.concat([x, other], 1, [8, 0], [0, 128], *small, rounding)
    parts = [settled(whole(x), 8, *small, rounding), other.numpy()]
    np.testing.assert_array_equal(got.numpy(), np.concatenate(parts, 1))
    table = torch.arange(2**16).flip(0).sub(2**15).to(torch.int16)
    assert torch.equal(ops.lookup(x, table, "", -(2**15)), -1 - x)


@pytest.mark.parametrize(("rounding", "by"), [*product(ROUNDINGS, (-2, 0, 1))])
def test_averages_are_rounded_once(rounding: str, by: int) -> None:
    x = codes(2, 3, 5, 4)
    sums = whole(x, 128).sum((2, 3)).ravel()
    for divisor in (0, 1, 7):
        got = ops.mean(x, [2, 3], False, by, 128, 128, 0, 255, divisor, rounding)
        quotients = [Fraction(int(v), divisor or 20) / Fraction(2) ** by for v in sums]
        expected = [min(max(rounded(q, rounding) + 128, 0), 255) for q in quotients]
        assert got.flatten().tolist() == expected


@pytest.mark.parametrize(("padded", "ceil"), [*product((True, False), (True, False))])
def test_average_pool_counts_as_torch_does(padded: bool, ceil: bool) -> None:
    x = codes(1, 2, 7, 6)
    how = ([3, 2], [2, 2], [1, 0], ceil, padded)
    got = ops.average_pool(x, *how, 0, 0, 0, 0, 255)
    exact = torch.nn.functional.avg_pool2d(x.double(), *how).round()
    assert torch.equal(got, exact.to(torch.uint8))


@pytest.mark.parametrize(
    ("shape", "kernel", "pool"),
    [((2, 3, 11), [3], "avg_pool1d"), ((1, 2, 5, 6, 7), [3, 2, 3], "avg_pool3d")],
)
def test_average_pools_of_lines_and_volumes(
    shape: tuple[int, ...], kernel: list[int], pool: str
) -> None:
    x, axes = codes(*shape), len(kernel)
    how = (kernel, [2] * axes, [1] * axes, True, False)
    exact = getattr(torch.ops.aten, pool).default(x.double(), *how).round()
    assert torch.equal(ops.average_pool(x, *how, 0, 0, 0, 0, 255), exact.to(torch.uint8))


def test_a_divisor_takes_the_place_of_the_count() -> None:
    x = codes(1, 2, 7, 6)
    how = ([3, 2], [2, 2], [1, 0], True, False)
    got = ops.average_pool(x, *how, 0, 0, 0, 0, 255, 11)
    exact = torch.nn.functional.avg_pool2d(x.double(), *how, divisor_override=11).round()
    assert torch.equal(got, exact.to(torch.uint8))


RESIZINGS = (
    ("linear", "bilinear", False), ("linear", "bilinear", True), ("cubic", "bicubic", False),
    ("smooth", "bilinear", False), ("nearest", "nearest-exact", None),
)  # fmt: skip


@pytest.mark.parametrize(("kind", "mode", "corners"), RESIZINGS)
@pytest.mark.parametrize("size", [(10, 14), (12, 9), (3, 4), (20, 28)])
def test_resizing_is_torch_within_a_step_of_its_weights(
    kind: str, mode: str, corners: bool | None, size: tuple[int, int]
) -> None:
    x = codes(2, 3, 5, 7)
    made = [
        windows.resizing(kind, *e, 0.0, bool(corners), 2) for e in zip((5, 7), size, strict=True)
    ]
    assert all(set(w.sum(1).tolist()) <= {2**b for b in range(9)} for _, w in made)
    places, weights = ([pair[i] for pair in made] for i in range(2))
    got = ops.resample(x, places, weights, -2, 128, 128, 0, 255)
    smooth = {"antialias": True} if kind == "smooth" else {}
    true = torch.nn.functional.interpolate(
        x.double() - 128, size=size, mode=mode, align_corners=corners, **smooth
    )
    assert (got.double() - 128 - (4 * true).clamp(-128, 127)).abs().max() < 0.5 + 4 * 255 * 2**-8
    fake = ops.fake_resize((x.double() - 128) / 4, kind, size, [0.0, 0.0], bool(corners))
    assert torch.equal((4 * (4 * fake)).round().clamp(-128, 127) + 128, got.double())


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_uneven_windows_are_rounded_once(rounding: str) -> None:
    x = codes(1, 2, 10, 7)
    pairs = [windows.uneven(10, 4), windows.uneven(7, 3)]
    places, weights = ([pair[i] for pair in pairs] for i in range(2))
    got = ops.resample(x, places, weights, 1, 128, 128, 0, 255, rounding)
    for c, i, j in product(range(2), range(4), range(3)):
        rows, columns = (
            slice(n * k // m, -(-(k + 1) * n // m)) for n, m, k in ((10, 4, i), (7, 3, j))
        )
        window = whole(x, 128)[0, c, rows, columns]
        quotient = Fraction(int(window.sum()), 2 * window.size)
        assert int(got[0, c, i, j]) == rounded(quotient, rounding) + 128


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_prelu_rounds_once(rounding: str) -> None:
    x, weight = codes(2, 3, 4), torch.tensor([0.3, -1.5, 2.0**-9])
    slopes, unit = slope_codes(weight, 3)
    assert (unit, slopes.flatten().tolist()) == (13, [2458, -12288, 16])
    got = ops.prelu(x, slopes, unit, unit - 1, 128, 128, 0, 255, rounding)
    factor = np.where(whole(x, 128) > 0, 2**13, slopes.numpy().astype(np.int64))
    expected = settled(whole(x, 128) * factor, 12, 128, 0, 255, rounding)
    np.testing.assert_array_equal(got.numpy(), expected)
    assert slope_codes(torch.tensor([1e9]), 2)[0].tolist() == [32767]


@pytest.mark.parametrize(("rounding", "by"), [*product(ROUNDINGS, (-9, -2, 0, 1, 5))])
def test_a_quotient_is_exact_and_ends_at_zero(rounding: str, by: int) -> None:
    a, b = codes(3, 400), codes(400)
    b[:40] = 128
    made = ops.div.default(a, b, by, 100, 128, 128, 3, 250, rounding)
    expected = []
    for over, under in zip(whole(a, 100).flat, np.tile(whole(b, 128), 3), strict=True):
        if under == 0:
            code = 128 + 1000 * int(np.sign(over))
        else:
            value = Fraction(int(over), int(under)) / Fraction(2) ** by
            code = rounded(value, rounding) + 128
        expected.append(min(max(code, 3), 250))
    assert made.flatten().tolist() == expected


@pytest.mark.parametrize(("rounding", "by"), [*product(ROUNDINGS, (-3, -1, 0, 1, 2, 4))])
def test_a_norm_is_a_root_rounded_once(rounding: str, by: int) -> None:
    x = codes(300, 4)
    x[:60] = torch.arange(60, dtype=torch.uint8)[:, None] + 128  # roots of whole numbers, ties
    made = ops.vector_norm.default(x, 2.0, [1], False, by, 128, 0, 0, 255, rounding)
    expected = []
    for square in (whole(x, 128) ** 2).sum(1).tolist():
        down = math.isqrt(math.floor(Fraction(square) / Fraction(4) ** by))
        over = Fraction(square) / Fraction(4) ** by - (down + Fraction(1, 2)) ** 2
        up = over > 0 or (over == 0 and (rounding == "half_up" or down % 2 == 1))
        expected.append(min(down + up, 255))
    assert made.tolist() == expected


@pytest.mark.parametrize("exponent", [6, 8, 10])
def test_softmax_is_an_exact_quotient(exponent: int) -> None:
    x = codes(4, 9)
    table = statistics.exponentials(4, statistics.table_bits(exponent, 9))
    got = ops.softmax(x, table, -1, exponent, 0, 0, 255)
    for row, made in zip(x.tolist(), got.tolist(), strict=True):
        powers = [int(table[max(row) - q]) for q in row]
        exact = [Fraction(p * 2**exponent, sum(powers)) for p in powers]
        assert made == [min(rounded(q, "half_even"), 255) for q in exact]
        true = torch.softmax(torch.tensor(row, dtype=torch.float64) / 16, 0) * 2**exponent
        assert max(abs(t - q) for t, q in zip(true.tolist(), exact, strict=True)) < 0.6


def test_tables_of_exponentials_keep_away_from_ties() -> None:
    for exponent, bits in product(range(-2, 8), (8, 11, 15)):
        table = statistics.exponentials(exponent, bits)
        assert statistics.distinct(table, exponent)
        assert 2 ** (bits - 1) < int(table[0]) <= 2**bits


def test_layer_norm_is_close_to_the_true_one() -> None:
    x, weight, bias = codes(5, 24), torch.randn(24), torch.randn(24)
    gain, offset = statistics.norm_parameters(weight, bias, [24], 5)
    eps = statistics.norm_eps(1e-5, 4)
    got = ops.layer_norm(x, gain, offset, 1, eps, 128, 128, 0, 255).double() - 128
    true = torch.nn.functional.layer_norm((x.double() - 128) / 16, (24,), weight.double(),
                                          bias.double()) * 32  # fmt: skip
    assert (got - true.clamp(-128, 127)).abs().max() <= 0.5 + 1e-3


@pytest.mark.parametrize("centred", [True, False])
def test_group_and_rms_norms_are_close_to_the_true_ones(centred: bool) -> None:
    x, weight, bias = codes(3, 4, 6, 5), torch.randn(4), torch.randn(4)
    gain, offset = (t.reshape(2, 2, 1) for t in statistics.norm_parameters(weight, bias, [4], 5))
    eps = statistics.norm_eps(1e-5, 4)
    rows = x.reshape(3, 2, 2, 30)
    got = ops.layer_norm(rows, gain, offset, 2, eps, 128, 128, 0, 255, centred)
    true = (rows.double() - 128) / 16
    true = true - true.mean((2, 3), keepdim=True) if centred else true
    true = true / (true.square().mean((2, 3), keepdim=True) + 1e-5).sqrt() * gain + offset
    assert (got.double() - 128 - true.clamp(-128, 127)).abs().max() <= 0.5 + 1e-3
    x = (x.double() - 128) / 16
    made = ops.fake_group_norm(x, weight, bias, 2, 1e-5, [4, 128, 0, 255], [5, 128, 0, 255])
    if centred:
        assert torch.equal(made * 32 + 128, got.double().reshape(x.shape))


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("count", [3, 700, statistics.LARGEST_WIDE_NORM])
def test_norms_of_the_largest_wide_codes_are_the_true_ones(count: int, centred: bool) -> None:
    """The sums are held to whole numbers without an end: nothing overflows at the longest rows."""
    high = np.full(count, 2**15 - 1)
    ends = [-high - 1, high, np.where(np.arange(count) % 2, high, -high - 1)]
    ends += [np.where(np.arange(count) == 1, high, -1), RNG.integers(-(2**15), 2**15, count)]
    x = torch.from_numpy(np.stack(ends).astype(np.int16))
    offset = torch.from_numpy(RNG.normal(size=count).astype(np.float32))
    got = ops.layer_norm(
        x, torch.full((count,), 3000.0), offset, 1, 0.25, 0, 0, -(2**15), 2**15 - 1, centred,
        "half_even", True,
    )  # fmt: skip
    assert got.dtype is torch.int16
    for row, made in zip(ends, got.tolist(), strict=True):
        total, squares = int(row.sum()) if centred else 0, sum(int(v) ** 2 for v in row)
        spread = math.sqrt(Fraction(count * squares - total**2, count**2) + Fraction(1, 4))
        true = (row - total / count) / spread * 3000 + offset.numpy().astype(np.float64)
        assert np.abs(np.array(made) - true.clip(-(2**15), 2**15 - 1)).max() <= 0.52


def test_a_norm_of_nothing_but_its_mean_is_its_offset() -> None:
    x = torch.full((2, 7), 200, dtype=torch.uint8)
    gain, offset = torch.ones(7) * 32, torch.arange(7.0)
    got = ops.layer_norm(x, gain, offset, 1, statistics.norm_eps(0.0, 4), 128, 128, 0, 255)
    assert got.tolist() == [[128 + i for i in range(7)]] * 2


def test_quantize_and_back() -> None:
    x = torch.tensor([-9.0, -0.75, -0.25, 0.25, 0.75, 1.25, 9.0])
    assert ops.quantize(x, 1, 128, 120, 135).tolist() == [120, 126, 128, 128, 130, 130, 135]
    assert ops.quantize(x, 1, 0, 0, 15).tolist() == [0, 0, 0, 0, 2, 2, 15]
    back = ops.dequantize(ops.quantize(x, 1, 128, 120, 135), 1, 128)
    assert torch.equal(back, ops.fake_quantize(x, 1, 128, 120, 135))


def test_bound_covers_every_input() -> None:
    weight = torch.tensor([[3, -2, 5], [-7, -7, 0]], dtype=torch.int8)
    bias = torch.tensor([4, -9], dtype=torch.int32)
    assert accumulator_bound(weight, bias, Grid(3)).tolist() == [255 * 8 + 4, 255 * 14 + 9]
    signed = accumulator_bound(weight, None, Grid(3, 128))
    assert signed.tolist() == [128 * 8 + 127 * 2, 128 * 14]
    turned = torch.arange(-6, 6, dtype=torch.int8).reshape(4, 1, 3)
    assert accumulator_bound(turned, None, Grid(0), 1, 2).tolist() == [255 * 21, 255 * 15]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Grid(3, 127), "a zero point is 0 or 128"),
        (lambda: Grid(3, 0, 1), "1-bit codes are not supported"),
        (lambda: Grid(99), "cannot be represented"),
        (lambda: WeightGrid((3,), 40), "40-bit weights are not supported"),
        (lambda: WeightGrid((-99,)), "cannot be represented"),
    ],
)
def test_grids_refuse(make, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        make()


def test_operators_know_their_shapes_without_data() -> None:
    x = codes(2, 4, 5, 5)
    weight = torch.ones(6, 4, 3, 3, dtype=torch.int8)
    args = ([4], 0, 0, 0, 255, [1, 1], [1, 1], [1, 1], 1)
    real = ops.conv(x, weight, None, *args)
    bare = ops.conv(x.to("meta"), weight.to("meta"), None, *args)
    assert (bare.shape, bare.dtype) == (real.shape, real.dtype)
