"""What small networks become in integers: every shift, grid, name and note.

Another choice of grids may be as good by the error that a test allows; here it is seen.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

import narrows
from narrows.ir.program import Program
from narrows.ir.text import to_text
from tests.backends.several_forms import PROGRAMS
from tests.networks import NETWORKS

# Networks, each with options of its own.
KINDS: dict[str, dict[str, Any]] = {
    "class_token": {"method": "percentile"},
    "concat_three_widths": {"weights": 4, "first_last": 8},
    "cumsum_space": {},
    "depthwise": {"weights": "pot4", "first_last": None},
    "dense_block": {"rounding": "half_up"},
    "group_norm": {"activations": 12},
    "image_attention": {"weights": "pot3x2", "first_last": 8},
    "layer_norm_tokens": {"rounding": "half_up"},
    "multihead_attention": {"method": "mse"},
    "residual_projection": {"skip": ["head"]},
    "shuffle_block": {"first_last": "float"},
    "squeeze_excite_hardsigmoid": {"equalize": True, "correct_bias": False},
    "subtract_branches": {"weights": 6, "activations": 6},
    "transposed_conv_grouped": {},
    "two_inputs": {"activations": {"*": 10}},
    "upsample_nearest": {},
}


def text_of(program: Program) -> str:
    """Return the text form, without the blanks that make columns, and without source lines."""
    return re.sub(r" *\(?tests/\S+:\d+\)?", "", re.sub(r" {3,}", "  ", to_text(program)))


@pytest.mark.parametrize("name", KINDS)
def test_networks_in_integers(name: str, golden: Callable[[str, str], None]) -> None:
    network = NETWORKS[name]
    inputs = tuple(x.float() if x.is_floating_point() else x for x in network.inputs(4, 1))
    program = narrows.capture(network.build().float(), inputs)
    options = {"method": "minmax", **KINDS[name]}
    made = narrows.quantize(program, [inputs], check=False, **options)
    golden(f"integers/{name}", text_of(made.program))


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_in_integers(name: str, golden: Callable[[str, str], None]) -> None:
    program = PROGRAMS[name]()
    made = narrows.quantize(program, [program.examples], method="minmax", check=False)
    golden(f"integers/{name}", text_of(made.program))
