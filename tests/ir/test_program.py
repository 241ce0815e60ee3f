"""`Program`: running, deriving and comparing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import narrows
from narrows.errors import ProgramError
from narrows.ir.channels import analyse
from narrows.ir.compare import relative_error
from narrows.ir.editing import infer_shapes
from narrows.ir.graph import live_nodes
from narrows.ir.meta import Meta, where
from narrows.ir.program import Program, format_shape
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
    return program.replace(aliases={"again.weight": "conv.weight"})


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
    draft = program.copy()
    assert [n.name for n in draft.nodes] == [n.name for n in program.nodes]
    assert all(draft.weights[n] is t for n, t in program.weights.items())
    draft.node("relu").target = aten.sigmoid.default
    Meta(draft.node("conv")).shape = (1,)
    draft.weights["conv.weight"] = ramp(4, 4, 3, 3) * 2
    assert str(program) == before
    assert relative_error(draft(*draft.examples), program(*program.examples)) > 0.1


def test_other_precision(program: Program) -> None:
    double = program.to(torch.float64)
    verify(double, shapes=True)
    assert {t.dtype for t in double.weights.values()} == {torch.float64}
    assert relative_error(double(*double.examples), program(*program.examples)) < 1e-6
    verify(program, shapes=True)


def test_precision_of_literals() -> None:
    b = Builder((2, 3))
    y = b.call(aten.to.dtype, b.inputs[0], torch.float32)
    program = b.program(b.call(aten.full_like.default, y, 0, dtype=torch.float32))
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
    program = program.copy()
    with program.graph.inserting_before(program.output):
        dead = program.graph.call_function(aten.relu.default, (program.node("conv"),))
    live = list(live_nodes(program.graph))
    assert dead not in live
    assert len(live) == len(program.nodes) - 1


# ---------------------------------------------------------------------- shapes


def test_shapes_after_a_rewrite(program: Program) -> None:
    draft = program.copy()
    draft.node("conv").args = (*draft.node("conv").args[:3], [1, 1], [0, 0])
    draft.node("again").args = (*draft.node("again").args[:2], None, [1, 1], [1, 1])
    infer_shapes(draft)
    assert Meta(draft.node("conv")).shape == (2, 4, 2, 2)
    assert Meta(draft.node("relu")).shape == (2, 4, 2, 2)


def test_shapes_of_what_minds_devices_and_memory_order() -> None:
    b = Builder((2, 3, 4, 4))
    x = b.inputs[0]
    made = b.call(aten.full.default, [4, 4], 0.0, device=torch.device("cpu"))
    y = b.call(aten.scaled_dot_product_attention.default, x, x, x)
    y = b.call(aten.reshape.default, b.call(aten.add.Tensor, y, made), [2, 3, 16])
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


def test_a_draft_remembers_nothing(program: Program) -> None:
    draft = program.copy()
    for made in range(3):
        assert draft.memo("made", lambda made=made: made) == made
    finished = draft.seal()
    assert finished.memo("made", lambda: 3) == finished.memo("made", lambda: 4) == 3
    assert finished.seal() is finished
    for late in (lambda: draft.weights.clear(), lambda: setattr(draft, "name", "late")):
        with pytest.raises(ProgramError, match="is not changed"):
            late()


CHANGES: dict[str, Callable[[Program], object]] = {
    "weight": lambda p: p.weights.__setitem__("conv.weight", torch.ones(1)),  # pyright: ignore
    "weights": lambda p: p.weights.clear(),  # pyright: ignore
    "alias": lambda p: p.aliases.__setitem__("a", "b"),  # pyright: ignore
    "origin": lambda p: p.origins.__setitem__("a", None),  # pyright: ignore
    "mark": lambda p: p.marks.clear(),  # pyright: ignore
    "attribute": lambda p: setattr(p, "examples", ()),
    "argument": lambda p: setattr(p.node("relu"), "args", ()),
    "one argument": lambda p: p.node("relu").update_arg(0, p.placeholders[0]),
    "operator": lambda p: setattr(p.node("relu"), "target", aten.neg.default),
    "name": lambda p: p.node("relu")._rename("other"),
    "reader": lambda p: p.node("conv").replace_all_uses_with(p.placeholders[0]),
    "operand": lambda p: p.node("relu").replace_input_with(p.node("conv"), p.placeholders[0]),
    "order": lambda p: p.node("conv").append(p.node("relu")),
    "new node": lambda p: p.graph.call_function(aten.relu.default, (p.node("relu"),)),
    "no node": lambda p: p.graph.erase_node(p.output),
    "shape": lambda p: setattr(Meta(p.node("relu")), "shape", (1,)),
    "meta": lambda p: p.node("relu").meta.pop("shape"),
    "other meta": lambda p: setattr(p.node("relu"), "meta", {}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_finished_program_cannot_be_changed(program: Program, change: str) -> None:
    text, before = str(program), [dict(n.meta) for n in program.nodes]
    with pytest.raises(ProgramError, match="a finished program is not changed") as info:
        CHANGES[change](program)
    assert "program.copy()" in info.value.hint
    assert str(program) == text
    assert [dict(n.meta) for n in program.nodes] == before


def test_a_deep_copy_has_tensors_of_its_own_and_is_sealed_as_well(program: Program) -> None:
    x = program.examples[0]
    for p in (program, program.copy()):
        other = copy.deepcopy(p)
        assert type(other) is type(p)
        assert torch.equal(other(x), program(x))
        assert str(other) == str(program)
    copied = copy.deepcopy(program)
    copied.weights["conv.weight"].zero_()
    assert program.weights["conv.weight"].any()
    with pytest.raises(ProgramError, match="is not changed"):
        copied.node("relu").args = ()


def test_what_is_changed_in_a_draft_is_seen_by_an_analysis() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    draft = narrows.capture(net, (torch.randn(2, 3, 4, 4),)).copy()

    def constants() -> list[float]:
        return analyse(draft).value(draft.node("_0")).const.tolist()

    draft.weights["0.weight"] = torch.ones(4, 3, 1, 1)
    assert all(map(math.isnan, constants()))
    draft.weights["0.weight"] = torch.zeros(4, 3, 1, 1)
    assert constants() == draft.weights["0.bias"].tolist()
    first, last = draft.node("_0"), draft.node("_2")
    last.args = (first, *last.args[1:])
    assert [r.operand for r in analyse(draft).flows[last].reads] == [first]
