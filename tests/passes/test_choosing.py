"""Choosing by what the outputs lose: every part against a direct computation, and the whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import narrows
from narrows.errors import PlanUsageError
from narrows.ir.program import Program
from narrows.ir.workload import macs, works_of
from narrows.passes.choosing.compensations.base import Sums
from narrows.passes.choosing.compensations.catalog import COMPENSATIONS, find
from narrows.passes.choosing.compensations.least_squares import LeastSquares
from narrows.passes.choosing.divergence import Divergence
from narrows.passes.choosing.left import Left
from narrows.passes.choosing.losses import in_order
from narrows.passes.choosing.prepare import prepared
from narrows.passes.choosing.products import gram
from narrows.passes.choosing.reads import reads_of
from narrows.passes.choosing.repair import held_at_once
from narrows.passes.choosing.search import Search
from narrows.passes.choosing.segments import segments_of
from narrows.passes.choosing.statistics import measured
from narrows.passes.choosing.surgeon import DAMPING, Surgeon
from narrows.passes.plans.plan import ChannelPlan
from tests.networks import NETWORKS
from tests.networks.registry import conv
from tests.passes.residual import images, settled

SOME = (
    "residual_projection", "squeeze_excite_sigmoid", "depthwise", "grouped_conv",
    "transposed_conv", "transposed_conv_grouped", "conv1d", "conv3d", "dense_block",
    "multihead_attention", "swiglu_mlp", "flatten_linear", "strided_dilated", "shared_conv",
    "raw_matmul", "slice_prefix",
)  # fmt: skip


@pytest.fixture
def program() -> Program:
    return settled()


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
    search = Search(program, data, {"macs": lambda reads: reads.macs})
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
        # What follows a layer that reads nothing is constant, too, and no longer there at all.
        empty = (found.reads.widths(found.there)[0] == 0).any()
        if name != "slice_prefix" and not empty:
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
    generator = torch.Generator().manual_seed(0)
    found = torch.zeros(3, 3)
    count = 4000
    for _ in range(count):
        leaf = z.clone().requires_grad_()
        divergence.probe([leaf], generator).backward()
        found += leaf.grad.T @ leaf.grad / count
    p = z.softmax(1)[0]
    torch.testing.assert_close(found, p.diag() - torch.outer(p, p), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("z", "kind", "wanted"),
    [
        (torch.randn(4, 3), "auto", ("logits", 1)),
        (torch.randn(4, 3).softmax(1), "auto", ("probabilities", 1)),
        (torch.randn(4, 3).softmax(1), "logits", ("logits", 1)),
        (torch.randn(4, 3), "values", ("values", -1)),
        (torch.randn(4, 1), "auto", ("values", -1)),
        (torch.randn(4, 5, 3), "auto", ("values", -1)),
        (torch.randn(4, 3, 6, 6).softmax(1), "auto", ("values", -1)),
        (torch.randn(4, 5, 3), "logits", ("logits", 2)),
        (torch.randn(4, 3, 6, 6), "logits", ("logits", 1)),
        (torch.arange(6), "auto", ("nothing", -1)),
    ],
)
def test_what_an_output_is_and_where_its_classes_lie(z: Tensor, kind: str, wanted: tuple):
    (found,) = Divergence.of([z], "values" if wanted[0] == "nothing" else kind).outputs
    assert (found.kind, found.axis) == wanted


def test_outputs_of_one_class_are_no_logits():
    one, many = torch.randn(4, 1), torch.randn(4, 3)
    assert Divergence.of([one, many], "logits").logits == (False, True)
    with pytest.raises(PlanUsageError, match="the outputs are no logits"):
        Divergence.of([one], "logits")


@pytest.mark.parametrize("axis", [1, 2])
def test_maps_and_sequences_are_compared_class_by_class(axis: int):
    """As the matrices of all their places are, but for the mean, which is over the examples."""
    shape = (2, 3, 4, 5) if axis == 1 else (2, 4, 3)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator) for _ in "ab")
    flat = [z.movedim(axis, -1).reshape(-1, 3) for z in (a, b)]
    wanted = Divergence.of([flat[0]])
    found = Divergence.of([a], "logits")
    places = len(flat[0]) / 2
    each = wanted.between([flat[0]], [flat[1]])
    assert found.between([a], [b]) == pytest.approx(each * places)
    assert found.agreement([a], [b]) == pytest.approx(wanted.agreement([flat[0]], [flat[1]]))


def test_probabilities_are_compared_as_their_logits_are():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(4, 3, generator=generator) for _ in "ab")
    p, q = a.softmax(1), b.softmax(1)
    plain, sure = Divergence.of([a]), Divergence.of([p])
    assert sure.between([p], [q]) == pytest.approx(plain.between([a], [b]), rel=1e-5)
    assert sure.agreement([p], [q]) == plain.agreement([a], [b])
    never, one = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.25, 0.75]])
    assert sure.between([never], [one]) == pytest.approx(np.log(4))
    assert np.isfinite(sure.between([one], [never]))


def test_values_are_compared_by_their_variance():
    a, b = torch.tensor([1.0, 3.0]), torch.tensor([1.0, 5.0])
    assert Divergence.of([a]).between([a], [b]) == pytest.approx(0.5 * 4 / 2)
    same = torch.full((2,), 4.0)  # nothing spreads: their magnitude stands for the deviation
    assert Divergence.of([same]).between([same], [same + 4]) == pytest.approx(0.5)
    assert Divergence.of([same * 0]).between([same * 0], [same * 0 + 1]) == pytest.approx(0.5)


def test_classes_that_are_ruled_out_have_a_finite_probe():
    z = torch.tensor([[1.0, 2.0, -torch.inf]], requires_grad=True)
    p = torch.tensor([[0.25, 0.75, 0.0]], requires_grad=True)
    for outputs in (z, p):
        number = Divergence.of([outputs]).probe([outputs], torch.Generator().manual_seed(0))
        number.backward()
        assert number.isfinite()
        assert outputs.grad is not None
        assert outputs.grad.isfinite().all()


def test_divergences():
    a, b = torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    divergence = Divergence.of([a])
    wanted = nn.functional.kl_div(b.log_softmax(1), a.softmax(1), reduction="batchmean")
    assert divergence.between([a], [b]) == pytest.approx(float(wanted))
    assert divergence.agreement([a], [b]) == 0.5
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
    spelled = f"{method}{{steps=2}}" if method in ("blocks", "distill") else method
    made = narrows.compensate(program, plan, data=[images(32)], method=spelled)
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


@pytest.mark.parametrize("name", ["residual_projection", "squeeze_excite_sigmoid", "dense_block",
                                  "multihead_attention", "raw_matmul", "unet_skip"])  # fmt: skip
def test_what_does_not_fit_is_computed_again(name: str, monkeypatch: pytest.MonkeyPatch):
    program, data = built(name)
    plan = narrows.plan(program, ratio=0.4, criterion="l1", constrained=False)
    given = [tuple(batch) for batch in data]
    wanted = narrows.compensate(program, plan, data=given)
    monkeypatch.setattr("narrows.passes.choosing.repair.HELD", 0)
    made = narrows.compensate(program, plan, data=given)
    assert all(made.weights[n].equal(w) for n, w in wanted.weights.items())


def test_what_is_held_is_what_is_alive_in_both_networks_of_all_examples(program: Program):
    base = prepared(program)
    first = segments_of(base, [p.layer.node for p in reads_of(base).products])[0]
    image, channels = 3 * 64, 16 * 64  # the stem reads the one and makes the other, in float32
    assert held_at_once(base, first, 100) == 2 * 4 * (image + channels) * 100


class Unfolded(nn.Module):
    """A norm that cannot be folded, as what it reads is read elsewhere, too."""

    def __init__(self, *, shared: bool) -> None:
        super().__init__()
        self.conv = conv(3, 12)
        self.norm = nn.BatchNorm2d(12)
        self.one, self.two = conv(12, 10), conv(12, 10)
        if shared:
            self.two.bias = self.one.bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.one(self.norm(y).relu()).mean((2, 3)) + self.two(y.relu()).mean((2, 3))


def unfolded(*, shared: bool) -> Program:
    torch.manual_seed(1)
    module = Unfolded(shared=shared)
    with torch.no_grad():
        module.norm.bias.fill_(2.0)
        for _ in range(3):
            module.train()(images(64))
    return narrows.capture(module.eval(), (images(2),))


def test_a_repair_begins_where_the_masks_are():
    """They are zero behind the norm: what stands there without them is not there to be used."""
    program = unfolded(shared=False)
    plan = ChannelPlan.given(program, {}, {"conv.weight": range(6)})
    squares: list[Tensor] = []

    class Watched(LeastSquares):
        def solve(self, sums: Sums) -> Tensor:
            squares.append(sums.square)
            return super().solve(sums)

    narrows.compensate(program, plan, data=[images(32)], method=Watched())
    one, two = (s[0].diagonal() for s in squares if s.shape[1] == 12 * 9 + 1)
    for reads in (one, two):
        assert reads[: 6 * 9].all()
        assert not reads[6 * 9 : 12 * 9].any()


def test_a_bias_of_two_layers_holds_both():
    program = unfolded(shared=True)
    plan = ChannelPlan.given(program, {"one.weight": range(6)})
    made = narrows.compensate(program, plan, data=[images(32)])
    base = prepared(program)
    assert made.weights["one.bias"].equal(base.weights["one.bias"])
    assert made.weights["two.weight"].equal(base.weights["two.weight"])
    told = [n.message for n in made.notes if n.reason == "shared weight"]
    assert len(told) == 2
    assert all("'one.bias' is used in several places" in text for text in told)


def test_a_network_at_chance_is_told(program: Program):
    plan = ChannelPlan.given(program, {"head.weight": []})
    made = narrows.compensate(program, plan, data=[images(40)], method="mean")
    agrees = next(n.message for n in made.notes if n.reason == "compensated")
    assert "same class" in agrees
    assert any(n.reason == "chance" for n in made.notes)  # one class for all
