"""The criteria that score by data, against their papers' formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import narrows
from narrows.ir.program import Program
from narrows.passes.choosing.criteria.base import NoScoreError
from narrows.passes.choosing.criteria.catalog import find
from narrows.passes.choosing.criteria.filters import blocks
from narrows.passes.choosing.criteria.lasso import drops
from narrows.passes.choosing.evidence import informed
from tests.passes.scored import IMAGES, LABELLED, Small, captured, labels, layer, told, x_of


@pytest.fixture(scope="module")
def cnn() -> Program:
    return captured(Small())


class Traced:
    """The network `Small` by hand: every tensor that the tests look at, and its gradient."""

    def __init__(self, program: Program) -> None:
        w = {k: v.detach().clone().requires_grad_() for k, v in program.weights.items()}
        self.weights, self.tensors = w, {}

        def unit(name: str, x: Tensor, active: bool = True, groups: int = 1) -> Tensor:
            x = self.keep(f"{name} in", x * 1)
            y = nn.functional.conv2d(x, w[f"{name}.0.weight"], w[f"{name}.0.bias"], 1, 1, 1, groups)
            self.keep(f"{name} raw", y)
            y = nn.functional.batch_norm(
                y, w[f"{name}.1.running_mean"].detach(), w[f"{name}.1.running_var"].detach(),
                w[f"{name}.1.weight"], w[f"{name}.1.bias"],
            )  # fmt: skip
            return self.keep(f"{name} out", y.relu() if active else y)

        x = unit("stem", IMAGES.clone().requires_grad_())
        x = x + unit("down", unit("wise", unit("up", x), groups=12), active=False)
        x = unit("split", x, groups=2)
        x = self.keep("head in", x.mean((2, 3)) * 1)
        self.logits = nn.functional.linear(x, w["head.weight"], w["head.bias"])
        target = torch.cat([y for _, y in LABELLED])
        nn.functional.cross_entropy(self.logits, target, reduction="sum").backward()

    def keep(self, name: str, x: Tensor) -> Tensor:
        x.retain_grad()
        self.tensors[name] = x
        return x

    def effects(self, name: str) -> Tensor:
        x = self.tensors[name]
        assert x.grad is not None
        return (x * x.grad).detach().reshape(len(x), x.shape[1], -1).sum(2)


@pytest.fixture(scope="module")
def traced(cnn: Program) -> Traced:
    return Traced(cnn)


PLACES = [
    ("up.0.weight", "inputs", "up in"), ("up.0.weight", "outputs", "up out"),
    ("down.0.weight", "outputs", "down out"), ("split.0.weight", "inputs", "split in"),
    ("head.weight", "inputs", "head in"),
]  # fmt: skip


@pytest.mark.parametrize(("weight", "side", "place"), PLACES)
def test_activity_of_a_channel(
    cnn: Program, traced: Traced, weight: str, side: str, place: str
) -> None:
    x = traced.tensors[place].detach().transpose(0, 1).flatten(1)
    near = {"rtol": 1e-10, "atol": 1e-12}
    assert np.allclose(told(cnn, "mean-activation", weight, side), x.abs().mean(1), **near)
    assert np.allclose(told(cnn, "variance", weight, side), x.var(1, correction=0), **near)
    if bool((x == 0).any()):
        zeros = (x == 0).double().mean(1)
        assert np.allclose(told(cnn, "apoz", weight, side), 1 - zeros, **near)
    else:
        with pytest.raises(NoScoreError, match="none of its numbers is ever zero"):
            told(cnn, "apoz", weight, side)


@pytest.mark.parametrize(("weight", "side", "place"), PLACES[:4])
def test_hrank(cnn: Program, traced: Traced, weight: str, side: str, place: str) -> None:
    x = traced.tensors[place].detach()
    wanted = [np.mean([np.linalg.matrix_rank(m) for m in maps]) for maps in x.transpose(0, 1)]
    assert np.array_equal(told(cnn, "hrank", weight, side), wanted)


@pytest.mark.parametrize(("weight", "side", "place"), PLACES)
def test_effects_on_a_loss(
    cnn: Program, traced: Traced, weight: str, side: str, place: str
) -> None:
    effects, how = traced.effects(place), {"data": LABELLED, "loss": labels}
    found = told(cnn, "taylor", weight, side, **how)
    assert np.allclose(found, effects.abs().mean(0), rtol=1e-9)
    found = told(cnn, "gauss-newton", weight, side, **how)
    assert np.allclose(found, effects.square().mean(0) / 2, rtol=1e-9)
    if side == "inputs":
        found = told(cnn, "diversity", weight, side, **how)
        assert np.allclose(found, effects.abs().var(0, correction=0), rtol=1e-9)


@pytest.mark.parametrize("weight", ["up.0.weight", "split.0.weight", "head.weight"])
def test_fisher(cnn: Program, weight: str) -> None:
    squares = torch.zeros_like(cnn.weights[weight])
    module = cnn.to_module()
    for x, target in zip(IMAGES, torch.cat([y for _, y in LABELLED]), strict=True):
        module.zero_grad()
        nn.functional.cross_entropy(module(x[None]), target[None]).backward()
        squares += module.get_parameter(weight).grad.square() / len(IMAGES)
    worth = squares * cnn.weights[weight].detach().square() / 2
    found = told(cnn, "fisher", weight, "outputs", data=LABELLED, loss=labels)
    assert np.allclose(found, worth.flatten(1).sum(1), rtol=1e-9)
    found = told(cnn, "fisher", weight, "inputs", data=LABELLED, loss=labels)
    groups = layer(cnn, weight).groups
    each = worth.reshape(groups, len(worth) // groups, worth.shape[1], -1)
    assert np.allclose(found, each.sum((1, 3)).flatten(), rtol=1e-9)


def test_wanda(cnn: Program, traced: Traced) -> None:
    for weight, place, groups in (("up.0.weight", "up in", 1), ("split.0.weight", "split in", 2)):
        x = traced.tensors[place].detach().transpose(0, 1).flatten(1)
        norms = x.norm(dim=1) / len(IMAGES) ** 0.5
        w = cnn.weights[weight].detach().abs()
        w = w.reshape(groups, len(w) // groups, w.shape[1], -1)
        worth = w * norms.reshape(groups, 1, -1, 1)
        found = told(cnn, "wanda", weight, "inputs")
        assert np.allclose(found, worth.sum((1, 3)).flatten(), rtol=1e-10)
        found = told(cnn, "wanda", weight, "outputs")
        assert np.allclose(found, worth.sum((2, 3)).flatten(), rtol=1e-10)


def patches(x: Tensor, groups: int) -> Tensor:
    """Return the columns of 3x3 convolutions, ``[groups, rows, inputs of a group * 9]``."""
    found = nn.functional.unfold(x, 3, padding=1).transpose(1, 2).flatten(0, 1)
    return found.reshape(len(found), groups, -1).transpose(0, 1)


@pytest.mark.parametrize(("name", "groups"), [("up", 1), ("split", 2), ("wise", 12), ("head", 1)])
def test_obc(cnn: Program, traced: Traced, name: str, groups: int) -> None:
    weight = "head.weight" if name == "head" else f"{name}.0.weight"
    x = traced.tensors[f"{name} in"].detach()
    rows = x[None] if name == "head" else patches(x, groups)
    matrix = cnn.weights[weight].detach().flatten(1).reshape(groups, -1, rows.shape[2])
    taps = 1 if name == "head" else 9
    wanted = []
    for own, w in zip(rows, matrix, strict=True):
        h = own.T @ own / len(own)
        h += 0.01 * h.diagonal().mean() * torch.eye(len(h))
        for c in range(0, len(h), taps):  # the best weights without the channel, by least squares
            rest = [i for i in range(len(h)) if not c <= i < c + taps]
            own_h = h[c : c + taps, c : c + taps]
            if rest:
                cross = h[rest][:, c : c + taps]
                own_h = own_h - cross.T @ torch.linalg.solve(h[rest][:, rest], cross)
            gone = w[:, c : c + taps]
            wanted.append(float(0.5 * ((gone @ own_h) * gone).sum()))
    assert np.allclose(told(cnn, "obc", weight, "inputs"), wanted, rtol=1e-8)


@pytest.mark.parametrize("conv", [
    nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2),
    nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
    nn.Conv3d(4, 6, (1, 2, 3)),
])  # fmt: skip
def test_what_a_convolution_multiplies_gives_its_result(conv: nn.Module) -> None:
    """The sum of OBC's errors over nothing else is the energy of the result, through the Gram."""
    rank = conv.weight.dim() - 2
    x = x_of(3, 4, *(5,) * rank, seed=3)
    program = narrows.capture(conv.double().eval(), (x,))
    known = informed(program, find("obc"), [x], sides=("inputs",))
    (sums,) = known.sums.values()
    assert isinstance(sums, dict)
    weights = blocks(program, layer(program, "weight")).double().flatten(2)
    energy = torch.einsum("gof,gfh,goh->", weights, sums["gram"] / sums["rows"], weights)
    made = (conv(x) - conv.bias.reshape(-1, *[1] * rank)).detach()
    assert np.isclose(float(energy), float(made.square().mean() * 6), rtol=1e-10)


def test_an_image_alone_is_a_batch_of_one() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1)).double()
    x = x_of(3, 20, 20, seed=2)
    alone, batched = (narrows.capture(net.eval(), (images,)) for images in (x, x[None]))
    found = told(alone, "obc", "2.weight", "inputs", data=[x])
    assert np.allclose(found, told(batched, "obc", "2.weight", "inputs", data=[x[None]]))
    macs = {"macs": 0.8, "constrained": False}
    wanted = narrows.plan(batched, data=[x[None]] * 2, **macs)
    assert narrows.plan(alone, data=[x] * 2, **macs).inputs == wanted.inputs


def test_lasso_is_the_order_of_the_path() -> None:
    """Each score is where coordinate descent finds the coefficient to leave zero."""
    program = captured(nn.Sequential(nn.Conv2d(3, 7, 1), nn.Conv2d(7, 5, 3)))
    found = told(program, "lasso", "1.weight", "inputs")
    x = nn.functional.conv2d(IMAGES, program.weights["0.weight"], program.weights["0.bias"])
    w = program.weights["1.weight"].detach()
    parts = torch.stack([
        nn.functional.conv2d(x[:, c : c + 1], w[:, c : c + 1]).flatten() for c in range(7)
    ]).detach().numpy()  # fmt: skip
    a = parts @ parts.T / (parts.shape[1] / 5)
    order = np.argsort(-found)
    for at, channel in enumerate(order):
        for penalty, there in ((found[channel] * 1.01, False), (found[channel] * 0.99, True)):
            b = solved(a, penalty)
            if all(abs(penalty / f - 1) > 0.005 for f in found):  # between two events
                assert (b[channel] != 0) == there, (at, channel)


def solved(a: np.ndarray, penalty: float) -> np.ndarray:
    """Return the minimum of ``1/2 b a b - b a 1 + penalty |b|_1`` by coordinate descent."""
    b, goal = np.zeros(len(a)), a.sum(1)
    for _ in range(4000):
        for i in range(len(a)):
            rest = goal[i] - a[i] @ b + a[i, i] * b[i]
            b[i] = np.sign(rest) * max(abs(rest) - penalty, 0) / a[i, i]
    return b


def test_a_lasso_s_coefficient_comes_back_to_zero() -> None:
    """A path on which one does: checked against coordinate descent all along it."""
    generator = np.random.default_rng(6)
    parts = generator.standard_normal((6, 40))
    parts[0] = parts[1:4].sum(0) + 0.3 * parts[0]  # enters first, then the others replace it
    parts[0] *= 0.2
    a = parts @ parts.T / 40
    found = drops(a)
    for penalty in np.linspace(0.01, 0.99, 23) * found.max():
        assert set(np.flatnonzero(solved(a, penalty))) <= set(np.flatnonzero(found >= penalty))
    assert (found > 0).all()
