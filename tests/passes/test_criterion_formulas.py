"""The criteria against their papers' formulas, computed directly on small layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import narrows
from narrows.errors import PlanError
from narrows.ir.program import Program
from narrows.ir.structure.layers import Layer
from narrows.passes.choosing.criteria.base import NoScoreError
from narrows.passes.choosing.criteria.catalog import CRITERIA
from narrows.passes.plans.plan import ChannelPlan
from tests.networks.registry import conv_bn
from tests.passes.scored import BATCHES, Small, Vit, captured, score


@pytest.fixture(scope="module")
def cnn() -> Program:
    return captured(Small())


@pytest.fixture(scope="module")
def vit() -> Program:
    return captured(Vit())


def rows(program: Program, weight: str, side: str) -> list[Tensor]:
    """Return the weights of every channel of a plain convolution, flat."""
    found = program.weights[weight].double()
    return [w.flatten() for w in (found if side == "outputs" else found.transpose(0, 1))]


# ------------------------------------------------------------------ of the weights alone


def test_random_is_of_the_seed_and_the_weight_alone(cnn: Program) -> None:
    first = score(cnn, "random", "up.0.weight", "outputs")
    assert np.array_equal(first, score(cnn, "random{seed=0}", "up.0.weight", "outputs"))
    for other in (
        ("random{seed=1}", "up.0.weight", "outputs"),
        ("random", "up.0.weight", "inputs"),
    ):
        assert not np.isin(score(cnn, *other), first).any()


@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_lamp(cnn: Program, side: str) -> None:
    squares = np.array([float(w.square().sum()) for w in rows(cnn, "up.0.weight", side)])
    wanted = [s / squares[squares >= s].sum() for s in squares]
    assert np.allclose(score(cnn, "lamp", "up.0.weight", side), wanted, rtol=1e-12)


@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_fpgm(cnn: Program, side: str) -> None:
    each = rows(cnn, "up.0.weight", side)
    wanted = [sum(float((a - b).norm()) for b in each) for a in each]
    # Distances come from inner products: an error of 1e-16 in a square of 0 is one of 1e-8.
    assert np.allclose(score(cnn, "fpgm", "up.0.weight", side), wanted, rtol=1e-7)


def test_bn_scale_is_the_gain_of_the_norm_by_the_layer(cnn: Program) -> None:
    found = score(cnn, "bn-scale", "up.0.weight", "outputs")
    assert np.array_equal(found, cnn.weights["up.1.weight"].abs())
    found = score(cnn, "bn-scale", "down.0.weight", "inputs")
    assert np.array_equal(found, cnn.weights["wise.1.weight"].abs())
    for weight, side, place in (
        ("split.0.weight", "inputs", "stands right before"), ("head.weight", "outputs", "follows"),
    ):  # fmt: skip
        with pytest.raises(NoScoreError, match=f"no batch norm with a gain {place} it.*\n.*'l1'"):
            score(cnn, "bn-scale", weight, side)


def test_adapruner_keeps_shares_in_proportion_to_the_mean_gain() -> None:
    module = nn.Sequential(*(nn.Sequential(nn.Sequential(conv_bn(8, 8), nn.ReLU())) for _ in "ab"))
    program = narrows.capture(module.eval(), (torch.randn(2, 8, 6, 6),))
    gains = {"0.0.0.1.weight": torch.full((8,), 0.4), "1.0.0.1.weight": torch.full((8,), 0.8)}
    program = program.with_weights({**program.weights, **gains})
    found = {
        w: score(program, "adapruner", w, "outputs") for w in ("0.0.0.0.weight", "1.0.0.0.weight")
    }
    for share in (0.3, 0.5, 1.0):
        kept = {w: int((s >= 1 / (share * 1.25)).sum()) for w, s in found.items()}
        assert list(kept.values()) == [int(8 * share * 0.5 + 1e-9), int(8 * share + 1e-9)]
    order = score(program, "l1", "0.0.0.0.weight", "outputs").argsort()
    assert np.array_equal(found["0.0.0.0.weight"].argsort(), order)


@pytest.mark.parametrize(
    "weight", ["up.0.weight", "down.0.weight", "split.0.weight", "head.weight"]
)
def test_udfc(cnn: Program, weight: str) -> None:
    filters = torch.stack([w.flatten() for w in cnn.weights[weight].double()])
    module = weight.partition(".")[0]
    if module == "head":
        bias = cnn.weights["head.bias"]
    else:
        gain, shift, mean, variance = (
            cnn.weights[f"{module}.1.{n}"]
            for n in ("weight", "bias", "running_mean", "running_var")
        )
        scale = gain / (variance + 1e-5).sqrt()
        own = cnn.weights[f"{module}.0.bias"]
        filters, bias = filters * scale[:, None], shift + (own - mean) * scale
    filters = torch.cat([filters, bias[:, None]], 1)
    ridge = 0.01 * float(filters.square().sum(1).mean())
    wanted = []
    for j, own in enumerate(filters):
        others = torch.cat([filters[:j], filters[j + 1 :]])
        gram = others @ others.T + ridge * torch.eye(len(others))
        s = torch.linalg.solve(gram, others @ own)
        wanted.append(float((own - s @ others).square().sum() + ridge * s.square().sum()))
    assert np.allclose(score(cnn, "udfc", weight, "outputs"), wanted, rtol=1e-9)


def test_udfc_of_more_filters_than_weights_and_of_none() -> None:
    program = captured(nn.Sequential(nn.Conv2d(3, 9, 1), nn.ReLU(), nn.Conv2d(9, 4, 1)))
    filters = torch.cat(
        [program.weights["0.weight"].flatten(1), program.weights["0.bias"][:, None]], 1
    )
    ridge = 0.01 * filters.square().sum(1).mean()
    inverse = torch.linalg.inv(filters @ filters.T + ridge * torch.eye(9))
    wanted = 1 / inverse.diagonal() - ridge
    assert np.allclose(score(program, "udfc", "0.weight", "outputs"), wanted, rtol=1e-9)
    zeros = {name: torch.zeros_like(w) for name, w in program.weights.items()}
    found = score(program.with_weights(zeros), "udfc", "0.weight", "outputs")
    assert np.array_equal(found, np.zeros(9))


def test_scores_that_compare_are_not_divided_by_their_mean() -> None:
    class Told:
        """Scores that come from outside."""

        name = "told"

        def __init__(self, comparable: bool) -> None:
            self.comparable = comparable

        def score(self, program: Program, layer: Layer, side: str) -> np.ndarray:
            low = 1.0 if layer.weight == "1.weight" else 100.0
            return low * np.arange(1, layer.width(side) + 1)

    program = captured(nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(3))))
    options: dict[str, Any] = {"ratio": 0.34, "scope": "global", "constrained": False}
    plan = narrows.plan(program, criterion=Told(True), **options)
    assert plan.inputs == {"1.weight": (2,)}
    plan = narrows.plan(program, criterion=Told(False), **options)
    assert plan.inputs == {"1.weight": (1, 2), "2.weight": (1, 2)}


# ------------------------------------------------------------------ on networks


@pytest.mark.parametrize("name", CRITERIA.providers())
@pytest.mark.parametrize("network", ["cnn", "vit"])
@pytest.mark.parametrize(
    "how", [{}, {"constrained": False}, {"constrained": False, "side": "output"}],
    ids=["couplings", "consumers", "producers"],
)  # fmt: skip
def test_each_plans_or_says_why_not(name: str, network: str, how: Any, request: Any) -> None:
    data = BATCHES if CRITERIA.lookup(name).data else None
    plan, why = planned(request.getfixturevalue(network), criterion=name, data=data, **how)
    if plan is None:
        assert f"{name} has no score for the" in why
        assert "(try criterion=" in why or "(try constrained=False" in why
        return
    assert plan.removed
    unscored = [n for n in plan.notes if n.reason == "unscored"]
    assert all(n.message.startswith("its channels stay: ") for n in unscored)


def planned(program: Program, **options: Any) -> tuple[ChannelPlan | None, str]:
    """Return the plan of options, or why there is none."""
    try:
        return narrows.plan(program, ratio=0.5, **options), ""
    except PlanError as error:
        return None, error.why
