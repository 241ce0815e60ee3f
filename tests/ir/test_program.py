"""`Program`: running, deriving and comparing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from narrows.errors import ProgramError
from narrows.ir.editing import infer_shapes
from narrows.ir.graph import live_nodes
from narrows.ir.program import Meta, Program, format_shape, relative_error, where
from narrows.ir.verify import verify
from tests.builder import Builder, ramp

aten = torch.ops.aten


@pytest.fixture
def program() -> Program:
    """Build two convolutions that share one weight, and a norm."""
    b = Builder((2, 4, 4, 4))
    x = b.inputs[0]
    y = b.norm(b.conv(x, "conv", 4, 4), "norm", 4)
    again = b.call(aten.conv2d.default, y, b.nodes["conv.weight"], name="again")
    program = b.program(b.relu(again))
    program.aliases["again.weight"] = "conv.weight"
    return program


# ---------------------------------------------------------------------- running


def test_runs_at_another_batch_size(program: Program) -> None:
    assert program(ramp(5, 4, 4, 4)).shape == (5, 4, 2, 2)
    both = program(torch.cat([program.examples[0]] * 2))
    assert torch.equal(both[:2], program(*program.examples))


def test_records_no_gradients(program: Program) -> None:
    assert not program(ramp(2, 4, 4, 4).requires_grad_()).requires_grad


def test_observer_sees_every_node_in_order(program: Program) -> None:
    seen: list[str] = []
    program.run_flat(program.examples, observe=lambda node, value: seen.append(node.name))
    assert seen == [n.name for n in program.nodes if n.op != "output"]


def test_other_weights_for_one_run(program: Program) -> None:
    weights = {**program.weights, "conv.weight": torch.zeros(4, 4, 3, 3)}
    (result,) = program.run_flat(program.examples, weights=weights)
    assert not result.any()
    assert program(*program.examples).any()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((ramp(2, 3, 4, 4),), r"has shape \[2, 3, 4, 4\], the program takes \[b,4,4,4\]"),
        ((ramp(2, 4),), r"has shape \[2, 4\]"),
        ((ramp(2, 4, 4, 4), 1), "another structure"),
        ((3,), "is a int, not a tensor"),
    ],
)
def test_unfit_inputs(program: Program, inputs: tuple[object, ...], message: str) -> None:
    with pytest.raises(ProgramError, match=message):
        program(*inputs)


def test_wrong_number_of_flat_inputs(program: Program) -> None:
    with pytest.raises(ProgramError, match="takes 1 inputs, got 2"):
        program.run_flat(program.examples * 2)


# ---------------------------------------------------------------------- reading


def test_lookups_suggest_what_was_meant(program: Program) -> None:
    assert program.node("relu") is program.output.args[0][0]
    with pytest.raises(ProgramError, match="did you mean 'relu'"):
        program.node("rellu")
    assert program.canonical("again.weight") == "conv.weight"
    with pytest.raises(ProgramError, match=r"did you mean 'norm\.weight'"):
        program.canonical("norm.wieght")


def test_users_of_a_shared_weight(program: Program) -> None:
    assert [n.name for n in program.users_of("again.weight")] == ["conv", "again"]
    state = program.state_dict()
    assert state["again.weight"] is state["conv.weight"]
    assert program.parameter_count == 4 * 4 * 9 + 4 + 4


def test_places(program: Program) -> None:
    assert where(program.node("relu")) == "relu (net.py:4  y = self.relu(x))"
    assert where(program.placeholders[0]) == "x"
    assert format_shape((2, 3, 4), (0,)) == "[b,3,4]"
    with pytest.raises(AttributeError):
        Meta(program.node("relu")).colour = 3


# ---------------------------------------------------------------------- deriving


def test_copy_shares_tensors_only(program: Program) -> None:
    before = str(program)
    copy = program.copy()
    assert [n.name for n in copy.nodes] == [n.name for n in program.nodes]
    assert all(copy.weights[n] is t for n, t in program.weights.items())
    copy.node("relu").target = aten.sigmoid.default
    Meta(copy.node("conv")).shape = (1,)
    copy.weights["conv.weight"] = ramp(4, 4, 3, 3) * 2
    assert str(program) == before
    assert relative_error(copy(*copy.examples), program(*program.examples)) > 0.1


def test_other_precision(program: Program) -> None:
    double = program.to(torch.float64)
    verify(double, shapes=True)
    assert {t.dtype for t in double.weights.values()} == {torch.float64}
    assert relative_error(double(*double.examples), program(*program.examples)) < 1e-6
    verify(program, shapes=True)


def test_precision_of_literals() -> None:
    b = Builder((2, 3))
    y = b.call(aten.to.dtype, b.inputs[0], torch.float32)
    program = b.program(b.call(aten.zeros_like.default, y, dtype=torch.float32))
    assert program.to(torch.float64)(ramp(2, 3).double()).dtype == torch.float64


def test_weights_of_another_checkpoint(program: Program) -> None:
    state = {n: t * 2 for n, t in program.weights.items()}
    state["norm.num_batches_tracked"] = torch.tensor(7)
    state["again.weight"] = state.pop("conv.weight")
    other = program.with_weights(state)
    verify(other, shapes=True)
    assert torch.equal(other.weights["conv.weight"], program.weights["conv.weight"] * 2)


def test_unfit_checkpoint(program: Program) -> None:
    state = dict(program.weights)
    state["norm.wieght"] = state.pop("norm.weight")
    with pytest.raises(ProgramError, match=r"no weight 'norm.weight'\n.*did you mean"):
        program.with_weights(state)
    state = {n: t for n, t in program.weights.items() if n != "norm.running_var"}
    with pytest.raises(ProgramError, match=r"no weight 'norm.running_var'"):
        program.with_weights(state)
    state = {**program.weights, "norm.weight": ramp(5)}
    with pytest.raises(ProgramError, match=r"is \[5\] in the checkpoint, \[4\] in the program"):
        program.with_weights(state)


def test_live_nodes(program: Program) -> None:
    with program.graph.inserting_before(program.output):
        dead = program.graph.call_function(aten.relu.default, (program.node("conv"),))
    live = list(live_nodes(program.graph))
    assert dead not in live
    assert len(live) == len(program.nodes) - 1


# ---------------------------------------------------------------------- shapes


def test_shapes_after_a_rewrite(program: Program) -> None:
    copy = program.copy()
    copy.node("conv").args = (*copy.node("conv").args[:3], [1, 1], [0, 0])
    copy.node("again").args = (*copy.node("again").args[:2], None, [1, 1], [1, 1])
    infer_shapes(copy)
    assert Meta(copy.node("conv")).shape == (2, 4, 2, 2)
    assert Meta(copy.node("relu")).shape == (2, 4, 2, 2)


def test_shapes_of_what_minds_devices_and_memory_order() -> None:
    b = Builder((2, 3, 4, 4))
    x = b.inputs[0]
    made = b.call(aten.zeros.default, [4, 4], device=torch.device("cpu"))
    y = b.call(aten.scaled_dot_product_attention.default, x, x, x)
    y = b.call(aten.view.default, b.call(aten.add.Tensor, y, made), [2, 3, 16])
    verify(b.program(y), shapes=True)


# ---------------------------------------------------------------------- comparing


def pair(a: Tensor, b: Tensor) -> dict[str, list[Tensor]]:
    return {"x": [a, b]}


@pytest.mark.parametrize(
    ("actual", "expected", "error"),
    [
        (torch.ones(3), torch.ones(3), 0.0),
        (torch.tensor([1.0, 3.0]), torch.tensor([1.0, 4.0]), 0.25),
        (torch.tensor([0.5]), torch.tensor([0.0]), 0.5),
        (torch.ones(3), torch.ones(4), math.inf),
        (torch.tensor([math.nan]), torch.tensor([1.0]), math.inf),
        (torch.tensor([math.inf, 1.0]), torch.tensor([math.inf, 1.0]), 0.0),
        (torch.tensor([math.inf, 1.0]), torch.tensor([-math.inf, 1.0]), math.inf),
        (torch.tensor([math.inf, 1.0]), torch.tensor([math.nan, 1.0]), math.inf),
        (pair(torch.ones(2), torch.zeros(2)), pair(torch.ones(2), torch.ones(2)), 1.0),
        ([torch.ones(2)], torch.ones(2), math.inf),
        ((torch.ones(2), 3), (torch.ones(2), 3), 0.0),
        ((torch.ones(2), 3), (torch.ones(2), 4), math.inf),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), 1 / 3),
    ],
)
def test_relative_error(actual: object, expected: object, error: float) -> None:
    assert relative_error(actual, expected) == pytest.approx(error)


def test_what_is_remembered_of_a_program_goes_when_its_weights_change(program: Program) -> None:
    made: list[int] = []
    program.memo("made", lambda: made.append(1))
    program.memo("made", lambda: made.append(2))
    program.replace(notes=()).memo("made", lambda: made.append(3))
    assert made == [1]
    program.copy().memo("made", lambda: made.append(4))
    assert made == [1, 4]
    program.weights["conv.weight"].zero_()
    program.memo("made", lambda: made.append(5))
    assert made == [1, 4, 5]


def test_what_is_remembered_goes_when_a_weight_is_replaced(program: Program) -> None:
    name, tensor = next(iter(program.weights.items()))
    for made in range(3):  # a new tensor may get the place of one that is gone
        program.weights[name] = tensor * made
        assert program.memo("made", lambda made=made: made) == made


def test_what_is_remembered_goes_when_a_node_reads_another(program: Program) -> None:
    assert program.memo("made", lambda: 1) == 1
    node = next(n for n in program.nodes if n.op == "call_function")
    node.args = tuple(node.args)
    assert program.memo("made", lambda: 2) == 1  # the same again
    node.args = (node.args[0], *node.args[:1], *node.args[2:])
    assert program.memo("made", lambda: 3) == 3
