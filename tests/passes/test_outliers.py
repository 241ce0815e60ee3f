"""Tensors with a channel far larger than the others: 16 bits for those that need them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import narrows
from narrows.backends.c.compiler import find_compiler
from narrows.ir.program import Program
from narrows.passes.quant.measure import decibels
from narrows.passes.quant.quantization import Quantized
from narrows.passes.quant.widen_outliers import Outliers, widen_outliers

WIDTH = 100  # channels, one of which is an outlier
HELD = 30.0  # dB


class Convs(nn.Module):
    """Residual convolutions, with outputs before and after."""

    def __init__(self, times: float, channel: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH)
        self.mid, self.act, self.last = nn.Conv2d(WIDTH, WIDTH, 1), act(), nn.Conv2d(WIDTH, 6, 1)
        with torch.no_grad():
            self.stem.weight[channel] *= times

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(self.stem(x))
        y = y + self.mid(self.act(y))
        return self.last(self.act(y)), y


class Absorbed(Convs):
    """The layers behind read as much of the outlier as of any other channel: their weights for it
    are as small as it is large."""

    def __init__(self, times: float, channel: int, act: type[nn.Module]) -> None:
        super().__init__(times, channel, act)
        with torch.no_grad():
            for layer in (self.mid, self.last):
                layer.weight[:, channel] /= times


class Tokens(nn.Module):
    """Blocks on a residual stream of tokens: what mixes them, and a layer of each by itself."""

    def __init__(self, times: float, channel: int, norm: type[nn.Module], attends: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(16, WIDTH), nn.Linear(WIDTH, 8)
        self.norms = nn.ModuleList(norm(WIDTH) for _ in range(5))
        mixed = (WIDTH, 3 * WIDTH) if attends else (6, 6)
        self.mix = nn.ModuleList(nn.Linear(*mixed) for _ in range(2))
        self.wide = nn.ModuleList(nn.Linear(WIDTH, 2 * WIDTH) for _ in range(2))
        self.back = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH) for _ in range(2))
        self.attends = attends
        with torch.no_grad():
            self.embed.bias[channel] = times
            for each in self.norms:  # as trained ones do, they take the outlier back
                each.weight[channel] /= times

    def mixed(self, layer: nn.Module, x: Tensor) -> Tensor:
        if not self.attends:
            return layer(x.transpose(1, 2)).transpose(1, 2)
        q, k, v = (a.unflatten(-1, (4, -1)).transpose(1, 2) for a in layer(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.embed(x)
        for i, mix in enumerate(self.mix):
            y = y + self.mixed(mix, self.norms[2 * i](y))
            y = y + self.back[i](F.gelu(self.wide[i](self.norms[2 * i + 1](y))))
        return self.head(self.norms[4](y)), y


def drawn(kind: str, seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a network whose outlier is 30 to 300 times the rest, and two sets of inputs."""
    torch.manual_seed(seed)
    times, channel = 30.0 * 10.0 ** float(torch.rand(())), int(torch.randint(WIDTH, ()))
    if kind in ("convs", "absorbed"):
        net = {"convs": Convs, "absorbed": Absorbed}[kind]
        made = net(times, channel, (nn.ReLU, nn.SiLU)[seed % 2])
        return made.eval(), torch.randn(64, 3, 6, 6), torch.randn(16, 3, 6, 6)
    made = Tokens(times, channel, (nn.LayerNorm, nn.RMSNorm)[seed % 2], kind == "attention")
    return made.eval(), torch.randn(32, 6, 16), torch.randn(16, 6, 16)


def kept(net: nn.Module, program: Program, x: Tensor) -> list[float]:
    """Return what every output keeps, in dB."""
    with torch.no_grad():
        pairs = zip(net(x), program(x), strict=True)
    return [decibels(float(a.square().sum()), float((a - b).square().sum())) for a, b in pairs]


def said(made: Quantized, reason: str) -> list[str]:
    return [n.message for n in made.plan.notes if n.reason == reason]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", ["convs", "absorbed", "mixer", "attention"])
def test_outliers_leave_thirty_decibels_or_a_warning_with_a_name(kind: str, seed: int) -> None:
    net, x, others = drawn(kind, seed)
    made = narrows.quantize(narrows.capture(net, (x[:2],)), [x], check=False)
    names = made.plan.activations.keys() | made.plan.weights.keys()
    warned = [text for text in said(made, "loss") if any(f" {n}" in text for n in names)]
    assert warned or min(kept(net, made.program, others)) >= HELD
    # Only weights that are as small as an outlier is large are beyond wide codes.
    assert bool(warned) == (kind == "absorbed")
    assert not warned or "mid.weight" in warned[0]


def test_tensors_and_channels_are_named() -> None:
    net, x, _ = drawn("attention", 0)
    program = narrows.capture(net, (x[:2],))
    made = narrows.quantize(program, [x], check=False)
    wide = {n for n, g in made.plan.activations.items() if g.wide}
    channel = int(net.embed.bias.abs().argmax())
    notes = {n.where: n.message for n in made.plan.notes if n.reason == "wide"}
    assert notes.keys() == wide
    assert "embed" in wide
    assert all(f"of {WIDTH} channels on axis 2, {channel} have up to" in t for t in notes.values())
    (auto,) = said(made, "auto")
    assert f"with 16 bits for {', '.join(sorted(wide))} " in auto
    again = narrows.quantize(program, plan=made.plan, check=False)
    assert torch.equal(again.program(x)[0], made.program(x)[0])


def test_eight_bits_stay_where_they_hold() -> None:
    """A method that is named, codes that are asked for, and networks without outliers."""
    net, x, _ = drawn("attention", 1)
    program = narrows.capture(net, (x[:2],))
    for options in ({"method": "minmax"}, {"activations": 6, "first_last": None}):
        plan = narrows.quantize(program, [x], check=False, **options).plan
        assert not any(g.wide for g in plan.activations.values())
    even = Convs(1.0, 0, nn.ReLU).eval()
    images = torch.randn(32, 3, 6, 6)
    plan = narrows.quantize(narrows.capture(even, (images,)), [images], check=False).plan
    assert not any(g.wide for g in plan.activations.values())


@pytest.mark.parametrize("kind", ["convs", "attention"])
def test_every_backend_computes_them(kind: str) -> None:
    net, x, others = drawn(kind, 1)
    made = narrows.quantize(narrows.capture(net, (x[:2],)), [x], check=False).program
    artifact = narrows.lower(made, samples=1)
    for got, own in zip(artifact.run(others), made(others), strict=True):
        assert np.array_equal(got, own.numpy())
    if find_compiler():
        narrows.lower(made, "c", samples=1)  # its check is equality


def test_an_outlier_of_what_takes_no_wide_codes_is_said_to_stay() -> None:
    class Resized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
            with torch.no_grad():
                self.stem.weight[5] *= 200.0
                self.last.weight[:, 5] /= 200.0

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.interpolate(self.stem(x), scale_factor=1.5, mode="bilinear"))

    torch.manual_seed(0)
    x = torch.randn(16, 3, 6, 6)
    made = narrows.quantize(narrows.capture(Resized().eval(), (x,)), [x], check=False)
    notes = {n.where: n.message for n in made.plan.notes if n.reason == "narrow"}
    assert "upsample_bilinear2d.vec works on codes of 8 bits" in notes["stem"]
    assert "of 8 channels on axis 1, 5 have up to" in notes["stem"]


def outlier(name: str, kept: float) -> Outliers:
    class Node:  # all that the search asks of one
        pass

    node = Node()
    node.name = name  # type: ignore[attr-defined]
    return Outliers(node, 1, (3,), WIDTH, 100.0, kept)  # type: ignore[arg-type]


@pytest.mark.parametrize("needed", [0, 1, 2, 3, 7, 8])
def test_no_more_tensors_are_widened_than_the_outputs_need(needed: int) -> None:
    found = [outlier(f"t{i}", float(i)) for i in range(8)]
    asked: list[int] = []

    def lost(names: frozenset[str]) -> float:
        asked.append(len(names))
        assert names == {f"t{i}" for i in range(len(names))}  # the poorest first
        return 0.2 if needed and len(names) >= needed else 50.0

    widened, loss = widen_outliers(found, 50.0, lost)
    assert len(widened) == needed
    assert math.isclose(loss, 0.2 if needed else 50.0)
    assert len(asked) <= 4
