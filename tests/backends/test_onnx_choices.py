"""Which ONNX operators an integer node becomes on both sides of the bounds of float32."""

from __future__ import annotations

import onnx
import pytest
import torch
from torch import Tensor, fx

import narrows
from narrows.backends.onnx.session import MODEL
from narrows.ir.program import Program
from tests.builder import Builder, aten


def integers(b: Builder, node: fx.Node, *, method: str = "minmax") -> Program:
    program = b.program(node)
    return narrows.quantize(program, [program.examples], method=method).program


def operators(program: Program, form: str = "qdq") -> set[str]:
    """Return the kinds of ONNX nodes; lowering itself compares the numbers, with ==."""
    artifact = narrows.lower(program, form=form, samples=1)
    return {n.op_type for n in onnx.load(artifact.folder / MODEL).graph.node}


def line(*shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
    return torch.linspace(low, high, torch.Size(shape).numel()).reshape(shape)


def unary(x: Tensor, target: object, *args: object) -> Program:
    b = Builder(tuple(x.shape))
    b.examples = (x,)
    return integers(b, b.call(target, b.inputs[0], *args))


def test_a_softmax_is_floats_where_those_are_exact() -> None:
    assert "Exp" in operators(unary(line(2, 9, high=2.0), aten.softmax.int, -1))
    # The shares of a thousand are on so fine a grid that float32 does not hold every quotient.
    assert "Exp" not in operators(unary(line(2, 1000, high=2.0), aten.softmax.int, -1))


@pytest.mark.parametrize("target", [aten.add.Tensor, aten.sub.Tensor])
def test_a_sum_is_floats_where_those_are_exact(target: object) -> None:
    for reach, quick in ((2.0**15, True), (2.0**16, False)):
        b = Builder((2, 9), (2, 9))
        b.examples = (line(2, 9), line(2, 9, high=reach))
        made = operators(integers(b, b.call(target, *b.inputs)))
        assert ("Mod" not in made) == quick, made  # how integers are shifted


def test_a_resized_image_is_floats_where_those_are_exact() -> None:
    x = line(2, 1, 5, 5, low=0.0)  # codes whose zero point is the least of them
    assert "Resize" in operators(unary(x, aten.upsample_bilinear2d.vec, [10, 10], False, None))
    assert "Mod" in operators(unary(x, aten.upsample_bicubic2d.vec, [12, 12], False, None))


def test_an_average_is_floats_where_every_divisor_is_exact() -> None:
    x = line(2, 1, 9, 9, low=0.0, high=0.99)  # averages lie on the same grid
    for width, quick in ((5, True), (7, False)):  # 14 is not exact; at a border it is 8, 10 or 12
        pads = [0, width // 2]
        made = operators(unary(x, aten.avg_pool2d.default, [2, width], [1, 1], pads, False, False))
        assert ("AveragePool" in made) == quick, made


def test_the_mean_square_of_a_wide_row_is_without_its_zero_point() -> None:
    operators(unary(line(2, 4000), aten.rms_norm.default, [4000]))


def test_tensors_of_one_grid_are_joined_as_codes() -> None:
    b = Builder((2, 3, 4), (2, 5, 4))
    b.examples = (line(2, 3, 4), line(2, 5, 4))
    program = integers(b, b.call(aten.cat.default, list(b.inputs), 1))
    artifact = narrows.lower(program, form="qdq", samples=1)
    nodes = onnx.load(artifact.folder / MODEL).graph.node
    (join,) = (n for n in nodes if n.op_type == "Concat")
    made = {out: n.op_type for n in nodes for out in n.output}
    assert {made[name] for name in join.input} == {"QuantizeLinear"}


def test_a_sum_of_many_codes_is_of_integers() -> None:
    for width, quick in ((9, True), (300, False)):  # float32 holds 65,793 times 255
        x = line(1, 1, width, width, low=0.0)
        made = operators(unary(x, aten.sum.dim_IntList, [2, 3]))
        assert ("Mod" not in made) == quick, made
