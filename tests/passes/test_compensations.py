"""Compensations of whole networks: each against its formula on a small case, and what they keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import narrows
from narrows.errors import PlanError, PlanUsageError, UsageError
from narrows.ir.program import Program
from narrows.passes.choosing.compensations import blocks, distill
from narrows.passes.choosing.compensations.catalog import find
from narrows.passes.choosing.compensations.folding import repair
from narrows.passes.choosing.compensations.udfc import Udfc
from narrows.passes.choosing.descending import Course, descend
from narrows.passes.choosing.families import families_of
from narrows.passes.choosing.prepare import prepared
from narrows.passes.choosing.reads import reads_of
from narrows.passes.choosing.segments import segments_of
from narrows.passes.plans.plan import ChannelPlan
from tests.networks import NETWORKS
from tests.passes.residual import images, settled

FREE = ("udfc", "fold")


@pytest.fixture
def program() -> Program:
    return settled()


class Mlp(nn.Module):
    """The half of a transformer's block that a ViT's channels are pruned in, behind a stem."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(6, 16), nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 12), nn.Linear(12, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Conv(nn.Module):
    """Two convolutions with norms between that are not what they begin as."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.two = nn.Conv2d(8, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.norm(self.one(x)).relu()).mean((2, 3))


def captured(module: nn.Module, x: Tensor) -> Program:
    module = module.double().eval()
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor in (part.weight, part.bias, part.running_mean, part.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)  # type: ignore[arg-type]
    return narrows.capture(module, (x.double(),))


# ------------------------------------------------------------------ without data


def filters(program: Program) -> tuple[Tensor, Tensor]:
    base = prepared(program)
    return base.weights["one.weight"].flatten(1), base.weights["one.bias"]


def test_udfc_solves_for_the_sum_of_the_others():
    torch.manual_seed(0)
    program = captured(Conv(), torch.randn(2, 3, 8, 8))
    keep, gone = [0, 2, 3, 6, 7], [1, 4, 5]
    plan = ChannelPlan.given(program, {"two.weight": keep})
    made = narrows.compensate(program, plan, method="udfc{ridge=0.05, shift=2.0}")
    rows, bias = filters(program)
    f = torch.cat([rows, 2.0 * bias[:, None]], 1)
    ridge = 0.05 * f.square().sum(1).mean()
    before = prepared(program).weights["two.weight"]
    wanted = before.clone()
    wanted[:, gone] = 0
    for j in gone:  # min over s of |f_j - s F|^2 + ridge |s|^2, as a stacked regression
        left = torch.cat([f[keep].T, ridge.sqrt() * torch.eye(len(keep))], 0)
        right = torch.cat([f[j], torch.zeros(len(keep))])
        s = torch.linalg.lstsq(left.double(), right.double()[:, None]).solution[:, 0]
        for i, share in zip(keep, s, strict=True):
            wanted[:, i] += share * before[:, j]
    torch.testing.assert_close(made.weights["two.weight"], wanted)


@pytest.mark.parametrize("module", [Conv, Mlp])
@pytest.mark.parametrize("method", ["fold", "udfc{ridge=1e-9}"])
def test_a_channel_that_is_there_twice_costs_nothing(module: type[nn.Module], method: str):
    """A twin is expressed by its twin, and merged with it, whatever lies between."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8) if module is Conv else torch.randn(4, 6)
    net = module()
    first, second, width = ("one", "two", 8) if module is Conv else ("up", "down", 12)
    program = captured(net, x)
    with torch.no_grad():
        weights = dict(program.weights)
        for name, tensor in program.weights.items():
            if tensor.dim() and len(tensor) == width and not name.startswith(second):
                weights[name] = tensor.clone()
                weights[name][5] = weights[name][2]
    program = program.with_weights(weights)
    keep = [i for i in range(width) if i != 5]
    x = x.double()
    for plan in (
        ChannelPlan.given(program, {f"{second}.weight": keep}),
        ChannelPlan.given(program, {f"{second}.weight": keep}, {f"{first}.weight": keep}),
    ):
        made = narrows.compensate(program, plan, method=method)
        far = (narrows.apply(made, plan)(x) - program(x)).abs().max()
        # The ridge leaves its own share of what was lost, by up to the filters' condition.
        assert far < 1e-6 * (program(x) - plan.masked(program)(x)).abs().max() + 1e-12


def test_fold_merges_a_cluster_into_its_repaired_mean():
    torch.manual_seed(0)
    program = captured(Conv(), torch.randn(2, 3, 8, 8))
    keep, gone = [0, 2, 3, 6, 7], [1, 4, 5]
    masks: Any = {"two.weight": keep}, {"one.weight": keep}
    plan = ChannelPlan.given(program, *masks)
    made = narrows.compensate(program, plan, method="fold")
    rows, bias = filters(program)
    f = torch.cat([rows, bias[:, None]], 1)
    base = prepared(program)
    near = {j: min(keep, key=lambda i: float((f[i] - f[j]).norm())) for j in gone}
    shift = program.weights["norm.bias"]
    for i in keep:
        cluster = [i, *(j for j in gone if near[j] == i)]
        n = len(cluster)
        cosines = [
            float(torch.cosine_similarity(rows[a], rows[b], 0))
            for a in cluster for b in cluster if a != b
        ]  # fmt: skip
        c = max(float(np.mean(cosines)) if cosines else 0.0, 0.0)
        scale = n / (n + n * (n - 1) * c) ** 0.5
        wanted = scale * rows[cluster].mean(0)
        torch.testing.assert_close(made.weights["one.weight"][i].flatten(), wanted)
        # The mean of a channel is its norm's shift; it stays the mean of the cluster's.
        drift = bias[cluster].mean() - shift[cluster].mean()
        torch.testing.assert_close(
            made.weights["one.bias"][i], scale * drift + shift[cluster].mean()
        )
        summed = base.weights["two.weight"][:, cluster].sum(1)
        torch.testing.assert_close(made.weights["two.weight"][:, i], summed)


def test_a_merged_mean_has_the_deviation_of_its_parts():
    generator = torch.Generator().manual_seed(0)
    rows = torch.linalg.qr(torch.randn(6, 3, generator=generator, dtype=torch.float64))[0].T
    rows = rows + 0.5 * rows.sum(0)  # of one length, and of one cosine
    merged = repair(rows) * rows.mean(0)
    torch.testing.assert_close(merged.norm(), rows.norm(dim=1).mean())


def test_where_one_layer_goes_without_a_channel_the_channel_stays_as_it_is():
    program = settled()
    plan = ChannelPlan.given(program, {"last.weight": list(range(12))})
    made = narrows.compensate(program, plan, method="fold")
    base = prepared(program)
    changed = {n for n, w in made.weights.items() if not w.equal(base.weights[n])}
    assert changed == {"last.weight"}


def test_channels_that_meet_between_are_not_made_up_for():
    torch.manual_seed(0)
    program = captured(Mlp(), torch.randn(4, 6))
    plan = ChannelPlan.given(program, {"up.weight": list(range(6))})
    for method in FREE:
        made = narrows.compensate(program, plan, method=method)
        told = [n.message for n in made.notes if n.reason == "no family"]
        assert len(told) == 1
        assert "norm lies between, in which channels meet" in told[0]


SOME = (
    "residual_projection", "squeeze_excite_sigmoid", "depthwise", "grouped_conv", "dense_block",
    "transposed_conv_grouped", "multihead_attention", "swiglu_mlp", "flatten_linear",
    "split_residual", "shuffle_block", "shared_conv", "conv1d",
)  # fmt: skip


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("method", FREE)
def test_what_comes_out_is_what_the_masks_mean(name: str, method: str):
    network = NETWORKS[name]
    program = narrows.capture(network.build(), network.inputs())
    plan = narrows.plan(program, ratio=0.4, criterion="l1", constrained=False)
    made = narrows.compensate(program, plan, method=method)
    narrows.apply(made, plan)  # which holds it to the masked program
    assert all(w.isfinite().all() for w in made.weights.values() if w.is_floating_point())


@pytest.mark.parametrize("name", ["residual_projection", "dense_block", "flatten_linear"])
def test_a_family_says_what_a_channel_is_made_of(name: str):
    """With the activations between taken away, a channel is its filter times what it is of."""
    network = NETWORKS[name]
    program = prepared(narrows.capture(network.build(), network.inputs()))
    reads = reads_of(program)
    there = reads.all()
    for own in reads.of_layer:
        there[own[: len(own) // 2]] = False
    families, _ = families_of(program, reads, there)
    compared = 0
    for family in families:
        assert len(family.filters) == len(family.reads) == len(family.constants)
        layers = {tuple(int(reads.maker_layer[m]) for m in made) for made in family.makers}
        assert len(layers) == 1
        first = reads.products[min(next(iter(layers)))]
        if len(next(iter(layers))) == 1 and first.groups == 1 and family.settled is False:
            (number,) = next(iter(layers))
            matrix = first.matrix(
                program.weights[first.layer.weight],
                program.weights[first.bias] if first.bias else None,
            )[0]
            rows = [int(reads.rows[made[0]][0]) for made in family.makers]
            assert number == int(reads.maker_layer[family.makers[0][0]])
            if all(len(reads.rows[made[0]]) == 1 for made in family.makers):
                torch.testing.assert_close(family.filters, matrix[rows, :-1])
                torch.testing.assert_close(family.constants[:, 0], matrix[rows, -1])
                compared += 1
    assert compared


# ------------------------------------------------------------------ by steps


def test_steps_keep_what_was_best_and_an_interruption_ends_them():
    begun = {"w": torch.tensor([4.0, 1.0])}
    masks = {"w": torch.tensor([1.0, 0.0])}
    seen: list[float] = []

    def loss(weights: dict[str, Tensor]) -> Tensor:
        if len(seen) > 30:
            raise KeyboardInterrupt
        return (weights["w"][0] - 1).square()

    def judge(weights: dict[str, Tensor]) -> float:
        seen.append(float(weights["w"][0]))
        return abs(seen[-1] - 2.0)  # not where the loss goes: it is passed by

    taken = descend(
        begun, masks, [loss], judge, Course(200, float("inf"), 0.05, 0), lambda *a: None
    )
    assert taken.better
    assert not taken.stopped
    assert taken.after == min(abs(s - 2.0) for s in seen)
    assert abs(float(taken.weights["w"][0]) - 2.0) == taken.after
    assert float(taken.weights["w"][1]) == 0
    seen.extend([0.0] * 30)
    taken = descend(
        begun, masks, [loss], judge, Course(200, float("inf"), 0.05, 0), lambda *a: None
    )
    assert taken.stopped == "interrupted"
    assert not taken.better
    assert taken.weights["w"].equal(begun["w"])


def test_seconds_end_the_steps(monkeypatch: pytest.MonkeyPatch):
    clock = iter(range(1000))
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    weights = {"w": torch.ones(2)}
    course = Course(1 << 30, 6.0, 0.01, 0)
    taken = descend(
        weights, weights, [lambda w: w["w"].sum()], lambda w: 1.0, course, lambda *a: None
    )
    assert taken.steps == 5


@pytest.mark.parametrize("name", ["residual_projection", "dense_block", "split_residual",
                                  "multihead_attention", "two_inputs", "unet_skip"])  # fmt: skip
def test_segments_one_after_another_are_the_network(name: str):
    network = NETWORKS[name]
    program = prepared(narrows.capture(network.build(), network.inputs()))
    layers = [p.layer.node for p in reads_of(program).products]
    segments = segments_of(program, layers)
    values: Any = dict(zip(program.placeholders, program.examples, strict=True))
    for segment in segments:
        assert set(layers) & set(segment.nodes)
        values = segment.run(values, program.weights)
    wanted = program.run_flat([*program.examples])
    made = [values[n] for n in segments[-1].ends]
    assert any(all(a.equal(b) for a in made) for b in wanted)


def test_a_residual_network_falls_into_its_blocks(program: Program):
    base = prepared(program)
    segments = segments_of(base, [p.layer.node for p in reads_of(base).products])
    counts = [sum(n.target in _LAYERS for n in s.nodes) for s in segments]
    assert counts == [1, 4, 1, 1]  # the stem, the branch and its gate, the last, the head


_LAYERS = {torch.ops.aten.conv2d.default, torch.ops.aten.linear.default}


class Harder(nn.Module):
    """A residual block of two layers: there is more to learn than least squares of one find."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 4)
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + 2 * self.down(self.up(x).relu())).relu())


def data(seed: int, count: int = 512) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


def far(made: Program, plan: ChannelPlan, program: Program, x: Tensor) -> float:
    own = program(x).double().log_softmax(-1)
    other = plan.masked(made)(x).double().log_softmax(-1)
    return float((own.exp() * (own - other)).sum(-1).mean())


def stepped(made: Program) -> str:
    (text,) = (n.message for n in made.notes if n.reason == "steps")
    return text


@pytest.mark.parametrize("method", ["distill{steps=60, rate=0.005}", "blocks{rate=0.005}"])
def test_steps_bring_the_outputs_closer_where_there_is_enough_to_learn_from(method: str):
    torch.manual_seed(0)
    program = narrows.capture(Harder().eval(), (data(0, 2),))
    plan = ChannelPlan.given(program, {"down.weight": range(12)})
    x, other = data(1), data(2)
    plain = narrows.compensate(program, plan, data=[x])
    ways = [narrows.compensate(program, plan, data=[x], method=method) for _ in range(2)]
    assert all(ways[0].weights[n].equal(ways[1].weights[n]) for n in ways[0].weights)
    assert far(ways[0], plan, program, other) < 0.9 * far(plain, plan, program, other)
    before, after = stepped(ways[0]).rpartition("data ")[2].split(" -> ")
    assert float(after) < float(before)
    torch.testing.assert_close(
        narrows.apply(ways[0], plan)(other), plan.masked(ways[0])(other), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("method", ["distill{steps=8, rate=50.0}", "blocks{steps=4, rate=50.0}"])
def test_steps_that_lead_nowhere_are_not_kept(program: Program, method: str):
    plan = ChannelPlan.given(program, {"last.weight": range(12)})
    some = [images(32, 1)]
    made = narrows.compensate(program, plan, data=some, method=method)
    plain = narrows.compensate(program, plan, data=some)
    assert "not kept" in stepped(made)
    assert all(made.weights[n].equal(plain.weights[n]) for n in plain.weights)


def test_an_interrupted_distillation_is_told(program: Program):
    plan = ChannelPlan.given(program, {"last.weight": range(12)})

    def stop(what: str, done: int, total: int) -> None:
        if what == "distill" and done == 2:
            raise KeyboardInterrupt

    made = narrows.compensate(
        program, plan, data=[images(16)], method="distill{steps=50}", progress=stop
    )
    assert "2 steps" in stepped(made)
    assert "interrupted" in stepped(made)


@pytest.mark.parametrize("method", ["distill{steps=2}", "blocks{steps=2}"])
def test_inference_mode_is_no_obstacle(program: Program, method: str):
    plan = ChannelPlan.given(program, {"last.weight": range(12)})
    with torch.inference_mode():
        made = narrows.compensate(program, plan, data=[images(16)], method=method)
    assert "2 steps" in stepped(made) or "blocks" in stepped(made)


# ------------------------------------------------------------------ bad use


def test_a_method_by_data_needs_some(program: Program):
    for method in ("least-squares", "blocks", "distill"):
        with pytest.raises(UsageError, match="there is no data"):
            narrows.compensate(program, ChannelPlan(), method=method)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("distil", "there is no compensation 'distil'"),
        ("distill{step=3}", "step"),
        ("distill{seconds=0.0}", "0.0 seconds"),
        ("blocks{steps=0}", "steps is a whole number of at least 1, got 0"),
        ("udfc{ridge=0.0}", "ridge above 0"),
        ("least-squares{ridge=0.0}", "ridge above 0"),
        (Udfc, "a compensation is a name, or an object"),
    ],
)
def test_bad_methods_are_told(program: Program, method: Any, message: str):
    with pytest.raises(PlanUsageError, match=message):
        narrows.compensate(program, ChannelPlan(), data=[images(4)], method=method)


def test_one_example_is_too_little_for_steps(program: Program):
    with pytest.raises(PlanUsageError, match="too little data to see what is lost"):
        narrows.compensate(program, ChannelPlan(), data=[images(1)], method="distill")


def test_steps_from_what_is_not_finite_are_told(program: Program):
    bad: Sequence[Tensor] = [images(16), torch.full((16, 3, 8, 8), float("nan"))]
    for method in ("distill", "blocks"):
        with pytest.raises(PlanError, match="not finite"):
            narrows.compensate(program, ChannelPlan(), data=bad, method=method)


def test_they_are_found_by_their_spelling():
    assert find("distill{seconds=60}") == distill.Distill(seconds=60)
    assert find("blocks{steps=30}") == blocks.Blocks(steps=30)
    assert find(Udfc(ridge=0.5)) == Udfc(ridge=0.5)
