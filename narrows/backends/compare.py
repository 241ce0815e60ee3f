"""How an artifact is compared with the program it was made from: on which inputs, how closely."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from narrows.ir.program import Meta, Program, relative_error

# The largest difference that is taken for rounding, relative to the largest number of an output.
# The runtime sums in another order and fuses operators, so it differs by a few units in the last
# place per layer: 1e-6 to 1e-5 in float32 (unit 6e-8) for networks of 20 to 200 layers. A wrong
# operator, weight or axis moves an output by 1e-2 and more. float64 has the same margin above
# its unit (1e-16); float16 and bfloat16 round every layer's output to 5e-4 and 4e-3.
TOLERANCE: dict[torch.dtype, float] = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 6e-2,
}

FLAT = "every output was one and the same number on all checked inputs, so the check tells little"


def limit_of(wanted: Any) -> float:
    """Return the relative error that an output may have."""
    return TOLERANCE.get(wanted.dtype, 0.0) if isinstance(wanted, Tensor) else 0.0


def tolerance_of(program: Program) -> float:
    """Return the relative error that an output of a program may have, by its dtypes."""
    tensors = [*program.weights.values(), *(e for e in program.examples if isinstance(e, Tensor))]
    return max((TOLERANCE.get(t.dtype, 0.0) for t in tensors), default=0.0)


def varies(wanted: Any) -> bool:
    """Whether an output holds two numbers that differ, without which a check tells little."""
    if not isinstance(wanted, Tensor) or not wanted.numel():
        return False
    return bool((wanted != wanted.flatten()[0]).any())


def output_names(program: Program) -> list[str]:
    """Return the names of a program's flat outputs."""
    outputs: Any = program.output.args[0]
    return [getattr(value, "name", repr(value)) for value in outputs]


def output_error(actual: Any, expected: Any) -> float:
    """Return the relative error of one output; infinite unless whole numbers are equal.

    A result without a finite number, of which nothing can be told, counts as infinitely wrong.
    """
    if not isinstance(expected, Tensor):
        return 0.0 if actual == expected else math.inf
    got = torch.from_numpy(np.ascontiguousarray(actual).reshape(np.shape(actual)))
    if got.dtype != expected.dtype or got.shape != expected.shape:
        return math.inf
    if not expected.is_floating_point():
        return 0.0 if torch.equal(got, expected) else math.inf
    if expected.numel() and not bool(expected.isfinite().any()):
        return math.nan
    return relative_error(got, expected)


def draw_inputs(
    program: Program, batch: int | None, generator: torch.Generator | None
) -> list[Any]:
    """Return flat inputs of another batch size, like the program's examples.

    Numbers are drawn between the example's smallest and largest; whole numbers and truth values are
    rows of the example, so that indices stay in range. Without a generator the rows are the
    example's own, repeated where there are too few.
    """
    drawn: list[Any] = []
    for node, example in zip(program.placeholders, program.examples, strict=True):
        if not isinstance(example, Tensor):
            drawn.append(example)
            continue
        value = example.detach()
        free = Meta(node).dynamic if batch is not None else ()
        for axis in free or ((0,) if value.dim() else ()):
            rows = value.shape[axis]
            count = batch if batch is not None and axis in free else rows
            if generator is None:
                order = torch.arange(count) % rows
            elif free:
                order = torch.randint(rows, (count,), generator=generator)
            else:
                order = torch.randperm(rows, generator=generator)
            value = value.index_select(axis, order)
        drawn.append(value if generator is None else _redraw(value, generator))
    return drawn


def _redraw(value: Tensor, generator: torch.Generator) -> Tensor:
    if not value.is_floating_point() or not value.numel() or not bool(value.isfinite().all()):
        return value
    low, high = value.min().item(), value.max().item()
    drawn = torch.rand(value.shape, generator=generator) * (high - low) + low
    if low == high:  # an example of zeros says nothing of the range
        drawn = torch.randn(value.shape, generator=generator)
    return drawn.to(value.dtype)
