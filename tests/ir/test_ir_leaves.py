"""Leaves of `ir`, by hand: what operands have in common, what an analysis does not see through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx

import narrows
from narrows.ir.channels import analyse
from narrows.ir.choices import Choices
from narrows.ir.compare import relative_error
from narrows.ir.liveness import Demand
from narrows.ir.ops import table
from narrows.ir.program import Pruning
from narrows.ir.rewrite.aligned import agree
from narrows.ir.work import Work
from narrows.ir.workload import work_of
from narrows.passes.prune_channels import PruneChannels
from narrows.passes.pruning.form import emit
from tests.builder import Builder, aten, ramp
from tests.networks import NETWORKS

# ------------------------------------------------------------------ in step


@pytest.mark.parametrize(
    ("others", "alike"),
    [
        ([[[0, 2, 5]]], True),
        ([[[0, 2, 5], [0, 2, 5]]], True),
        ([[[0, 2, 5], [0, 2, 6]]], False),
        ([[[0, 2, 6]]], False),
        ([[[0, 2]]], False),
        ([[[0, 2, 5]], [[0, 3, 5]]], False),
        ([[[0, 2, 5], [0, 2, 5]], [[0, 2, 5]]], True),
        ([[[[0, 2, 5]], [[0, 2, 5]], [[0, 2, 5]]], [[0, 2, 5]]], True),
    ],
)
def test_operands_that_have_the_same_indices(others: list[Any], alike: bool) -> None:
    first = torch.tensor([[0, 2, 5]])
    axis = -1
    assert agree([first, *(torch.tensor(o) for o in others)], axis) == alike


def test_indices_that_do_not_broadcast_do_not_agree() -> None:
    one, other = torch.zeros(2, 3), torch.zeros(4, 3)
    assert not agree([one, other], 1)
    assert agree([one, one], 1)
    assert not agree([one, one, other], 1)


# ------------------------------------------------------------------ barriers


def made(b: Builder) -> fx.Node:
    """Return six channels that a linear layer makes, on the last axis."""
    return b.call(aten.linear.default, b.inputs[0], b.weight("w", ramp(6, 4)))


def turned(b: Builder) -> fx.Node:
    return b.call(aten.permute.default, made(b), [0, 2, 1])


BARRIERS: dict[str, tuple[Callable[[Builder], fx.Node], str]] = {
    "reflected channels": (
        lambda b: b.call(aten.pad.default, made(b), [1, 1], "reflect"),
        "it mirrors channels into new ones",
    ),
    "reflected positions": (lambda b: b.call(aten.pad.default, turned(b), [1, 1], "reflect"), ""),
    "a table of inputs": (
        lambda b: b.call(aten.embedding.default, b.call(aten.select.int, made(b), 0, 0),
                         b.weight("i", torch.tensor([0, 1]))),
        "its table is computed from the inputs",
    ),
    "a vector factor": (
        lambda b: b.call(aten.matmul.default, x := made(b), b.call(
            aten.select.int, b.call(aten.select.int, x, 0, 0), 0, 0)),
        "one factor is a vector",
    ),
    "a weight of several matrices": (
        lambda b: b.call(aten.matmul.default, made(b), b.weight("v", ramp(2, 6, 3))),
        "one factor is a weight that is not a matrix",
    ),
    "a norm over channels": (
        lambda b: b.call(aten.group_norm.default, made(b), 2),
        "channels lie on an axis it averages over",
    ),
    "a norm beside channels": (lambda b: b.call(aten.group_norm.default, turned(b), 2), ""),
    "rows of a weight": (
        lambda b: b.call(aten.index.Tensor, b.weight("v", ramp(5, 4)), [
            b.call(aten.argmax.default, made(b), 2)]),
        "it looks up rows of a weight",
    ),
    "a mask": (
        lambda b: b.call(aten.index.Tensor, made(b), [
            b.weight("m", torch.tensor([True, True]))]),
        "how much it takes is computed at run time",
    ),
    "channels that are picked": (
        lambda b: b.call(aten.index.Tensor, made(b), [
            None, None, b.weight("i", torch.tensor([0, 3]))]),
        "which channels it takes is computed at run time",
    ),
    "positions that are sampled": (
        lambda b: b.call(aten.grid_sampler.default, b.weight("v", ramp(2, 3, 4, 4)),
                         b.call(aten.reshape.default, b.inputs[0], [2, 2, 4, 2]), 0, 0, False),
        "it reads a weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BARRIERS)
def test_what_is_not_seen_through_says_why(name: str) -> None:
    build, reason = BARRIERS[name]
    b = Builder((2, 4, 4))
    node = build(b)
    program = b.program(node)
    flow = analyse(program).flows[node]
    assert (flow.barrier or "") == reason
    plan = narrows.plan(program, keep_outputs={"w": [0, 2, 3]} if "w" in program.weights else {})
    result = PruneChannels(plan).run(program).program
    masked = plan.masked(program)
    assert relative_error(result(*program.examples), masked(*program.examples)) < 1e-6


# ------------------------------------------------------------------ orders that take groups apart


@pytest.mark.parametrize(
    "ranks", [[0, 4, 1, 5, 2, 6, 3, 7], [7, 6, 5, 4, 3, 2, 1, 0], [0, 1, 2, 7, 3, 4, 5, 6]]
)
@pytest.mark.parametrize("name", ["group_norm", "grouped_conv", "shuffle_block"])
def test_an_order_of_channels_that_no_group_knows(name: str, ranks: list[int]) -> None:
    """What reads groups puts them together again."""
    network = NETWORKS[name]
    program = narrows.capture(network.build(), network.inputs())
    pruned = PruneChannels().run(program).program
    pruning = pruned.pruning or Pruning(program)
    facts = analyse(pruning.program, pruning.ignored)
    orders = {
        node.name: np.resize(np.array(ranks), facts.value(node).count)
        for node in facts.flows if table.contraction(facts, node) is not None
        and node is not pruning.program.output.args[0][0]  # type: ignore[index]
    }  # fmt: skip
    result = emit(pruning.choose(Choices(order=orders)))
    x = network.inputs(3, seed=5)
    assert relative_error(result(*x), program(*x)) < 1e-9


# ------------------------------------------------------------------ who needs what


def test_a_reader_that_needs_less_than_another_adds_to_it() -> None:
    """In whichever order the readers come, what is asked of a tensor is what any of them asks."""
    for first, second in (([0, 1], [1, 2, 3]), ([1, 2, 3], [0, 1]), ([0], [0]), ([5], [0, 2])):
        b = Builder((2, 4))
        x = b.call(aten.linear.default, b.inputs[0], b.weight("w", ramp(6, 4)))
        parts = [
            b.call(aten.index_select.default, x, 1, b.weight(f"i{i}", torch.tensor(keep)))
            for i, keep in enumerate((first, second))
        ]
        facts = analyse(b.program(*parts))
        demand = Demand(facts)
        wanted = np.isin(np.arange(6), first + second)
        assert np.array_equal(demand.needed(x), wanted)
        assert np.array_equal(demand.valued(x), wanted)
        whole = [set(keep) == set(first + second) for keep in (first, second)]
        assert [demand.only_reader(part, 0) for part in parts] == whole


# ------------------------------------------------------------------ works


@pytest.mark.parametrize(
    ("shape", "batch", "width", "space"),
    [
        ((6,), 1, 6, ()), ((2, 6), 2, 6, ()), ((2, 5, 6), 2, 6, (5,)),
        ((2, 5, 6, 7), 2, 5, (6, 7)), ((2, 3, 4, 5, 6), 2, 3, (4, 5, 6)), ((), 1, 1, ()),
    ],
)  # fmt: skip
def test_the_channels_of_tensors_of_every_rank(
    shape: tuple[int, ...], batch: int, width: int, space: tuple[int, ...]
) -> None:
    b = Builder(shape)
    node = b.call(aten.silu.default, b.inputs[0])
    b.program(node)
    assert work_of(node) == Work(
        "pointwise", "silu", batch, inputs=width, outputs=width, space=space
    )


# ------------------------------------------------------------------ columns


@pytest.mark.parametrize("shape", [(8, 9), (3, 8, 9)])
def test_sums_over_columns_of_an_input_are_one_channel(shape: tuple[int, ...]) -> None:
    b = Builder(shape)
    node = b.call(aten.col2im.default, b.inputs[0], [4, 4], [2, 2], [1, 1], [0, 0], [1, 1])
    value = analyse(b.program(node)).value(node)
    assert value.count == 1
    assert tuple(value.tensor.shape) == (1,) * (len(shape) + 1)
    assert value.shape == (*shape[:-2], 2, 4, 4)


# ------------------------------------------------------------------ modules


def test_a_module_holds_shared_tensors_under_all_their_names() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = torch.nn.Embedding(7, 4), torch.nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight
            self.register_buffer("scale", torch.tensor(2.0))
            self.register_buffer("offset", torch.tensor(1.0), persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(x) * self.scale) + self.offset

    net, x = Tied().eval(), torch.tensor([[1, 2], [3, 4]])
    module = narrows.capture(net, (x,)).to_module()
    assert module.state_dict().keys() == net.state_dict().keys()
    assert module.get_parameter("embed.weight") is module.get_parameter("head.weight")
    assert torch.equal(module(x), net(x))


def test_what_was_not_emitted_yet_is_not_said_to_be_untouched() -> None:
    b = Builder((2, 4))
    program = b.program(b.relu(b.inputs[0]))
    pruning = Pruning(program)
    assert not pruning.untouched
    assert emit(pruning) is not None
    assert pruning.untouched == (emit(pruning).graph is program.graph)
