"""Laws for the facts of a row that no channel shows: where an operator ends, whether it takes any
width, what kind of work it is, and what its integer form computes.

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
from narrows.ir.ops.integer_forms import Lookup
from narrows.ir.ops.pointwise import PerChannel, Pointwise
from narrows.ir.ops.row import Row
from narrows.ir.ops.samples import Given, Made, Sample, Size, Weight
from narrows.ir.program import Program
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


__all__ = ["integer_law", "partial_law", "width_law", "work_law"]
