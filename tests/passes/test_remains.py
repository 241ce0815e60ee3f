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
        "none of the 8 masked outputs of k.weight goes: the model's output holds them and cat "
        "joins the model's input keys to them"
    )


def test_a_place_that_another_tensor_fills_is_told() -> None:
    def end(y: Tensor, x: Tensor) -> Tensor:
        return torch.stack((y, x), 1).sum(1).relu() @ torch.ones(6, 1, dtype=x.dtype)

    (note,) = about(pruned(pair(end), keep_outputs={"b.weight": [0, 1, 2]}), "place")
    assert (note.where, note.channels) == ("b", 3)
    assert note.message == (
        "none of the 3 masked outputs of b.weight goes: stack joins the model's input x to them"
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


# ------------------------------------------------------------------ per mask


def remains(build: Callable[[], nn.Module], *shape: int, **masks: object) -> list[Note]:
    torch.manual_seed(0)
    program = narrows.capture(build().double().eval(), (torch.randn(*shape, dtype=torch.float64),))
    return about(pruned(program, **masks), "place")


def test_channels_that_a_norm_needs_are_told_of_the_mask() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4))

    (note,) = remains(build, 3, 6, keep_outputs={"0.weight": [0, 1, 2, 3, 4]})
    assert note.message == (
        "none of the 3 masked outputs of 0.weight goes: _1 needs them for its statistics"
    )
    assert note.channels == 0  # the norm's own note counts them
    assert note.where == "_0"


class Barred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.logcumsumexp(self.a(x), -1))


def test_a_barrier_is_told_with_its_line() -> None:
    (note,) = remains(Barred, 3, 6, keep_outputs={"a.weight": range(6)})
    assert note.message.startswith("none of the 2 masked outputs of a.weight goes: logcumsumexp (")
    assert "is a barrier" in note.message
    assert "torch.logcumsumexp(self.a(x), -1)" in note.message
    assert note.channels == 2


class Cut(nn.Module):
    """Some channels of a layer meet another layer's, some are read alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(6, 4)
        self.c, self.d = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.c(y[:, :4] + self.b(x)) + self.d(y[:, 4:].relu())


def test_a_mask_that_goes_in_part_says_how_much() -> None:
    (note,) = remains(Cut, 3, 6, keep_outputs={"a.weight": [0, 1, 6, 7]})
    assert note.message == (
        "2 of the 4 masked outputs of a.weight went, 2 stay: they meet b in add"
    )
    assert note.channels == 0  # add says it, too


class Twice(nn.Module):
    """One weight makes what a layer reads, and what is shown."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, width), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.b(self.a(x).relu()), self.a(x + 1).exp()


def test_half_of_a_shared_weight_stays_for_its_other_use() -> None:
    program = narrows.capture(Twice().double().eval(), (torch.randn(3, 6, dtype=torch.float64),))
    result = pruned(program, keep_outputs={"a.weight": range(4)})
    assert result.weights["a.weight"].shape == (8, 6)
    told = {n.where: n for n in result.notes if n.channels or n.reason == "place"}
    assert told["a"].message == "4 channels stay: another use of the weight needs them"
    assert told["a"].source


def test_what_a_note_at_the_layer_says_is_not_said_twice() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))

    masks = {"0.weight": [0, 2, 3], "2.weight": [1, 2]}
    program = narrows.capture(build().double().eval(), (torch.randn(3, 6, dtype=torch.float64),))
    result = pruned(program, keep_outputs=masks)
    assert not about(result, "place")
    (note,) = about(result, "output")
    assert (note.where, note.channels) == ("_2", 2)


def test_groups_that_keep_a_masked_input_say_so() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1, groups=2))

    torch.manual_seed(0)
    program = narrows.capture(
        build().double().eval(), (torch.randn(2, 3, 4, 4, dtype=torch.float64),)
    )
    result = pruned(program, keep_inputs={"2.weight": [0, 1, 2, 4]})
    (note,) = [n for n in result.notes if n.where == "_2" and n.channels]
    assert (note.reason, note.channels) == ("groups", 2)
    assert not about(result, "place")
