"""Every one-feature network, pruned with random masks, equals its masked program.

The networks are of the kinds on which other pruners are wrong or crash. The masks are
unconstrained: every weight has its own, on what it reads, on what it makes, or on both.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

import narrows
from narrows.ir.compare import relative_error
from narrows.ir.graph import interpret
from narrows.ir.program import Program
from narrows.ir.verify import verify
from narrows.passes.base import TOLERANCE, Fidelity
from narrows.passes.prune_channels import PruneChannels
from tests.networks import NETWORKS, contraction, random_masks
from tests.networks.reference import masked_module

EXACT = TOLERANCE[Fidelity.EXACT][torch.float64]
AMOUNTS = (0.3, 0.6)
SIDES = ("input", "output", "both")

# Networks in which random masks cannot save a parameter, each with the reason.
KEPT_WHOLE = {
    "einsum": "einsum is a barrier",
    "layer_norm_tokens": "the norm's statistics need all channels",
    "layer_norm_plain": "the norm's statistics need all channels",
    "rms_norm": "the norm's statistics need all channels",
    "shifted_copies": "copies are joined along an axis beside that of the channels",
}


# Tensors that several layers read, each with another mask: they part, and may take more room.
UNTIED = {"shared_head", "tied_embedding"}

# Reasons for which a path is kept that carries nothing but a constant.
CARRIERS = {"merge", "padding", "shape", "ragged"}


class Case:
    """A network, its program, and what masks make of it; each is made once."""

    def __init__(self, name: str) -> None:
        self.name, self.network = name, NETWORKS[name]
        self.module: nn.Module = self.network.build()
        self.program = narrows.capture(self.module, self.network.inputs())
        self.batches = (2, 5) if self.program.dynamic_batch else (2,)
        self.pruned = functools.cache(self._pruned)

    def _pruned(self, side: str, amount: float) -> tuple[Program, Program]:
        inputs, outputs = random_masks(self.program, amount, side)
        plan = narrows.plan(self.program, keep_inputs=inputs, keep_outputs=outputs, zeros=False)
        return plan.masked(self.program), narrows.apply(self.program, plan)

    def examples(self) -> Iterator[tuple[Tensor, ...]]:
        """Yield inputs that the capture has not seen."""
        for batch in self.batches:
            yield self.network.inputs(batch, seed=10 + batch)


@pytest.fixture(scope="module", params=sorted(NETWORKS))
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


@pytest.mark.parametrize("side", SIDES)
def test_pruned_program_equals_the_masked_one(case: Case, side: str) -> None:
    for amount in AMOUNTS:
        masked, result = case.pruned(side, amount)
        verify(result)
        smaller = result.parameter_count <= case.program.parameter_count
        assert smaller or case.name in UNTIED
        for x in case.examples():
            assert relative_error(result(*x), masked(*x)) <= EXACT


@pytest.mark.parametrize("side", SIDES)
def test_masked_program_is_the_masked_network(case: Case, side: str) -> None:
    """The plan's own reference agrees with one that shares no code with narrows."""
    for amount in AMOUNTS:
        masked, _ = case.pruned(side, amount)
        keeps = random_masks(case.program, amount, side)
        reference = masked_module(case.module, *keeps, case.network.inputs())
        with torch.no_grad():
            for x in case.examples():
                assert relative_error(masked(*x), reference(*x)) <= EXACT


def test_capture_computes_what_the_module_does(case: Case) -> None:
    """And the network hides no mistake: its outputs are finite and depend on its inputs."""
    verify(case.program)
    with torch.no_grad():
        for x in case.examples():
            assert relative_error(case.program(*x), case.module(*x)) <= EXACT
        one, two = (tensors(case.module(*case.network.inputs(seed=s))) for s in (1, 2))
    assert all(bool(t.isfinite().all()) for t in one)
    assert all(relative_error(a, b) > 0.01 for a, b in zip(one, two, strict=True))


def test_masks_save_parameters(case: Case) -> None:
    """Exactness alone is cheap: nothing removed is exact, too."""
    _, result = case.pruned("both", 0.6)
    shrank = result.parameter_count < case.program.parameter_count
    assert shrank or case.name in KEPT_WHOLE


@pytest.mark.parametrize("side", SIDES)
def test_pruning_again_changes_nothing(case: Case, side: str) -> None:
    _, result = case.pruned(side, 0.6)
    again = PruneChannels().run(result)
    assert not again.changed
    assert again.program is result


def test_what_stays_has_a_use_or_a_reason(case: Case) -> None:
    """Each channel of the result varies and moves the output, or a note says why it stays."""
    _, result = case.pruned("both", 0.6)
    idle = idle_channels(result, case.network.inputs(6 if result.dynamic_batch else 2, seed=3))
    assert {n.name: c for n, c in idle.items() if not reasons_after(result, n)} == {}


def test_the_oracle_sees_idle_channels() -> None:
    """A network with a dead channel is caught: the test above can fail."""
    network = NETWORKS["residual_plain"]
    module = network.build()
    with torch.no_grad():
        module.head.weight[:, 2] = 0  # type: ignore[union-attr,operator,index]
    idle = idle_channels(narrows.capture(module, network.inputs()), network.inputs())
    assert {n.name: c for n, c in idle.items()} == {"feature_second_0": [2]}


# ------------------------------------------------------------------ the experiment


def idle_channels(program: Program, inputs: tuple[Tensor, ...]) -> dict[fx.Node, list[int]]:
    """Return, per contraction, the output channels that a rewrite could have removed.

    Found by experiment: adding noise to one channel of the operator's result leaves the outputs
    alone, or the channel has one value for all samples and positions.
    """
    values: dict[fx.Node, Tensor] = {}

    def observe(node: fx.Node, value: object) -> None:
        if isinstance(value, Tensor):
            values[node] = value

    with torch.no_grad():
        base = program.run_flat(inputs, observe=observe)
    idle: dict[fx.Node, list[int]] = {}
    for node in program.graph.nodes:
        if contraction(program, node) is None:
            continue
        axis = 1 if "conv" in str(node.target) else values[node].dim() - 1
        for channel in range(values[node].shape[axis]):
            part = values[node].select(axis, channel)
            constant = float(part.max() - part.min()) <= EXACT * float(part.abs().max())
            if constant or not moves(program, inputs, base, node, axis, channel):
                idle.setdefault(node, []).append(channel)
    return idle


def moves(
    program: Program,
    inputs: tuple[Tensor, ...],
    base: list[Tensor],
    changed: fx.Node,
    axis: int,
    channel: int,
) -> bool:
    """Whether another value of one channel of ``changed`` changes an output."""
    generator = torch.Generator().manual_seed(channel)

    def call(node: fx.Node, args: tuple, kwargs: dict) -> object:
        value = node.target(*args, **kwargs)  # type: ignore[operator]
        if node is changed:
            value = value.clone()
            part = value.select(axis, channel)
            part.add_(3 * torch.randn(part.shape, generator=generator, dtype=part.dtype))
        return value

    with torch.no_grad():
        result = interpret(program.graph, inputs, program.weights, call=call)
    return any(not torch.equal(a, b) for a, b in zip(result, base, strict=True))


def reasons_after(program: Program, start: fx.Node) -> set[str]:
    """Return the reasons noted at ``start``, up to the next contractions, and where one is fed.

    A constant that cannot be folded, or a layer that would have no input, keeps a path from the
    inputs on which nothing varies; so those reasons count wherever they lie downstream.
    """
    notes: dict[str, set[str]] = {}
    for note in program.notes:
        notes.setdefault(note.where, set()).add(note.reason)
    found = set(notes.get(start.name, ()))
    seen, queue = {start}, [(start, True)]
    while queue:
        node, near = queue.pop()
        for user in node.users:
            reasons = notes.get(user.name, set())
            found |= reasons if near else reasons & CARRIERS
            if user not in seen:
                seen.add(user)
                queue.append((user, near and contraction(program, user) is None))
    return found


def tensors(result: object) -> list[Tensor]:
    """Return the tensors of a nested result."""
    return [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
