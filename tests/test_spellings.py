"""Ways to say the same: device and dtype literals, sizes as numbers, parts without elements.

What a model may say beside its layers is not for the layers' passes to stumble over: each of these
is captured, rewritten without a plan, run in float64, and sorted into couplings.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import narrows
from narrows.ir.compare import relative_error
from narrows.ir.verify import verify

CPU = torch.device("cpu")


class Net(nn.Module):
    """``b(form(a(x)))``; the form may read the buffers."""

    def __init__(self, form: Callable[[Tensor, Net], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.form = nn.Linear(4, 8), nn.Linear(8, 3), form
        self.register_buffer("row", torch.linspace(-1, 1, 8))
        self.register_buffer("square", torch.linspace(-1, 1, 64).view(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.form(self.a(x), self))


Form = Callable[[Tensor, Net], Tensor]

# The `+ 0` is an identity, for whose sake the program is run without data.
LITERALS: dict[str, Form] = {
    "type_as": lambda y, s: y.half().float().type_as(y) + 0,
    "to(device, dtype)": lambda y, s: (y + 0).to(CPU, torch.float32).view(y.shape),
    "to(device=, dtype=)": lambda y, s: (y + 0).double().to(device=CPU, dtype=torch.float32),
    "to(other)": lambda y, s: y.double().to(s.row) + 0,
    "cpu()": lambda y, s: y.cpu() + 0,
    "memory format": lambda y, s: (
        (y + 0).view(-1, 8, 1, 1).to(memory_format=torch.channels_last).reshape(-1, 8)
    ),
    "arange on a device": lambda y, s: y + torch.arange(8, device=y.device).to(y.dtype) + 0,
    "mask of comparisons": lambda y, s: y * (y > 0).long().to(y.device).type_as(y) + 0,
    "ones of no dtype": lambda y, s: (
        torch.triu(torch.ones(y.shape[0], y.shape[0], device=CPU)) @ y + 0
    ),
    "integers divided": lambda y, s: y + (torch.arange(y.shape[0]) / 4).view(-1, 1) + 0,
    "zeros beside": lambda y, s: torch.cat([y[:, :4], torch.zeros(y.shape[0], 4)], 1) + 0,
    "full_like": lambda y, s: y * torch.full_like(y, 3.0, dtype=torch.float32) + 0,
    "new_full": lambda y, s: y * y.new_full((y.shape[0], 8), 2.0, device=CPU) + 0,
    "softmax in float64": lambda y, s: y * torch.softmax(y, 1, dtype=torch.float64).to(y.dtype) + 0,
    "the lowest number": lambda y, s: (
        y.masked_fill(y > 1, torch.finfo(y.dtype).min).clamp(-1, 1) + 0
    ),
}

SIZES: dict[str, Form] = {
    "groups": lambda y, s: F.conv1d(
        y.view(1, -1, 1), y.repeat_interleave(8, 0).view(-1, 8, 1), groups=y.shape[0]
    ).view(-1, 8),
    "groups, weight repeated": lambda y, s: F.conv1d(
        y.view(1, -1, 1), s.square.repeat(y.shape[0], 1).view(-1, 8, 1), groups=y.shape[0]
    ).view(-1, 8),
    "transposed groups": lambda y, s: F.conv_transpose1d(
        y.view(1, -1, 1), s.square.repeat(y.shape[0], 1).view(-1, 8, 1), groups=y.shape[0]
    ).view(-1, 8),
    "pad": lambda y, s: F.pad(y, (0, 0, 0, y.shape[0]))[: y.shape[0]],
    "alpha": lambda y, s: torch.add(y, s.row, alpha=y.shape[0]),
    "clamp": lambda y, s: y.clamp(-y.shape[0], y.shape[0]),
    "repeat_interleave": lambda y, s: (
        y.repeat_interleave(y.shape[0], 1).view(-1, 8, y.shape[0]).mean(2)
    ),
    "power": lambda y, s: y * y.shape[0] ** -0.5,
    "roll": lambda y, s: y.roll(y.shape[0], 1),
}

EMPTY: dict[str, Form] = {
    "rotary of whole heads": lambda y, s: torch.cat([y[:, :8] * s.row, y[:, 8:].relu() * 2], 1),
    "no prefix": lambda y, s: torch.cat([s.row[:0].expand(y.shape[0], 0), y], 1),
    "no tokens": lambda y, s: torch.cat(
        [s.square[None, :0].expand(y.shape[0], -1, -1), y.view(-1, 1, 8)], 1
    ).flatten(1),
    "an empty split": lambda y, s: torch.cat([part * 2 for part in y.split([8, 0], 1)], 1),
    "an empty layer": lambda y, s: torch.cat([y, F.linear(y, s.square[:0])], 1),
    "an empty sum": lambda y, s: y + y[:, :0].sum(1, keepdim=True),
    "an empty product": lambda y, s: y + y[:, :0] @ s.square[:0],
    "empty keys": lambda y, s: y + (y @ y[:0].t()) @ y[:0],
}


def build(form: Form) -> tuple[Net, Tensor]:
    return Net(form).eval(), torch.randn(2, 4)


FORMS = {**LITERALS, **SIZES, **EMPTY}


@pytest.mark.parametrize("name", FORMS)
def test_without_a_plan_it_is_the_model(name: str) -> None:
    net, x = build(FORMS[name])
    program = narrows.capture(net, (x,))
    made = narrows.apply(program)
    verify(made, shapes=True)
    assert relative_error(made(x), net(x)) < 1e-6
    wide = program.to(torch.float64)
    assert wide(x.double()).dtype is torch.float64
    assert relative_error(wide(x.double()), net(x)) < 1e-3  # half may be among the literals
    program.couplings()
    if program.dynamic_batch:
        other = torch.randn(3, 4)
        assert relative_error(made(other), net(other)) < 1e-6


@pytest.mark.parametrize("name", [n for n in FORMS if n not in ("ones of no dtype", "empty keys")])
def test_with_a_plan_it_is_the_masked_model(name: str) -> None:
    net, x = build(FORMS[name])
    program = narrows.capture(net, (x,)).to(torch.float64)
    plan = narrows.plan(program, keep_inputs={"b.weight": [0, 2, 3, 7]}, zeros=False)
    made = narrows.apply(program, plan)
    assert relative_error(made(x.double()), plan.masked(program)(x.double())) < 1e-12


@pytest.mark.parametrize("name", ["the lowest number", "power", "to(other)"])
def test_float64_cast_down_is_float32(name: str) -> None:
    net, x = build(FORMS[name])
    program = narrows.capture(net.double(), (x.double(),)).to(torch.float32)
    assert program(x).dtype is torch.float32
    assert relative_error(program(x), net(x.double())) < 1e-5


@pytest.mark.parametrize(
    "name", ["to(device=, dtype=)", "mask of comparisons", "zeros beside", "clamp", "pad"]
)
def test_it_is_quantized(name: str) -> None:
    net, x = build(FORMS[name])
    quantized = narrows.quantize(narrows.capture(net, (x,)), [torch.randn(16, 4)])
    assert relative_error(quantized.program(x), net(x)) < 0.1


def test_concatenation_of_a_part_without_elements_is_the_other_part() -> None:
    net, x = build(EMPTY["rotary of whole heads"])
    program = narrows.capture(net, (x,))
    assert "cat" not in str(program)
    small = narrows.apply(program, {"ratio": 0.5})
    assert small.weights["a.weight"].shape == (4, 4)
