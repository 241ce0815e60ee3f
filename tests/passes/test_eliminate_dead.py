"""eliminate-dead: what goes, what stays, and that it computes the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from narrows.ir.compare import relative_error
from narrows.ir.program import Program
from narrows.ir.text import to_text
from narrows.ir.verify import verify
from narrows.passes.base import PassResult
from narrows.passes.eliminate_dead import EliminateDead
from narrows.passes.instruments import Promises
from tests.builder import Builder, aten, ramp

Make = Callable[[Builder, fx.Node], fx.Node]


def eliminate(program: Program) -> PassResult:
    """Run the pass, held to its promises and to equal outputs."""
    watch, pass_ = Promises(), EliminateDead()
    watch.before(pass_, program)
    result = pass_.run(program)
    watch.after(pass_, program, result, 0.0)
    verify(result.program)
    expected = program.run_flat(program.examples)
    assert relative_error(result.program.run_flat(program.examples), expected) == 0
    return result


def ops(program: Program) -> list[str]:
    return [n.target._opname for n in program.nodes if n.op == "call_function"]


def between(make: Make, *, after: Any = aten.relu.default) -> Program:
    """Return relu, then what is tested, then another operator."""
    b = Builder((2, 4, 6))
    return b.program(b.call(after, make(b, b.relu(b.inputs[0])), name="after"))


IDENTITIES: dict[str, Make] = {
    "mul by one": lambda b, x: b.call(aten.mul.Tensor, x, 1),
    "mul by constant ones": lambda b, x: b.call(
        aten.mul.Tensor, x, b.weight("ones", torch.ones(4, 1), trained=False)
    ),
    "div by one": lambda b, x: b.call(aten.div.Tensor, x, 1.0),
    "add zero": lambda b, x: b.call(aten.add.Tensor, x, 0),
    "sub zero": lambda b, x: b.call(aten.sub.Tensor, x, 0.0),
    "index_select of all": lambda b, x: b.call(
        aten.index_select.default, x, 1, b.weight("index", torch.arange(4), trained=False)
    ),
    "slice of all": lambda b, x: b.call(aten.slice.Tensor, x, 1, 0, 4),
    "slice beyond the end": lambda b, x: b.call(aten.slice.Tensor, x, 2, 0, 2**63 - 1),
    "slice of the whole batch": lambda b, x: b.call(aten.slice.Tensor, x, 0, None, 2**63 - 1),
    "reshape": lambda b, x: b.call(aten.reshape.default, x, [-1, 4, 6]),
    "flatten of one axis": lambda b, x: b.call(aten.flatten.using_ints, x, 1, 1),
    "expand": lambda b, x: b.call(aten.expand.default, x, [-1, 4, 6]),
    "permute in order": lambda b, x: b.call(aten.permute.default, x, [0, 1, -1]),
    "to the same dtype": lambda b, x: b.call(aten.to.dtype, x, torch.float32),
    "contiguous": lambda b, x: b.call(aten.contiguous.default, x),
    "clone twice": lambda b, x: b.call(aten.clone.default, b.call(aten.clone.default, x)),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_an_identity_goes(name: str):
    result = eliminate(between(IDENTITIES[name]))
    assert ops(result.program) == ["relu", "relu"]
    assert result.program.weights == {}


KEPT: dict[str, Make] = {
    "mul by two": lambda b, x: b.call(aten.mul.Tensor, x, 2),
    "mul by a trained one": lambda b, x: b.call(
        aten.mul.Tensor, x, b.weight("scale", torch.ones(4, 1))
    ),
    "mul by almost ones": lambda b, x: b.call(
        aten.mul.Tensor, x, b.weight("ones", torch.tensor([[1.0], [1], [1], [2]]), trained=False)
    ),
    "mul by ones that widens": lambda b, x: b.call(
        aten.mul.Tensor, x, b.weight("ones", torch.ones(3, 1, 1, 1), trained=False)
    ),
    "mul that changes the dtype": lambda b, x: b.call(
        aten.mul.Tensor, x, b.weight("ones", torch.ones(6).double(), trained=False)
    ),
    "division of whole numbers": lambda b, x: b.call(
        aten.div.Tensor, b.call(aten.to.dtype, x, torch.int64), 1
    ),
    "add one": lambda b, x: b.call(aten.add.Tensor, x, 1),
    "index_select in another order": lambda b, x: b.call(
        aten.index_select.default, x, 1, b.weight("i", torch.tensor([1, 0, 2, 3]), trained=False)
    ),
    "index_select of some": lambda b, x: b.call(
        aten.index_select.default, x, 1, b.weight("i", torch.tensor([0, 1, 2]), trained=False)
    ),
    "index_select of the example's batch": lambda b, x: b.call(
        aten.index_select.default, x, 0, b.weight("i", torch.arange(2), trained=False)
    ),
    "slice of some": lambda b, x: b.call(aten.slice.Tensor, x, 1, 1, 4),
    "slice with a step": lambda b, x: b.call(aten.slice.Tensor, x, 1, 0, 4, 2),
    "slice of the example's batch": lambda b, x: b.call(aten.slice.Tensor, x, 0, 0, 2),
    "reshape to another shape": lambda b, x: b.call(aten.reshape.default, x, [2, 24]),
    "permute": lambda b, x: b.call(aten.permute.default, x, [0, 2, 1]),
    "to another dtype": lambda b, x: b.call(aten.to.dtype, x, torch.float64),
    "dropout, which to_module may train": lambda b, x: b.call(aten.dropout.default, x, 0.5, False),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_does_something_stays(name: str):
    program = between(KEPT[name])
    result = eliminate(program)
    assert not result.changed
    assert result.program is program


def test_a_copy_that_a_later_view_relies_on_stays():
    b = Builder((2, 4, 6))
    turned = b.call(aten.permute.default, b.relu(b.inputs[0]), [0, 2, 1])
    copied = b.call(aten.clone.default, turned, memory_format=torch.contiguous_format)
    again = b.call(aten.contiguous.default, copied)
    result = eliminate(b.program(b.call(aten.view.default, again, [2, 24])))
    assert ops(result.program) == ["relu", "permute", "clone", "view"]


def test_a_selection_that_also_makes_contiguous_stays():
    b = Builder((2, 4, 6))
    turned = b.call(aten.permute.default, b.relu(b.inputs[0]), [0, 2, 1])
    index = b.weight("i", torch.arange(6), trained=False)
    chosen = b.call(aten.index_select.default, turned, 1, index)
    result = eliminate(b.program(b.call(aten.view.default, chosen, [2, 24])))
    assert not result.changed


@pytest.mark.parametrize("of", ["input", "weight"])
def test_a_copy_keeps_an_output_from_being_an_input_or_a_weight(of: str):
    b = Builder((2, 4))
    source = b.inputs[0] if of == "input" else b.weight("w", ramp(3))
    assert not eliminate(b.program(b.call(aten.clone.default, source))).changed


def test_equal_selections_are_computed_once():
    b = Builder((2, 4, 6))
    x = b.relu(b.inputs[0])
    chosen = [
        b.call(
            aten.index_select.default, x, axis, b.weight(f"i{k}", torch.tensor(i), trained=False)
        )
        for k, (axis, i) in enumerate([(1, [0, 2]), (-2, [0, 2]), (1, [2, 0]), (2, [0, 2])])
    ]
    slices = [b.call(aten.slice.Tensor, x, 1, 0, e) for e in (2, 2, 3)]
    result = eliminate(b.program(*(b.relu(c) for c in chosen + slices)))
    assert ops(result.program).count("index_select") == 3
    assert ops(result.program).count("slice") == 2
    assert set(result.program.weights) == {"i0", "i2", "i3"}


def test_selections_after_equal_selections_are_equal_too():
    b = Builder((2, 4, 6))
    x = b.relu(b.inputs[0])
    ends = [
        b.call(aten.slice.Tensor, b.call(aten.slice.Tensor, x, 1, 0, 3), 2, 1, 4) for _ in range(2)
    ]
    result = eliminate(b.program(b.call(aten.cat.default, ends, 1)))
    assert ops(result.program) == ["relu", "slice", "slice", "cat"]


def test_dead_nodes_and_unread_weights_go_with_their_other_names():
    b = Builder((2, 4, 6), (2, 3))
    b.call(aten.add.Tensor, b.inputs[0], b.weight("dead", ramp(6)))
    program = b.program(b.relu(b.inputs[0]))
    program = program.copy()
    program.weights["unread"] = ramp(3)
    program.aliases = {"alias": "unread"}
    program.buffers = frozenset({"unread"})
    result = eliminate(program).program
    assert ops(result) == ["relu"]
    assert (result.weights, result.aliases, result.buffers) == ({}, {}, frozenset())
    assert len(result.placeholders) == 2


def test_golden(golden):
    b = Builder((2, 4, 6))
    x = b.relu(b.inputs[0])
    x = b.call(aten.mul.Tensor, x, 1, name="times_one")
    index = b.weight("index", torch.tensor([0, 2]), trained=False)
    parts = [b.call(aten.index_select.default, x, 1, index, name=n) for n in ("left", "right")]
    b.call(aten.neg.default, x, name="unread")
    program = b.program(b.call(aten.cat.default, parts, 1, name="join"))
    golden("eliminate_dead", to_text(program) + "\n" + to_text(eliminate(program).program))


def test_it_is_idempotent():
    once = eliminate(between(IDENTITIES["clone twice"])).program
    assert not eliminate(once).changed
