"""The criteria that score by data, against their papers' formulas, and what is wrong with data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import narrows
from narrows.errors import NarrowsError, PlanError
from narrows.ir.program import Program
from narrows.ir.structure.layers import Layer
from narrows.passes.choosing.criteria.base import NoScoreError, scores
from narrows.passes.choosing.criteria.catalog import find
from narrows.passes.choosing.criteria.filters import blocks
from narrows.passes.choosing.criteria.lasso import drops
from narrows.passes.choosing.divergence import Divergence
from narrows.passes.choosing.evidence import informed
from narrows.passes.plans.mass import kept_mass
from tests.passes.scored import BATCHES, IMAGES, Small, captured, layer, score, x_of


@pytest.fixture(scope="module")
def cnn() -> Program:
    return captured(Small())


# ------------------------------------------------------------------ of data


def told(program: Program, criterion: Any, weight: str, side: str, **options: Any) -> np.ndarray:
    """Return scores by `BATCHES`, or other data."""
    options = {"data": BATCHES, **options}
    known = informed(program, find(criterion), **options)
    return scores(known, program, layer(program, weight), side)


def labels(outputs: Tensor, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(outputs, batch[1], reduction="sum")


LABELLED = [(x, torch.arange(len(x)) % 5) for x in BATCHES]


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


def test_the_probe_is_the_curvature_of_the_divergence() -> None:
    """The mean of many probes' squares is the Gauss-Newton form, within the noise of its mean."""
    program = captured(nn.Sequential(nn.Flatten(), nn.Linear(108, 4), nn.Linear(4, 3)))
    many = [IMAGES[:1]] * 4000
    found = told(program, "gauss-newton", "2.weight", "inputs", data=many)
    w, b = program.weights["2.weight"].detach(), program.weights["2.bias"].detach()
    x = program.weights["1.weight"] @ IMAGES[0].flatten() + program.weights["1.bias"]
    p = (w @ x + b).softmax(0).detach()
    curvature = torch.diag(p) - torch.outer(p, p)
    change = (w * x).detach()  # what the logits lose with each channel
    wanted = 0.5 * (change.T @ curvature @ change).diagonal()
    # The square of a normal number has the deviation sqrt(2): 4000 of them 2.2 %, here 4.5 times.
    assert np.allclose(found, wanted, rtol=0.1)


def test_probabilities_are_probed_as_their_logits_are() -> None:
    plain = captured(nn.Sequential(nn.Flatten(), nn.Linear(108, 4), nn.Linear(4, 3)))
    module = nn.Sequential(nn.Flatten(), nn.Linear(108, 4), nn.Linear(4, 3), nn.Softmax(1))
    sure = captured(module).with_weights(plain.weights)
    first, second = (told(p, "taylor", "2.weight", "inputs") for p in (plain, sure))
    assert np.allclose(first, second, rtol=1e-9)


def test_evidence_is_of_all_uses_of_a_weight_and_leaves_gradients_alone() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(self.a(x)))

    module = Twice().eval()
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    program = narrows.capture(module, (x,))
    found = told(program, "mean-activation", "a.weight", "inputs", data=[x])
    both = torch.stack([x, module.a(x)]).detach()
    assert np.allclose(found, both.abs().mean((0, 1)), rtol=1e-6)
    told(program, "fisher", "a.weight", "inputs", data=[x])
    assert all(p.grad is None for p in module.parameters())


def test_windows_of_an_image_are_its_positions() -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            b, n, c = x.shape
            y = self.a(x.reshape(b * 2, n // 2, c)).reshape(b, n, c)
            return self.b(y.mean(1))

    x = x_of(3, 6, 4, seed=4)
    program = narrows.capture(Windows().double().eval(), (x,))
    found = told(program, "taylor", "a.weight", "inputs", data=[x])
    weights = {k: v.detach() for k, v in program.weights.items()}
    own = x.clone().requires_grad_()
    outputs = program.run_flat([own], weights)
    Divergence.of(outputs).probe(outputs, torch.Generator().manual_seed(0)).backward()
    assert own.grad is not None
    assert np.allclose(found, (own * own.grad).sum(1).abs().mean(0).detach(), rtol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "wanda"}, r"wanda scores by data, and there is none(.|\n)*data=\[images\]"),
        ({"criterion": "taylor"}, "it measures what layers see, and gradients"),
        ({"criterion": "l1", "data": BATCHES}, "data has no effect with the criterion l1"),
        ({"criterion": "l1", "data": None, "loss": labels}, "loss has no effect with the crit"),
        ({"criterion": "wanda", "loss": labels}, "a loss has no effect with wanda"),
        ({"criterion": "l1", "data": None, "loss": None, "outputs": "values"}, "outputs has no ef"),
        ({"criterion": "wanda", "loss": None, "outputs": "logits"}, "no effect with wanda"),
        ({"loss": labels, "data": LABELLED, "outputs": "logits"}, "no effect with a loss"),
        ({"loss": 3}, "a loss is a function"),
        ({"loss": labels}, "the loss failed: ValueError"),
        ({"loss": lambda y, b: y}, r"one number .* got \[4, 5\]"),
        ({"loss": lambda y, b: 3.0}, "got float"),
        ({"loss": lambda y, b: y.sum() / 0}, "the loss is -?inf"),
        ({"criterion": "wanda", "data": []}, "there is no data(.|\n)*try: data="),
        ({"criterion": "wanda", "data": IMAGES}, "the data is one Tensor, not batches"),
        ({"criterion": "wanda", "data": LABELLED}, "called with another structure"),
        ({"criterion": "wanda", "data": [IMAGES.float()]}, "is torch.float32, the program takes"),
        ({"criterion": "wanda", "data": [IMAGES * float("nan")]}, "wanda scores .* as NaN"),
        ({"criterion": "diversity", "data": [IMAGES[:1]]}, "one example has no variance"),
        ({"criterion": "obc{damping=0.0}", "data": BATCHES}, "obc takes a damping above 0"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_data_is_told(cnn: Program, options: Any, message: str) -> None:
    if "loss" in options:
        options = {"criterion": "taylor", "data": BATCHES, **options}
    with pytest.raises(NarrowsError, match=message):
        narrows.plan(cnn, ratio=0.5, **options)


def test_data_without_a_ratio_has_no_effect(cnn: Program) -> None:
    for options in ({"data": BATCHES}, {"loss": labels}):
        with pytest.raises(PlanError, match="has no effect without a ratio or a latency"):
            narrows.plan(cnn, **options)


def test_outputs_without_classes_are_values() -> None:
    program = captured(nn.Sequential(nn.Flatten(), nn.Linear(108, 4), nn.Linear(4, 1)))
    found = told(program, "gauss-newton", "2.weight", "inputs", data=[IMAGES[:1]])
    x = program.weights["1.weight"] @ IMAGES[0].flatten() + program.weights["1.bias"]
    w, b = program.weights["2.weight"][0].detach(), program.weights["2.bias"].detach()
    noise = torch.randn(1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # One number has no deviation: its magnitude stands for it.
    wanted = (0.5 * (noise * w * x / (w @ x + b)).square()).detach()
    assert np.allclose(found, wanted, rtol=1e-9)


def test_outputs_that_no_layer_makes_have_no_gradients() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)).argmax(1)

    x = x_of(3, 6, seed=1)
    program = narrows.capture(Fixed().double().eval(), (x,))
    with pytest.raises(PlanError, match="the outputs have no gradients to score by"):
        narrows.plan(program, ratio=0.5, criterion="taylor", data=[x])
    with pytest.raises(PlanError, match="the outputs have no gradients to score by"):
        narrows.plan(program, macs=0.5, data=[x])


def test_classes_of_maps_lie_along_axis_1_if_told() -> None:
    """Each place of a map counts as an example of a network that makes it from its patch does."""
    net = captured(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1)))
    found, plain = (told(net, "gauss-newton", "1.weight", "inputs", data=[IMAGES], outputs=kind)
                    for kind in ("logits", "auto"))  # fmt: skip
    own = IMAGES.clone()
    x = nn.functional.conv2d(own, net.weights["0.weight"], net.weights["0.bias"]).detach()
    x.requires_grad_()
    z = nn.functional.conv2d(x, net.weights["1.weight"], net.weights["1.bias"])

    def effects(v: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(z, x, v, retain_graph=True)
        return ((x * grad).sum((2, 3)).square().mean(0) / 2).detach()

    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0), dtype=z.dtype)
    p = z.softmax(1).detach()
    v = p.sqrt() * noise
    assert np.allclose(found, effects(v - p * v.sum(1, keepdim=True)), rtol=1e-9)
    assert np.allclose(plain, effects(noise / z.std(correction=0).detach()), rtol=1e-9)


def test_a_user_s_criterion_may_measure(cnn: Program) -> None:
    class Largest:
        """The largest number, by a sum over batches that is none."""

        name = "largest"

        def measure(self, seen: Any) -> Any:
            return {"largest": seen.flat.amax((0, 2))}

        def weigh(self, program: Program, layer: Layer, side: str, sums: Any) -> Any:
            return sums["largest"]

    plan = narrows.plan(cnn, ratio=0.5, criterion=Largest(), data=BATCHES, include="up.*")
    assert plan.reasons["up.0.weight"] == "largest 0.5 constrained"

    class Broken(Largest):
        def measure(self, seen: Any) -> Any:
            return 1 / 0

    with pytest.raises(PlanError, match=r"largest failed to measure the inputs of .*: Zero"):
        narrows.plan(cnn, ratio=0.5, criterion=Broken(), data=BATCHES)


def test_an_entry_point_adds_a_criterion(
    cnn: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "more_criteria-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: more-criteria\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[narrows.criteria]\nl4 = more_criteria:L4\nlost = more_criteria:Lost\n"
        "bare = more_criteria:Bare\n"
    )
    (tmp_path / "more_criteria.py").write_text(
        "from dataclasses import dataclass\n"
        "from narrows.passes.choosing.criteria.magnitude import Magnitude\n"
        "@dataclass\nclass L4(Magnitude):\n    name, power = 'l4', 4\n"
        "class Lost(L4):\n    pass\nclass Bare(Magnitude):\n    name, power = 'bare', 4\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    fourth = cnn.weights["up.0.weight"].detach().pow(4).sum((1, 2, 3))
    assert np.allclose(score(cnn, "l4", "up.0.weight", "outputs"), fourth, rtol=1e-12)
    with pytest.raises(PlanError, match="the criterion 'lost' of more_criteria:Lost calls itself"):
        find("lost")
    with pytest.raises(PlanError, match="the criterion 'bare' of more_criteria:Bare is no datacl"):
        find("bare")


class Words(nn.Module):
    """A lookup, a layer and classes, behind an operator without a derivative if asked for."""

    def __init__(self, between: str = "") -> None:
        super().__init__()
        self.table, self.a, self.b = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.between = between

    def forward(self, ids: Tensor) -> Tensor:
        x = self.a(self.table(ids))
        if self.between == "sign":
            x = (x > 0).to(x.dtype)
        elif self.between:
            x = torch.igamma(x.abs(), x.abs())
        return self.b(x.mean(1))


def test_a_lookup_is_scored_by_what_it_makes() -> None:
    ids = torch.arange(8).reshape(2, 4)
    program = narrows.capture(Words().eval(), (ids,))
    made = program.weights["table.weight"].detach()[ids].abs().mean((0, 1))
    found = told(program, "mean-activation", "table.weight", "outputs", data=[ids])
    assert np.allclose(found, made, rtol=1e-6)
    for criterion in ("taylor", "gauss-newton"):
        assert told(program, criterion, "table.weight", "outputs", data=[ids]).all()
    for criterion in ("wanda", "fisher"):
        with pytest.raises(NoScoreError, match="it looks rows up, and multiplies nothing"):
            told(program, criterion, "table.weight", "outputs", data=[ids])


def test_an_operator_without_a_derivative_is_told() -> None:
    ids = torch.arange(8).reshape(2, 4)
    program = narrows.capture(Words("sign").eval(), (ids,))
    told(program, "wanda", "a.weight", "inputs", data=[ids])
    for criterion, side in (("taylor", "inputs"), ("fisher", "inputs"), ("fisher", "outputs")):
        with pytest.raises(NoScoreError, match="no gradient reaches it"):
            told(program, criterion, "a.weight", side, data=[ids])
    assert told(program, "taylor", "b.weight", "inputs", data=[ids]).any()
    program = narrows.capture(Words("igamma").eval(), (ids,))
    with pytest.raises(PlanError, match=r"no gradients can be taken of words: .*igamma"):
        told(program, "taylor", "b.weight", "inputs", data=[ids])


def test_gradients_are_taken_in_inference_mode_too(cnn: Program) -> None:
    wanted = told(cnn, "taylor", "up.0.weight", "inputs")
    with torch.inference_mode():
        batches = [x.clone() for x in BATCHES]
        found = told(cnn, "taylor", "up.0.weight", "inputs", data=batches)
    assert np.array_equal(found, wanted)


def test_score_mass_by_data_wants_a_criterion_that_has_seen_it(cnn: Program) -> None:
    plan = narrows.plan(cnn, ratio=0.5, criterion="wanda", data=BATCHES)
    with pytest.raises(PlanError, match="wanda scores by data, and there is none"):
        kept_mass(cnn, plan, "wanda")
    assert 0 < kept_mass(cnn, plan, informed(cnn, find("wanda"), BATCHES)) < 1
