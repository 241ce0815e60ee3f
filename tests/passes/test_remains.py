"""What is said where masked channels remain, and where no input decides an output any more."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import narrows
from narrows.ir.compare import relative_error
from narrows.ir.program import Note, Program
from narrows.passes.base import TOLERANCE, Fidelity

EXACT = TOLERANCE[Fidelity.EXACT][torch.float64]


class Step(nn.Module):
    """Attention whose cache of keys and values goes in and comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        def heads(y: Tensor) -> Tensor:
            return y.view(y.shape[0], -1, 2, 8).transpose(1, 2)

        k = torch.cat((keys, heads(self.k(x))), 2)
        v = torch.cat((values, heads(self.v(x))), 2)
        y = F.scaled_dot_product_attention(heads(self.q(x)), k, v)
        return self.o(y.transpose(1, 2).flatten(2)), k, v


class Pair(nn.Module):
    """Two layers, whose second result is shown, too, or meets the input."""

    def __init__(self, end: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.end, self.a, self.b = end, nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> object:
        return self.end(self.b(self.a(x).relu()), x)


def pair(end: Callable[[Tensor, Tensor], object]) -> Program:
    torch.manual_seed(0)
    return narrows.capture(Pair(end).double().eval(), (torch.randn(3, 6, dtype=torch.float64),))


def pruned(program: Program, **masks: object) -> Program:
    plan = narrows.plan(program, zeros=False, **masks)
    result = narrows.apply(program, plan)
    x = program.examples
    assert relative_error(result(*x), plan.masked(program)(*x)) <= EXACT
    return result


def about(program: Program, reason: str) -> list[Note]:
    return [n for n in program.notes if n.reason == reason]


def test_a_mask_on_cached_keys_says_why_nothing_goes() -> None:
    cache = torch.randn(2, 2, 5, 8).double()
    x = torch.randn(2, 1, 16).double()
    program = narrows.capture(Step().double().eval(), (x, cache, cache.clone()))
    result = pruned(program, keep_outputs={"k.weight": range(8)})
    (note,) = about(result, "place")
    assert (note.where, note.channels) == ("k", 8)
    assert note.message == (
        "8 masked outputs stay, as zeros: the model's output holds them and cat joins the model's "
        "input keys to them"
    )


def test_a_place_that_another_tensor_fills_is_told() -> None:
    def end(y: Tensor, x: Tensor) -> Tensor:
        return torch.stack((y, x), 1).sum(1).relu() @ torch.ones(6, 1, dtype=x.dtype)

    (note,) = about(pruned(pair(end), keep_outputs={"b.weight": [0, 1, 2]}), "place")
    assert (note.where, note.channels) == ("b", 3)
    assert note.message == (
        "3 masked outputs stay, as zeros: stack joins the model's input x to them"
    )


def test_what_goes_is_not_noted() -> None:
    assert not about(pruned(pair(lambda y, x: y), keep_outputs={"a.weight": [0, 2]}), "place")


@pytest.mark.parametrize(
    ("masks", "numbers"),
    [
        ({"keep_inputs": {"b.weight": []}}, [0]),
        ({"keep_outputs": {"a.weight": []}}, [0]),
        ({"keep_inputs": {"a.weight": []}}, [0]),
        ({"keep_inputs": {"b.weight": [1]}}, []),
        ({"keep_outputs": {"b.weight": []}}, [0]),
    ],
)
def test_an_output_that_no_input_decides_is_noted(
    masks: dict[str, dict[str, list[int]]], numbers: list[int]
) -> None:
    result = pruned(pair(lambda y, x: (y, x * 2)), **masks)
    told = about(result, "constant")
    assert [n.message.split()[1] for n in told] == [str(n) for n in numbers]
    assert all(n.channels == 0 and n.source for n in told)
    y = [result(torch.randn(4, 6, dtype=torch.float64))[0] for _ in range(2)]
    assert torch.equal(*y) is bool(numbers)


def test_an_output_that_never_depended_on_an_input_is_not_noted() -> None:
    program = pair(lambda y, x: (y, torch.ones(3, dtype=torch.float64)))
    assert not about(pruned(program, keep_inputs={"b.weight": [1]}), "constant")
