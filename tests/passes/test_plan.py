"""Plans as data, and the masked program that gives them their meaning."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import narrows
from narrows.errors import PlanError
from narrows.ir.compare import relative_error
from narrows.ir.program import Note, Program
from narrows.ir.verify import verify
from narrows.passes.base import TOLERANCE, Fidelity
from narrows.passes.plans.plan import ChannelPlan, fingerprint
from tests.passes.plans import Net, TiedHead, captured, plan_of

EXACT = TOLERANCE[Fidelity.EXACT][torch.float64]


@pytest.fixture
def program() -> Program:
    return captured(Net(), 2, 3, 8, 8)


def gone(tensor: Tensor, axis: int) -> list[int]:
    """Return the indices of an axis at which a tensor is zero throughout."""
    rows = tensor.movedim(axis, 0).reshape(tensor.shape[axis], -1)
    return torch.nonzero((rows == 0).all(1)).flatten().tolist()


# ------------------------------------------------------------------ masks at the edge


@pytest.mark.parametrize(
    "mask",
    [
        [0, 2, 5],
        (5, 0, 2),
        {0, 2, 5},
        np.array([0, 2, 5]),
        torch.tensor([0, 2, 5]),
        [True, False, True, False, False, True, False, False],
        np.array([1, 0, 1, 0, 0, 1, 0, 0], dtype=bool),
        torch.tensor([1, 0, 1, 0, 0, 1, 0, 0]).bool(),
        list(torch.tensor([1, 0, 1, 0, 0, 1, 0, 0]).bool()),
        [np.int64(0), np.int64(2), np.int64(5)],
    ],
)
def test_masks_of_every_kind_mean_the_same(program: Program, mask: Any) -> None:
    plan = narrows.plan(program, keep_inputs={"second.weight": mask}, zeros=False)
    assert plan.inputs == {"second.weight": (0, 2, 5)}
    assert plan.widths == {"second.weight": (8, 6)}
    assert plan.reasons == {"second.weight": "given"}
    assert plan.removed == 5


def test_integers_are_channels_even_where_they_look_like_a_mask(program: Program) -> None:
    plan = narrows.plan(program, keep_outputs={"head.weight": [0, 1]}, zeros=False)
    assert plan.outputs == {"head.weight": (0, 1)}


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([0, 8], "the inputs of 'second.weight' are 0 to 7, got 8"),
        ([-1], "the inputs of 'second.weight' are 0 to 7, got -1"),
        ([1, 1], "the inputs of 'second.weight' name channel 1 twice"),
        ([0, 1, 0, 1, 1, 0, 0, 0], "a mask is made of booleans"),
        ([True] * 7, "take a mask of 8 entries, got 7"),
        ([True, 1], "holds bool, int"),
        ([0.0, 1.0], "holds float"),
        ([[0], [1]], "holds list"),
        (torch.ones(8), "convert it: mask.bool"),
        ("all", "neither booleans nor kept channels"),
        (3, "neither booleans nor kept channels"),
        (None, "neither booleans nor kept channels"),
    ],
)
def test_masks_that_do_not_fit(program: Program, mask: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        narrows.plan(program, keep_inputs={"second.weight": mask})


def test_other_names_of_shared_weights_count(program: Program) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(6, 6)
            self.two = nn.Linear(6, 6)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x).relu())

    tied = captured(Tied(), 2, 6)
    plan = narrows.plan(tied, keep_inputs={"two.weight": [0, 1]}, zeros=False)
    assert plan.inputs == {"one.weight": (0, 1)}
    with pytest.raises(PlanError, match="two masks on its inputs"):
        narrows.plan(tied, keep_inputs={"one.weight": [0], "two.weight": [1]})


def test_an_empty_keep_is_allowed_and_noted(program: Program) -> None:
    plan = narrows.plan(
        program, keep_inputs={"second.weight": []}, keep_outputs={"first.weight": [False] * 8},
        zeros=False,
    )  # fmt: skip
    assert plan.inputs == {"second.weight": ()}
    assert [n.where for n in plan.notes if n.reason == "empty"] == ["second.weight", "first.weight"]
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    result = narrows.apply(program, plan)
    verify(result)
    assert relative_error(result(x), plan.masked(program)(x)) <= EXACT
    assert any(n.reason == "empty" for n in result.notes)


# ------------------------------------------------------------------ the masked program


def test_an_input_mask_zeroes_what_the_consumer_reads(program: Program) -> None:
    masked = narrows.plan(program, keep_inputs={"second.weight": [1, 4]}).masked(program)
    assert gone(masked.weights["second.weight"], 1) == [0, 2, 3, 5, 6, 7]
    kept = masked.weights["second.weight"][:, [1, 4]]
    assert torch.equal(kept, program.weights["second.weight"][:, [1, 4]])
    others = program.weights.keys() - {"second.weight"}
    assert all(masked.weights[n] is program.weights[n] for n in others)
    assert masked.name == program.name


def test_an_output_mask_lies_behind_the_norm(program: Program) -> None:
    keep = {"first.weight": [0, 1], "second.weight": [2, 3]}
    masked = narrows.plan(program, keep_outputs=keep).masked(program)
    assert masked.weights["first.weight"] is program.weights["first.weight"]
    assert masked.weights["first.bias"] is program.weights["first.bias"]
    assert gone(masked.weights["norm.weight"], 0) == [2, 3, 4, 5, 6, 7]
    assert gone(masked.weights["norm.bias"], 0) == [2, 3, 4, 5, 6, 7]
    assert gone(masked.weights["second.weight"], 0) == [0, 1, 4, 5]
    assert gone(masked.weights["second.bias"], 0) == [0, 1, 4, 5]


class Followed(nn.Module):
    """A layer, what follows it, and a head that reads it all."""

    def __init__(self, layer: nn.Module, follow: nn.Module, width: int) -> None:
        super().__init__()
        self.layer, self.follow, self.head = layer, follow, nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.follow(self.layer(x)).flatten(1))


class Last(nn.Module):
    """A norm over channels that stand on axis 1, by way of a permutation."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)


NORMS = {
    "batch": nn.BatchNorm2d(6),
    "batch-plain": nn.BatchNorm2d(6, affine=False),
    "instance": nn.InstanceNorm2d(6, affine=True),
    "instance-plain": nn.InstanceNorm2d(6),
    "group": nn.GroupNorm(2, 6),
    "layer-all": nn.LayerNorm((6, 4, 4)),
    "layer-space": nn.LayerNorm((4, 4)),
    "layer-last": Last(nn.LayerNorm(6)),
    "layer-last-plain": Last(nn.LayerNorm(6, elementwise_affine=False)),
    "layer-last-no-bias": Last(nn.LayerNorm(6, bias=False)),
    "rms-last": Last(nn.RMSNorm(6)),
    "flat": nn.Sequential(nn.Flatten(), nn.BatchNorm1d(96), nn.Unflatten(1, (6, 4, 4))),
}


@pytest.mark.parametrize("name", NORMS)
def test_the_contribution_is_zero_after_the_norm(name: str) -> None:
    """Whatever the norm, its result is the unmasked one with the masked channels zero."""
    layer = nn.Conv2d(3, 6, 3)
    program = captured(Followed(layer, NORMS[name], 96), 2, 3, 6, 6)
    plan = narrows.plan(program, keep_outputs={"layer.weight": [0, 3, 4]}, zeros=False)
    masked = plan.masked(program)
    verify(masked)
    x = torch.randn(3, 3, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        middle = NORMS[name](layer(x))
        middle[:, [1, 2, 5]] = 0
    head = program.weights["head.weight"], program.weights["head.bias"]
    assert relative_error(masked(x), F.linear(middle.flatten(1), *head)) <= EXACT
    result = narrows.apply(program, plan, check=True)
    assert relative_error(result(x), masked(x)) <= EXACT
    products = [n for n in result.nodes if n.target is torch.ops.aten.mul.Tensor]
    assert not products or name == "layer-last-plain"  # whose statistics need the masked channels


def test_a_norm_that_is_not_the_only_reader() -> None:
    """The producer's rows are zero for the other reader, and the norm's result is zero as well."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm, self.head = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return self.head(y + self.norm(y))

    program = captured(Both(), 2, 4)
    masked = narrows.plan(program, keep_outputs={"layer.weight": [1, 2]}).masked(program)
    for name in ("layer.weight", "layer.bias", "norm.weight", "norm.bias"):
        assert gone(masked.weights[name], 0) == [0, 3, 4, 5]


def test_a_norm_that_others_use_is_masked_by_a_product() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 6)
            self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.one(x)).relu()
            return self.head(self.norm(self.two(x)))

    program = captured(Shared(), 2, 4)
    plan = narrows.plan(program, keep_outputs={"one.weight": [1, 2]}, zeros=False)
    masked = plan.masked(program)
    verify(masked)
    assert masked.weights["norm.weight"] is program.weights["norm.weight"]
    assert sum(n.target is torch.ops.aten.mul.Tensor for n in masked.nodes) == 1
    x = torch.randn(3, 4, dtype=torch.float64)
    assert relative_error(narrows.apply(program, plan)(x), masked(x)) <= EXACT


GEOMETRIES = {
    "conv": (nn.Conv2d(8, 6, 3), 8, 6),
    "conv-grouped": (nn.Conv2d(8, 6, 3, groups=2), 8, 6),
    "conv-depthwise": (nn.Conv2d(8, 16, 3, groups=8), 8, 16),
    "transposed": (nn.ConvTranspose2d(8, 6, 3), 8, 6),
    "transposed-grouped": (nn.ConvTranspose2d(8, 6, 3, groups=2), 8, 6),
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_channels_are_the_operators_own(name: str) -> None:
    """A mask counts over all groups; masking the weight equals masking the tensor."""
    layer, inputs, outputs = GEOMETRIES[name]
    program = captured(nn.Sequential(nn.Conv2d(3, 8, 1), layer, nn.ReLU()), 2, 3, 6, 6)
    keep_in, keep_out = list(range(0, inputs, 2)), list(range(1, outputs, 3))
    plan = narrows.plan(program, {"1.weight": keep_in}, {"1.weight": keep_out}, zeros=False)
    assert plan.widths == {"1.weight": (inputs, outputs)}
    x = torch.randn(3, 3, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        first = F.conv2d(x, program.weights["0.weight"], program.weights["0.bias"])
        hidden = torch.zeros_like(first)
        hidden[:, keep_in] = first[:, keep_in]
        made = layer(hidden).relu()
        expected = torch.zeros_like(made)
        expected[:, keep_out] = made[:, keep_out]
    masked = plan.masked(program)
    assert relative_error(masked(x), expected) <= EXACT
    assert relative_error(narrows.apply(program, plan)(x), expected) <= EXACT


class Products(nn.Module):
    """Raw weights: ``x @ a``, ``b @ x`` and addmm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.randn(4, 3))
        self.c, self.bias = nn.Parameter(torch.randn(5, 2)), nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, (self.b @ (x @ self.a).relu()).flatten(0, 1), self.c)


def test_products_with_raw_weights() -> None:
    program = captured(Products(), 2, 3, 6)
    plan = narrows.plan(
        program,
        {"a": [0, 1], "b": [0, 2], "c": [1, 3]},
        {"a": [3], "b": [0], "c": [1]},
        zeros=False,
    )
    assert plan.widths == {"a": (6, 5), "b": (3, 4), "c": (5, 2)}
    masked = plan.masked(program)
    assert gone(masked.weights["a"], 0) == [2, 3, 4, 5]
    assert gone(masked.weights["a"], 1) == [0, 1, 2, 4]
    assert gone(masked.weights["b"], 1) == [1]
    assert gone(masked.weights["b"], 0) == [1, 2, 3]
    assert gone(masked.weights["c"], 0) == [0, 2, 4]
    assert gone(masked.weights["bias"], 0) == [0]


def test_a_transposed_weight_is_masked_at_its_root() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.w = nn.Linear(4, 6), nn.Parameter(torch.randn(5, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x).relu() @ self.w.t()

    program = captured(Turned(), 2, 4)
    plan = narrows.plan(program, {"w": [0, 4]}, {"w": [1, 2]}, zeros=False)
    masked = plan.masked(program)
    assert gone(masked.weights["w"], 1) == [1, 2, 3, 5]
    assert gone(masked.weights["w"], 0) == [0, 3, 4]
    assert narrows.apply(program, plan).weights["first.weight"].shape == (2, 4)


# ------------------------------------------------------------------ shared weights


class TiedAutoencoder(nn.Module):
    """One weight read both ways."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.w).relu(), self.w.t())


def test_a_mask_of_another_length_means_the_uses_of_that_width() -> None:
    program = captured(TiedAutoencoder(), 2, 8)
    x = torch.randn(3, 8, dtype=torch.float64)
    w = program.weights["w"]
    code = F.linear(x, w).relu()
    code[:, 1:] = 0
    mask = [True, False, False, False, False]
    second = narrows.plan(program, keep_inputs={"w": mask}, zeros=False)
    assert second.widths["w"][0] == 5
    masked = second.masked(program)
    verify(masked)
    assert relative_error(masked(x), F.linear(code, w.t())) <= EXACT
    assert relative_error(narrows.apply(program, second)(x), masked(x)) <= EXACT
    first = narrows.plan(program, keep_inputs={"w": [0]}, zeros=False)
    assert first.widths["w"][0] == 8
    x[:, 1:] = 0
    assert relative_error(first.masked(program)(x), program(x)) <= EXACT


def test_a_mask_on_a_tied_head_leaves_the_embedding_alone() -> None:
    ids = torch.arange(8).view(2, 4)
    program = narrows.capture(TiedHead().eval(), (ids,))
    plan = narrows.plan(program, {"embed.weight": [0, 1, 2]}, {"embed.weight": range(9)})
    assert plan.widths == {"embed.weight": (6, 10)}
    masked = plan.masked(program)
    verify(masked)
    assert masked.weights["embed.weight"] is program.weights["embed.weight"]
    copy = masked.weights["embed.weight_masked"]
    assert gone(copy, 1) == [3, 4, 5]
    assert gone(copy, 0) == [9]
    assert masked.origins["embed.weight_masked"].name == "embed.weight"
    lookup = narrows.plan(program, keep_outputs={"embed.weight": [True, False] * 3}, zeros=False)
    assert gone(lookup.masked(program).weights["embed.weight_masked"], 1) == [1, 3, 5]
    for each in (plan, lookup):
        assert relative_error(narrows.apply(program, each)(ids), each.masked(program)(ids)) < 1e-6


def test_a_weight_that_several_nodes_read_is_masked_at_each() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.norm, self.head = nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.w(self.norm(self.w(x)).relu()).relu())

    program = captured(Twice(), 2, 6)
    plan = narrows.plan(program, {"w.weight": [0, 1, 2]}, {"w.weight": [2, 3]}, zeros=False)
    masked = plan.masked(program)
    verify(masked)
    w, b = program.weights["w.weight"], program.weights["w.bias"]
    x = torch.randn(3, 6, dtype=torch.float64)
    read, made = torch.zeros(6).double(), torch.zeros(6).double()
    read[:3], made[2:4] = 1, 1
    norm = program.weights["norm.weight"], program.weights["norm.bias"]
    y = F.layer_norm(F.linear(x * read, w, b), (6,), *norm) * made
    y = (F.linear(y.relu() * read, w, b) * made).relu()
    head = program.weights["head.weight"], program.weights["head.bias"]
    assert relative_error(masked(x), F.linear(y, *head)) <= EXACT


# ------------------------------------------------------------------ JSON


def test_plans_go_to_json_and_back(program: Program, tmp_path: Path) -> None:
    plan = plan_of(program)
    assert plan.save(tmp_path / "p.json") == tmp_path / "p.json"
    loaded = ChannelPlan.load(tmp_path / "p.json")
    assert loaded == plan
    assert hash(loaded) == hash(plan)
    assert ChannelPlan.from_json(plan.to_json()) == plan
    assert json.loads((tmp_path / "p.json").read_text()) == plan.to_json()
    assert os.listdir(tmp_path) == ["p.json"]
    assert ' "first.weight": [0, 1, 7]' in (tmp_path / "p.json").read_text()
    assert repr(plan) == "ChannelPlan(1 inputs, 1 outputs, 11 channels masked)"


def test_saving_again_replaces_the_file(program: Program, tmp_path: Path) -> None:
    plan = plan_of(program)
    plan.save(tmp_path / "p.json")
    other = narrows.plan(program, {"head.weight": [1]}, zeros=False)
    other.save(tmp_path / "p.json")
    assert ChannelPlan.load(tmp_path / "p.json") == other


def test_a_plan_applies_to_another_checkpoint(program: Program) -> None:
    other = captured(Net(), 2, 3, 8, 8, seed=5)
    assert fingerprint(other) == fingerprint(program)
    assert fingerprint(program.to(torch.float32)) == fingerprint(program)
    plan = plan_of(program)
    masked = plan.masked(program.with_weights(other.state_dict()))
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    assert relative_error(masked(x), plan.masked(other)(x)) <= EXACT


def test_a_plan_made_by_hand(program: Program) -> None:
    plan = ChannelPlan(inputs={"second.weight": (1, 4)})
    assert gone(plan.masked(program).weights["second.weight"], 1) == [0, 2, 3, 5, 6, 7]


# ------------------------------------------------------------------ merging


def test_a_merged_plan_keeps_what_both_keep(program: Program) -> None:
    a = ChannelPlan.given(program, {"second.weight": [0, 1, 2]}, reason="mine")
    b = ChannelPlan.given(program, {"second.weight": [1, 2, 3]}, {"first.weight": [0]})
    both = a | b
    assert both.inputs == {"second.weight": (1, 2)}
    assert both.outputs == {"first.weight": (0,)}
    assert both.reasons == {"second.weight": "mine, given", "first.weight": "given"}
    assert both.fingerprint == a.fingerprint
    assert both.by_reason() == {"mine, given": 6, "given": 7}
    assert a | a == a


def test_plans_of_different_models_do_not_merge(program: Program) -> None:
    a = ChannelPlan.given(program, {"head.weight": [0]})
    b = ChannelPlan({"head.weight": (0,)}, widths={"head.weight": (9, 4)})
    with pytest.raises(PlanError, match="two plans of different models"):
        a.merge(b)


def test_notes_survive(program: Program) -> None:
    note = Note("first.weight", "test", "a note", 3, "net.py:1")
    plan = plan_of(program).with_notes(note)
    assert ChannelPlan.from_json(plan.to_json()).notes[-1] == note


def test_a_programs_fingerprint_knows_the_shapes_of_its_weights() -> None:
    def of(width: int) -> str:
        net = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))
        return fingerprint(narrows.capture(net.eval(), (torch.randn(2, 4),)))

    assert of(6) == of(6) != of(8)


def test_a_weight_that_there_is_not_is_named_as_such(program: Program) -> None:
    with pytest.raises(PlanError, match=r"net has no weight 'nothing\.weight'"):
        narrows.plan(program, keep_inputs={"nothing.weight": [0]})
