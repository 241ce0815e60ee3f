"""Norms that are written out become operators, and compute the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import narrows
from narrows.ir.meta import op_name
from narrows.ir.program import Program

Forward = Callable[[Any, Tensor], Tensor]


class Net(nn.Module):
    """A function with a weight and a bias of 6 numbers."""

    def __init__(self, function: Forward) -> None:
        super().__init__()
        self.function = function
        self.w = nn.Parameter(torch.linspace(0.5, 1.5, 6))
        self.b = nn.Parameter(torch.linspace(-0.3, 0.3, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def captured(function: Forward, shape: tuple[int, ...] = (2, 6, 4, 5)) -> Program:
    """Return a program that was compared with its function on other data and another batch."""
    module = Net(function).double().eval()
    program = narrows.capture(module, (torch.randn(shape, dtype=torch.float64),))
    x = torch.randn((3, *shape[1:]), dtype=torch.float64)
    torch.testing.assert_close(program(x), module(x).detach(), rtol=1e-10, atol=1e-10)
    return program


def names(program: Program) -> list[str]:
    """Return the operators of a program, without those that only move."""
    calls = [op_name(n).partition(".")[0] for n in program.nodes if n.op == "call_function"]
    return [n for n in calls if n not in ("permute", "view", "reshape", "sym_size")]


def over(*dims: int) -> Callable[[Tensor], Tensor]:
    return lambda x: x.mean(dims, keepdim=True)


def image(p: Tensor) -> Tensor:
    return p.view(1, -1, 1, 1)


def nafnet(m: Any, x: Tensor) -> Tensor:
    c = x - over(1)(x)
    return image(m.w) * (c / (over(1)(c.pow(2)) + 1e-6).sqrt()) + image(m.b)


def convnext(m: Any, x: Tensor) -> Tensor:
    u = x.mean(1, keepdim=True)
    s = (x - u).pow(2).mean(1, keepdim=True)
    return m.w[:, None, None] * ((x - u) / torch.sqrt(s + 1e-6)) + m.b[:, None, None]


def tokens(m: Any, x: Tensor) -> Tensor:
    c = x - x.mean(-1, keepdim=True)
    return c * torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5) * m.w + m.b


def moments(m: Any, x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) * (1 / torch.sqrt((x * x).mean(-1, keepdim=True) - mean**2 + 1e-3))


def llama(m: Any, x: Tensor) -> Tensor:
    return m.w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def root(m: Any, x: Tensor) -> Tensor:
    return x * (x.square().mean(-1, True) + 1e-6) ** -0.5


def instance(m: Any, x: Tensor) -> Tensor:
    c = x - over(2, 3)(x)
    return c / ((c * c).mean((2, 3), keepdim=True) + 1e-5) ** 0.5 * image(m.w) + image(m.b)


def group(m: Any, x: Tensor) -> Tensor:
    y = x.view(x.shape[0], 2, -1)
    y = (y - over(2)(y)) / torch.sqrt(y.var(2, correction=0, keepdim=True) + 1e-5)
    return y.view(x.shape) * image(m.w) + image(m.b)


@pytest.mark.parametrize(
    ("function", "shape", "wanted"),
    [
        (nafnet, (2, 6, 4, 5), ["layer_norm"]),
        (convnext, (2, 6, 4, 5), ["layer_norm"]),
        (tokens, (2, 3, 6), ["layer_norm"]),
        (moments, (2, 3, 6), ["layer_norm"]),
        (llama, (2, 3, 6), ["rms_norm"]),
        (root, (2, 6), ["rms_norm"]),
        (instance, (2, 6, 4, 5), ["instance_norm"]),
        (group, (2, 6, 4, 5), ["group_norm"]),
    ],
)
def test_norms_are_one_operator(
    function: Forward, shape: tuple[int, ...], wanted: list[str]
) -> None:
    program = captured(function, shape)
    assert names(program) == wanted
    made = next(n for n in program.nodes if op_name(n).partition(".")[0] == wanted[0])
    read = {str(n.target) for n in made.all_input_nodes if n.op == "get_attr"}
    bias = {"b"} if wanted[0] != "rms_norm" else set()
    assert read == (set() if function in (moments, root) else {"w"} | bias)


def unbiased(m: Any, x: Tensor) -> Tensor:
    return (x - x.mean(-1, True)) / torch.sqrt(x.var(-1, keepdim=True) + 1e-5)


def beside(m: Any, x: Tensor) -> Tensor:
    return (x - x.mean(-1, True)) / (x.std(-1, unbiased=False, keepdim=True) + 1e-5)


def others(m: Any, x: Tensor) -> Tensor:
    c = x - x.mean(1, True)
    return c / torch.sqrt((x * x).mean(1, True) + 1e-5)


def axes(m: Any, x: Tensor) -> Tensor:
    c = x - x.mean(1, True)
    return c / torch.sqrt(x.var(2, unbiased=False, keepdim=True) + 1e-5)


def batch(m: Any, x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).mean(0, True) + 1e-5)


@pytest.mark.parametrize("function", [unbiased, beside, others, axes, batch])
def test_what_is_another_function_stays_as_it_is(function: Forward) -> None:
    program = captured(function, (2, 5, 6)) if function is not batch else fixed(function)
    assert not {"layer_norm", "rms_norm", "instance_norm", "group_norm"} & {*names(program)}


def fixed(function: Forward) -> Program:
    return narrows.capture(Net(function).eval(), (torch.randn(2, 5, 6),), dynamic_batch=False)


def test_an_affine_part_that_others_read_stays_apart() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return y * m.w + y.relu()

    assert names(captured(function, (2, 3, 6))) == ["rms_norm", "mul", "relu", "add"]


def test_a_norm_written_out_is_quantized_as_the_operator() -> None:
    x = torch.randn(16, 6, 8, 8) * torch.linspace(0.2, 3, 6).view(1, -1, 1, 1)

    def operator(m: Any, x: Tensor) -> Tensor:
        y = torch.nn.functional.layer_norm(x.permute(0, 2, 3, 1), (6,), m.w, m.b, 1e-6)
        return y.permute(0, 3, 1, 2)

    programs = []
    for function in (nafnet, operator):
        program = narrows.capture(Net(function).eval(), (x[:2],))
        made = narrows.quantize(program, [x], check=False)
        assert made.plan.floats == {}
        programs.append(made.program)
    assert torch.equal(programs[0](x), programs[1](x))
