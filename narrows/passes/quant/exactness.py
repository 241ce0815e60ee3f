"""`assert_exact`: that a quantized program is what it claims to be, shown on a batch of data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from narrows.errors import FidelityError
from narrows.ir.integer.grid import CENTRE
from narrows.ir.meta import where
from narrows.ir.ops.args import arguments
from narrows.ir.program import Program
from narrows.passes.quant.batches import as_inputs
from narrows.passes.quant.fold_shifts import FoldShifts

ops: Any = torch.ops.narrows


def assert_exact(fake: Program, program: Program, item: Any) -> None:
    """Raise `FidelityError` unless scales are powers of two and the integers are the numbers.

    Every weight and every activation of the fake-quantized program, in float64, is a whole number
    of steps ``2**-e`` within its codes, its zero point is 0 or 128, and the outputs of the integer
    program are the same to the last bit.

    Args:
        fake: The fake-quantized program.
        program: The integer program.
        item: One batch, as for `narrows.quantize`.
    """
    flat = program.flat_inputs(*as_inputs(item))
    expected = (
        FoldShifts()
        .reference(fake)
        .run_flat(
            [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in flat],
            observe=_on_grid,
        )
    )
    made = program.run_flat(flat)
    for place, (a, b) in enumerate(zip(made, expected, strict=True)):
        if not isinstance(a, Tensor):
            continue
        count = int((a.double() != b.double()).sum())
        if count:
            raise FidelityError(
                f"{count:,} of {a.numel():,} elements of output {place} differ from the "
                "fake-quantized program",
                why="the integer program has to equal it bit for bit",
            )


def _on_grid(node: fx.Node, value: Any) -> None:
    if node.target is ops.fake_quantize.default:
        given = arguments(node)
        zero = given["zero"]
        good = zero in (0, CENTRE)
        steps = torch.tensor(2.0 ** -given["exponent"], dtype=torch.float64)
        low, high = given["low"] - zero, given["high"] - zero
    elif node.target is ops.fake_quantize_weight.default:
        given = arguments(node)
        good, low, high = True, given["low"], given["high"]
        steps = torch.exp2(-torch.tensor(given["exponents"], dtype=torch.float64))
        steps = steps.reshape([-1 if a == given["axis"] else 1 for a in range(value.dim())])
    else:
        return
    codes = value.double() / steps
    whole = bool(((codes == codes.round()) & (codes >= low) & (codes <= high)).all())
    if not (good and whole):
        raise FidelityError(
            "a tensor does not lie on its grid of a power of two",
            where=where(node),
            why="its zero point is neither 0 nor 128" if not good else "a number has no code",
        )


__all__ = ["assert_exact"]
