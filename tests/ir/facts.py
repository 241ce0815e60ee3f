"""Laws for the facts of a row that no channel shows: where an operator ends, whether it takes any
width, what kind of work it is, when it changes nothing, what it is put together of, what its
parameters do, and what its integer form computes.

Each raises an `AssertionError` if the operator does not do what the row says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

import narrows
from narrows.errors import NarrowsError
from narrows.ir.channels import analyse
from narrows.ir.compare import relative_error
from narrows.ir.ops.args import arguments
from narrows.ir.ops.integer_forms import Lookup
from narrows.ir.ops.pointwise import PerChannel, Pointwise
from narrows.ir.ops.row import Row
from narrows.ir.ops.sample import Given, Made, Sample, Size, Weight
from narrows.ir.program import Program
from narrows.passes.eliminate_dead import identity_of
from tests.ir.bench import Bench

# Numbers at which functions end: where they turn, where powers and logarithms have poles, and where
# exponentials leave float64.
HARD = (-2000.0, -3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0, 2000.0)
SAME = {"rtol": 1e-12, "atol": 1e-12}  # float64: another number is off by far more

# Codes of 8 bits, scales that are powers of two: about 1 % of the range; another function is off by
# tens of percent.
CODES = 0.05


# ------------------------------------------------------------------ partial


def partial_law(row: Pointwise) -> None:
    """``partial``: for some finite inputs the result is infinite or undefined, or for none."""
    calls = [call for sample in row.samples for call in _with_hard_numbers(row, sample)]
    ends = [call for call in calls if not all_finite(row, *call)]
    if row.partial:
        assert ends, "it is finite everywhere"
    else:
        assert not ends, f"it ends: {ends[0]}"


def all_finite(row: Row, args: Any, kwargs: Any) -> bool:
    """Whether a call is finite where each of its tensors takes all hard numbers in turn."""
    leaves = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Made | Given | Weight)]
    axes = {id(leaf): i for i, leaf in enumerate(dict.fromkeys(leaves))}

    def hard(leaf: Any) -> Any:
        if isinstance(leaf, Size):
            return leaf.rows
        if id(leaf) not in axes:
            return leaf
        numbers = torch.tensor(HARD, dtype=torch.float64).to(leaf.dtype).unique()
        if leaf.shape == ():
            return numbers[0]
        return numbers.reshape([-1 if a == axes[id(leaf)] else 1 for a in range(len(axes))])

    args, kwargs = pytree.tree_map(hard, (args, kwargs))
    try:
        return bool(torch.as_tensor(row.target(*args, **kwargs)).isfinite().all())
    except (RuntimeError, ZeroDivisionError):
        return False


def _with_hard_numbers(row: Row, sample: Sample) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield a sample's call, and those with other numbers for an operand that is a number."""
    yield sample.args, sample.kwargs
    for i, argument in enumerate(row.target._schema.arguments[: len(sample.args)]):
        operand = argument.name in ("self", "other", "exponent")
        if operand and "number" in str(argument.type).lower():
            for number in HARD:
                yield (*sample.args[:i], number, *sample.args[i + 1 :]), sample.kwargs


# ------------------------------------------------------------------ any_width


def width_law(row: Row) -> None:
    """``any_width``: with more channels the operator does to the first ones what it did before."""
    if not row.any_width and not isinstance(row, Pointwise | PerChannel):
        return  # it may take any width all the same
    found = [takes_more(row, sample) for sample in row.samples]
    if row.any_width:
        assert False not in found, f"not at another width: {row.samples[found.index(False)]}"
    else:
        assert False in found, "it takes any width"


def takes_more(row: Row, sample: Sample) -> bool | None:
    """Whether an operator takes one channel more, its literals unchanged.

    ``None`` where the sample does not tell: no axis of its operands is all channels, or none is
    passed on.
    """
    bench = Bench(row, sample)
    grown = {
        node: (made.axes[0], bench.uniform(made.shape, made.low, made.high).to(made.dtype))
        for made, node in bench.made.items()
        if len(made.axes) == 1 and made.shape[made.axes[0]] > 1
    }
    if not grown or any(len(made.axes) > 1 for made in bench.made):
        return None
    facts = analyse(bench.program())
    for follows in row.weight_axes(facts, bench.node):
        grown[follows.weight] = follows.axis, bench.values[follows.weight]

    def more(node: fx.Node) -> Any:
        value = bench.values[node]
        if node not in grown:
            return value
        axis, fresh = grown[node]
        return torch.cat([value, fresh.narrow(axis, 0, 1)], axis)

    args, kwargs = fx.node.map_arg((bench.node.args, bench.node.kwargs), more)
    try:
        after = row.target(*args, **kwargs)
    except (RuntimeError, IndexError, ValueError):
        return False
    before = bench.values[bench.node]
    if not isinstance(after, Tensor) or after.dim() != before.dim():
        return False
    return None if after.shape == before.shape else _begins_with(after, before)


def _begins_with(after: Tensor, before: Tensor) -> bool:
    """Whether one tensor is the other with something more at the end of some axes."""
    if any(a < b for a, b in zip(after.shape, before.shape, strict=True)):
        return False
    for axis, size in enumerate(before.shape):
        after = after.narrow(axis, 0, size)
    return torch.allclose(after.double(), before.double(), equal_nan=True, **SAME)


# ------------------------------------------------------------------ work_kind


def work_law(row: Row) -> None:
    """``work_kind``: what its results may have to do with its operands."""
    kind = row.work_kind
    if not kind:
        return
    benches = [Bench(row, sample) for sample in row.samples]
    stays = [_stays(bench) for bench in benches]
    if kind == "view":
        assert all(stays), f"elements move: {row.samples[stays.index(False)]}"
    elif row.kind == "layout":
        assert not all(stays), "no element moves: it is a view"
    if kind in ("pointwise", "scale"):
        assert all(map(_is_local, benches)), "elements depend on others"
    shares = [_adds_up_to_one(bench) for bench in benches]
    assert (kind == "softmax") == all(shares), "it is a softmax if its results add up to one"
    if kind == "pool":
        sizes = [(b.values[b.node].numel(), _first(b).numel()) for b in benches]
        assert all(made <= read for made, read in sizes), "a pooling makes fewer elements"


def _first(bench: Bench) -> Tensor:
    node = next(n for n in bench.node.all_input_nodes if isinstance(bench.values[n], Tensor))
    return bench.values[node]


def _stays(bench: Bench) -> bool:
    """Whether the result has its operand's elements in the same order in memory."""
    result, operand = bench.values[bench.node], _first(bench)
    if not isinstance(result, Tensor) or result.numel() != operand.numel():
        return False
    return torch.equal(result.flatten(), operand.flatten().to(result.dtype))


def _is_local(bench: Bench) -> bool:
    """Whether a change of one element of an operand changes that element of the result alone."""
    result = bench.values[bench.node]
    for made, node in bench.made.items():
        if made.shape != tuple(result.shape):
            continue
        changed = bench.values[node].clone()
        other = changed.flatten()[-1] if changed.dtype != torch.bool else ~changed.flatten()[0]
        changed.view(-1)[0] = other
        args, kwargs = fx.node.map_arg(
            (bench.node.args, bench.node.kwargs),
            lambda n, node=node, changed=changed: changed if n is node else bench.values[n],
        )
        after = bench.row.target(*args, **kwargs)
        if not torch.equal(after.flatten()[1:], result.flatten()[1:]):
            return False
    return True


def _adds_up_to_one(bench: Bench) -> bool:
    """Whether the result, or its exponential, has the sum one along an argument's axis."""
    result = bench.values[bench.node]
    axis = bench.node.args[1] if len(bench.node.args) > 1 else None
    if not isinstance(axis, int) or isinstance(axis, bool) or not isinstance(result, Tensor):
        return False
    if not -result.dim() <= axis < result.dim() or not result.is_floating_point():
        return False
    sums = result.sum(axis), result.exp().sum(axis)
    return any(torch.allclose(s, torch.ones_like(s), **SAME) for s in sums)


# ------------------------------------------------------------------ identity


def identity_law(row: Row) -> None:
    """``identity``: where the rule says so, the result is the first operand."""
    found = 0
    for sample in row.samples:
        for tried in (sample, *_with_neutral_numbers(row, sample)):
            bench = Bench(row, tried)
            if identity_of(bench.program(), bench.node) is not None:
                assert torch.equal(bench.values[bench.node], _first(bench)), f"not: {tried}"
                found += 1
    assert found, "no sample hands its operand on"


def _with_neutral_numbers(row: Row, sample: Sample) -> Iterator[Sample]:
    """Yield a call with zero and with one for an operand that is a number, or could be one."""
    names = [a.name for a in row.target._schema.arguments[: len(sample.args)]]
    for number in (0, 1) if "other" in names else ():
        at = names.index("other")
        yield Sample((*sample.args[:at], number, *sample.args[at + 1 :]), sample.kwargs)


# ------------------------------------------------------------------ parts


def parts_law(row: Row) -> None:
    """``parts``: each element of the result is one of these arguments', or a number given."""
    for sample in row.samples:
        bench = Bench(row, sample)
        given = arguments(bench.node)
        leaves = pytree.tree_leaves([given[name] for name in row.parts])
        tensors = [bench.values[x].flatten() for x in leaves if isinstance(x, fx.Node)]
        flat = [x for x in pytree.tree_leaves(given) if not isinstance(x, fx.Node)]
        numbers = [float(x) for x in flat if isinstance(x, int | float)]
        beside = [bench.values[x] for x in pytree.tree_leaves(given) if isinstance(x, fx.Node)]
        scalars = [x.flatten() for x in beside if x.shape == ()]
        known = torch.cat([*tensors, *scalars, torch.tensor(numbers, dtype=torch.float64)])
        assert bool(torch.isin(bench.values[bench.node], known).all()), (
            f"not put together: {sample}"
        )


# ------------------------------------------------------------------ gain


def gain_law(row: Row) -> None:
    """``gain``: where an entry is zero the result is the bias; other weights have no such effect.

    `Row.parameter_axis` says along which axis of the operand an entry lies.
    """
    found = [_is_silent(row, sample, row.gain or "weight") for sample in row.samples]
    if row.gain:
        assert True in found, "no sample has a gain"
        assert False not in found, f"something comes through: {row.samples[found.index(False)]}"
    else:
        assert False in found, "it has a gain"


def _is_silent(row: Row, sample: Sample, gain: str) -> bool | None:
    """Whether nothing comes through the first entry of a gain that is zero; ``None`` without."""
    bench = Bench(row, sample)
    given, values = arguments(bench.node), dict(bench.values)
    if not isinstance(given.get(gain), fx.Node):
        return None
    weight, bias, rank = values[given[gain]], given.get("bias"), _first(bench).dim()
    lies = [row.parameter_axis(axis, rank, weight.dim()) for axis in range(rank)]
    axis, own = next((axis, own) for axis, own in enumerate(lies) if own is not None)
    silent = weight.clone()
    silent.select(own, 0).zero_()
    values[given[gain]] = silent
    args, kwargs = fx.node.map_arg((bench.node.args, bench.node.kwargs), values.__getitem__)
    result = row.target(*args, **kwargs).select(axis, 0)
    wanted = torch.zeros(()) if bias is None else values[bias].select(own, 0)
    return torch.allclose(result, wanted.double(), **SAME)


# ------------------------------------------------------------------ affine


def affine_law(row: Row) -> None:
    """``affine``: half way between two operands is half way between their results, and each channel
    of axis 1 is moved and scaled by numbers of its own."""
    for sample in row.samples:
        bench = Bench(row, sample)
        x = next(iter(bench.made.values()))
        one = bench.values[x]
        two = bench.uniform(tuple(one.shape), -3.0, 3.0)

        def run(value: Tensor, bench: Bench = bench, x: fx.Node = x) -> Tensor:
            args, kwargs = fx.node.map_arg(
                (bench.node.args, bench.node.kwargs),
                lambda n: value if n is x else bench.values[n],
            )
            return row.target(*args, **kwargs)

        middle = (run(one) + run(two)) / 2
        torch.testing.assert_close(run((one + two) / 2), middle, **SAME)
        assert _is_local(bench), "elements depend on others"
        steps = (run(one) - run(two)) / (one - two)
        lines = steps.movedim(1, 0).flatten(1)
        torch.testing.assert_close(lines, lines[:, :1].expand_as(lines), rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------ keeps_axes


def axes_law(row: Row) -> None:
    """``keeps_axes``: the indices along an operand's axis are those along one axis of the result,
    or the same everywhere."""
    for sample in row.samples:
        bench = Bench(row, sample)
        x = next(iter(bench.made.values()))
        shape = tuple(bench.values[x].shape)
        for axis, size in enumerate(shape):
            view = [-1 if a == axis else 1 for a in range(len(shape))]
            ruler = torch.arange(size).view(view).expand(shape)
            args, kwargs = fx.node.map_arg(
                (bench.node.args, bench.node.kwargs),
                lambda n, x=x, ruler=ruler, bench=bench: ruler if n is x else bench.values[n],
            )
            result = row.target(*args, **kwargs)
            along = [
                a for a in range(result.dim()) if bool((result != result.narrow(a, 0, 1)).any())
            ]
            assert len(along) <= 1, f"an axis lies on several: {sample}"
            for own in along:
                line = result.movedim(own, 0).flatten(1)[:, 0]
                assert torch.equal(line, torch.arange(size)), f"an axis is mixed: {sample}"


# ------------------------------------------------------------------ integer


def integer_law(row: Row, program: Callable[[Row, Sample], Program]) -> None:
    """``integer``: on codes the operator computes what it computes on numbers.

    Args:
        row: The row.
        program: Makes the program that is nothing but a sample's call.
    """
    for sample in row.samples:
        floats = program(row, sample)
        inputs = [_coded(x) for x in floats.examples]
        try:
            quantized = narrows.quantize(floats, [inputs], method="minmax", check=False)
        except NarrowsError:  # these arguments have no integer form
            continue
        if quantized.plan.floats:
            continue
        actual = quantized.program.run_flat(inputs)
        error = relative_error(actual, floats.run_flat(inputs))
        assert error <= CODES, f"relative error {error:.2f}: {sample}"
        break
    else:
        raise AssertionError("no sample works on codes")
    if isinstance(row.integer, Lookup):
        assert not all(is_clip(row, sample) for sample in row.samples), "it is a clip"


def _coded(x: Tensor) -> Tensor:
    """Return numbers that are codes on any grid of 8 bits that covers them."""
    return (x * 8).round() / 8 if x.is_floating_point() else x


def is_clip(row: Row, sample: Sample) -> bool:
    """Whether a function of one number is ``min(max(x, low), high)``."""
    x = torch.linspace(-20.0, 20.0, 4001, dtype=torch.float64)
    tensors = [a for a in sample.args if isinstance(a, Made | Weight)]
    if len(tensors) != 1:
        return False
    args = [x if isinstance(a, Made | Weight) else a for a in sample.args]
    y = row.target(*args, **sample.kwargs)
    return bool(torch.equal(y, x.clamp(float(y.min()), float(y.max()))))


__all__ = [
    "affine_law",
    "axes_law",
    "gain_law",
    "identity_law",
    "integer_law",
    "partial_law",
    "parts_law",
    "width_law",
    "work_law",
]
