"""`verify`: one broken program for every invariant."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx

from narrows.errors import ProgramError
from narrows.ir.meta import Meta
from narrows.ir.program import Draft, Program
from narrows.ir.verify import verify
from tests.builder import Builder, ramp

aten = torch.ops.aten


@pytest.fixture
def program() -> Program:
    """Build a convolution, a relu and a residual sum."""
    b = Builder((2, 3, 4, 4))
    x = b.inputs[0]
    weight = b.weight("conv.weight", ramp(3, 3, 1, 1))
    y = b.call(aten.conv2d.default, x, weight, name="conv")
    z = b.call(aten.relu.default, y, name="relu")
    return b.program(b.call(aten.add.Tensor, z, x, name="total"))


def test_sound_program(program: Program) -> None:
    before = [(n.name, dict(n.meta)) for n in program.nodes]
    verify(program, shapes=True)
    assert [(n.name, dict(n.meta)) for n in program.nodes] == before


def foreign_call(p: Draft) -> None:
    p.node("relu").target = torch.relu


def method_call(p: Draft) -> None:
    p.node("relu").op = "call_method"


def write(p: Draft) -> None:
    p.node("relu").target = aten.relu_.default


def stray_keyword(p: Draft) -> None:
    p.node("relu").kwargs = {"speed": 3}


def unknown_weight(p: Draft) -> None:
    p.weights["other"] = p.weights.pop("conv.weight")


def other_weight_shape(p: Draft) -> None:
    p.weights["conv.weight"] = ramp(3, 3, 3, 3)


def no_shape(p: Draft) -> None:
    del p.node("relu").meta["shape"]


def no_such_axis(p: Draft) -> None:
    Meta(p.node("relu")).dynamic = (4,)


def bare_output(p: Draft) -> None:
    p.output.args = (p.node("total"),)


def two_outputs(p: Draft) -> None:
    p.output.args = ((p.node("total"), p.node("relu")),)


def read_too_early(p: Draft) -> None:
    p.node("total").append(p.node("relu"))


def unread_weight(p: Draft) -> None:
    p.weights["spare"] = ramp(3)


def second_node_of_a_weight(p: Draft) -> None:
    with p.graph.inserting_before(p.node("conv")):
        again = p.graph.create_node("get_attr", "conv.weight")
    again.meta = dict(p.node("conv_weight").meta)
    p.node("relu").args = (again,)


def lost_alias(p: Draft) -> None:
    p.aliases["tied.weight"] = "gone.weight"


def alias_of_itself(p: Draft) -> None:
    p.aliases["conv.weight"] = "conv.weight"


def other_example(p: Draft) -> None:
    p.examples = (ramp(2, 3, 5, 5),)


def missing_example(p: Draft) -> None:
    p.examples = ()


def lost_buffer(p: Draft) -> None:
    p.buffers = frozenset({"gone"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (foreign_call, "relu is no operator of the dialect"),
        (method_call, "a node of a kind outside the dialect"),
        (write, r"relu_\.default writes into its arguments"),
        (stray_keyword, "keyword arguments it does not know"),
        (unknown_weight, "no weight 'conv.weight' to read"),
        (other_weight_shape, "does not fit the weight"),
        (no_shape, "has no shape in its meta"),
        (no_such_axis, "a free axis that is not there"),
        (bare_output, "holds no tuple"),
        (two_outputs, "2 outputs, the result's structure has 1"),
        (read_too_early, "reads relu before it is computed"),
        (unread_weight, "nothing reads the weight 'spare'"),
        (second_node_of_a_weight, "the weight 'conv.weight' has several nodes"),
        (lost_alias, "'gone.weight', which is no weight"),
        (alias_of_itself, "is a weight and an alias"),
        (other_example, "its example"),
        (missing_example, "1 placeholders and 0 examples"),
        (lost_buffer, "the buffer 'gone' is no weight"),
    ],
)
def test_broken_program(program: Program, damage: Callable[[Draft], None], message: str) -> None:
    draft = program.copy()
    damage(draft)
    with pytest.raises(ProgramError, match=message):
        verify(draft)


def test_error_names_node_and_source_line(program: Program) -> None:
    draft = program.copy()
    node = draft.node("relu")
    Meta(node).source, Meta(node).code = "model.py:12", "y = relu(x)"
    write(draft)
    with pytest.raises(ProgramError) as info:
        verify(draft)
    assert info.value.where == "relu (model.py:12  y = relu(x))"


@pytest.mark.parametrize(
    ("key", "value"), [("shape", (2, 3, 4, 5)), ("dtype", torch.float16), ("dtype", None)]
)
def test_wrong_shape_or_type(program: Program, key: str, value: object) -> None:
    program = program.copy()
    program.node("total").meta[key] = value
    if value is not None:
        verify(program)
    with pytest.raises(ProgramError, match="total"):
        verify(program, shapes=True)


def test_graph_that_does_not_run(program: Program) -> None:
    program = program.copy()
    program.node("total").target = aten.matmul.default
    program.node("total").args = (program.node("relu"), program.node("conv_weight"))
    with pytest.raises(ProgramError, match="does not run: RuntimeError"):
        verify(program, shapes=True)


def test_size_that_is_wrong() -> None:
    b = Builder((2, 3))
    size = b.call(aten.sym_size.int, b.inputs[0], 0, name="size")
    program = b.program(b.call(aten.reshape.default, b.inputs[0], [size, 3], name="view"))
    verify(program, shapes=True)
    program = program.copy()
    Meta(program.node("size")).size = 5
    with pytest.raises(ProgramError, match="size"):
        verify(program, shapes=True)


def test_names_are_unique_and_valid(program: Program) -> None:
    broken = program.copy()
    relu: fx.Node = broken.node("relu")
    for name in ("conv", "a.b"):
        object.__setattr__(relu, "name", name)
        with pytest.raises(ProgramError, match="valid and unique name"):
            verify(broken)
