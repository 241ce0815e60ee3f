"""Random networks with random masks: whatever is drawn, the pruned program equals the masked one.

The examples are the same on every run, and are small enough to be read as they are.
`NARROWS_EXAMPLES=2000` searches further with fresh ones, and shrinks what it finds.
"""

from __future__ import annotations

import torch
from hypothesis import example, given, reject
from hypothesis import strategies as st

import narrows
from narrows.backends import costs_of
from narrows.errors import PlanError
from narrows.ir.compare import relative_error
from narrows.ir.costs import Costs
from narrows.ir.program import Program
from narrows.ir.verify import verify
from narrows.passes.base import TOLERANCE, Fidelity
from narrows.passes.pipeline import Pipeline
from narrows.passes.plans.plan import ChannelPlan
from narrows.passes.prune_channels import PruneChannels
from tests.networks import draw_masks, randomise
from tests.networks.generated import Generated, Size, Step, bounded, heads, kinds, sizes, steps
from tests.networks.reference import masked_module
from tests.passes.test_forms import costs

EXACT = TOLERANCE[Fidelity.EXACT][torch.float64]
NOTHING_TO_REMOVE = ("removes no channel", "no channel can be removed")
seeds = st.integers(0, 99)
tables = st.builds(costs, st.sampled_from((1e-6, 1.0, 1e3)), st.sampled_from((1, 4, 16)))


def images(batch: int, seed: int, size: Size = (8, 8)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, *size, generator=generator, dtype=torch.float64)


def built(drawn: list[Step], head: str, seed: int, size: Size = (8, 8)) -> Generated:
    torch.manual_seed(seed)
    module = Generated(drawn, head).double()
    randomise(module, seed, (images(4, seed, size),))
    return module


def planned(program: Program, kind: str, seed: int) -> ChannelPlan:
    inputs, outputs = draw_masks(program, kind, seed)
    return narrows.plan(program, keep_inputs=inputs, keep_outputs=outputs, zeros=False)


@bounded(12)
@given(steps, heads, kinds, seeds, sizes)
def test_pruned_equals_masked(
    drawn: list[Step], head: str, kind: str, seed: int, size: Size
) -> None:
    module = built(drawn, head, seed, size)
    program = narrows.capture(module, (images(2, 0, size),))
    plan = planned(program, kind, seed)
    masked, result = plan.masked(program), narrows.apply(program, plan)
    verify(result)
    assert result.parameter_count <= program.parameter_count
    reference = masked_module(module, plan.inputs, plan.outputs, (images(2, 0, size),))
    for batch in (2, 3):
        x = images(batch, batch, size)
        assert relative_error(result(x), masked(x)) <= EXACT
        with torch.no_grad():
            assert relative_error(masked(x), reference(x)) <= EXACT
    assert not PruneChannels().run(result).changed


@bounded(12)
@given(steps, heads, kinds, seeds, tables)
def test_the_form_for_any_costs_equals_masked(
    drawn: list[Step], head: str, kind: str, seed: int, table: Costs
) -> None:
    """Whatever copies and widths cost: wider reads, added channels, producers made twice."""
    program = narrows.capture(built(drawn, head, seed), (images(2, 0),))
    plan = planned(program, kind, seed)
    result = Pipeline.default(plan, table).run(program).program
    verify(result)
    x = images(3, 3)
    assert relative_error(result(x), plan.masked(program)(x)) <= EXACT


@bounded(8)
@given(steps, heads, kinds, seeds)
def test_plans_survive_the_round_trip(
    tmp_path_factory, drawn: list[Step], head: str, kind: str, seed: int
) -> None:
    program = narrows.capture(built(drawn, head, seed), (images(2, 0),))
    plan = planned(program, kind, seed)
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    plan.save(path)
    assert ChannelPlan.load(path) == plan


@bounded(12)
@given(steps, heads, kinds, seeds, st.sampled_from(("onnx", "torch")))
def test_the_form_for_a_target_equals_masked(
    drawn: list[Step], head: str, kind: str, seed: int, target: str
) -> None:
    """Made in float32, whose costs the shipped tables have, and compared in float64."""
    program = narrows.capture(built(drawn, head, seed).float(), (images(2, 0).float(),))
    plan = planned(program, kind, seed)
    result = Pipeline.default(plan, costs_of(target)).run(program).program
    verify(result)
    x = images(3, 3)
    found, wanted = (p.to(torch.float64)(x) for p in (result, plan.masked(program)))
    assert relative_error(found, wanted) <= TOLERANCE[Fidelity.EXACT][torch.float32]


@bounded(12)
@given(steps, heads, st.sampled_from((0.25, 0.5, 0.75)), st.booleans())
@example(  # a sum of channels on two axes, one operand in another order than before
    [("pixel", 0, 0), ("shuffle", 0, 0), ("attention", 0, 0), ("concat", 0, 0)],
    "pooled",
    0.5,
    False,
)
def test_criteria_give_exact_plans(
    drawn: list[Step], head: str, ratio: float, constrained: bool
) -> None:
    program = narrows.capture(built(drawn, head, 1), (images(2, 0),))
    try:
        plan = narrows.plan(program, criterion="l1", ratio=ratio, constrained=constrained)
    except PlanError as refused:
        if not any(text in str(refused) for text in NOTHING_TO_REMOVE):
            raise
        reject()  # the network is too narrow, and says so
    masked, result = plan.masked(program), narrows.apply(program, plan)
    verify(result)
    x = images(3, 5)
    assert relative_error(result(x), masked(x)) <= EXACT


@bounded(12)
@given(steps, heads, seeds)
def test_zeros_in_the_weights_are_found(drawn: list[Step], head: str, seed: int) -> None:
    """A model that another pruner zeroed shrinks without any plan, and computes the same."""
    module = built(drawn, head, seed)
    chooser = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
                drop = torch.rand(layer.weight.shape[1], generator=chooser) < 0.5
                layer.weight[:, drop] = 0
    program = narrows.capture(module, (images(2, 0),))
    result = narrows.apply(program, narrows.plan(program))
    verify(result)
    x = images(3, seed)
    assert relative_error(result(x), program(x)) <= EXACT
