"""Parameter groups of the unpruned model, followed to the pruned module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import narrows
from narrows import training
from narrows.errors import UsageError
from narrows.ir.program import Program
from tests.training.digits import digits


def named(groups: list[dict[str, Any]], module: nn.Module) -> list[set[str]]:
    names = {id(p): n for n, p in module.named_parameters()}
    return [{names[id(p)] for p in g["params"]} for g in groups]


@pytest.fixture
def pruned(program: Program) -> Program:
    plan = narrows.plan(program, ratio=0.4, scope="global", constrained=False)
    return narrows.apply(program, plan)


def test_every_parameter_is_in_the_group_that_named_what_it_came_from(
    program: Program, pruned: Program
) -> None:
    module = pruned.to_module(train=True)
    groups = training.follow(
        [
            {"names": ["stem.*", "norm.*"], "lr": 0.0},
            {"names": "block*", "lr": 0.1, "weight_decay": 0.5},
            {"names": ["*"], "lr": 0.01},
        ],
        program, pruned, module,
    )  # fmt: skip
    found = named(groups, module)
    assert all(n.startswith("block") for n in found[0])
    assert not any(n.startswith(("block", "stem", "norm")) for n in found[1])
    assert {n for n, p in module.named_parameters() if p.requires_grad} == found[0] | found[1]
    assert [{k: v for k, v in g.items() if k != "params"} for g in groups] == [
        {"lr": 0.1, "weight_decay": 0.5}, {"lr": 0.01},
    ]  # fmt: skip
    images, labels = digits(16)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    optimizer = torch.optim.SGD(groups, lr=1.0)
    F.cross_entropy(module(images), labels).backward()
    optimizer.step()
    moved = {n for n, p in module.named_parameters() if not torch.equal(p, before[n])}
    assert not any(n.startswith(("stem", "norm")) for n in moved)
    assert "head.weight" in moved


def test_a_bias_that_pruning_made_goes_with_its_weight() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.sigmoid(self.a(x)))  # a masked channel is 1/2, not 0

    torch.manual_seed(0)
    program = narrows.capture(Constant().eval(), (torch.randn(2, 4),))
    pruned = narrows.apply(program, narrows.plan(program, keep_outputs={"a.weight": [0, 1, 2]}))
    module = pruned.to_module(train=True)
    made = {n for n, _ in module.named_parameters()} - program.weights.keys()
    assert made  # the constants
    groups = training.follow(
        [{"names": "a.*", "lr": 0.0}, {"names": "b.weight", "lr": 0.1}], program, pruned, module
    )
    assert named(groups, module) == [{"b.weight", *made}]


def test_the_rest_has_options_of_its_own(program: Program, pruned: Program) -> None:
    module = pruned.to_module(train=True)
    head = [{"names": "head.*", "lr": 1.0}]
    groups = training.follow(head, program, pruned, module, rest={"lr": 0.0})
    assert named(groups, module) == [{"head.weight", "head.bias"}]
    assert not module.get_parameter("stem.weight").requires_grad


BAD: tuple[tuple[list[Mapping[str, Any]], str], ...] = (
    ([{"names": "head.*", "lr": 1.0}], "no group has the parameter"),
    ([{"names": "haed.weight", "lr": 1.0}], "'haed.weight' matches no parameter"),
    ([{"lr": 1.0}], "a group has no names"),
)


@pytest.mark.parametrize(("groups", "text"), BAD)
def test_bad_groups_are_told(
    groups: list[Mapping[str, Any]], text: str, program: Program, pruned: Program
) -> None:
    with pytest.raises(UsageError, match=text) as error:
        training.follow(groups, program, pruned, pruned.to_module(train=True))
    assert all((error.value.where, error.value.why, error.value.hint))


def test_another_module_is_told(program: Program, pruned: Program) -> None:
    with pytest.raises(UsageError, match="the pruned program has no parameter") as error:
        training.follow([{"names": "*"}], program, pruned, nn.Linear(2, 2))
    assert error.value.hint


def test_options_are_not_written_to(program: Program, pruned: Program) -> None:
    given: list[dict[str, Any]] = [{"names": "*", "lr": 0.0}]
    make: Callable[[], Any] = lambda: pruned.to_module(train=True)  # noqa: E731
    assert training.follow(given, program, pruned, make()) == []
    assert given == [{"names": "*", "lr": 0.0}]
