"""Which ONNX operators every integer operator becomes, in each form: what numbers cannot tell.

Every way to write an operator is exact, so a wrong choice among them only costs time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Any

import pytest
import torch
from torch import fx

import narrows
from narrows.backends.leaves import Leaves
from narrows.backends.onnx.integer.lower import FORMS, lower
from narrows.ir.program import Program
from tests.backends.several_forms import PROGRAMS, WIDE, images, integers
from tests.builder import aten


def written(program: Program, form: str) -> dict[str, str]:
    """Return per node of a program the operators that it becomes, with what they keep."""
    model = lower(program, Leaves.of(program).computed, form, 20)
    names = {n.name for n in program.graph.nodes}
    made: dict[str, list[str]] = {}
    waiting: list[str] = []  # steps without a name of their own come before those that have one
    for node in model.graph.node:
        waiting.append(node.op_type)
        owner = next((n for n in (node.name, node.name.partition(".")[0]) if n in names), None)
        if owner is not None:
            made.setdefault(owner, []).extend(waiting)
            waiting = []
    assert not waiting
    return {name: " ".join(_repeated(ops)) for name, ops in made.items()}


def _repeated(ops: list[str]) -> Iterator[str]:
    for op, group in groupby(ops):
        count = len(list(group))
        yield op if count == 1 else f"{op}*{count}"


SHIFTED = "Add*2 Mod Sub Div Equal Cast Mod Mul Sub Add Clip Cast"  # a division, rounded; a clip


def text_of(program: Program, names: Iterable[str] = FORMS) -> str:
    """Return a line per node and way to write it, with the forms that do."""
    forms = {form: written(program, form) for form in names}
    lines = []
    for node in program.graph.nodes:
        if node.name.endswith(("_q", "_float")):
            continue
        ways: dict[str, list[str]] = {}
        for form, made in forms.items():
            ways.setdefault(made.get(node.name, ""), []).append(form)
        for way, of in ways.items():
            if way:
                told = f" ({', '.join(of)})" if len(ways) > 1 else ""
                lines.append(f"{node.name}{told}: {way.replace(SHIFTED, 'settled')}\n")
    return "".join(lines)


@pytest.mark.parametrize(("name", "bits"), [*((n, 8) for n in PROGRAMS), *((n, 12) for n in WIDE)])
def test_operators_of_every_form(name: str, bits: int, golden: Callable[[str, str], None]) -> None:
    golden(f"onnx_forms/{name}_{bits}", text_of(integers(name, bits=bits)))


def layers() -> Program:
    """Layers that sum, of tensors of two to four axes, and what normalizes."""
    b = images((2, 3, 6, 5), (2, 4, 6), (2, 6))
    image, words, row = b.inputs
    generator = torch.Generator().manual_seed(2)

    def weight(name: str, *shape: int) -> fx.Node:
        return b.weight(name, torch.randn(shape, generator=generator))

    conv = b.call(aten.conv2d.default, image, weight("conv", 4, 3, 3, 3), weight("bias", 4))
    clipped = b.call(aten.hardtanh.default, conv, 0.0, 1.1)
    up = b.call(aten.conv_transpose2d.input, image, weight("up", 3, 4, 2, 2), None, [2, 2])
    deep = b.call(aten.linear.default, words, weight("deep", 5, 6), weight("shift", 5))
    flat = b.call(aten.linear.default, row, weight("flat", 3, 6))
    least = b.call(aten.relu.default, words)
    turned = b.call(aten.permute.default, least, [0, 2, 1])
    tiny = b.call(aten.mul.Tensor, b.call(aten.sigmoid.default, words), 2.0**-16)
    both = b.call(aten.matmul.default, words, turned)
    positive = b.call(aten.softmax.int, least, -1)
    return b.program(
        clipped, up, deep, flat, both, positive,
        b.call(aten.add.Tensor, words, least),
        b.call(aten.sub.Tensor, words, least),
        b.call(aten.add.Tensor, words, tiny),
        b.call(aten.mul.Tensor, words, least),
        b.call(aten.cat.default, [words, least], 1),
        b.call(aten.cat.default, [words, b.call(aten.flip.default, words, [2])], 2),
        b.call(aten.mean.dim, conv, [2, 3], True),
        b.call(aten.mean.dim, conv, [2, 3]),
        b.call(aten.mean.dim, conv, [1, 3]),
        b.call(aten.mean.dim, words, [1]),
        b.call(aten.mean.dim, b.call(aten.slice.Tensor, image, 3, 0, 3), [3, 2]),
        b.call(aten.softmax.int, words, 1),
        b.call(aten.layer_norm.default, words, [6], weight("gain", 6), weight("offset", 6)),
        b.call(aten.layer_norm.default, least, [4, 6]),
        b.call(aten.rms_norm.default, words, [6]),
        b.call(aten.adaptive_avg_pool2d.default, conv, [1, 1]),
        b.call(aten.clamp.default, b.call(aten.gelu.default, row), 0.0, 0.7),
        b.call(aten.silu.default, row), b.call(aten.hardsigmoid.default, row),
        b.call(aten.amax.default, image, [2, 3]), b.call(aten.tanh.default, row),
    )  # fmt: skip


@functools.cache
def integer_layers(bits: int, rounding: str) -> Program:
    """Return the layers in integers."""
    program = layers()
    how: dict[str, Any] = {"activations": bits, "method": "minmax", "rounding": rounding}
    return narrows.quantize(program, [program.examples], **how).program


@pytest.mark.parametrize("rounding", ["half_even", "half_up"])
@pytest.mark.parametrize("bits", [8, 12])
def test_layers_of_every_form(bits: int, rounding: str, golden: Callable[[str, str], None]) -> None:
    made = integer_layers(bits, rounding)
    forms = FORMS if rounding == "half_even" else ["integer"]
    golden(f"onnx_forms/layers_{bits}_{rounding}", text_of(made, forms))
    if bits == 8:
        narrows.lower(made, form="integer", samples=1)  # it compares, with ==
