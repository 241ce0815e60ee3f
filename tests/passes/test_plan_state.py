"""State dicts across a plan: to the pruned shapes and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import narrows
from narrows.errors import PlanError
from narrows.ir.compare import relative_error
from narrows.ir.program import Program
from narrows.passes.base import TOLERANCE, Fidelity
from narrows.passes.plans.state import place_of
from tests.networks import NETWORKS, random_masks
from tests.passes.plans import Net, TiedHead, captured, plan_of

EXACT = TOLERANCE[Fidelity.EXACT][torch.float64]


@pytest.fixture
def program() -> Program:
    return captured(Net(), 2, 3, 8, 8)


def trained(program: Program, origins: Any) -> dict[str, Tensor]:
    """Return the state dict with every trained number that is not zero moved a little."""
    state = dict(program.weights)
    for name, tensor in program.weights.items():
        if name not in program.buffers and name in origins:
            noise = torch.randn(tensor.shape, dtype=tensor.dtype)
            state[name] = tensor + 0.1 * noise * (tensor != 0)
    return {**state, **{a: state[n] for a, n in program.aliases.items()}}


STATES = [
    "residual_plain", "grouped_conv", "depthwise", "constant_sigmoid", "flatten_linear",
    "transposed_conv_grouped", "norm_without_affine", "concat_same_twice", "separate_qkv",
]  # fmt: skip


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("side", ["input", "output", "both"])
def test_a_trained_state_dict_goes_back(name: str, side: str) -> None:
    """The masked program computes with it what the pruned program does, and it shrinks again."""
    network = NETWORKS[name]
    program = narrows.capture(network.build(), network.inputs())
    plan = narrows.plan(program, *random_masks(program, 0.5, side), zeros=False)
    pruned = narrows.apply(program, plan, pipeline="prune-channels")
    state = trained(pruned, {*pruned.origins} & {*program.weights})
    restored = plan.restore(program, state)
    assert {n: t.shape for n, t in restored.items()} == {
        n: t.shape for n, t in program.state_dict().items()
    }
    x, masked = network.inputs(3, seed=1), plan.masked(program)
    expected = pruned.with_weights(state)(*x)
    assert relative_error(masked.with_weights(restored)(*x), expected) <= EXACT
    if len(masked.nodes) == len(program.nodes):
        assert relative_error(program.with_weights(restored)(*x), expected) <= EXACT
    again = plan.shrink(program, restored)
    assert again.keys() == pruned.to_module().state_dict().keys()
    assert max(relative_error(again[n], state[n]) for n in again) <= EXACT


def test_an_untrained_state_dict_goes_back_to_the_masked_weights(program: Program) -> None:
    plan = plan_of(program)
    pruned = narrows.apply(program, plan, pipeline="prune-channels")
    restored = plan.restore(program, pruned.state_dict())
    masked = plan.masked(program)
    assert all(relative_error(restored[n], t) <= EXACT for n, t in masked.weights.items())


def test_the_model_itself_takes_what_comes_back() -> None:
    """Buffers that are not persistent, and literals of the code, are in no state dict."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)
            self.register_buffer("scale", torch.arange(1.0, 7.0).view(6, 1, 1), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return (
                self.b(self.norm(self.a(x)) * self.scale) + torch.tensor([1.0, 2.0])[:, None, None]
            )

    model = Scaled()
    program = captured(model, 2, 3, 4, 4)
    plan = narrows.plan(program, ratio=0.5)
    pruned = narrows.apply(program, plan)
    restored = plan.restore(program, pruned.to_module(train=True))
    model.load_state_dict(restored)
    assert plan.shrink(program, model.state_dict()).keys() == pruned.to_module().state_dict().keys()


def test_untied_weights_come_back_under_their_own_names() -> None:
    ids = torch.arange(8).view(2, 4)
    program = narrows.capture(TiedHead().double().eval(), (ids,))
    plan = narrows.plan(program, {"embed.weight": [0, 1, 2]}, zeros=False)
    pruned = narrows.apply(program, plan, pipeline="prune-channels")
    state = trained(pruned, pruned.weights)
    restored = plan.restore(program, state)
    assert restored.keys() - program.state_dict().keys() == {"embed.weight_masked"}
    masked = plan.masked(program).with_weights(restored)
    assert relative_error(masked(ids), pruned.with_weights(state)(ids)) <= EXACT


def test_a_state_dict_of_something_else_is_refused(program: Program) -> None:
    plan = plan_of(program)
    with pytest.raises(PlanError, match="not a state dict of what prune-channels makes"):
        plan.restore(program, program.state_dict())
    with pytest.raises(PlanError, match=r"has no weight 'first\.weight'"):
        plan.shrink(program, {})


def test_a_checkpoint_with_zeros_of_its_own_is_refused(program: Program) -> None:
    plan = narrows.plan(program, {"second.weight": range(6)}, zeros=False)
    state = program.state_dict()
    state["second.weight"] = state["second.weight"].clone()
    state["second.weight"][:, 0] = 0
    with pytest.raises(PlanError, match=r"prunes to another shape: 'first\.bias' is"):
        plan.shrink(program, state)


def test_a_bias_that_pruning_made_has_no_place_in_the_original() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid(), nn.Conv2d(4, 5, 1, bias=False))
    program = captured(module, 2, 3, 4, 4)
    plan = narrows.plan(program, keep_outputs={"0.weight": [0, 1]}, zeros=False)
    pruned = narrows.apply(program, plan, pipeline="prune-channels")
    state = pruned.state_dict()
    assert state["2.bias"].shape == (5,)
    assert plan.restore(program, state).keys() == program.state_dict().keys()
    state["2.bias"] = state["2.bias"] + 1
    with pytest.raises(PlanError, match=r"'2\.bias' has no place in the original shapes"):
        plan.restore(program, state)


def test_origins_lead_back_through_two_rounds_of_pruning() -> None:
    """Also where every group of a convolution keeps other channels, so that rows have their own."""
    module = nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 12, 3, groups=2), nn.ReLU(),
        nn.Conv2d(12, 4, 1),
    )  # fmt: skip
    program = captured(module, 2, 3, 6, 6)
    first = narrows.plan(program, {"2.weight": [0, 1, 2, 3, 5, 9, 10, 12, 14, 15]}, zeros=False)
    once = narrows.apply(program, first, pipeline="prune-channels")
    assert once.weights["2.weight"].shape == (12, 5, 3, 3)
    second = narrows.plan(
        once, {"2.weight": [0, 2, 3, 4, 6, 9]}, {"2.weight": [0, 1, 4, 7, 8, 11]}, zeros=False
    )
    twice = narrows.apply(once, second, pipeline="prune-channels")
    assert twice.weights["2.weight"].shape[0] == 6
    nested = 0
    for name, origin in twice.origins.items():
        assert origin.shape == program.weights[origin.name].shape
        nested += any(i is not None and isinstance(i[0], tuple) for i in origin.index)
        there, now = program.weights[origin.name][place_of(origin)], twice.weights[name]
        assert torch.equal(torch.where(now == 0, now, there), now)
    assert nested == 1


# ------------------------------------------------------------------ norms, and orders


class Norms(nn.Module):
    """Layers with a bias and without, behind them norms of every kind, one of them two."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 12, 3, bias=False), nn.BatchNorm2d(12)
        self.b, self.m = nn.Conv2d(12, 10, 1), nn.BatchNorm2d(10, affine=False)
        self.c, self.k = nn.ConvTranspose2d(12, 10, 1, bias=False), nn.BatchNorm2d(10)
        self.l, self.o = nn.BatchNorm2d(10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.n(self.a(x)).relu()
        return self.o((self.m(self.b(y)).relu() + self.l(self.k(self.c(y)))).mean((2, 3)))


FINE_TUNED = {
    "as apply makes it": None,
    "in the old order": "prune-channels",
    "folded": "prune-channels{order=true}, fold-batch-norm, eliminate-dead",
    "folded, in the old order": "prune-channels, fold-batch-norm",
}


@pytest.mark.parametrize("how", FINE_TUNED)
@pytest.mark.parametrize("options", [{}, {"constrained": False, "side": "both"}], ids=str)
def test_fine_tuning_goes_round(how: str, options: dict[str, Any]) -> None:
    program = captured(Norms(), 2, 3, 6, 6)
    plan = narrows.plan(program, ratio=0.5, **options)
    small = narrows.apply(program, plan, pipeline=FINE_TUNED[how])
    state = trained(small, small.weights)
    x, masked = program.examples[0], plan.masked(program)
    expected = small.with_weights(state)(x)
    restored = plan.restore(program, state)
    assert restored.keys() >= program.state_dict().keys()
    assert relative_error(masked.with_weights(restored)(x), expected) <= EXACT
    module = small.to_module()
    module.load_state_dict(state, strict=False)  # it has no place for a plan's masks
    restored = plan.restore(program, module)
    assert relative_error(masked.with_weights(restored)(x), module(x)) <= EXACT


def test_what_a_dead_gain_would_lose_gets_a_gain() -> None:
    program = captured(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), 2, 3, 4, 4)
    program.weights["1.weight"][1] = 0
    plan, x = narrows.plan(program, {}, zeros=False), program.examples[0]
    folded = narrows.apply(program, pipeline="fold-batch-norm")
    state = {n: t + 1 for n, t in folded.weights.items()}
    restored = program.with_weights(plan.restore(program, state))
    assert relative_error(restored(x), folded.with_weights(state)(x)) <= EXACT


def test_a_norm_that_layers_share_cannot_be_two() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(3, 4, 1, bias=False)
            self.n = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.n(self.a(x)) * self.n(self.b(x))

    program = captured(Shared(), 2, 3, 4, 4)
    plan = narrows.plan(program, {}, zeros=False)
    folded = narrows.apply(program, pipeline="fold-batch-norm")
    assert plan.restore(program, folded.state_dict()).keys() == program.state_dict().keys()
    state = folded.state_dict()
    state["a.bias"] = state["a.bias"] + 1
    with pytest.raises(PlanError, match=r"'n\.bias' cannot be restored"):
        plan.restore(program, state)


class Fork(nn.Module):
    """Two readers, whose channels are put side by side in an order of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        return self.b(y) + self.c(y)


def test_a_state_dict_that_fits_two_orders_is_of_the_nearer_one() -> None:
    program = captured(Fork(), 2, 3)
    plan = narrows.plan(program, {"b.weight": [0, 2, 4, 6], "c.weight": [1, 2, 5, 6]}, zeros=False)
    ordered = narrows.apply(program, plan)
    plain = narrows.apply(program, plan, pipeline="prune-channels")
    assert ordered.origins["a.weight"] != plain.origins["a.weight"]
    x, masked = program.examples[0], plan.masked(program)
    for small in (ordered, plain):
        state = trained(small, small.weights)
        restored = masked.with_weights(plan.restore(program, state))
        assert relative_error(restored(x), small.with_weights(state)(x)) <= EXACT
    torch.manual_seed(1)
    anew = {n: torch.randn_like(t) for n, t in ordered.weights.items()}
    with pytest.raises(PlanError, match="may be of channels in two orders"):
        plan.restore(program, anew)
    restored = masked.with_weights(plan.restore(program, anew, ordered))
    assert relative_error(restored(x), ordered.with_weights(anew)(x)) <= EXACT


def test_the_form_of_a_target_goes_back_where_its_norms_stand() -> None:
    program = captured(Fork(), 2, 3)
    plan = narrows.plan(program, {"b.weight": [0, 2, 4], "c.weight": [1, 2, 5]}, zeros=False)
    small = narrows.apply(program, plan, target="onnx")
    state = trained(small, small.weights)
    restored = plan.masked(program).with_weights(plan.restore(program, state, small))
    x = program.examples[0]
    assert relative_error(restored(x), small.with_weights(state)(x)) <= EXACT
    norms = captured(Norms(), 2, 3, 6, 6)
    plan = narrows.plan(norms, ratio=0.5)
    folded = narrows.apply(norms, plan, target="onnx")
    with pytest.raises(PlanError, match="norms of the pruned program were folded"):
        plan.restore(norms, folded.state_dict(), folded)


class Normed(nn.Module):
    """A layer with a norm, and two readers that ask for channels in other orders."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b, self.c, self.e = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 2, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.n(self.a(x)).relu()
        return self.b(y), self.c(y), self.e(y)


def test_statistics_that_move_far_do_not_hide_the_order_of_the_channels() -> None:
    torch.manual_seed(0)
    program = narrows.capture(Normed().eval(), (torch.randn(2, 3, 8, 8),))
    keep = {"c.weight": [1, 3, 5, 7], "b.weight": [0, 1, 2, 3, 5, 7], "e.weight": [0, 2, 3, 7]}
    plan = narrows.plan(program, keep_inputs=keep)
    state = dict(narrows.apply(program, plan).to_module().state_dict())
    for name, tensor in state.items():
        moved = 20.0 if "running_var" in name else 1e-3
        if tensor.is_floating_point():
            state[name] = tensor + moved * (1 + 0.1 * torch.rand_like(tensor))
    restored = plan.restore(program, state)
    kept = [0, 1, 2, 3, 5, 7]
    off = (restored["a.weight"] - program.weights["a.weight"])[kept]
    assert float(off.abs().max()) < 2e-3
