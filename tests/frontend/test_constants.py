"""Numbers that a model spells out: computed once, and known where they select."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from narrows.frontend import capture
from tests.frontend.test_normalise import Around, Forward, checked, ops, rows


def test_mask_written_slice_by_slice_is_one_constant() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        mask = x.new_zeros((4, 6))
        for i, part in enumerate((slice(0, 2), slice(2, 4))):
            mask[part, 1:] = i + 1
        mask = mask.unsqueeze(1) - mask.unsqueeze(2)
        return x + mask.masked_fill(mask != 0, -100.0).sum(1)

    program = checked(function)
    assert ops(program) == ["add"]
    assert list(program.weights) == ["const_0"]
    assert program.buffers == {"const_0"}


def test_constant_read_before_and_after_a_write() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        table = torch.arange(6.0, dtype=torch.float64)
        first = x * table
        table[2:] = 9
        return first + table

    program = checked(function)
    assert ops(program) == ["mul", "add"]
    assert [program.weights[f"const_{i}"].tolist() for i in (0, 1)] == [
        [0, 1, 2, 3, 4, 5],
        [0, 1, 9, 9, 9, 9],
    ]


def test_literal_that_data_is_written_into_is_not_folded() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        table = torch.zeros(6, dtype=torch.float64)
        table += x.mean((0, 1))
        return x * table

    program = checked(function)
    assert ops(program) == ["mean", "add", "mul"]
    assert program.weights["const_0"].tolist() == [0.0] * 6


def test_numbers_computed_from_literals() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        return x * torch.tensor([2.0, 3.0]).max().item()

    program = checked(function)
    assert ops(program) == ["mul"]
    assert program.node("mul").args[1] == 3.0


def test_parameters_and_buffers_are_never_folded() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        bias = m.table[m.order].t() * m.scale
        return x + bias.sum(0).view(4, 1) + torch.zeros_like(m.scale).view(4, 1)

    program = checked(function)
    assert {"scale", "table", "order"} <= set(program.weights)
    assert "index_select" in ops(program)


def test_zeros_of_a_free_size_stay_in_the_graph() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        return torch.cat([x, x.new_ones(x.shape[0], 1, 6)], 1)

    assert ops(checked(function)) == ["sym_size", "full", "cat"]
    assert ops(checked(function, free=False)) == ["cat"]


# ---------------------------------------------------------------------- indices

INDICES: dict[str, tuple[Forward, list[str]]] = {
    "a list": (lambda s, x: x[:, [2, 0, 2]], ["index_select"]),
    "from the end": (lambda s, x: x[:, [-1, 0]], ["index_select"]),
    "a buffer": (lambda s, x: x[:, s.order], ["index_select"]),
    "the last axis": (lambda s, x: x[..., [1, -2]], ["index_select"]),
    "yes or no": (lambda s, x: x[:, [True, False, True, True]], ["index_select"]),
    "yes or no, and read": (
        lambda s, x: x[:, [True, False, True, True]].flatten(1).relu(),
        ["index_select", "flatten", "relu"],
    ),
    "one": (lambda s, x: x[:, torch.tensor(-1)], ["select"]),
    "several axes": (
        lambda s, x: x[:, torch.tensor([[0, 1], [3, -2]])],
        ["index_select", "unflatten"],
    ),
    "small integers": (
        lambda s, x: x[:, torch.tensor([3, 1], dtype=torch.int32)],
        ["index_select"],
    ),
    "two axes at once": (lambda s, x: x[:, [0, 1], [2, 5]], ["index"]),
    "computed": (lambda s, x: x[:, x[0, :, 0].argsort()], ["select", "select", "argsort", "index"]),
}


@pytest.mark.parametrize("name", INDICES)
def test_known_indices_are_selections(name: str) -> None:
    function, wanted = INDICES[name]
    assert ops(checked(function)) == wanted


def test_an_index_that_a_checkpoint_may_change_stays_a_weight() -> None:
    model = Around(lambda s, x: x[:, s.order])
    program = capture(model, rows(2))
    state = {**model.state_dict(), "order": torch.tensor([3, 3, 0, 1])}
    changed = program.with_weights(state)
    assert torch.equal(changed(rows(2)), rows(2)[:, [3, 3, 0, 1]])
    model.order.sub_(4)  # from the end: what the checkpoint says is not read as another thing
    assert ops(capture(model, rows(2))) == ["index"]
    model._non_persistent_buffers_set.add("order")  # now no checkpoint holds it
    assert ops(capture(model, rows(2))) == ["index_select"]
