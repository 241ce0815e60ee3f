"""Random networks in C: the interpreter's bits; `NARROWS_EXAMPLES=200` searches further."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import narrows
from narrows.backends.c.compiler import find_compiler
from narrows.ir.integer.grid import ROUNDINGS
from tests.networks import randomise
from tests.networks.generated import Generated, Step, bounded, heads, steps

pytestmark = pytest.mark.skipif(not find_compiler(), reason="there is no C compiler")

widths = st.sampled_from((8, 8, 12, 16))


@bounded(8)
@given(steps, heads, st.integers(0, 99), st.sampled_from((8, 8, 4)), widths,
       st.sampled_from(ROUNDINGS))  # fmt: skip
def test_the_c_code_is_the_interpreter(
    drawn: list[Step], head: str, seed: int, bits: int, activations: int, rounding: str
) -> None:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(4, 3, 8, 8, generator=generator)
    module = Generated(drawn, head)
    randomise(module, seed, (images,))
    program = narrows.capture(module.float(), (images[:2],))
    options = {"weights": bits, "activations": activations, "rounding": rounding}
    quantized = narrows.quantize(program, [images], **options, check=False)
    try:
        artifact = narrows.lower(quantized.program, "c", check=False)
    except narrows.NarrowsError as refusal:
        assert quantized.plan.floats
        assert "the c target has no floating-point" in str(refusal)  # noqa: PT017
        return
    facts = artifact.manifest["c"]
    assert facts["arena"] <= 1.1 * facts["bound"] + 16
    for image in images[:2]:
        expected = quantized.program.run_flat([image[None]])
        actual = artifact.run_flat([image[None]], optimize=False)
        for got, wanted in zip(actual, expected, strict=True):
            assert torch.equal(torch.from_numpy(got), wanted)
