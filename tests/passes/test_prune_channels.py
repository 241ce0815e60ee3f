"""prune-channels as a pass: what it promises, and what it says."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import narrows
from narrows.errors import PassError, PlanError
from narrows.ir.compare import relative_error
from narrows.ir.program import Program
from narrows.ir.verify import verify
from narrows.passes.base import TOLERANCE, Fidelity, PassResult
from narrows.passes.fold_batch_norm import FoldBatchNorm
from narrows.passes.instruments import Promises, Verify
from narrows.passes.pipeline import Pipeline
from narrows.passes.plans.plan import ChannelPlan
from narrows.passes.prune_channels import PruneChannels
from tests.networks import NETWORKS, random_masks

EXACT = TOLERANCE[Fidelity.EXACT][torch.float64]
SAMPLES = ["residual_plain", "grouped_conv", "constant_sigmoid", "view_linear", "group_norm"]


def captured(name: str) -> Program:
    network = NETWORKS[name]
    return narrows.capture(network.build(), network.inputs())


def run(program: Program, plan: ChannelPlan | None = None) -> PassResult:
    """Run the pass, held to its promises, and compare it with its reference."""
    watch, pass_ = Promises(), PruneChannels(plan)
    watch.before(pass_, program)
    result = pass_.run(program)
    watch.after(pass_, program, result, 0.0)
    verify(result.program)
    expected = pass_.reference(program).run_flat(program.examples)
    assert relative_error(result.program.run_flat(program.examples), expected) <= EXACT
    return result


@pytest.mark.parametrize("name", SAMPLES)
def test_a_pass_that_keeps_its_promises(name: str) -> None:
    program = captured(name)
    plan = narrows.plan(program, *random_masks(program, 0.5, "both"), zeros=False)
    result = run(program, plan)
    assert result.changed
    assert result.program.parameter_count < program.parameter_count
    assert result.program.notes == program.notes  # the pipeline adds them


@pytest.mark.parametrize("name", SAMPLES)
def test_running_twice_changes_nothing_more(name: str) -> None:
    program = captured(name)
    plan = narrows.plan(program, *random_masks(program, 0.5, "both"), zeros=False)
    once = run(program, plan).program
    again = run(once)
    assert not again.changed
    assert again.program is once
    assert again.notes[-1].reason == "idle"


@pytest.mark.parametrize(
    "name", ["residual_plain", "view_linear", "norm_without_affine", "qkv_by_hand"]
)
def test_without_a_plan_a_dense_network_stays(name: str) -> None:
    program = captured(name)
    result = run(program)
    assert not result.changed
    assert result.program is program
    assert result.notes[-1].message == "no channel is masked, dead or constant"


def test_without_a_plan_dead_channels_go() -> None:
    program = captured("residual_plain")
    weight = program.weights["head.weight"].clone()
    weight[:, :2] = 0
    program = program.with_weights({**program.weights, "head.weight": weight})
    result = run(program)
    assert result.changed
    assert result.program.weights["head.weight"].shape[1] == weight.shape[1] - 2


def test_a_mask_that_removes_no_channel_is_a_change() -> None:
    """Outputs of the model stay, but they are zero now."""
    module = nn.Sequential(nn.Conv2d(3, 4, 1)).double().eval()
    program = narrows.capture(module, (torch.randn(2, 3, 4, 4).double(),))
    plan = narrows.plan(program, keep_outputs={"0.weight": [0, 1]}, zeros=False)
    result = run(program, plan)
    assert result.changed
    assert result.program.weights["0.weight"].shape == (4, 3, 1, 1)
    (note,) = [n for n in result.notes if n.channels]
    assert (note.reason, note.channels) == ("output", 2)


def test_notes_count_what_the_plan_masks() -> None:
    program = captured("residual_plain")
    weight = program.weights["head.weight"].clone()
    weight[:, :2] = 0
    program = program.with_weights({**program.weights, "head.weight": weight})
    plan = narrows.plan(program, keep_outputs={"stem.0.weight": range(1, 8)})
    result = run(program, plan)
    messages = [n.message for n in result.notes if n.reason == "plan"]
    assert messages == ["the plan masks 3 channels: given 1, zeros 2"]


def test_a_plan_from_before_another_pass_fits_and_is_noted() -> None:
    program = captured("residual_plain")
    plan = narrows.plan(program, ratio=0.5)
    folded = FoldBatchNorm().run(program).program
    result = run(folded, plan)
    assert any("before other rewrites" in n.message for n in result.notes)
    assert result.program.parameter_count < folded.parameter_count


def test_the_plan_may_be_a_path(tmp_path: Path) -> None:
    program = captured("residual_plain")
    plan = narrows.plan(program, ratio=0.5)
    path = plan.save(tmp_path / "p.json")
    for given in (path, str(path)):
        by_path = PruneChannels(given)
        assert by_path == Pipeline.parse(str(Pipeline((by_path,)))).passes[0] or given is path
        result = by_path.run(program).program
        assert str(result) == str(PruneChannels(plan).run(program).program)
    pipeline = Pipeline.parse(f"prune-channels{{plan={path}}}")
    done = pipeline.run(program, [Verify()])
    assert done.program.history == (f"prune-channels{{plan={path}}}",)


def test_plans_that_are_none() -> None:
    program = captured("residual_plain")
    with pytest.raises(PlanError, match=r"cannot read the plan none\.json"):
        PruneChannels("none.json").run(program)
    with pytest.raises(PassError, match="takes a plan or its path, got dict"):
        PruneChannels({"ratio": 0.5}).run(program)  # type: ignore[arg-type]


def test_masks_by_product_go_with_the_channels_that_they_zero() -> None:
    program = captured("shuffle_block")
    plan = narrows.plan(program, *random_masks(program, 0.5, "output"), zeros=False)

    def masks(made: Program) -> list[Tensor]:
        own = made.weights.keys() - program.weights.keys()
        return [made.weights[name] for name in own if name.endswith("_mask")]

    before, after = masks(plan.masked(program)), masks(run(program, plan).program)
    assert 0 < len(after) < len(before)
    assert not any(bool(mask.all()) for mask in after)


class Turned(nn.Module):
    """Two halves put in another order, for readers that can do without and one that cannot."""

    def __init__(self, head: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1)
        self.order = torch.tensor([3, 0, 11, 7, 2, 9, 1, 10, 4, 6, 8, 5])
        self.head, self.other = head, other

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([self.one(x).relu(), self.two(x).relu()], 1)
        turned = both.index_select(1, self.order)
        return self.head(turned), self.other(turned)


@pytest.mark.parametrize(
    ("head", "other", "left"),
    [
        (nn.Conv2d(12, 4, 1), nn.Conv2d(12, 5, 3, padding=1), 0),
        (nn.Conv2d(12, 4, 1), nn.Conv2d(12, 12, 3, groups=12), 1),
        (nn.Conv2d(12, 4, 1), nn.ReLU(), 1),
    ],
)  # fmt: skip
def test_an_order_goes_into_the_columns_of_its_readers(
    head: nn.Module, other: nn.Module, left: int
) -> None:
    network = Turned(head, other).double().eval()
    program = narrows.capture(network, (torch.randn(2, 3, 5, 5, dtype=torch.float64),))
    made = run(program).program
    copies = [n for n in made.nodes if n.name == "index_select"]
    assert len(copies) == left
    assert all(len(copy.users) == 1 for copy in copies)
    outputs = {"one.weight": (0, 3, 4), "two.weight": (1, 2)}
    run(program, narrows.plan(program, None, outputs, zeros=False))


class Ones(nn.Module):
    """Products with ones: that of an output, one that a checkpoint holds, one of the code."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("held", torch.ones(4))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        ones = torch.ones(4)
        return x * ones, self.layer(x * self.held), self.layer(x * ones)


def test_only_products_that_do_nothing_and_nobody_can_change_go() -> None:
    program = narrows.capture(Ones().eval(), (torch.randn(2, 4),))
    result = run(program, ChannelPlan()).program
    assert sum("mul" in str(n.target) for n in result.nodes) == 2
    assert result.output.all_input_nodes[0].op == "call_function"  # no output is an input
    assert "held" in result.weights


class KeysWithHeads(nn.Module):
    """Attention in which queries and values have one head, and keys have four."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 6), nn.Linear(8, 24), nn.Linear(8, 6)
        self.o = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        keys = self.k(x).view(b, n, 4, 6).transpose(1, 2)
        one, other = self.q(x)[:, None], self.v(x)[:, None]
        y = F.scaled_dot_product_attention(one, keys, other)
        return self.o(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("seed", range(6))
def test_keys_alone_have_heads(seed: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    program = narrows.capture(KeysWithHeads().eval().double(), x)
    inputs, outputs = random_masks(program, 0.5, "both", seed)
    plan = narrows.plan(program, keep_inputs=inputs, keep_outputs=outputs)
    assert relative_error(narrows.apply(program, plan)(x), plan.masked(program)(x)) <= EXACT


@pytest.mark.parametrize("name", ["meeting_interleave", "meeting_index", "meeting_stack"])
def test_what_meets_again_is_cut_to_what_is_read(name: str) -> None:
    """Not left as it was, with all of the parameters that make it."""
    program = captured(name)
    masks, _ = random_masks(program, 0.6, "input")
    pruned = narrows.apply(program, narrows.plan(program, keep_inputs=masks, zeros=False))
    assert (pruned.parameter_count, program.parameter_count) == (40, 153)


LAYERS = {
    "dense": nn.Conv2d(4, 4, 3, padding=1),
    "grouped": nn.Conv2d(4, 6, 3, padding=1, groups=2),
    "depthwise": nn.Conv2d(4, 8, 3, padding=1, groups=4),
    "transposed": nn.ConvTranspose2d(4, 4, 2),
    "grouped transposed": nn.ConvTranspose2d(4, 6, 2, groups=2),
    "linear": nn.Linear(4, 5),
}


@pytest.mark.parametrize("lost", [(0,), (0, 3), (1, 2, 3)])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_behind_a_barrier_ignores_what_its_mask_says(
    name: str, lost: tuple[int, ...]
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.layer = nn.Conv2d(3, 4, 3, padding=1), copy.deepcopy(LAYERS[name])
            self.last = nn.LazyConv2d(3, 1)  # folds what a layer makes of nothing

        def forward(self, x: Tensor) -> Tensor:
            before = torch.cummax(self.first(x), 1).values  # all channels stay
            return self.last(self.layer(before))

    net, image = Net(), torch.randn(2, 3, 4, 4)
    net(image)
    program = narrows.capture(net.double().eval(), (image.double(),))
    kept = [c for c in range(4) if c not in lost]
    plan = narrows.plan(program, keep_inputs={"layer.weight": kept}, zeros=False)
    assert plan.inputs
    run(program, plan)


def test_an_index_that_only_fills_a_place_stays_an_index() -> None:
    """Groups are made equally wide with channels nobody reads; an index of those is still one."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.values, self.before = nn.Conv2d(1, 8, 1), nn.Conv2d(1, 8, 1, bias=False)
            self.where, self.last = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1, groups=2)
            nn.init.ones_(self.before.weight)
            # Each channel of its own input: from 2 to 0 with it, and 8 without.
            self.where.weight = nn.Parameter(-6.0 * torch.eye(8)[:, :, None, None])
            self.where.bias = nn.Parameter(torch.full((8,), 8.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.values(x).gather(3, self.where(self.before(x)).long()))

    image = 1 + torch.rand(2, 1, 4, 4).double() / 3
    program = narrows.capture(Net().double().eval(), (image,))
    plan = narrows.plan(program, keep_inputs={"last.weight": [0, 1, 2, 3, 5]}, zeros=False)
    run(program, plan)
