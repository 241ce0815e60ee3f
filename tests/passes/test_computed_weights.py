"""Weights that are computed from weights: their channels are chosen, masked and removed as others'.

The reference without narrows is the torch module itself, whose layers read zeros (a hook before
them) and make zeros (one behind).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import narrows
from narrows.errors import PlanUsageError
from narrows.ir.compare import relative_error
from narrows.ir.program import Program
from narrows.ir.structure.computed import settled
from narrows.ir.structure.layers import layers_of
from narrows.passes.base import TOLERANCE, Fidelity
from tests.networks.computed import NETWORKS, SPELLINGS, chain

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated"),
    pytest.mark.filterwarnings("ignore:.*spectral_norm.*deprecated"),
]

EXACT = TOLERANCE[Fidelity.EXACT][torch.float64]
# What a plan calls the layers of `chain`: a weight that forward makes of one of that name is named
# by it, too.
LAYERS = ("0.weight", "2.weight", "4.weight", "6.weight")
SHAPE = (2, 3, 6, 6)


def built(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Return a network in double precision."""
    torch.manual_seed(seed)
    return make().double().eval()


def input_of(shape: tuple[int, ...], seed: int = 1) -> Tensor:
    """Return an input in double precision."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def zeroed(model: nn.Module, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> object:
    """Return the module with what its layers read and make multiplied by masks, by hand."""

    def along(mask: Tensor, x: Tensor) -> Tensor:
        return x * mask.to(x.dtype).view(1, -1, *[1] * (x.dim() - 2))

    handles = []
    for name, mask in inputs.items():
        module = model.get_submodule(name.removesuffix(".weight"))
        handles.append(
            module.register_forward_pre_hook(lambda _, args, m=mask: (along(m, args[0]),))
        )
    for name, mask in outputs.items():
        module = model.get_submodule(name.removesuffix(".weight"))
        handles.append(module.register_forward_hook(lambda _, args, y, m=mask: along(m, y)))
    return handles


def drawn(program: Program, names: tuple[str, ...], seed: int) -> tuple[dict[str, Tensor], ...]:
    """Return random masks of the inputs and of the outputs of layers; each keeps a channel."""
    generator = torch.Generator().manual_seed(seed)
    found: tuple[dict[str, Tensor], ...] = ({}, {})
    whole = {w: uses[0] for w, uses in layers_of(settled(program)).items()}
    for name in names:
        layer = whole.get(name) or whole[f"{name}_computed"]
        for masks, side in zip(found, ("inputs", "outputs"), strict=True):
            mask = torch.rand(layer.width(side), generator=generator) < 0.6
            mask[int(torch.randint(len(mask), (1,), generator=generator))] = True
            masks[name] = mask
    return found


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_any_masks_on_both_sides_are_exact(spelling: str, groups: int, seed: int) -> None:
    model = built(lambda: chain(spelling, groups), seed)
    x = input_of(SHAPE)
    program = narrows.capture(model, (x,))
    inputs, outputs = drawn(program, LAYERS[:3], seed)
    inputs.pop("0.weight")  # the image itself
    plan = narrows.plan(program, keep_inputs=inputs, keep_outputs=outputs, zeros=False)
    smaller = narrows.apply(program, plan)
    other = input_of((3, *SHAPE[1:]), 2)
    handles = zeroed(model, inputs, outputs)
    expected = model(other).detach()
    for handle in handles:  # type: ignore[attr-defined]
        handle.remove()
    assert relative_error(plan.masked(program)(other), expected) <= EXACT
    assert relative_error(smaller(other), expected) <= EXACT
    module = smaller.to_module()
    assert relative_error(module(other).detach(), expected) <= EXACT
    again = smaller.with_weights(module.state_dict())
    assert relative_error(again(other), expected) <= EXACT


@pytest.mark.parametrize("constrained", [True, False])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_ratio_takes_channels_of_them(spelling: str, constrained: bool) -> None:
    x = input_of(SHAPE)
    program = narrows.capture(built(lambda: chain(spelling)), (x,))
    plan = narrows.plan(program, ratio=0.5, constrained=constrained)
    smaller = narrows.apply(program, plan)
    assert relative_error(smaller(x), plan.masked(program)(x)) <= EXACT
    assert smaller.parameter_count < (0.45 if constrained else 0.75) * program.parameter_count
    onnx = narrows.apply(program, plan, target="onnx")
    assert relative_error(onnx(x), plan.masked(program)(x)) <= EXACT


# ------------------------------------------------------------------ what can be trained


def factors_of(spelling: str, **masks: Mapping[str, list[int]]) -> tuple[set[str], str]:
    """Return the names in ``2`` that a pruned chain trains, and the note on its weight."""
    program = narrows.capture(built(lambda: chain(spelling)), (input_of(SHAPE),))
    smaller = narrows.apply(program, narrows.plan(program, zeros=False, **masks))
    (note,) = (n for n in smaller.notes if n.reason == "computed" and n.where.startswith("2."))
    parameters = dict(smaller.to_module().named_parameters())
    return {n for n in parameters if n.startswith("2.") and n != "2.bias"}, note.message


KEPT = [0, 2, 3, 6]


def test_factors_that_work_channel_by_channel_are_cut_and_trained() -> None:
    names, note = factors_of("scaled", keep_inputs={"2.weight": KEPT})
    assert names == {"2.weight"}
    assert "to_module() trains what is left of 2.weight" in note
    names, _ = factors_of("low-rank", keep_inputs={"2.weight": KEPT})
    assert names == {"2.weight", "2.down", "2.up"}
    names, _ = factors_of("weight-norm", keep_outputs={"2.weight": KEPT})
    assert names == {f"2.parametrizations.weight.original{i}" for i in range(2)}
    names, _ = factors_of("standardised", keep_outputs={"2.weight": KEPT})
    assert names == {"2.weight"}


def test_what_counts_the_channels_that_went_is_a_weight_from_there_on() -> None:
    for spelling in ("standardised", "binary", "scaled-standardised"):
        names, note = factors_of(spelling, keep_inputs={"2.weight": KEPT})
        assert names == {"2.weight_computed"}
        assert note.endswith("is one of its own now: it counts what went, too")
    for side in ("keep_inputs", "keep_outputs"):
        names, note = factors_of("spectral-norm", **{side: {"2.weight": KEPT}})
        assert names == {"2.weight"}
        assert note.endswith("it counts what went, too")


def test_cut_factors_are_trained_as_they_were() -> None:
    model = built(lambda: chain("weight-norm"))
    x = input_of(SHAPE)
    program = narrows.capture(model, (x,))
    plan = narrows.plan(program, keep_outputs={"2.weight": KEPT}, zeros=False)
    module = narrows.apply(program, plan).to_module(train=True)
    handles = zeroed(model, {}, {"2.weight": torch.isin(torch.arange(8), torch.tensor(KEPT))})
    assert handles
    for net in (model, module):
        net(x).square().sum().backward()
    name = "2.parametrizations.weight.original0"
    ours = dict(module.named_parameters())[name].grad
    theirs = dict(model.named_parameters())[name].grad
    assert ours is not None
    assert theirs is not None
    assert relative_error(ours, theirs[KEPT]) <= EXACT


def test_a_compensation_makes_plain_weights() -> None:
    x = input_of((8, 3, 6, 6))
    program = narrows.capture(built(lambda: chain("weight-norm")), (x,))
    plan = narrows.plan(program, ratio=0.5)
    made = narrows.compensate(program, plan, data=[x])
    notes = {n.where: n.message for n in made.notes if n.reason == "computed"}
    assert notes["4.weight"].endswith("is one of its own now: a rewrite has changed its numbers")
    smaller = narrows.apply(made, plan)
    assert relative_error(smaller(x), plan.masked(made)(x)) <= EXACT
    assert "4.weight" in dict(smaller.to_module().named_parameters())


# ------------------------------------------------------------------ state dicts


@pytest.mark.parametrize("spelling", ["scaled", "standardised", "weight-norm", "prune"])
def test_checkpoints_go_through_a_plan_and_back(spelling: str) -> None:
    x = input_of(SHAPE)
    program = narrows.capture(built(lambda: chain(spelling)), (x,))
    other = program.with_weights(built(lambda: chain(spelling), 5).state_dict())
    plan = narrows.plan(program, ratio=0.5, zeros=False)
    smaller = narrows.apply(program, plan)
    if spelling != "prune":  # of which another checkpoint has other zeros
        state = plan.shrink(program, other.state_dict())
        expected = plan.masked(other)(x)
        assert relative_error(smaller.with_weights(state)(x), expected) <= EXACT
    module = smaller.to_module()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.25)
    restored = plan.restore(program, module)
    expected = module(x).detach()
    assert relative_error(plan.masked(program).with_weights(restored)(x), expected) <= EXACT


# ------------------------------------------------------------------ names


class Half(nn.Module):
    """A product whose weight is no module's."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 5)
        self.w = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.linear(self.a(x), self.w * 0.5))


class Crossed(nn.Module):
    """Attention whose queries and keys are made by parts of one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.attention = nn.Linear(6, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.after = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        return self.after(self.attention(y[:, :2], y, y, need_weights=False)[0])


class Tied(nn.Module):
    """An embedding whose table, scaled, is the last layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(11, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(self.inner(self.table(x))), self.table.weight * 0.5)


def test_a_plan_may_name_the_weight_that_another_is_computed_from() -> None:
    x = input_of((2, 4))
    program = narrows.capture(built(Half), (x,))
    plan = narrows.plan(program, keep_outputs={"w": [0, 1, 2]})
    assert list(plan.outputs) == ["w_computed"]
    smaller = narrows.apply(program, plan)
    assert relative_error(smaller(x), plan.masked(program)(x)) <= EXACT
    assert smaller.weights["w_computed"].shape == (3, 8)
    assert "w" in smaller.to_module().state_dict()


def test_parts_of_one_matrix_are_layers_of_their_own() -> None:
    x = input_of((2, 5, 6))
    program = narrows.capture(built(Crossed), (x,))
    with pytest.raises(PlanUsageError) as caught:
        narrows.plan(program, keep_inputs={"attention.in_proj_weight": [0]})
    assert "weights are computed from 'attention.in_proj_weight'" in caught.value.what
    plan = narrows.plan(program, ratio=0.5)
    smaller = narrows.apply(program, plan)
    assert relative_error(smaller(x), plan.masked(program)(x)) <= EXACT
    assert smaller.parameter_count < 0.45 * program.parameter_count
    assert relative_error(smaller.to_module()(x).detach(), smaller(x)) <= EXACT


def test_a_tie_with_a_scale_in_it_can_be_cut_on_both_sides() -> None:
    x = torch.tensor([[1, 4, 7]])
    program = narrows.capture(built(Tied), (x,))
    plan = narrows.plan(program, ratio=0.5)
    smaller = narrows.apply(program, plan)
    assert relative_error(smaller(x), plan.masked(program)(x)) <= EXACT
    assert smaller.weights["table.weight"].shape == (11, 4)
    assert relative_error(smaller.to_module()(x).detach(), smaller(x)) <= EXACT


def test_nothing_pruned_is_the_program_itself() -> None:
    program = narrows.capture(built(lambda: chain("weight-norm")), (input_of(SHAPE),))
    same = narrows.apply(program, narrows.plan(program))
    assert same.weights.keys() == program.weights.keys()


def test_a_weight_that_two_calls_compute_is_one() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 6)
            self.b = parametrizations.weight_norm(nn.Linear(6, 6))
            self.c = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(F.relu(self.b(F.relu(self.a(x))))))

    x = input_of((2, 4))
    program = narrows.capture(built(Twice), (x,))
    assert len(layers_of(settled(program))["b.weight"]) == 2
    plan = narrows.plan(program, ratio=0.5)
    smaller = narrows.apply(program, plan)
    assert relative_error(smaller(x), plan.masked(program)(x)) <= EXACT
    assert [n for n in smaller.weights if n.startswith("b.weight")] == ["b.weight"]
    assert relative_error(smaller.to_module()(x).detach(), smaller(x)) <= EXACT


# ------------------------------------------------------------------ whole networks


@pytest.mark.parametrize("name", NETWORKS)
def test_nearly_all_of_a_network_is_prunable(name: str) -> None:
    make, shape = NETWORKS[name]
    x = input_of(shape)
    program = narrows.capture(built(make), (x,))
    plan = narrows.plan(program, ratio=0.5)
    smaller = narrows.apply(program, plan)
    assert relative_error(smaller(x), plan.masked(program)(x)) <= EXACT
    whole = settled(program)
    cut = [
        t.numel() for n, t in whole.weights.items()
        if n not in whole.buffers and t.shape != getattr(smaller.weights.get(n), "shape", None)
    ]  # fmt: skip
    assert sum(cut) >= 0.9 * whole.parameter_count
    assert smaller.parameter_count <= 0.4 * whole.parameter_count
    assert relative_error(smaller.to_module()(x).detach(), smaller(x)) <= EXACT


@pytest.mark.parametrize("name", ["nfnet", "vocoder"])
def test_a_network_is_lowered_and_quantized(name: str) -> None:
    make, shape = NETWORKS[name]
    x = input_of(shape).float()
    program = narrows.capture(copy.deepcopy(built(make)).float(), (x,))
    smaller = narrows.apply(program, {"ratio": 0.5}, target="onnx")
    artifact = narrows.lower(smaller, "onnx")
    assert relative_error(torch.as_tensor(artifact.run(x)), smaller(x)) <= 1e-5
    made = narrows.quantize(smaller, [x])
    assert relative_error(made.program(x), smaller(x)) < 0.1
