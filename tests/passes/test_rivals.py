"""The forms that a search begins with and ends in: exact, and never behind one of them."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import narrows
from narrows.backends import costs_of
from narrows.errors import UsageError
from narrows.ir.choices import Choices
from narrows.ir.compare import relative_error
from narrows.ir.costs import Costs
from narrows.ir.meta import Meta, shape_of
from narrows.ir.program import Program, Pruning
from narrows.ir.rewrite import demand_of, facts_of
from narrows.passes.base import TOLERANCE, Fidelity
from narrows.passes.forms.common import common
from narrows.passes.forms.mixing import Account, Mixture
from narrows.passes.forms.sketch import sketched
from narrows.passes.legalize_reads import LegalizeReads
from narrows.passes.prune_channels import PruneChannels
from narrows.passes.pruning.form import emit
from narrows.passes.pruning.rivals import SMALLEST, UNPRUNED, rivals
from narrows.passes.pruning.stages import prune

EXACT = TOLERANCE[Fidelity.EXACT][torch.float64]
# A sketch counts a split as one operator, where its form has a slice for every part.
SKETCHED = 0.05
pytestmark = pytest.mark.usefixtures("shipped_costs")


class Mixed(nn.Module):
    """Inverted bottlenecks whose depthwise convolutions have windows of two sizes."""

    def __init__(self, blocks: int = 2, gated: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, 2, 1)
        self.up, self.down = (
            nn.ModuleList(nn.Conv2d(a, b, 1) for _ in range(blocks))
            for a, b in ((64, 192), (192, 64))
        )
        self.small, self.large = (
            nn.ModuleList(nn.Conv2d(96, 96, k, 1, k // 2, groups=96) for _ in range(blocks))
            for k in (3, 5)
        )
        self.gates = nn.ModuleList(nn.Conv2d(192, 192, 1) for _ in range(blocks if gated else 0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        gates = itertools.chain(self.gates, itertools.repeat(None))
        for up, small, large, down, gate in zip(
            self.up, self.small, self.large, self.down, gates, strict=False
        ):
            a, b = up(x).relu().split(96, 1)
            y = torch.cat([small(a), large(b)], 1).relu()
            if gate is not None:
                y = y * gate(y.mean((2, 3), keepdim=True)).sigmoid()
            x = x + down(y)
        return x


class Ghosts(nn.Module):
    """Half of a layer's channels are made of the other half, and a stream is shortened."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.tip = nn.Conv2d(3, 32, 3, 2, 1), nn.Conv2d(64, 24, 1)
        self.first, self.second = nn.Conv2d(32, 32, 1), nn.Conv2d(64, 16, 1)
        self.cheap = nn.Conv2d(32, 32, 3, 1, 1, groups=32)
        self.again = nn.Conv2d(16, 16, 3, 1, 1, groups=16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        a = self.first(x).relu()
        y = self.second(torch.cat([a, self.cheap(a).relu()], 1))
        x = x + torch.cat([y, self.again(y)], 1)
        return self.tip(torch.cat([x, x.roll(1, 1)], 1))


class Dense(nn.Module):
    """Layers that read everything that was made before them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, 1, 1)
        self.layers = nn.ModuleList(nn.Conv2d(32 + 16 * i, 16, 3, 1, 1) for i in range(3))
        self.head = nn.Conv2d(80, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for layer in self.layers:
            x = torch.cat([x, layer(x).relu()], 1)
        return self.head(nn.functional.avg_pool2d(x, 2))


NETS = {
    "mixed": Mixed, "gated": lambda: Mixed(1, gated=True), "ghosts": Ghosts, "dense": Dense,
}  # fmt: skip


@functools.cache
def case(name: str, amount: float = 0.5) -> tuple[Program, narrows.ChannelPlan]:
    """Return a network, and a plan without so large a share of every dense layer's inputs."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    net = NETS[name]().double().eval()
    program = narrows.capture(net, (x,), name=name)
    keep = {}
    for path, layer in net.named_modules():
        if isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.in_channels > 3:
            order = layer.weight.detach().abs().sum((0, 2, 3)).argsort(descending=True)
            keep[f"{path}.weight"] = sorted(order[int(amount * len(order)) :].tolist())
    return program, narrows.plan(program, keep_inputs=keep, zeros=False)


@functools.cache
def pruned(name: str, amount: float = 0.5) -> Pruning:
    return prune(*case(name, amount)).pruning


def seconds(costs: Costs, program: Program) -> float:
    return sum(s for _, s in costs.predict(program, 1))


def costs() -> Costs:
    found = costs_of("onnx")
    assert found is not None
    return found


@pytest.mark.parametrize(("name", "fill"), [*((n, False) for n in NETS), ("dense", True)])
def test_every_form_is_exact_and_none_is_ahead_of_the_first(name: str, fill: bool) -> None:
    program, plan = case(name)
    found = rivals(pruned(name), costs(), fill=fill)
    expected = plan.masked(program)(*program.examples)
    assert {SMALLEST, UNPRUNED, "common", "chosen"} <= {r.name for r in found}
    for rival in found:
        for pruning in (rival.pruning, rival.whole):
            assert relative_error(emit(pruning)(*program.examples), expected) <= EXACT, rival.name
        assert rival.seconds == pytest.approx(seconds(costs(), emit(rival.whole)), rel=SKETCHED)
        assert found[0].seconds <= rival.seconds * (1 + 1e-8)


@pytest.mark.parametrize("amount", [0.3, 0.5, 0.7])
def test_windows_of_several_sizes_are_pruned(amount: float) -> None:
    """Where channels are split, half of them are gone from each part, by whole blocks."""
    found = {r.name: r for r in rivals(pruned("mixed", amount), costs())}
    best = next(iter(found.values()))
    assert best.name not in (SMALLEST, UNPRUNED)
    assert best.seconds < 0.9 * min(found[n].seconds for n in (SMALLEST, UNPRUNED))
    assert best.seconds <= found["common-16"].seconds
    for node in emit(found["common-16"].whole).graph.nodes:
        if node.name.startswith(("small", "large")) and "conv2d" in str(node.target):
            assert shape_of(node)[1] % 16 == 0


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("step", [1, 16])
def test_a_sketch_has_the_widths_and_the_costs_of_its_form(name: str, step: int) -> None:
    pruning = pruned(name)
    facts, demand = facts_of(pruning), demand_of(pruning.choose(Choices()))
    choices = common(facts, demand, step)
    sketch, form = sketched(facts, choices), emit(pruning.choose(choices))
    shapes = {n.name: shape_of(n) for n in form.graph.nodes}
    drawn = {n.name: shape_of(n) for n in sketch.graph.nodes if n.op == "call_function"}
    assert {n: s for n, s in drawn.items() if n in shapes} == {
        n: shapes[n] for n in drawn if n in shapes
    }
    assert seconds(costs(), sketch) == pytest.approx(seconds(costs(), form), rel=SKETCHED)


def test_the_common_mask_copies_nothing_and_keeps_what_any_reader_reads() -> None:
    plan, pruning = case("dense")[1], pruned("dense")
    choices = common(facts_of(pruning), demand_of(pruning.choose(Choices())))
    form = emit(pruning.choose(choices))
    kinds = [str(n.target) for n in form.graph.nodes]
    assert not [k for k in kinds if "index_select" in k or "slice" in k]
    read = [set(plan.inputs[f"layers.{i}.weight"]) for i in range(3)]
    stem = set().union(*read, plan.inputs["head.weight"]) & {*range(32)}
    assert shape_of(form.node("stem"))[1] == len(stem)


def test_of_channels_that_stay_those_come_first_that_weigh_most() -> None:
    pruning = pruned("dense", 0.9)
    facts, demand = facts_of(pruning), demand_of(pruning.choose(Choices()))
    node = next(n for n in facts.flows if n.name == "layers_2")
    least = common(facts, demand).forced[node.name]
    first, heavy = (common(facts, demand, 16, fill=f).forced[node.name] for f in (False, True))
    assert first.sum() == heavy.sum() == 16 or least.sum() == first.sum()
    reader = pruning.program.weights["head.weight"].abs().sum((0, 2, 3)).numpy()[-16:]
    assert reader[heavy].sum() >= reader[first].sum()
    assert not np.any(least & ~heavy)


def test_a_form_is_taken_by_its_name() -> None:
    program, plan = case("mixed")
    start = PruneChannels(plan).run(program).program
    table = costs()
    for name in ("common-8", "common-16", UNPRUNED, SMALLEST):
        result = LegalizeReads(table, form=name).run(start)
        widths = [Meta(n).shape[1] for n in result.program.graph.nodes if n.name == "up_0"]
        assert widths == [{"unpruned": 192}.get(name, widths[0])]
        assert name not in (UNPRUNED, SMALLEST) or name in result.notes[0].message
    with pytest.raises(UsageError, match="there is no form 'comon-16' of mixed") as caught:
        LegalizeReads(table, form="comon-16").run(start)
    assert "did you mean 'common-16'" in str(caught.value)


def test_every_part_has_the_form_that_is_cheapest_there() -> None:
    """By accounts in which the stream is dear in one form, and all else in the other."""
    program, plan = case("mixed")
    pruning, table = pruned("mixed"), costs()
    found = {r.name: r.whole for r in rivals(pruning, table)}
    forms = {n: found[n] for n in (SMALLEST, "common-8")}
    family = Mixture(facts_of(pruning), table, {}).family
    stream = [n for n, of in family.items() if of == family["stem"]]
    accounts = {}
    for name, form in forms.items():
        made = emit(form)
        dear = [(op, (op.node in stream) == (name == SMALLEST)) for op in table.account(made, 1)]
        paid = [replace(op, seconds=float(is_dear), layout=0.0) for op, is_dear in dear]
        accounts[name] = Account(made, paid)
    mixture = Mixture(facts_of(pruning), table, accounts)
    for start in forms:
        chosen = mixture.run(start)
        assert chosen[mixture.family["up_0"]] == SMALLEST
        assert chosen[mixture.family["stem"]] == "common-8"
    made = emit(pruning.choose(mixture.choices(chosen, {n: f.choices for n, f in forms.items()})))
    expected = plan.masked(program)(*program.examples)
    assert relative_error(made(*program.examples), expected) <= EXACT
    wide = emit(forms["common-8"])
    assert shape_of(made.node("stem")) == shape_of(wide.node("stem"))
    assert shape_of(made.node("up_0")) == shape_of(emit(forms[SMALLEST]).node("up_0"))
    assert shape_of(made.node("up_0")) != shape_of(wide.node("up_0"))
