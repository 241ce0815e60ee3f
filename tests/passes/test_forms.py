"""Reads, widths and orders: each is chosen by costs that a test makes up, and stays exact."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import narrows
from narrows.backends.measured.grid import Grid
from narrows.backends.measured.layout import Layout
from narrows.backends.onnx.staircase import StairTable
from narrows.errors import PassError, UsageError
from narrows.ir.compare import relative_error
from narrows.ir.meta import Meta
from narrows.ir.program import Program
from narrows.passes.align_channels import AlignChannels
from narrows.passes.base import TOLERANCE, Fidelity
from narrows.passes.forms.order import consecutive
from narrows.passes.legalize_reads import LegalizeReads
from narrows.passes.pipeline import Pipeline
from narrows.passes.prune_channels import PruneChannels
from narrows.passes.pruning import stages
from narrows.passes.pruning.form import emit
from narrows.passes.pruning.stages import fastest, order, prune, reads
from narrows.passes.reorder_channels import ReorderChannels

EXACT = TOLERANCE[Fidelity.EXACT][torch.float64]
COPIES = {"aten.index_select.default", "aten.slice.Tensor"}


def costs(gather: float, block: int = 1) -> StairTable:
    """Return a table in which work takes time in proportion, and a gathered element ``gather``."""

    def linear(name: str, rate: float) -> Grid:
        return Grid(((name, (1.0, 1e6)),), np.array([rate, rate * 1e6]))

    def product(*names: str) -> Grid:
        us = np.ones([2] * len(names))
        for axis in range(len(names)):
            us = us * np.array([1.0, 1e3]).reshape([-1 if a == axis else 1 for a in range(us.ndim)])
        return Grid(tuple((n, (1.0, 1e3)) for n in names), us)

    conv = product("positions", "inputs", "outputs")
    grids = {f"{form} conv 3x3/1": conv for form in ("plain", "blocked", "direct")}
    grids |= {"gather": linear("elements", gather), "copy": linear("elements", 1e-3)}
    grids |= {n: linear("elements", 1e-3) for n in ("reorder in", "reorder out", "scale")}
    grids |= {"linear": product("rows", "inputs", "outputs"), "pointwise": grids["copy"]}
    layout = Layout(block, 1, 1, ("relu",), ("relu", "add"))
    return StairTable("made up", "1", "cpu", layout, 1e-9, grids)


class Fork(nn.Module):
    """One tensor of 20 channels that three convolutions read."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 20, 3, padding=1)
        self.heads = nn.ModuleList(nn.Conv2d(20, outputs, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.stem(x).relu()
        return tuple(head(x) for head in self.heads)


X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def fork(*keeps: set[int], outputs: int = 1) -> tuple[Program, narrows.ChannelPlan]:
    torch.manual_seed(0)
    program = narrows.capture(Fork(outputs).double().eval(), (X,))
    masks = {f"heads.{i}.weight": sorted(keep) for i, keep in enumerate(keeps)}
    return program, narrows.plan(program, keep_inputs=masks, zeros=False)


def run(program: Program, plan: narrows.ChannelPlan, *passes: object) -> Program:
    pruned = PruneChannels(plan).run(program).program
    for pass_ in passes:
        pruned = pass_.run(pruned).program  # type: ignore[attr-defined]
    assert relative_error(pruned(X), plan.masked(program)(X)) <= EXACT
    return pruned


def copies(program: Program) -> list[str]:
    return [n.name for n in program.graph.nodes if str(n.target) in COPIES]


def widths(program: Program) -> dict[str, int]:
    return {
        n.name: Meta(n).shape[1] for n in program.graph.nodes if "conv2d" in str(n.target)
    }  # fmt: skip


EVENS, LOW, HIGH = {*range(0, 20, 2)}, {*range(8)}, {*range(6, 16)}


def test_dear_copies_are_replaced_by_zero_weights() -> None:
    program, plan = fork(EVENS, LOW, HIGH)
    assert len(copies(run(program, plan))) == 3
    result = run(program, plan, LegalizeReads(costs(1e3)), AlignChannels())
    assert copies(result) == []
    assert widths(result)["stem"] == 18  # 17 and 19 are in no mask


def test_cheap_copies_stay() -> None:
    program, plan = fork(EVENS, LOW, HIGH)
    smallest = run(program, plan)
    result = run(program, plan, LegalizeReads(costs(1e-6)), AlignChannels())
    assert copies(result) == copies(smallest)
    assert result.parameter_count == smallest.parameter_count


@pytest.mark.parametrize(("pick", "read"), [(1e-6, 8), (1e3, 20)])
def test_channels_that_lie_last_are_picked_or_read(pick: float, read: int) -> None:
    """By the cost of picking them one by one, not by that of a gather of whole images."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 20), nn.LayerNorm(20), nn.Linear(20, 6), nn.GELU())
    program = narrows.capture(net.double().eval(), (X,))
    plan = narrows.plan(program, keep_inputs={"2.weight": range(8)}, zeros=False)
    table = costs(1e-6)
    table = replace(table, grids={**table.grids, "pick": table.grids["gather"].scaled(pick / 1e-6)})
    result = run(program, plan, LegalizeReads(table), AlignChannels())
    assert result.weights["2.weight"].shape[1] == read


def test_widths_meet_the_blocks() -> None:
    """16 live channels fill two blocks of 8, and 9 would be as dear as 16."""
    program, plan = fork(LOW, HIGH, {0, 15})
    result = run(program, plan, LegalizeReads(costs(1e3, block=8)), AlignChannels())
    assert widths(result)["stem"] == 16
    program, plan = fork(LOW, {0, 7}, {3})
    result = run(program, plan, LegalizeReads(costs(1e3, block=8)), AlignChannels())
    assert widths(result)["stem"] == 8


def test_notes_name_what_is_read_with_zero_weights() -> None:
    program, plan = fork(EVENS, LOW, HIGH)
    pruned = PruneChannels(plan).run(program).program
    found = LegalizeReads(costs(1e3)).run(pruned).notes
    notes = [n for n in found if n.reason != "costs"]
    assert {(n.where, n.channels) for n in notes} == {
        ("heads_0", 8),
        ("heads_1", 10),
        ("heads_2", 8),
    }
    assert all("zero weights" in n.message and n.source for n in notes)


def test_an_order_keeps_no_channel() -> None:
    program, plan = fork(EVENS, LOW, HIGH)
    notes = PruneChannels(plan, order=True).run(program).notes
    assert [n.channels for n in notes if n.reason == "order"] == [0]


def test_without_costs_or_a_pruned_program_nothing_happens() -> None:
    program, plan = fork(EVENS, LOW, HIGH)
    pruned = PruneChannels(plan).run(program).program
    for pass_, given, why in (
        (LegalizeReads(), pruned, "costs"),
        (LegalizeReads(costs(1.0)), program, "prune-channels"),
        (AlignChannels(), pruned, "legalize-reads"),
        (ReorderChannels(), program, "prune-channels"),
    ):
        result = pass_.run(given)
        assert result.program is given
        assert not result.changed
        assert why in result.notes[0].message


def test_any_other_change_ends_what_may_be_chosen() -> None:
    program, plan = fork(EVENS, LOW, HIGH)
    pruned = PruneChannels(plan).run(program).program
    assert program.pruning is None
    assert pruned.pruning is not None
    assert pruned.copy().pruning is None
    assert pruned.replace(weights=dict(pruned.weights)).pruning is None
    assert pruned.replace(name="other").pruning is pruned.pruning


def test_a_copy_does_not_hold_the_unpruned_program() -> None:
    program, plan = fork(EVENS, LOW, HIGH)
    pruned = PruneChannels(plan).run(program.replace(name="own")).program
    copied, drafted = copy.deepcopy(pruned), pruned.copy().seal()
    assert copied.pruning is drafted.pruning is None
    assert torch.equal(copied(X)[0], pruned(X)[0])
    assert pruned.pruning is not None
    unpruned = weakref.ref(pruned.pruning.program)
    again = narrows.plan(pruned, keep_inputs={"heads.0.weight": range(3)}, zeros=False)
    twice = PruneChannels(again).run(pruned).program
    assert twice.pruning is not None
    assert twice.pruning.program.pruning is None  # only the program of the last pruning is held
    del pruned
    gc.collect()
    assert unpruned() is None


def test_another_precision_keeps_what_may_be_chosen() -> None:
    program, plan = fork(EVENS, LOW, HIGH)
    read = run(program, plan, LegalizeReads(costs(1e3, block=8)))
    single = read.to(torch.float32)
    assert single.pruning is not None
    assert single.pruning.program.weights["stem.weight"].dtype is torch.float32
    assert LegalizeReads(costs(1e3, block=8)).run(single).notes  # it is known what it came from
    aligned, expected = (AlignChannels().run(p).program for p in (single, read))
    assert widths(aligned) == widths(expected)
    assert {t.dtype for t in aligned.weights.values()} == {torch.float32}


def test_passes_one_by_one_make_what_the_stages_make_together() -> None:
    table = costs(1e3, block=8)
    for keeps, outputs in (((EVENS, LOW, HIGH), 1), ((LOW, {0, 7}, {3}), 1), ((EVENS, LOW), 4)):
        program, plan = fork(*keeps, outputs=outputs)
        passes = (PruneChannels(plan), LegalizeReads(table), AlignChannels(), ReorderChannels())
        one = program
        for pass_ in passes:
            one = Pipeline([pass_]).run(one).program
        whole = Pipeline(passes).run(program).program
        together = emit(order(fastest(program, plan, table)).pruning)
        assert str(one) == str(whole)
        assert one.notes == whole.notes
        assert one.history == whole.history == tuple(map(str, passes))
        for made in (one, together):
            assert [(n.name, n.target, str(n.args)) for n in made.graph.nodes] == [
                (n.name, n.target, str(n.args)) for n in whole.graph.nodes
            ]
            assert made.weights.keys() == whole.weights.keys()
            assert all(torch.equal(w, whole.weights[n]) for n, w in made.weights.items())


def test_a_stage_takes_a_pruning_and_returns_another() -> None:
    program, plan = fork(EVENS, LOW, {0, 15})
    smallest = prune(program, plan).pruning
    read = reads(smallest, costs(1e3, block=8)).pruning
    wide = stages.widths(read).pruning
    assert smallest.wider is wide.wider is None
    assert not smallest.choices
    assert read.wider is not None
    assert emit(read) is emit(read)  # made once
    for form in map(emit, (smallest, read, wide)):
        assert form.pruning is None
        assert relative_error(form(X), plan.masked(program)(X)) <= EXACT
    assert emit(smallest).parameter_count < emit(wide).parameter_count


def test_costs_come_from_a_file_in_a_spelled_pipeline(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    replace(costs(1e3), name="onnxruntime").save(path)
    program, plan = fork(EVENS, LOW, HIGH)
    spelling = f"prune-channels, legalize-reads{{costs={path}}}, align-channels"
    pipeline = Pipeline.parse(spelling)
    assert str(pipeline) == spelling
    result = narrows.apply(program, plan, pipeline=pipeline)
    assert copies(result) == []


def test_wrong_costs_are_refused(tmp_path: Path) -> None:
    program, plan = fork(EVENS, LOW, HIGH)
    pruned = PruneChannels(plan).run(program).program
    with pytest.raises(PassError, match="takes a cost table or its path, got int"):
        LegalizeReads(3).run(pruned)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="cannot be read"):
        LegalizeReads(str(tmp_path / "none.json")).run(pruned)
    for name, why in (("onnxruntim", "did you mean 'onnxruntime'"), (3, "it has no name")):
        (tmp_path / "odd.json").write_text(json.dumps({"name": name}))
        with pytest.raises(UsageError, match=why):
            LegalizeReads(str(tmp_path / "odd.json")).run(pruned)
    with pytest.raises(UsageError, match="there is no target 'onyx'"):
        narrows.apply(program, plan, target="onyx")
    with pytest.raises(PassError, match="align-channels needs legalize-reads before it"):
        narrows.apply(program, plan, pipeline="prune-channels, align-channels")


# ---------------------------------------------------------------------- orders


def test_reads_become_intervals_wherever_one_order_serves_all() -> None:
    """On every three masks over 4 atoms, a gather is left only where no order serves all."""
    atoms = [{0, 5}, {1, 6, 11}, {2, 7}, {3, 8, 13}]
    some = [s for n in (1, 2, 3) for s in itertools.combinations(range(4), n)]
    served = 0
    for chosen in list(itertools.combinations(some, 3))[::23]:
        masks = [set().union(*(atoms[a] for a in c)) for c in chosen]
        program, plan = fork(*masks)
        live = sorted(set().union(*masks))
        result = run(program, plan, ReorderChannels())
        gathers = [n for n in result.graph.nodes if "index_select" in str(n.target)]
        possible = any(
            all(_is_run(order, c) for c in chosen) for order in itertools.permutations(range(4))
        )
        assert (consecutive(live, masks) is not None) == possible
        assert not (possible and gathers)
        served += possible
    assert served > 3


def _is_run(order: tuple[int, ...], chosen: tuple[int, ...]) -> bool:
    places = sorted(order.index(c) for c in chosen)
    return places[-1] - places[0] + 1 == len(places)


class Joined(nn.Module):
    """Two producers that a concat joins, read as a whole, in part, and each for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(3, 6, 3, padding=1) for _ in range(2))
        self.own = nn.Conv2d(6, 2, 3, padding=1)
        self.part = nn.Conv2d(12, 2, 3, padding=1)
        self.whole = nn.Conv2d(12, 2, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        a, b = self.a(x).relu(), self.b(x).relu()
        both = torch.cat([a, b], 1)
        return self.own(a), self.part(both), self.whole(both)


def test_a_concat_is_ordered_with_its_operands() -> None:
    torch.manual_seed(0)
    program = narrows.capture(Joined().double().eval(), (X,))
    keep = {"own.weight": [1, 3, 5], "part.weight": [0, 2, 6, 10, 11]}
    plan = narrows.plan(program, keep_inputs=keep, zeros=False)
    result = run(program, plan, ReorderChannels())
    assert not [n for n in result.graph.nodes if "index_select" in str(n.target)]
    assert len(copies(result)) == 2  # slices, which are views


def test_pruning_in_order_is_pruning_and_then_ordering() -> None:
    torch.manual_seed(0)
    joined = narrows.capture(Joined().double().eval(), (X,))
    keep = {"own.weight": [1, 3, 5], "part.weight": [0, 2, 6, 10, 11]}
    plan = narrows.plan(joined, keep_inputs=keep, zeros=False)
    for program, masks in ((joined, plan), fork({0, 1, 4, 9}, {1, 2, 9}, {0, 2})):
        twice = run(program, masks, ReorderChannels())
        once = PruneChannels(masks, order=True).run(program).program
        assert [(n.name, n.target, str(n.args)) for n in once.graph.nodes] == [
            (n.name, n.target, str(n.args)) for n in twice.graph.nodes
        ]
        assert all(torch.equal(w, twice.weights[name]) for name, w in once.weights.items())
        plain = PruneChannels(masks).run(program).program
        assert any(not torch.equal(w, plain.weights[name]) for name, w in once.weights.items())
        assert not ReorderChannels().run(once).changed


def test_what_is_not_pruned_is_not_put_in_order() -> None:
    program = narrows.capture(Joined().double().eval(), (X,))
    result = PruneChannels(order=True).run(program)
    assert not result.changed
    assert result.program is program


def test_an_order_is_noted_with_what_it_leaves() -> None:
    program, plan = fork({0, 1, 4, 9}, {1, 2, 9}, {0, 2})
    pruned = PruneChannels(plan).run(program).program
    (note,) = ReorderChannels().run(pruned).notes
    assert note.reason == "order"
    assert "3 of 3 readers" in note.message or "2 of 3 readers" in note.message
    again = ReorderChannels().run(pruned)
    assert str(again.program) == str(ReorderChannels().run(pruned).program)  # deterministic


def test_what_reaches_an_output_keeps_its_order() -> None:
    class Open(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3)
            self.head = nn.Conv2d(8, 2, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.stem(x)
            return x, self.head(x)

    torch.manual_seed(0)
    program = narrows.capture(Open().double().eval(), (X,))
    plan = narrows.plan(program, keep_inputs={"head.weight": [0, 3, 6]}, zeros=False)
    result = run(program, plan, LegalizeReads(costs(1e-6)), AlignChannels(), ReorderChannels())
    assert len(copies(result)) == 1


def test_what_no_form_makes_faster_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    program, plan = fork(EVENS, LOW, HIGH)
    predict = StairTable.predict

    def pruned_is_slow(table: StairTable, p: Program, batch: int | None = None) -> list:
        slow = p.parameter_count < program.parameter_count
        return [(n, s * (1e6 if slow else 1)) for n, s in predict(table, p, batch)]

    monkeypatch.setattr(StairTable, "predict", pruned_is_slow)
    result = run(program, plan, LegalizeReads(costs(1.0)), AlignChannels(), ReorderChannels())
    assert result.parameter_count == program.parameter_count
    notes = LegalizeReads(costs(1.0)).run(PruneChannels(plan).run(program).program).notes
    assert [n.reason for n in notes] == ["idle", "costs"]
    assert "no pruned form is faster" in notes[0].message


class Stream(nn.Module):
    """A residual stream of 16 channels: four blocks add to it, and each reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(4))
        self.head = nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x).relu()
        return self.head(x)


def test_a_stream_shrinks_where_its_last_readers_need_less() -> None:
    torch.manual_seed(0)
    program = narrows.capture(Stream().double().eval(), (X,))
    masks = {f"blocks.{i}.weight": [*range(16)] for i in range(2)}
    masks |= {"blocks.2.weight": [1, 3, 5, 7, 9, 11], "blocks.3.weight": [1, 3, 5, 7]}
    masks |= {"head.weight": [1, 5, 7]}
    plan = narrows.plan(program, keep_inputs=masks, zeros=False)
    table = costs(1e-3)
    result = run(program, plan, LegalizeReads(table), AlignChannels(), ReorderChannels())
    made = widths(result)
    assert [made[f"blocks_{i}"] for i in range(4)] == [16, 6, 4, 3]
    # Channels stand by when they are read last, so that every cut is a slice.
    taken = [n for n in result.graph.nodes if n.name in copies(result)]
    assert len(taken) == 3
    assert all("slice" in str(n.target) for n in taken)


class Branches(nn.Module):
    """Two branches of 16 channels that are joined, pooled and read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.left = nn.Conv2d(8, 16, 3, padding=1)
        self.right = nn.Conv2d(8, 16, 3, padding=1)
        self.head = nn.Conv2d(32, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([self.left(x), self.right(x)], 1)
        return self.head(nn.functional.avg_pool2d(x, 3, 1, 1))


def test_what_a_concat_joins_is_in_blocks_together() -> None:
    """Alone, 13 channels are no dearer than 16; joined, they would keep the pooling plain."""
    torch.manual_seed(0)
    program = narrows.capture(Branches().double().eval(), (X,))
    keep = sorted({*range(32)} - {3, 4, 5, 20, 21})
    plan = narrows.plan(program, keep_inputs={"head.weight": keep}, zeros=False)
    table = costs(1e-3, block=8)
    slow = Grid((("elements", (1.0, 1e6)),), np.array([1.0, 1e6]))
    grids = {**table.grids, "pool": slow, "blocked pool": slow.scaled(1e-3)}
    table = replace(table, grids=grids)
    result = run(program, plan, LegalizeReads(table), AlignChannels(), ReorderChannels())
    made = widths(result)
    assert (made["left"], made["right"]) == (16, 16)
    assert copies(result) == []


class Pooled(nn.Module):
    """A tensor of 16 channels that one layer reads as it is, and another behind a pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(8, 16, 3, padding=1)
        self.left = nn.Conv2d(16, 8, 3, padding=1)
        self.right = nn.Conv2d(16, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.left(x) + self.right(nn.functional.avg_pool2d(x, 3, 1, 1))


def test_a_part_is_copied_behind_what_is_slow_in_the_plain_layout() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 8, 8, dtype=torch.float64)
    program = narrows.capture(Pooled().double().eval(), (x,))
    plan = narrows.plan(program, keep_inputs={"right.weight": [*range(0, 16, 2)]}, zeros=False)
    table = costs(1e-3, block=8)
    slow = Grid((("elements", (1.0, 1e6)),), np.array([1.0, 1e6]))
    table = replace(table, grids={**table.grids, "pool": slow, "blocked pool": slow.scaled(1e-3)})
    result = PruneChannels(plan).run(program).program
    for pass_ in (LegalizeReads(table), AlignChannels(), ReorderChannels()):
        result = pass_.run(result).program
    assert relative_error(result(x), plan.masked(program)(x)) <= EXACT
    (taken,) = copies(result)
    assert Meta(result.node("avg_pool2d")).shape[1] == 16
    assert next(n.name for n in result.node(taken).all_input_nodes) == "avg_pool2d"
    assert result.tensor(result.node("right").all_input_nodes[1]).shape[1] == 8
