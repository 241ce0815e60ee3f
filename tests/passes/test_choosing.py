"""Choosing by what the outputs lose: every part against a direct computation, and the whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import narrows
from narrows.errors import PlanError, PlanUsageError, UsageError
from narrows.ir.program import Program
from narrows.ir.workload import macs, works_of
from narrows.passes.choosing.compensations.base import Sums
from narrows.passes.choosing.compensations.catalog import COMPENSATIONS, find
from narrows.passes.choosing.compensations.least_squares import LeastSquares
from narrows.passes.choosing.divergence import Divergence
from narrows.passes.choosing.losses import Losses, in_order
from narrows.passes.choosing.prepare import prepared
from narrows.passes.choosing.products import gram
from narrows.passes.choosing.reads import reads_of
from narrows.passes.choosing.repair import Left
from narrows.passes.choosing.search import Search
from narrows.passes.choosing.statistics import measured, split
from narrows.passes.choosing.surgeon import DAMPING, Surgeon
from narrows.passes.plans.plan import ChannelPlan
from tests.networks import NETWORKS
from tests.networks.registry import conv, conv_bn

SOME = (
    "residual_projection", "squeeze_excite_sigmoid", "depthwise", "grouped_conv",
    "transposed_conv", "transposed_conv_grouped", "conv1d", "conv3d", "dense_block",
    "multihead_attention", "swiglu_mlp", "flatten_linear", "strided_dilated", "shared_conv",
    "raw_matmul", "slice_prefix",
)  # fmt: skip


class Small(nn.Module):
    """A residual network with a gate, whose channels are not all alike."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 16)
        self.first = conv_bn(16, 24)
        self.second = conv_bn(24, 16)
        self.gate = nn.Sequential(nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 16), nn.Sigmoid())
        self.last = conv(16, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        y = self.second(self.first(x).relu())
        y = y * self.gate(y.mean((2, 3)))[:, :, None, None]
        return self.head(self.last((x + y).relu()).relu().mean((2, 3)))


def images(count: int, seed: int = 0) -> Tensor:
    """Images that have few directions, as real ones do."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(6, 3 * 64, generator=torch.Generator().manual_seed(9))
    mixed = torch.randn(count, 6, generator=generator) @ basis
    return mixed.reshape(count, 3, 8, 8) + 0.1 * torch.randn(count, 3, 8, 8, generator=generator)


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    module = Small()
    with torch.no_grad():
        for _ in range(3):
            module.train()(images(64))
    return narrows.capture(module.eval(), (images(2),))


def left(program: Program) -> int:
    works = works_of(program)
    return sum(macs(n, works) for n in program.graph.nodes if n.op == "call_function")


# ------------------------------------------------------------------ layers as products


def built(name: str) -> tuple[Program, list[list[Tensor]]]:
    network = NETWORKS[name]
    program = narrows.capture(network.build(), network.inputs())
    return program, [[*network.inputs(2, 1)], [*network.inputs(2, 2)]]


@pytest.mark.parametrize("name", SOME)
def test_a_layer_is_its_matrix_times_its_patches(name: str):
    program, _ = built(name)
    base = prepared(program)
    values = {}
    outputs = base.run_flat([*program.examples], observe=values.__setitem__)
    for mine, wanted in zip(outputs, program.run_flat([*program.examples]), strict=True):
        torch.testing.assert_close(mine, wanted)
    for product in reads_of(base).products:
        y, weight = values[product.layer.node], base.weights[product.layer.weight]
        lines, made = product.rows(values[product.contraction.x], y, None)
        matrix = product.matrix(weight, base.weights[product.bias] if product.bias else None)
        torch.testing.assert_close(matrix @ lines, made)
        torch.testing.assert_close(gram(lines), lines @ lines.mT)
        assert product.weights(matrix, weight)[0].equal(weight)


def test_some_positions_stand_for_all(program: Program):
    base = prepared(program)
    values = {}
    x = images(4)
    base.run_flat([x], observe=values.__setitem__)
    product = reads_of(base).products[0]
    y = values[product.layer.node]
    assert product.places(y, 4, 0) is None
    places = product.places(y, 100_000, 0)
    assert places is not None
    some, made = product.rows(x, y, places)
    every, _ = product.rows(x, y, None)
    assert some.shape[2] == made.shape[2] == 4 * len(places)
    assert some.equal(every.unflatten(2, (4, -1))[..., places].flatten(2))


@pytest.mark.parametrize("name", SOME)
def test_what_is_counted_is_what_is_left(name: str):
    """A search's share is that of the program that comes out, but for what nobody ever read."""
    program, data = built(name)
    search = Search(program, data, lambda reads: reads.macs)
    search.down(0.9)
    found = search.down(0.8)
    plan = ChannelPlan.given(program, found.keep_inputs())
    made = narrows.compensate(program, plan, data=[tuple(batch) for batch in data])
    small = narrows.apply(made, plan)  # which holds it to the masked program
    names = {p.layer.node.name for p in found.reads.products}
    works, full = works_of(small), works_of(found.program)
    there = sum(macs(n, works) for n in small.graph.nodes if n.name in names)
    whole = sum(macs(n, full) for n in found.program.graph.nodes if n.name in names)
    shared = {p.layer.weight for p in found.reads.products if found.reads.notes}
    if not shared:  # a weight of several uses is untied, under other names
        assert there <= whole * found.curve[-1][0] * (1 + 1e-9)
        if name != "slice_prefix":
            assert there == pytest.approx(whole * found.curve[-1][0])


# ------------------------------------------------------------------ what a channel costs


def test_the_surgeons_costs_are_the_error_of_the_changed_weights():
    """The sum of its costs is ``1/2 sum_o g_o dW_o (H + damping) dW_o^T``."""
    generator = torch.Generator().manual_seed(0)
    lines = torch.randn(1, 13, 200, generator=generator, dtype=torch.float64)
    lines[:, -1] = 1
    weights = torch.randn(1, 5, 13, generator=generator, dtype=torch.float64)
    sensitivity = torch.rand(1, 5, generator=generator, dtype=torch.float64)
    square = lines @ lines.mT / 200
    reads = [np.array([c]) for c in range(4)]
    surgeon = Surgeon(weights, square, sensitivity, reads, 3)
    first = surgeon.scores()
    total = surgeon.remove([int(first.argmin())])
    assert total == pytest.approx(first.min())
    total += surgeon.remove([int(surgeon.scores().argmin())])
    change = surgeon.matrix - weights
    damped = square.clone()
    diagonal = damped.diagonal(dim1=1, dim2=2)
    diagonal[:, :-1] += DAMPING * diagonal[:, :-1].mean(1, keepdim=True)
    wanted = 0.5 * ((change @ damped * change).sum(2) * sensitivity).sum()
    assert total == pytest.approx(float(wanted), rel=1e-10)
    for gone in surgeon.gone:
        assert not surgeon.matrix[0][:, 3 * gone : 3 * gone + 3].any()


def test_groups_are_solved_for_each_by_itself():
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    lines = torch.randn(2, 5, 90, generator=generator, dtype=torch.float64)
    square, sensitivity = lines @ lines.mT, torch.ones(2, 3, dtype=torch.float64)
    both = Surgeon(weights, square, sensitivity, [np.array([c]) for c in range(4)], 2)
    alone = [
        Surgeon(
            weights[g : g + 1], square[g : g + 1], sensitivity[:1],
            [np.array([0]), np.array([1])], 2,
        ).scores()
        for g in (0, 1)
    ]  # fmt: skip
    np.testing.assert_allclose(both.scores(), np.concatenate(alone))


def test_costs_in_order_add_up_to_the_loss_of_everything():
    generator = torch.Generator().manual_seed(2)
    lines = torch.randn(1, 7, 60, generator=generator, dtype=torch.float64)
    weights = torch.randn(1, 3, 7, generator=generator, dtype=torch.float64)
    sensitivity = torch.ones(1, 3, dtype=torch.float64)
    surgeon = Surgeon(weights, lines @ lines.mT, sensitivity, [np.array([c]) for c in range(6)], 1)
    costs = in_order(surgeon, 6)
    assert (costs > 0).all()
    assert not surgeon.matrix[..., :-1].any()


def test_a_probe_has_the_covariance_of_the_probabilities():
    z = torch.tensor([[1.0, -0.5, 0.2]])
    divergence = Divergence.of([z.repeat(2, 1)])
    assert divergence.logits == (True,)
    generator = torch.Generator().manual_seed(0)
    found = torch.zeros(3, 3)
    count = 4000
    for _ in range(count):
        leaf = z.clone().requires_grad_()
        divergence.probe([leaf], generator).backward()
        found += leaf.grad.T @ leaf.grad / count
    p = z.softmax(1)[0]
    torch.testing.assert_close(found, p.diag() - torch.outer(p, p), atol=0.02, rtol=0)


def test_divergences():
    a, b = torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    divergence = Divergence.of([a])
    wanted = nn.functional.kl_div(b.log_softmax(1), a.softmax(1), reduction="batchmean")
    assert divergence.between([a], [b]) == pytest.approx(float(wanted))
    assert divergence.agreement([a], [b]) == 0.5
    assert Divergence.of([a.softmax(1)]).logits == (False,)
    assert Divergence.of([a], "values").agreement([a], [b]) is None


def test_sensitivities_are_squared_gradients_of_the_probe(program: Program):
    base = prepared(program)
    reads = reads_of(base)
    divergence = Divergence.of(base.run_flat([images(4)]))
    found = measured(base, reads, [[images(4)]], divergence, seed=3)
    bias = base.weights["head.bias"].clone().requires_grad_()
    (z,) = base.run_flat([images(4)], {**base.weights, "head.bias": bias})
    z.retain_grad()
    divergence.probe([z], torch.Generator().manual_seed(3)).backward()
    wanted = z.grad.double().square().sum(0)[None] / 4
    torch.testing.assert_close(found.sensitivities[-1], wanted)


# ------------------------------------------------------------------ compensation


def test_least_squares_is_the_regression():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 6, 300, generator=generator, dtype=torch.float64)
    x[:, -1] = 1
    y = torch.randn(1, 2, 300, generator=generator, dtype=torch.float64)
    kept = torch.tensor([[True, True, False, True, False, True]])
    now = torch.zeros(1, 2, 6, dtype=torch.float64)
    sums = Sums(now, kept, x @ x.mT / 300, y @ x.mT / 300, y.square().mean(2))
    found = LeastSquares(ridge=1e-12).solve(sums)
    wanted = torch.linalg.lstsq(x[0][kept[0]].T, y[0].T).solution.T
    torch.testing.assert_close(found[0][:, kept[0]], wanted)
    assert not found[0][:, ~kept[0]].any()


def test_moments_are_matched():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 500, generator=generator, dtype=torch.float64)
    x[:, -1] = 1
    weights = torch.randn(1, 3, 4, generator=generator, dtype=torch.float64)
    y = weights @ x
    kept = torch.tensor([[True, False, True, True]])
    now = weights * kept[:, None]
    sums = Sums(now, kept, x @ x.mT / 500, y @ x.mT / 500, y.square().mean(2))
    made = find("moments").solve(sums) @ x
    torch.testing.assert_close(made.mean(2), y.mean(2))
    torch.testing.assert_close(made.std(2), y.std(2))
    torch.testing.assert_close((find("mean").solve(sums) @ x).mean(2), y.mean(2))


@pytest.mark.parametrize("method", sorted(COMPENSATIONS.providers()))
def test_nothing_moves_where_nothing_is_gone(program: Program, method: str):
    plan = ChannelPlan.given(program, {"head.weight": list(range(32))})
    made = narrows.compensate(program, plan, data=[images(32)], method=method)
    x = images(8, 1)
    torch.testing.assert_close(made(x), program(x), atol=1e-3, rtol=1e-3)


def test_repair_gives_back_what_the_plan_took(program: Program):
    plan = ChannelPlan.given(
        program, {"last.weight": list(range(10)), "second.0.weight": list(range(0, 24, 2))}
    )
    data, x = [images(48, 1), images(48, 2)], images(64, 3)
    own = program(x)

    def far(made: Program) -> float:
        return float((plan.masked(made)(x) - own).square().mean())

    made = {m: narrows.compensate(program, plan, data=data, method=m)
            for m in ("least-squares", "symmetric", "moments")}  # fmt: skip
    assert far(made["least-squares"]) < 0.2 * far(program)
    assert far(made["moments"]) < far(program)
    small = narrows.apply(made["least-squares"], plan)
    torch.testing.assert_close(small(x), plan.masked(made["least-squares"])(x))
    assert any(n.reason == "compensated" for n in made["least-squares"].notes)


def test_what_a_plan_leaves_is_what_its_masked_program_computes(program: Program):
    base = prepared(program)
    reads = reads_of(base)
    plan = ChannelPlan.given(program, {"last.weight": [0, 3]}, {"first.0.weight": [1, 2, 5]})
    weights = Left.by(reads, plan).masked(reads.products, base.weights)
    x = images(4)
    torch.testing.assert_close(base.with_weights(weights)(x), plan.masked(base)(x))


def test_a_network_at_chance_is_told(program: Program):
    plan = ChannelPlan.given(program, {"head.weight": []})
    made = narrows.compensate(program, plan, data=[images(40)], method="mean")
    agrees = next(n.message for n in made.notes if n.reason == "compensated")
    assert "same class" in agrees
    told = [n for n in made.notes if n.reason == "chance"]
    own = program(images(40)).argmax(1)
    constant = float((own == plan.masked(made)(images(40)).argmax(1)).float().mean())
    assert bool(told) == (constant < 0.2)


# ------------------------------------------------------------------ plans by a budget


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("budget", ["macs", "params"])
def test_a_budget_is_met(program: Program, budget: str, constrained: bool):
    data = [images(32, 1), images(32, 2)]
    plan = narrows.plan(program, data=data, constrained=constrained, **{budget: 0.6})
    small = narrows.apply(program, plan)
    if budget == "macs":
        share = left(small) / left(program)
    else:
        layers = [n for n in program.weights if program.weights[n].dim() > 1]
        share = sum(small.weights[n].numel() for n in layers) / sum(
            program.weights[n].numel() for n in layers
        )
    assert 0.5 < share <= 0.6 + 1e-9
    assert any(n.reason == "curve" for n in plan.notes)


def test_a_search_is_better_than_a_ratio(program: Program):
    data, x = [images(64, 1), images(64, 2)], images(128, 5)
    searched = narrows.plan(program, data=data, macs=0.5, constrained=False)
    by_norm = narrows.plan(program, macs=0.5, constrained=False)
    assert left(narrows.apply(program, by_norm)) <= 0.5 * left(program) * 1.001
    divergence = Divergence.of([program(x)])

    def far(plan: ChannelPlan) -> float:
        made = plan.masked(narrows.compensate(program, plan, data=data))
        return divergence.between([program(x)], [made(x)])

    assert far(searched) < far(by_norm)


def test_what_is_excluded_or_given_stays(program: Program):
    data = [images(32, 1), images(32, 2)]
    plan = narrows.plan(
        program, {"last.weight": range(16)}, data=data, macs=0.8, constrained=False,
        exclude="second.*", min_width=8,
    )  # fmt: skip
    assert plan.inputs["last.weight"] == tuple(range(16))
    assert "second.0.weight" not in plan.inputs
    assert all(len(keep) >= 8 for keep in plan.inputs.values())


def test_a_latency_is_reached_by_losses(program: Program):
    data = [images(32, 1), images(32, 2)]
    plan = narrows.plan(program, latency=0.9, target="onnx", data=data)
    assert plan.removed
    assert plan.fingerprint == ChannelPlan.given(program).fingerprint
    costs = Losses.of(program, [[d] for d in data]).found["last.weight"]
    assert costs.shape == (16,)
    assert (costs > 0).all()


def test_bad_budgets(program: Program):
    with pytest.raises(PlanUsageError, match="ratio and macs exclude each other"):
        narrows.plan(program, ratio=0.5, macs=0.5)
    with pytest.raises(PlanUsageError, match="loss has no effect"):
        narrows.plan(program, macs=0.5, data=[images(8)], loss=lambda outputs, batch: outputs.sum())
    with pytest.raises(PlanUsageError, match="outputs is one of"):
        narrows.plan(program, macs=0.5, data=[images(8)], outputs="logit")
    with pytest.raises(PlanUsageError, match="macs are above 0"):
        narrows.plan(program, macs=0)
    with pytest.raises(PlanUsageError, match="one example"):
        narrows.plan(program, macs=0.5, data=[images(1)])
    with pytest.raises(PlanError, match="cannot be met") as caught:
        narrows.plan(program, macs=0.0001, data=[images(8)], constrained=False)
    assert "is the least" in str(caught.value)
    with pytest.raises(PlanError, match="cannot be met"):
        narrows.plan(program, macs=0.5, data=[images(8)], exclude="*", constrained=False)
    with pytest.raises(UsageError, match="not batches"):
        narrows.plan(program, macs=0.5, data=images(8))
    with pytest.raises(PlanUsageError, match="no compensation 'least-square'") as wrong:
        narrows.compensate(program, ChannelPlan(), data=[images(4)], method="least-square")
    assert wrong.value.hint == "did you mean 'least-squares'?"


def test_data_is_split_in_halves(program: Program):
    x = images(5)
    one, other = split(program, [[x]])
    assert one[0][0].equal(x[:2])
    assert other[0][0].equal(x[2:])


def test_everything_costs_what_the_network_does(program: Program):
    reads = reads_of(prepared(program))
    assert reads.cost(reads.all(), reads.macs) == reads.whole(reads.macs)


# ------------------------------------------------------------------ one saved thing


def test_a_solved_plan_is_one_file(program: Program, tmp_path: Path):
    plan = ChannelPlan.given(program, {"last.weight": list(range(10))})
    made = narrows.compensate(program, plan, data=[images(32)])
    narrows.Solved.of(program, plan, made).save(tmp_path / "plan.solved")
    solved = narrows.Solved.load(tmp_path / "plan.solved")
    assert solved.plan == plan
    again = solved.applied(program)
    assert all(again.weights[n].equal(t) for n, t in made.weights.items())
    other = program.with_weights({n: t + 1 for n, t in program.weights.items()})
    with pytest.raises(PlanError, match="another checkpoint"):
        solved.applied(other)
    (tmp_path / "bad").write_bytes(b"{}")
    with pytest.raises(PlanError, match="is no solved plan"):
        narrows.Solved.load(tmp_path / "bad")
    with pytest.raises(PlanError, match="there is no file"):
        narrows.Solved.load(tmp_path / "none")


# ------------------------------------------------------------------ one call


def model() -> nn.Module:
    torch.manual_seed(0)
    return Small().eval()


def test_compress_makes_an_artifact():
    seen = []
    artifact = narrows.compress(
        model(), (images(2),), data=[images(32, 1), images(32, 2)], macs=0.7,
        evaluate=lambda run: float(run(images(2)).shape[1]),
        progress=lambda what, done, of: seen.append((what, done, of)),
    )  # fmt: skip
    assert any("least-squares: divergence" in n["message"] for n in artifact.notes)
    assert any("evaluate: 10 unpruned, 10 pruned" in n["message"] for n in artifact.notes)
    assert seen
    assert all(0 < done <= of for _, done, of in seen)


def test_compress_in_bits_and_by_a_drop():
    data = [images(32, 1), images(32, 2)]
    artifact = narrows.compress(model(), (images(2),), data=data, accuracy_drop=60, bits=8)
    assert artifact.plan is not None
    alone = narrows.compress(model(), (images(2),), data=data, bits=8)
    assert alone.plan is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "there is no budget"),
        ({"macs": 0.5, "latency": 0.5}, "macs and latency exclude each other"),
        ({"macs": 0.5, "bits": 1}, "bits are 2 to 8"),
        ({"accuracy_drop": -1}, "points from 0 to 100"),
        ({"accuracy_drop": 1, "evaluate": lambda run: float("nan")}, "evaluate returned nan"),
        ({"accuracy_drop": 1, "evaluate": lambda run: "good"}, "did not return a number"),
        ({"macs": 0.5, "bits": "8"}, "bits are 2 to 8"),
        ({"accuracy_drop": 1, "outputs": "values"}, "needs something to be measured by"),
        ({"macs": 0.5, "data": []}, "there is no data"),
    ],
)
def test_compress_refuses(options: dict, message: str):
    given = {"data": [images(8), images(8)], **options}
    with pytest.raises(UsageError, match=message):
        narrows.compress(model(), (images(2),), **given)
