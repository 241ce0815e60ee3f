"""Each kind of gates against its paper's formula, computed directly on a small case."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import narrows
from narrows import training
from narrows.errors import UsageError
from narrows.ir.program import Program
from narrows.ir.workload import macs, works_of
from narrows.training.footprint import Footprint
from narrows.training.masks import lowest
from narrows.training.pdp import soft_mask, threshold_between
from narrows.training.predictors import firing
from narrows.training.searched_widths import drawn, interpolated
from narrows.training.sites import gates_of
from tests.training.digits import Net, digits

Fresh = Callable[[], Net]


# ------------------------------------------------------------------ soft masks


def test_soft_masks_choose_by_weight_times_gradient_and_pass_gradients_through(
    program: Program, fresh: Fresh
) -> None:
    model, (images, labels) = fresh().train(), digits(32)
    gates = training.SoftMasks(model, program, inputs="plain.weight", ratio=0.5, interval=1)
    F.cross_entropy(model(images), labels).backward()
    weight = model.plain.weight
    assert weight.grad is not None
    importance = (weight * weight.grad).abs().sum((0, 2, 3))
    gates.step()
    (mask,) = gates.masks()
    kept = importance.argsort(descending=True)[:4].sort().values
    assert torch.nonzero(mask).flatten().tolist() == kept.tolist()

    # The next forward call reads masked weights; the backward call gives the columns that are
    # closed the gradient that they would have with the same activations behind them.
    weight.grad = None
    x: list[Tensor] = []
    handle = model.plain.register_forward_pre_hook(lambda m, args: x.append(args[0].detach()))
    loss = F.cross_entropy(model(images), labels)
    handle.remove()
    loss.backward()
    by_hand = (weight * mask[None, :, None, None]).detach().requires_grad_()
    y = F.relu(F.conv2d(x[0], by_hand, model.plain.bias, padding=1)).mean((2, 3))
    other = F.cross_entropy(model.head(y), labels)
    other.backward()
    assert torch.allclose(loss, other, atol=1e-6)
    assert by_hand.grad is not None
    assert torch.allclose(weight.grad, by_hand.grad, atol=1e-6)
    assert weight.grad[:, mask == 0].abs().max() > 0


def test_a_closed_channel_returns(program: Program, fresh: Fresh) -> None:
    model, (images, labels) = fresh().train(), digits(32)
    gates = training.SoftMasks(model, program, inputs="plain.weight", ratio=0.5, interval=1)
    gates._open = [torch.tensor([True] * 4 + [False] * 4)]
    with torch.no_grad():
        model.plain.weight[:, :4] *= 1e-4
    F.cross_entropy(model(images), labels).backward()
    gates.step()
    assert gates.hard()[0].tolist() == [False] * 4 + [True] * 4


def test_gains_follow_the_density_and_remove_leaves_them_so(program: Program, fresh: Fresh) -> None:
    model, (images, _) = fresh().eval(), digits(8)
    gain = model.block1.norm1.weight.detach().clone()
    gates = training.SoftMasks(model, program, inputs="block1.conv1.weight")
    gates._open = [torch.tensor([True] * 6 + [False] * 2)]
    assert {n: float(f) for n, f in gates.factors().items()} == {"block1.norm1.weight": 0.75}
    with torch.no_grad():
        expected = model(images)
        gates.remove()
        assert torch.allclose(model.block1.norm1.weight, 0.75 * gain)
        model.block1.conv1.weight[:, 6:] = 0
        assert torch.allclose(model(images), expected, atol=1e-6)


def test_a_choice_of_ones_own_is_asked(program: Program, fresh: Fresh) -> None:
    model, (images, labels) = fresh().train(), digits(16)
    gates = training.SoftMasks(
        model, program, inputs="plain.weight", interval=1,
        choose=lambda own, scores: [torch.arange(g.width) % 2 == 0 for g in own],
    )  # fmt: skip
    F.cross_entropy(model(images), labels).backward()
    gates.step()
    assert gates.hard()[0].tolist() == [True, False] * 4


def test_the_lowest_of_all_go_but_one_of_each_stays() -> None:
    masks = lowest([torch.tensor([1.0, 5, 6]), torch.tensor([0.1, 0.3, 0.2])], 0.67)
    assert [m.tolist() for m in masks] == [[False, True, True], [False, True, False]]


# ------------------------------------------------------------------ pdp


def test_pdp_is_one_half_at_the_threshold_and_its_gradient_is_the_formulas() -> None:
    w = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64, requires_grad=True)
    t = threshold_between(w, 2)
    assert t.item() == 1.5
    mask = soft_mask(w, t, 0.5)
    expected = 1 / (1 + torch.exp((1.5**2 - w.detach() ** 2) / 0.5))
    assert torch.allclose(mask, expected)
    (mask * w).sum().backward()
    slope = expected * (1 - expected) * 2 * w.detach() / 0.5
    assert torch.allclose(w.grad, expected + w.detach() * slope)  # type: ignore[arg-type]
    assert soft_mask(torch.tensor(1.5), 1.5, 0.1) == 0.5
    assert threshold_between(w, 4).item() == 0


def test_pdp_masks_channels_by_the_norms_of_their_filters(program: Program, fresh: Fresh) -> None:
    model = fresh()
    gates = training.DifferentiableMasks(model, program, outputs="plain.weight", tau=0.1)
    norms = model.plain.weight.detach().flatten(1).norm(dim=1)
    ordered = norms.sort().values
    t = (ordered[5] + ordered[6]) / 2
    expected = 1 / (1 + torch.exp((t**2 - norms**2) / 0.1))
    assert torch.allclose(gates.masks()[0], expected)
    assert torch.equal(gates.hard()[0], norms > t)


def test_n_of_m_elements_and_channels(program: Program, fresh: Fresh) -> None:
    weight = torch.tensor([[1.0, 4, 3, 2, 9, 8, 7, 6]])
    mask = training.element_mask(weight, 2, 4, tau=1e-2)
    assert (mask > 0.5).tolist() == [[False, True, True, False, True, True, False, False]]
    t = torch.tensor([2.5] * 4 + [7.5] * 4)
    assert torch.allclose(mask, torch.sigmoid((weight**2 - t**2) / 1e-2))
    rows = training.element_mask(weight.T, 2, 4, tau=1e-2, axis=0)
    assert torch.equal(rows.T, mask)
    with pytest.raises(UsageError, match="2 of every 3 cannot be kept of 8"):
        training.element_mask(weight, 2, 3, tau=1e-2)
    model = fresh()
    gates = training.DifferentiableMasks(model, program, inputs="plain.weight", pattern=(1, 4))
    kept = gates.hard()[0].view(2, 4)
    assert kept.sum(1).tolist() == [1, 1]
    norms = model.plain.weight.detach().transpose(0, 1).flatten(1).norm(dim=1).view(2, 4)
    assert torch.equal(kept.int().argmax(1), norms.argmax(1))


# ------------------------------------------------------------------ gumbel


def test_gumbel_gates_are_drawn_with_their_probability(program: Program, fresh: Fresh) -> None:
    model = fresh()
    gates = training.GumbelGates(model, program, outputs="plain.weight", ratio=0.25, seed=3)
    with torch.no_grad():
        gates.scores[0].copy_(torch.linspace(-3, 3, 12))
    with torch.no_grad():
        share = torch.stack([gates.masks()[0] for _ in range(400)]).mean(0)
    # 400 draws: a share is off by less than five of its deviations, 1/40 each at most.
    assert (share - torch.sigmoid(gates.scores[0])).abs().max() < 5 / 40
    penalty = 10.0 * (torch.sigmoid(gates.scores[0]).mean() - 0.75) ** 2
    assert torch.allclose(gates.loss(), penalty)


def test_gumbel_gradients_are_those_of_the_relaxation(program: Program, fresh: Fresh) -> None:
    gates = training.GumbelGates(fresh(), program, outputs="plain.weight", temperature=0.5, seed=1)
    (mask,) = gates.masks()
    assert set(mask.tolist()) <= {0.0, 1.0}
    mask.sum().backward()
    u = torch.rand(12, generator=torch.Generator().manual_seed(1)).clamp(1e-6, 1 - 1e-6)
    p = torch.sigmoid((2.0 + torch.log(u) - torch.log(1 - u)) / 0.5)
    assert torch.equal(mask.detach(), (p > 0.5).float())
    assert torch.allclose(gates.scores[0].grad, p * (1 - p) / 0.5, atol=1e-5)  # type: ignore[arg-type]


# ------------------------------------------------------------------ norm sparsity


def test_the_penalty_is_the_subgradient_of_the_gains(program: Program, fresh: Fresh) -> None:
    model, (images, labels) = fresh().train(), digits(16)
    rates = training.Tent(0.2, steps=4)
    gates = training.NormSparsity(model, program, outputs="block1.conv1.weight", rate=rates)
    gain = model.block1.norm1.weight
    with torch.no_grad():
        gain[:3] *= -1
    F.cross_entropy(model(images), labels).backward()
    assert gain.grad is not None
    plain = gain.grad.clone()
    for rate in (0.0, 0.1, 0.2, 0.1):
        gain.grad = plain.clone()
        gates.step()
        assert torch.allclose(gain.grad, plain + rate * gain.detach().sign())


def test_thresholds_are_of_groups(program: Program, fresh: Fresh) -> None:
    model = fresh()
    with torch.no_grad():
        model.norm.weight.copy_(torch.arange(1.0, 9))
        model.block1.norm1.weight.copy_(-100 * torch.arange(1.0, 9))
    gates = training.NormSparsity(
        model, program, outputs=["stem.weight", "block1.conv1.weight"],
        ratio={"stem": 0.25, "block": 0.5}, groups={"stem": "stem*", "block": ["block1*"]},
    )  # fmt: skip
    kept = [m.tolist() for m in gates.hard()]
    assert kept == [[False] * 2 + [True] * 6, [False] * 4 + [True] * 4]


# ------------------------------------------------------------------ generated


def test_generated_gates_are_made_of_the_filters(program: Program, fresh: Fresh) -> None:
    model = fresh()
    latency = torch.nn.Linear(1, 1)
    gates = training.GeneratedGates(
        model, program, outputs="plain.weight", latency=latency, target=2.0, strength=3.0
    )
    rows = model.plain.weight.flatten(1)
    logits = gates.generators[0]((rows - rows.mean()) / (rows.std() + 1e-8))[:, 0]
    (mask,) = gates.masks()
    assert torch.equal(mask.detach(), (logits > 0).float())
    mask.sum().backward(retain_graph=True)
    by_mask = model.plain.weight.grad
    model.plain.weight.grad = None
    torch.sigmoid(logits).sum().backward()
    assert by_mask is not None
    assert torch.allclose(by_mask, model.plain.weight.grad, atol=1e-6)  # type: ignore[arg-type]
    predicted = latency(mask.sum()[None])
    assert torch.allclose(gates.loss(), 3.0 * torch.log(1 + predicted / 2.0))


def test_the_latency_predictor_learns_a_table() -> None:
    generator = torch.Generator().manual_seed(0)
    widths = torch.randint(1, 17, (64, 2), generator=generator).float()
    seconds = 1e-3 + 1e-5 * widths[:, 0] * widths[:, 1]
    predictor = training.LatencyPredictor(2)
    with pytest.raises(UsageError, match="has not been fitted"):
        predictor(widths)
    assert predictor.fit(widths, seconds) < 0.05
    assert predictor(torch.tensor([16.0, 16])) > predictor(torch.tensor([2.0, 2]))
    assert not any(p.requires_grad for p in predictor.parameters())
    with pytest.raises(UsageError, match="do not fit widths"):
        predictor.fit(widths, seconds[:3])


# ------------------------------------------------------------------ annealed


def test_annealed_masks_harden_within_an_epoch(program: Program, fresh: Fresh) -> None:
    gates = training.AnnealedMasks(fresh(), program, outputs="plain.weight", steps=5, highest=10.0)
    with torch.no_grad():
        gates.scores[0].copy_(torch.linspace(-1, 1, 12))
    e = gates.scores[0].detach()
    for step, b in enumerate([1, 2, 3, 4, 5, 1]):
        s = 1 / 10 + (10 - 1 / 10) * (b - 1) / 4
        gates.done = step
        assert torch.allclose(gates.masks()[0], torch.sigmoid(s * e))
    assert torch.equal(gates.hard()[0], e > 0)


def test_the_sparsity_loss_is_the_share_of_weights(program: Program, fresh: Fresh) -> None:
    gates = training.AnnealedMasks(
        fresh(), program, outputs=["block1.conv1.*", "plain.*"], steps=2, strength=0.5
    )
    m1, m2 = (m.mean() for m in gates.masks())
    sizes = {n: program.weights[f"{n}.weight"].numel() for n in ("plain", "head")}
    used = 72 + 576 * m1 + m1 * 576 + 2 * 576 + sizes["plain"] * m2 + m2 * sizes["head"]
    whole = 72 + 4 * 576 + sum(sizes.values())
    assert torch.allclose(gates.loss(), 0.5 * used / whole)


def test_a_residual_channel_is_there_unless_all_close_it(program: Program) -> None:
    found = gates_of(program, ["stem.weight", "block1.conv2.weight", "block2.conv2.weight"], ())
    footprint = Footprint(program, found.gates, "macs")
    masks = [torch.tensor([0.0] * 8), torch.tensor([0.0] * 6 + [1.0] * 2), torch.zeros(8)]
    # positions: 16 where there are pixels; the stream has two channels of eight.
    layers = {
        "stem": (72 * 16, 0.0), "block1.conv1": (576 * 16, 0.25), "block1.conv2": (576 * 16, 0.25),
        "block2.conv1": (576 * 16, 0.25), "block2.conv2": (576 * 16, 0.0),
        "plain": (864 * 16, 0.25), "head": (120, 1.0),
    }  # fmt: skip
    expected = sum(c * s for c, s in layers.values()) / sum(c for c, _ in layers.values())
    assert math.isclose(float(footprint.share(masks)), expected, rel_tol=1e-6)


class Chain(nn.Module):
    """Without biases, so that what a mask leaves is what a pruned program has."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, bias=False)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, bias=False)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, bias=False)
        self.b = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.head = nn.Linear(6, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.up(F.relu(self.depthwise(F.relu(self.a(x))))))
        y = F.relu(self.b(F.relu(self.b(y))))
        return self.head(y.mean((2, 3)))


def test_the_share_is_that_of_the_pruned_program() -> None:
    program = narrows.capture(Chain().eval(), (torch.randn(2, 3, 8, 8),))
    gates = gates_of(program, ["a.weight", "up.weight", "b.weight"], ()).gates
    masks = [torch.arange(g.width) % 2 == 0 for g in gates]
    keeps = {g.sides[0].weight: m.tolist() for g, m in zip(gates, masks, strict=True)}
    pruned = narrows.apply(program, narrows.plan(program, keep_outputs=keeps))
    soft = [m.float() for m in masks]
    multiplied = [sum(macs(n, works_of(p)) for n in p.nodes) for p in (pruned, program)]
    assert math.isclose(
        Footprint(program, gates, "macs").share(soft), multiplied[0] / multiplied[1], rel_tol=1e-6
    )
    stored = pruned.parameter_count / program.parameter_count
    assert math.isclose(Footprint(program, gates).share(soft), stored, rel_tol=1e-6)


# ------------------------------------------------------------------ predictors


def test_the_filters_that_fire_make_up_the_mass() -> None:
    y = torch.zeros(2, 4, 1, 2)
    y[0, :, 0, 0] = torch.tensor([5.0, -3, 1, 1])  # of 10
    y[1, :, 0, 1] = torch.tensor([1.0, 1, 1, 97])
    assert firing(y, 0.75).tolist() == [[True, True, False, False], [False, False, False, True]]
    assert firing(y, 0.85).tolist()[0] == [True, True, True, False]
    assert firing(y, 1.0).all()
    assert firing(y.permute(0, 2, 3, 1), 0.75, axis=3).tolist() == firing(y, 0.75).tolist()


def test_predictors_learn_what_fires(program: Program, fresh: Fresh) -> None:
    model, (images, _) = fresh().eval(), digits(16)
    gates = training.Predictors(model, program, outputs="plain.weight", mass=0.8, momentum=0.25)
    model(images)
    with gates.off(), torch.no_grad():
        x = model.block2(model.block1(F.relu(model.norm(model.stem(images)))))
        target = firing(model.plain(x), 0.8).float()
        logits = gates.predictors[0](x.amax((2, 3)))
        expected = F.binary_cross_entropy(torch.sigmoid(logits), target)
    assert torch.allclose(gates.loss(), expected, atol=1e-5)
    mean = 0.75 + 0.25 * (logits > 0).float().mean(0)
    assert torch.allclose(gates.mean_decisions[0], mean)


# ------------------------------------------------------------------ attended ratios


def test_ratios_are_an_attentions_share_of_the_global_one(program: Program, fresh: Fresh) -> None:
    model = fresh()
    gates = training.AttendedRatios(model, program, outputs="block*", ratio=0.3)
    f = gates.statistics()
    assert torch.allclose(f.mean(0), torch.zeros(4), atol=1e-5)
    rows = model.block1.conv1.weight.detach().flatten(1)
    others = [gates.gates[n].rows(gates._parameters_by_name()) for n in range(4)]
    logs = torch.stack([r.abs().mean().log() for r in others])
    first = (rows.abs().mean().log() - logs.mean()) / logs.std(correction=0)
    assert torch.allclose(f[0, 0], first, atol=1e-4)
    v, _, u = gates.attention
    scores = torch.tanh(f @ v.weight.T + v.bias) @ u.weight[0]  # type: ignore[union-attr]
    expected = torch.softmax(scores, 0) * 4 * 0.3
    assert torch.allclose(gates.ratios(), expected, atol=1e-6)
    assert math.isclose(float(gates.ratios().detach().mean()), 0.3, rel_tol=1e-5)
    for mask, ratio, row in zip(gates.hard(), expected, others, strict=True):
        rank = (row.norm(dim=1).argsort().argsort() + 0.5) / 8
        assert torch.equal(mask, rank > ratio)
    sum(m.sum() for m in gates.masks()).backward()  # type: ignore[union-attr]
    assert u.weight.grad is not None
    assert u.weight.grad.abs().max() > 0


# ------------------------------------------------------------------ searched widths


def test_interpolated_channels_are_means_of_those_at_their_place() -> None:
    x = torch.arange(6.0).view(1, 6, 1).expand(2, 6, 3)
    assert interpolated(x, 3)[0, :, 0].tolist() == [0.5, 2.5, 4.5]
    assert interpolated(x, 4)[0, :, 0].tolist() == [0.5, 1.5, 3.5, 4.5]
    wide = interpolated(x[:, :2], 4)
    assert wide.shape == (2, 4, 3)
    assert wide[0, :, 0].tolist() == [0, 0, 1, 1]
    assert torch.equal(interpolated(x.mT, 3, axis=2), interpolated(x, 3).mT)


def test_choices_are_drawn_without_replacement_and_weighted() -> None:
    scores = torch.tensor([2.0, 0.0, 1.0, -30.0])
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([drawn(scores, 2, 0.5, generator) for _ in range(300)])
    assert ((draws > 0).sum(1) <= 2).all()
    assert torch.allclose(draws.sum(1), torch.ones(300))
    p = torch.softmax(scores, 0)
    first = torch.bincount(draws.argmax(1), minlength=4) / 300
    assert (first - p).abs().max() < 5 * math.sqrt(0.25 / 300)  # five deviations
    again = torch.Generator().manual_seed(7)
    u = torch.rand(4, generator=torch.Generator().manual_seed(7)).clamp(1e-6, 1 - 1e-6)
    noisy = torch.log(p) - torch.log(-torch.log(u))
    best = noisy.topk(2).indices
    expected = torch.zeros(4)
    expected[best] = torch.exp(noisy[best] / 0.5) / torch.exp(noisy[best] / 0.5).sum()
    assert torch.allclose(drawn(scores, 2, 0.5, again), expected, atol=1e-6)


def test_features_of_two_widths_are_mixed(program: Program, fresh: Fresh) -> None:
    model, (images, _) = fresh().train(), digits(4)
    gates = training.SearchedWidths(
        model, program, outputs="plain.weight", widths=(0.5, 0.75), seed=5
    )
    x: list[Tensor] = []
    y: list[Tensor] = []
    model.plain.register_forward_hook(lambda m, args, out: (x.append(args[0]), y.append(out))[0])
    model(images)
    raw = model.plain(x[0]) if gates.remove() is model else x[0]
    weights = drawn(torch.zeros(2), 2, 1.0, torch.Generator().manual_seed(5))
    expected = torch.zeros_like(raw)
    pooled = F.adaptive_avg_pool1d(raw[:, :6].movedim(1, -1).flatten(0, 2)[:, None], 9)[:, 0]
    expected[:, :9] = weights[0] * pooled.view(4, 4, 4, 9).movedim(-1, 1) + weights[1] * raw[:, :9]
    assert torch.allclose(y[0], expected, atol=1e-6)


def test_depths_are_mixed_and_the_cost_follows_them(program: Program, fresh: Fresh) -> None:
    model, (images, _) = fresh().train(), digits(4)
    stage = {"block1": "block1.conv2.weight", "block2": "block2.conv2.weight"}
    gates = training.SearchedWidths(model, program, depths=[stage], seed=2, kind="weights")
    returned: dict[str, Tensor] = {}
    into: list[Tensor] = []
    handles = [
        model.block1.register_forward_hook(lambda m, a, out: returned.update(one=out)),
        model.block2.register_forward_hook(lambda m, a, out: returned.update(two=out)),
        model.plain.register_forward_pre_hook(lambda m, args: into.append(args[0])),
    ]
    model(images)
    for handle in handles:
        handle.remove()
    assert torch.equal(into[0], returned["two"])
    with torch.no_grad():
        gates.depth_scores[0].copy_(torch.tensor([1.0, 0.0]))
    assert [int(m.sum()) for m in gates.hard()] == [8, 0]
    both = torch.softmax(torch.tensor([1.0, 0.0]), 0)[1]
    whole = 72 + 4 * 576 + 864 + 120
    share = (whole - 576 * (1 - both)) / whole
    assert torch.allclose(gates.loss(), 2.0 * share.log())  # far above the target of one half
    gates.target = 1.0
    gates.strength = 3.0
    assert torch.allclose(gates.loss(), -3.0 * share.log() if share < 0.95 else share * 0)
