"""Couplings: what lives or dies together, which weight axes follow it, and what stays whole."""

from __future__ import annotations

import functools
import json
import random

import pytest
import torch
from torch import nn

import narrows
from narrows.ir.channels import analyse
from narrows.ir.compare import relative_error
from narrows.ir.couplings import Coupling, Member, couplings, to_table
from narrows.ir.program import Program, Pruning
from narrows.ir.rewrite import rewrite
from narrows.passes.base import TOLERANCE, Fidelity
from tests.builder import Builder, aten, ramp
from tests.networks import NETWORKS
from tests.networks.zoo import SMALL_TRANSFORMERS

EXACT = TOLERANCE[Fidelity.EXACT][torch.float64]


@functools.cache
def captured(name: str) -> Program:
    network = NETWORKS[name]
    return narrows.capture(network.build(), network.inputs())


def by_name(program: Program) -> dict[str, Coupling]:
    return {c.name: c for c in couplings(program)}


def members(coupling: Coupling) -> list[tuple[str, int, str]]:
    return [(m.weight, m.axis, m.role) for m in coupling.members]


def layers(coupling: Coupling) -> list[tuple[str, int, str]]:
    """Return the members that make channels or sum over them."""
    return [m for m in members(coupling) if m[2] != "with"]


def indices(coupling: Coupling, weight: str, axis: int) -> tuple[tuple[int, ...], ...]:
    (member,) = (m for m in coupling.members if (m.weight, m.axis) == (weight, axis))
    return member.indices


# ------------------------------------------------------------------ what a coupling holds


def residual() -> Program:
    b = Builder((2, 3, 8, 8))
    x = b.norm(b.conv(b.inputs[0], "stem", 4, 3), "stem_norm", 4)
    y = b.conv(b.relu(x), "body", 4, 4, bias=True)
    y = b.call(aten.add.Tensor, x, y, name="add")
    return b.program(b.conv(y, "head", 5, 4))


def test_a_residual_joins_its_branches():
    found = by_name(residual())
    assert list(found) == ["x", "stem", "head"]
    assert members(found["stem"]) == [
        ("stem.weight", 0, "out"),
        ("stem_norm.weight", 0, "with"),
        ("stem_norm.bias", 0, "with"),
        ("stem_norm.running_mean", 0, "with"),
        ("stem_norm.running_var", 0, "with"),
        ("body.weight", 1, "in"),
        ("body.weight", 0, "out"),
        ("body.bias", 0, "with"),
        ("head.weight", 1, "in"),
    ]
    assert found["stem"].width == 4
    assert found["stem"].barrier == ""
    assert found["stem"].nodes == ("stem", "stem_norm", "relu", "body", "add")
    assert all(m.indices == ((0,), (1,), (2,), (3,)) for m in found["stem"].members)


def test_inputs_and_outputs_stay():
    found = by_name(residual())
    assert (found["x"].barrier, members(found["x"])) == (
        "part of a model input",
        [("stem.weight", 1, "in")],
    )
    assert found["head"].barrier == "part of a model output"


def test_facts_may_be_given():
    program = residual()
    given = couplings(program, analyse(program))
    assert [c.to_json() for c in given] == [c.to_json() for c in program.couplings()]


def test_a_flattened_channel_has_many_indices():
    found = by_name(captured("flatten_linear"))
    block = indices(found["stem_0"], "head.weight", 1)
    assert block == tuple(tuple(range(64 * c, 64 * c + 64)) for c in range(8))
    (member,) = (m for m in found["stem_0"].members if m.weight == "head.weight")
    assert member.at([2, 0]) == (*range(64), *range(128, 192))


def test_what_a_slice_takes_is_a_coupling_of_its_own():
    found = by_name(captured("slice_prefix"))
    assert (found["stem_0"].width, found["stem_0#2"].width) == (5, 3)
    assert indices(found["stem_0#2"], "stem.0.weight", 0) == ((5,), (6,), (7,))
    assert layers(found["stem_0#2"]) == [("stem.0.weight", 0, "out")]


def test_overlapping_slices_read_an_index_twice():
    found = by_name(captured("slice_overlapping"))
    widths = {n: c.width for n, c in found.items() if n.startswith("stem")}
    assert widths == {"stem_0": 3, "stem_0#2": 2, "stem_0#3": 3}
    assert indices(found["stem_0#2"], "head.weight", 1) == ((3, 5), (4, 6))


def test_names_are_unique_and_stable():
    for name in ("dense_block", "split_sizes", "qkv_by_hand"):
        program = captured(name)
        names = [c.name for c in couplings(program)]
        assert len(set(names)) == len(names)
        assert names == [c.name for c in couplings(program.copy())]


# ------------------------------------------------------------------ rules of single operators


@pytest.mark.parametrize(
    ("name", "coupling", "expected"),
    [
        (  # equal positions of both groups of four
            "grouped_conv",
            "stem_0",
            {("stem.0.weight", 0): ((0, 4), (1, 5), (2, 6), (3, 7)),
             ("feature.0.weight", 1): ((0,), (1,), (2,), (3,))},
        ),
        (
            "grouped_conv_widening",
            "feature",
            {("feature.weight", 0): ((0, 3, 6, 9), (1, 4, 7, 10), (2, 5, 8, 11)),
             ("head.weight", 1): ((0, 3, 6, 9), (1, 4, 7, 10), (2, 5, 8, 11))},
        ),
        (
            "transposed_conv_grouped",
            "feature",
            {("feature.weight", 1): ((0,), (1,), (2,)),
             ("head.weight", 1): ((0, 3), (1, 4), (2, 5))},
        ),
        (  # a depthwise convolution passes its channel on, or the two that it makes of it
            "depthwise_multiplier",
            "stem_0",
            {("stem.0.weight", 0): tuple((c,) for c in range(8)),
             ("feature.0.weight", 0): tuple((2 * c, 2 * c + 1) for c in range(8)),
             ("head.weight", 1): tuple((2 * c, 2 * c + 1) for c in range(8))},
        ),
        (  # whole blocks of a norm go
            "group_norm",
            "feature_0",
            {("feature.0.weight", 0): ((0, 1), (2, 3), (4, 5), (6, 7)),
             ("feature.1.weight", 0): ((0, 1), (2, 3), (4, 5), (6, 7)),
             ("head.weight", 1): ((0, 1), (2, 3), (4, 5), (6, 7))},
        ),
        (  # what is compared goes together; the winner goes with it
            "maxout",
            "stem_0",
            {("stem.0.weight", 0): ((0, 1), (2, 3), (4, 5), (6, 7)),
             ("head.weight", 1): ((0,), (1,), (2,), (3,))},
        ),
        (  # a query and a key are summed against each other, alike in both heads
            "separate_qkv",
            "q",
            {("q.weight", 0): ((0, 4), (1, 5), (2, 6), (3, 7)),
             ("k.weight", 0): ((0, 4), (1, 5), (2, 6), (3, 7))},
        ),
        (
            "separate_qkv",
            "v",
            {("v.weight", 0): tuple((c, c + 6) for c in range(6)),
             ("project.weight", 1): tuple((c, c + 6) for c in range(6))},
        ),
        (  # four heads of queries on two of keys
            "grouped_query",
            "q",
            {("q.weight", 0): ((0, 2, 4, 6), (1, 3, 5, 7)),
             ("k.weight", 0): ((0, 2), (1, 3))},
        ),
        (  # rotary halves tie the two channels of each angle
            "rotary_halves",
            "q",
            {("q.weight", 0): ((0, 2, 4, 6), (1, 3, 5, 7)),
             ("k.weight", 0): ((0, 2, 4, 6), (1, 3, 5, 7))},
        ),
        (  # a norm inside a head leaves only whole heads to remove
            "qk_norm",
            "qkv",
            {("qkv.weight", 0): tuple(
                tuple(8 * part + 4 * head + c for part in range(3) for c in range(4))
                for head in range(2)),
             ("project.weight", 1): ((0, 1, 2, 3), (4, 5, 6, 7))},
        ),
    ],
)  # fmt: skip
def test_positions(name: str, coupling: str, expected: dict[tuple[str, int], object]):
    found = by_name(captured(name))[coupling]
    assert found.barrier == ""
    assert {k: indices(found, *k) for k in expected} == expected


def test_one_output_a_group_takes_the_group():
    b = Builder((2, 3, 8, 8))
    y = b.conv(b.conv(b.inputs[0], "stem", 6, 3), "narrow", 3, 2, groups=3)
    found = by_name(b.program(b.conv(y, "head", 2, 3)))["stem"]
    assert layers(found) == [
        ("stem.weight", 0, "out"),
        ("narrow.weight", 0, "out"),
        ("head.weight", 1, "in"),
    ]
    assert indices(found, "stem.weight", 0) == ((0, 1), (2, 3), (4, 5))
    assert indices(found, "narrow.weight", 0) == ((0,), (1,), (2,))


def test_a_shared_weight_joins_its_uses():
    found = by_name(captured("shared_conv"))
    assert layers(found["stem_0"]) == [
        ("stem.0.weight", 0, "out"),
        ("shared.weight", 1, "in"),
        ("shared.weight", 0, "out"),
        ("shared.weight", 1, "in"),
        ("shared.weight", 0, "out"),
        ("head.weight", 1, "in"),
    ]


def test_a_gate_of_one_channel_joins_nothing_and_stays():
    b = Builder((2, 3, 8, 8))
    x, gate = b.conv(b.inputs[0], "left", 4, 3), b.conv(b.inputs[0], "gate", 1, 3)
    found = by_name(b.program(b.conv(b.call(aten.mul.Tensor, x, gate, name="mul"), "head", 2, 4)))
    assert found["left"].barrier == ""
    assert layers(found["left"]) == [("left.weight", 0, "out"), ("head.weight", 1, "in")]
    assert found["gate"].barrier == "mul: they are spread over other channels"


@pytest.mark.parametrize(
    ("name", "coupling", "reason"),
    [
        ("softmax_channels", "stem_0", "softmax: it needs every channel it normalises over"),
        ("mean_channels_gate", "stem_0", "mean: it reduces over the channels"),
        ("group_norm_one_block", "feature_0", "feature_1: its statistics need every channel"),
        ("sort_channels", "stem_0", "sort: which of the channels come first is computed"),
        ("linear_over_space", "stem_0", "head: it sums over an axis beside theirs"),
        ("sum_channels", "stem_0", ""),
        ("linear_over_tokens", "embed", "norm: it needs every channel it normalises over"),
        ("intermediate_output", "stem_0", "part of a model output"),
    ],
)
def test_barriers_say_why(name: str, coupling: str, reason: str):
    assert by_name(captured(name))[coupling].barrier == reason


def test_a_computed_weight_stays():
    b = Builder((2, 6))
    w = b.call(aten.mul.Tensor, b.weight("raw", ramp(4, 6)), b.weight("scale", ramp(4, 1)))
    y = b.call(aten.linear.default, b.inputs[0], w, name="first")
    y = b.call(aten.linear.default, y, b.weight("last.weight", ramp(3, 4)), name="last")
    (found,) = (c for c in couplings(b.program(y)) if ("last.weight", 1, "in") in members(c))
    assert found.barrier == "first: its weight is computed from others"


# ------------------------------------------------------------------ as a whole

SMALL = (
    "add_then_cat", "causal_chunks", "channel_pad_shortcut", "channel_shuffle", "concat_same_twice",
    "dense_block", "depthwise_multiplier", "flip_add", "glu", "group_norm", "grouped_conv_chain",
    "linear_then_view", "maxout", "multihead_attention", "qk_norm", "qkv_by_hand",
    "residual_chained", "rotary_halves", "shared_head", "shuffle_block", "split_residual",
    "stack_weighted", "tied_embedding", "transposed_conv_grouped", "unet_skip", "view_blocks",
    "window_attention",
)  # fmt: skip


def program_of(name: str) -> Program:
    if name in NETWORKS:
        return captured(name)
    model = SMALL_TRANSFORMERS[name]
    return narrows.capture(model.build(), model.inputs())


@pytest.mark.parametrize("name", [*SMALL, *SMALL_TRANSFORMERS])
def test_any_channels_of_couplings_can_be_removed(name: str):
    """Masked like a constrained plan would, a program shrinks by all of it and stays exact."""
    program = program_of(name)
    draw = random.Random(0)
    weights = {n: t.clone() for n, t in program.weights.items()}
    gone: dict[tuple[str, int], set[int]] = {}
    for coupling in couplings(program):
        if coupling.barrier:
            continue
        chosen = draw.sample(range(coupling.width), coupling.width // 2)
        for member in coupling.members:
            removed = member.at(chosen)
            if "running" not in member.weight:
                weights[member.weight].index_fill_(member.axis, torch.tensor(removed).long(), 0)
            gone.setdefault((member.weight, member.axis), set()).update(removed)
    masked = program.replace(weights=weights)
    result, _ = rewrite(Pruning(masked))
    inputs = program.examples
    assert relative_error(result.run_flat(inputs), masked.run_flat(inputs)) <= EXACT
    assert any(gone.values()), "nothing can be removed"
    for (weight, axis), removed in gone.items():
        for left in (w for w, o in result.origins.items() if o.name == weight):
            index = result.origins[left].index[axis]
            assert index is not None or not removed, f"{left} is whole along axis {axis}"
            assert removed.isdisjoint(index or ()), f"{left} holds removed channels"
        if removed and weight in result.weights:
            assert weight in result.origins, f"{weight} is whole"


@pytest.mark.parametrize("name", SMALL)
def test_an_index_belongs_to_one_channel(name: str):
    program = captured(name)
    seen: dict[tuple[str, int], set[int]] = {}
    for coupling in couplings(program):
        distinct = {(m.weight, m.axis): m for m in coupling.members if m.role != "with"}
        for key, member in distinct.items():
            assert len(member.indices) == coupling.width
            flat = [i for channel in member.indices for i in channel]
            assert all(tuple(sorted(channel)) == channel for channel in member.indices)
            assert seen.setdefault(key, set()).isdisjoint(flat)
            seen[key].update(flat)
    for (weight, axis), found in seen.items():
        assert found <= set(range(program.weights[weight].shape[axis]))


def test_an_empty_program_has_no_couplings():
    b = Builder((2, 3))
    assert couplings(b.program(b.relu(b.inputs[0]))) == ()


# ------------------------------------------------------------------ text


def test_table_and_json():
    found = couplings(residual())
    text = to_table(found)
    assert text.splitlines()[:3] == [
        "x  3 channels  stays whole: part of a model input",
        "  stem.weight  axis 1  summed over",
        "stem  4 channels",
    ]
    data = json.loads(json.dumps([c.to_json() for c in found]))
    assert [c["width"] for c in data] == [3, 4, 5]
    assert data[1]["members"][0] == {"weight": "stem.weight", "axis": 0, "role": "out"}


def test_members_are_read_lazily():
    member = Member("w", 0, "out", torch.arange(6).view(3, 2).numpy())
    assert "indices" not in vars(member)
    assert member.indices == ((0, 1), (2, 3), (4, 5))
    assert member.at((2, 0)) == (0, 1, 4, 5)


def test_networks_of_two_thousand_nodes():
    """A dense network of that size is done at once; the test's timeout is the only clock."""

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()

    b = Builder((1, 3, 4, 4))
    features = [b.conv(b.inputs[0], "stem", 8, 3)]
    for i in range(330):
        joined = b.call(aten.cat.default, features[-64:], 1, name=f"cat{i}")
        width = 8 * len(features[-64:])
        features.append(b.conv(b.relu(b.norm(joined, f"norm{i}", width)), f"conv{i}", 8, width))
    program = b.program(b.conv(features[-1], "head", 2, 8))
    assert len(program.nodes) > 2000
    found = couplings(program)
    assert sum(not c.barrier for c in found) == 331
