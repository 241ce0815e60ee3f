"""Random networks: fake-quantized, in integers and in ONNX Runtime they are the same numbers.

The examples are the same on every run; `NARROWS_EXAMPLES=2000` searches further with fresh ones.
"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

import narrows
from narrows.ir.verify import verify
from tests.networks import random_masks, randomise
from tests.networks.generated import Generated, Step, bounded, heads, steps

forms = st.sampled_from(("qdq", "qlinear", "integer"))
bits = st.sampled_from((8, 8, 6, 4, 3, 2))
widths = st.sampled_from((8, 6, 4, 2, 12, 16))


def images(batch: int, seed: int) -> torch.Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def captured(drawn: list[Step], head: str, seed: int) -> narrows.Program:
    torch.manual_seed(seed)
    module = Generated(drawn, head)
    randomise(module, seed, (images(4, seed),))
    return narrows.capture(module.float(), (images(2, 0),))


def quantize(program: narrows.Program, seed: int, **options: Any) -> narrows.Quantized:
    """Return a program in integers, whatever unlike parts side by side lose by it."""
    return narrows.quantize(program, [images(4, seed)], allow_lost=True, **options)


@bounded(8)
@given(steps, heads, st.integers(0, 99), bits, widths, forms)
def test_every_backend_is_the_interpreter(
    drawn: list[Step], head: str, seed: int, weights: int, activations: int, form: str
) -> None:
    program = captured(drawn, head, seed)
    quantized = quantize(
        program, seed, weights=weights, activations=activations
    )  # its check holds the integer program to the fake-quantized one, bit for bit
    verify(quantized.program, shapes=True)
    narrows.lower(quantized.program, form=form, samples=1)  # and this to ONNX Runtime


@bounded(4)
@given(steps, heads, st.integers(0, 99), st.sampled_from((2, 3, 4, 5)), forms)
def test_levels_of_unequal_width_are_the_interpreter(
    drawn: list[Step], head: str, seed: int, activations: int, form: str
) -> None:
    program = captured(drawn, head, seed)
    options = {"activations": activations, "first_last": None, "align": False}
    quantized = quantize(program, seed, levels=True, **options)
    narrows.lower(quantized.program, form=form, samples=1)


@bounded(8)
@given(steps, heads, st.integers(0, 99), st.sampled_from((0.3, 0.6)))
def test_pruned_programs_quantize(drawn: list[Step], head: str, seed: int, amount: float) -> None:
    program = captured(drawn, head, seed)
    inputs, outputs = random_masks(program, amount, "both", seed)
    plan = narrows.plan(program, keep_inputs=inputs, keep_outputs=outputs, zeros=False)
    pruned = narrows.apply(program, plan)
    quantized = quantize(pruned, seed)
    narrows.lower(quantized.program, samples=1)


@bounded(8)
@given(steps, heads, st.integers(0, 99))
def test_ties_upward_are_the_interpreter_in_whole_numbers(
    drawn: list[Step], head: str, seed: int
) -> None:
    quantized = quantize(captured(drawn, head, seed), seed, rounding="half_up")
    narrows.lower(quantized.program, form="integer", samples=1)
