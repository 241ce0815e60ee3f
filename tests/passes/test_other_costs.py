"""Costs of processors that work otherwise than a CPU's runtimes: a class says them, no pass knows.

What a class leaves out has the answer of a runtime that computes operator by operator.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import narrows
from narrows import registry
from narrows.backends.onnx import OnnxTarget
from narrows.ir.account import account
from narrows.ir.compare import relative_error
from narrows.ir.costfiles import load_costs
from narrows.ir.costs import Costs, rounded
from narrows.ir.meta import Meta
from narrows.ir.program import Program
from narrows.ir.work import Work
from narrows.passes.base import TOLERANCE, Fidelity
from narrows.passes.plans.latency import SLACK

EXACT = TOLERANCE[Fidelity.EXACT][torch.float64]


@dataclass(frozen=True)
class Flat(Costs):
    """Time in proportion to what is computed and to what is moved, as a roofline has it."""

    name: str = "made up"
    mac: float = 1e-12
    byte: float = 1e-11
    call: float = 1e-9

    @classmethod
    def from_json(cls, data: Any) -> Flat:
        return cls(**data)

    def seconds(self, work: Work) -> float:
        moved = work.elements + work.batch * work.positions * work.inputs
        return self.call + self.mac * work.macs + self.byte * work.itemsize * moved


@dataclass(frozen=True)
class Octets(Flat):
    """A processor that multiplies eight by eight channels at once, and is slow at odd widths."""

    step = 8
    least_step = 8

    def fits(self, work: Work) -> bool:
        return work.inputs % 8 == 0

    def seconds(self, work: Work) -> float:
        if work.kind != "conv":
            return super().seconds(work)
        wide = replace(work, inputs=rounded(work.inputs, 8), outputs=rounded(work.outputs, 8))
        return (1 if self.fits(work) else 50) * super().seconds(wide)


@dataclass(frozen=True)
class Elsewhere(OnnxTarget):
    """A target that has its own costs; its artifacts run in ONNX Runtime all the same."""

    own: str = "flat"

    def costs(self) -> Costs:  # type: ignore[override]
        known = {"flat": Flat(), "cheap": Flat(byte=1e-14), "dear": Flat(byte=1e-6)}
        return {**known, "octets": Octets(mac=1e-9)}[self.own]


class Net(nn.Module):
    """A residual stream, a concat, a pooling, and readers that want different channels."""

    def __init__(self, width: int = 20) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.left, self.right = (nn.Conv2d(width, 24, 3, padding=1) for _ in range(2))
        self.up, self.down = nn.Conv2d(48, 32, 3, padding=1), nn.Conv2d(32, 48, 3, padding=1)
        self.head = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = torch.cat([self.left(x).relu(), nn.functional.max_pool2d(self.right(x), 3, 1, 1)], 1)
        x = x + self.down(self.up(x).relu())
        return self.head(x.mean((2, 3)))


X = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
KEEP = {
    "left.weight": range(0, 20, 2), "right.weight": range(12), "up.weight": range(1, 40, 3),
    "down.weight": range(0, 32, 5), "head.weight": range(0, 48, 2),
}  # fmt: skip


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    return narrows.capture(Net().double().eval(), (X,))


def masks(program: Program) -> narrows.ChannelPlan:
    return narrows.plan(program, keep_inputs={n: list(k) for n, k in KEEP.items()}, zeros=False)


def seconds(costs: Costs, program: Program) -> float:
    return sum(s for _, s in costs.predict(program, 1))


def copies(program: Program) -> int:
    names = ("aten.index_select.default", "aten.slice.Tensor")
    return sum(str(n.target) in names for n in program.graph.nodes)


@pytest.mark.parametrize("own", ["flat", "dear", "octets"])
def test_the_form_for_it_equals_masked_and_is_no_slower_by_it(program: Program, own: str) -> None:
    target, plan = Elsewhere(own=own), masks(program)
    costs = target.costs()
    made = narrows.apply(program, plan, target=target)
    assert relative_error(made(X), plan.masked(program)(X)) <= EXACT
    passes = [spelling.partition("{")[0] for spelling in made.history]
    assert {"legalize-reads", "align-channels", "reorder-channels"} < set(passes)
    assert "choose-kernels" not in passes
    assert seconds(costs, made) <= min(
        seconds(costs, p) for p in (program, narrows.apply(program, plan))
    ) * (1 + 1e-9)


def test_it_decides_what_is_copied(program: Program) -> None:
    plan = masks(program)
    cheap, dear = (narrows.apply(program, plan, target=Elsewhere(own=o)) for o in ("cheap", "dear"))
    assert copies(cheap) > copies(dear)


def test_a_latency_is_reached_by_it(program: Program) -> None:
    target = Elsewhere()
    plan = narrows.plan(program, latency=0.6, target=target)
    made = narrows.apply(program, plan, target=target)
    share = seconds(target.costs(), made) / seconds(target.costs(), program)
    assert 0.6 * (1 - 3 * SLACK) < share <= 0.6 * (1 + 1e-9)
    assert any("on made up, batch 1" in note.message for note in plan.notes)
    assert relative_error(made(X), plan.masked(program)(X)) <= EXACT


def test_widths_off_its_step_get_channels_of_zeros() -> None:
    torch.manual_seed(0)
    odd = narrows.capture(Net(21).double().eval(), (X,))
    plain, made = (narrows.apply(odd, target=Elsewhere(own=own)) for own in ("flat", "octets"))
    assert [Meta(p.node("stem")).shape[1] for p in (plain, made)] == [21, 24]
    assert relative_error(made(X), odd(X)) <= EXACT


def test_a_model_is_compiled_by_it() -> None:
    torch.manual_seed(0)
    model, x = Net().eval(), X.float()
    program = narrows.capture(model, (x,))
    plan = masks(program)
    artifact = narrows.compile(model, (x,), plan=plan, target=Elsewhere())
    got, wanted = artifact.run(x.numpy()), plan.masked(program)(x)
    np.testing.assert_allclose(got, wanted.detach().numpy(), rtol=1e-3, atol=1e-4)


def test_a_file_is_read_by_the_class_that_an_entry_point_names(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = metadata.EntryPoint("made up", f"{__name__}:Flat", "narrows.costs")
    monkeypatch.setattr(registry, "installed", lambda group: [entry])
    (tmp_path / "flat.json").write_text(json.dumps({"name": "made up", "byte": 1e-6}))
    assert load_costs(tmp_path / "flat.json") == Flat(byte=1e-6)
    passes = f"prune-channels, legalize-reads{{costs={tmp_path / 'flat.json'}}}, align-channels"
    made = narrows.apply(program, masks(program), pipeline=passes)
    assert copies(made) == copies(
        narrows.apply(program, masks(program), target=Elsewhere(own="dear"))
    )


def test_an_account_without_layouts_adds_up_and_folds_norms(program: Program) -> None:
    flat = Flat()
    ops = flat.account(program, 1)
    assert ops == account(flat, program, 1)
    assert flat.predict(program, 1) == [(op.node, op.seconds) for op in ops]
    assert {op.form for op in ops} == {"plain", "none"}  # nothing is fused, the output is none
    normed = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).double().eval()
    forms = [op.form for op in flat.account(narrows.capture(normed, (X,)))]
    assert forms == ["plain", "fused", "plain", "none"]
