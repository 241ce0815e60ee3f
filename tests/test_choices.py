"""Any form that a rewrite may choose equals the masked program.

Each one-feature network is pruned with random masks and then emitted in random forms: tensors that
hold more than is needed, layers that read channels with zero weights, and then reordered.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

import narrows
from narrows.ir.channels import analyse
from narrows.ir.choices import Choices
from narrows.ir.compare import relative_error
from narrows.ir.labels import Value
from narrows.ir.liveness import Demand
from narrows.ir.ops import table
from narrows.ir.program import Program, Pruning
from narrows.ir.rewrite import everything, facts_of
from narrows.ir.structure.spaces import spaces_of
from narrows.ir.verify import verify
from narrows.passes.base import TOLERANCE, Fidelity
from narrows.passes.forms.splitting import Split, can_split, taken_apart
from narrows.passes.prune_channels import PruneChannels
from narrows.passes.pruning.form import emit
from narrows.passes.pruning.stages import order
from tests.networks import NETWORKS, random_masks

EXACT = TOLERANCE[Fidelity.EXACT][torch.float64]


@functools.cache
def captured(name: str) -> Program:
    network = NETWORKS[name]
    return narrows.capture(network.build(), network.inputs())


def random_choices(pruning: Pruning, seed: int) -> Choices:
    """Return choices that no cost would suggest: a third of what is free to choose."""
    draw = np.random.default_rng(seed)
    facts = analyse(pruning.program, pruning.ignored)
    demand = Demand(facts)
    forced, columns = {}, {}
    for node, flow in facts.flows.items():
        if not isinstance(flow.value, Value) or flow.value.free or not demand.alive(node):
            continue
        count = flow.value.count
        if draw.random() < 0.3:
            forced[node.name] = draw.random(count) < 0.4
        c = table.contraction(facts, node)
        if c is not None and isinstance(flow.facts, tuple) and draw.random() < 0.3:
            columns[node.name] = draw.random(c.inputs) < 0.4
    return Choices(forced, columns)


def split_everywhere(pruning: Pruning) -> Pruning:
    """Return a pruning whose program makes every producer that allows it once per reader."""
    facts = facts_of(pruning)
    spaces = (s for s in spaces_of(facts, Demand(facts), even=True) if can_split(facts, s))
    return taken_apart(pruning, [Split(s, tuple((r,) for r in s.readers)) for s in spaces])


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_every_form_is_exact(name: str) -> None:
    network, program = NETWORKS[name], captured(name)
    inputs, outputs = random_masks(program, 0.5, "both")
    plan = narrows.plan(program, keep_inputs=inputs, keep_outputs=outputs, zeros=False)
    masked, pruned = plan.masked(program), PruneChannels(plan).run(program).program
    x = network.inputs(5 if program.dynamic_batch else 2, seed=10)
    pruning = pruned.pruning or Pruning(program)
    drawn = (random_choices(pruning, seed) for seed in (0, 1))
    chosen = (everything(facts_of(pruning)), *drawn)
    for form in (*map(pruning.choose, chosen), split_everywhere(pruning)):
        result: Program = emit(form)
        verify(result)
        assert relative_error(result(*x), masked(*x)) <= EXACT
        ordered = emit(order(form).pruning)
        verify(ordered)
        assert relative_error(ordered(*x), masked(*x)) <= EXACT


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_the_form_for_a_target_is_exact(name: str) -> None:
    network, program = NETWORKS[name], captured(name)
    for amount in (0.3, 0.7):
        inputs, outputs = random_masks(program, amount, "both")
        plan = narrows.plan(program, keep_inputs=inputs, keep_outputs=outputs, zeros=False)
        result = narrows.apply(program, plan, target="onnx")
        verify(result)
        x = network.inputs(5 if program.dynamic_batch else 2, seed=10)
        assert relative_error(result(*x), plan.masked(program)(*x)) <= EXACT
