"""What criteria see of data: probes, all uses of a weight, lookups; and what is wrong with data."""

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
from narrows.passes.choosing.criteria.base import NoScoreError
from narrows.passes.choosing.criteria.catalog import find
from narrows.passes.choosing.divergence import Divergence
from narrows.passes.choosing.evidence import informed
from narrows.passes.plans.mass import kept_mass
from tests.passes.scored import (
    BATCHES,
    IMAGES,
    LABELLED,
    Small,
    captured,
    labels,
    score,
    told,
    x_of,
)


@pytest.fixture(scope="module")
def cnn() -> Program:
    return captured(Small())


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
