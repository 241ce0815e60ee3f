"""Plans and programs that do not fit: one clear error each, and nothing is left behind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import narrows
from narrows.errors import PlanError, PlanUsageError
from narrows.ir.compare import relative_error
from narrows.ir.program import Program
from narrows.passes.instruments import fingerprint
from narrows.passes.plans import planfile
from narrows.passes.plans.plan import ChannelPlan
from narrows.passes.pruning import form


class Net(nn.Module):
    """Two convolutions and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)).relu())


@pytest.fixture
def program() -> Program:
    return narrows.capture(Net().eval(), (torch.randn(2, 3, 8, 8),))


def lines(error: pytest.ExceptionInfo[PlanError]) -> list[str]:
    return [line.strip() for line in str(error.value).splitlines()]


# ------------------------------------------------------------------ masks


def test_an_unknown_weight_is_named_with_a_suggestion(program: Program) -> None:
    with pytest.raises(PlanError) as error:
        narrows.plan(program, keep_inputs={"secnd.weight": [0]})
    assert lines(error) == [
        "net has no weight 'secnd.weight'",
        "try: did you mean 'second.weight'?",
    ]


def test_a_mask_of_weights_is_told_how_to_become_one_of_channels(program: Program) -> None:
    with pytest.raises(PlanUsageError) as error:
        narrows.plan(program, keep_inputs={"second.weight": torch.ones(4, 8, 3, 3).bool()})
    assert lines(error)[:2] == [
        "the mask of 'second.weight' has 4 axes",
        "because it has one entry per channel",
    ]
    mask = torch.ones(4, 8, 3, 3).bool()
    mask[:, 2] = False
    keep = mask.transpose(0, 1).flatten(1).any(1)  # as the hint says
    assert len(narrows.plan(program, {"second.weight": keep}).inputs["second.weight"]) == 7


def test_a_mask_of_the_wrong_length(program: Program) -> None:
    with pytest.raises(PlanError) as error:
        narrows.plan(program, keep_inputs={"second.weight": [True] * 4})
    assert lines(error) == ["the inputs of 'second.weight' take a mask of 8 entries, got 4"]


def test_a_weight_that_makes_no_channels(program: Program) -> None:
    with pytest.raises(PlanError) as error:
        narrows.plan(program, keep_outputs={"norm.weight": [0]})
    first, where, why, hint = lines(error)
    assert first == "'norm.weight' takes no mask on its outputs"
    assert where.startswith("at norm (")
    assert "test_bad_input.py" in where
    assert why == "because batch_norm.default makes no channels with it"
    assert hint.startswith("try: mask the weight of a convolution")


class Recurrent(nn.Module):
    """An operator without a row, between two that have one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 6), nn.LSTM(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x))[0])


def test_a_mask_for_a_barrier() -> None:
    program = narrows.capture(Recurrent().eval(), (torch.randn(3, 2, 4),), dynamic_batch=False)
    with pytest.raises(PlanError) as error:
        narrows.plan(program, keep_inputs={"middle.weight_ih_l0": [0, 1]})
    assert "because lstm.input has no row in the op table and is a barrier" in lines(error)
    with pytest.raises(PlanError, match="no row in the op table"):
        narrows.plan(program, ratio=0.5)


def test_a_lookup_has_no_inputs() -> None:
    module = nn.Sequential(nn.Embedding(10, 6), nn.Linear(6, 3)).eval()
    program = narrows.capture(module, (torch.arange(8).view(2, 4),))
    with pytest.raises(PlanError, match="a lookup sums over no channels"):
        narrows.plan(program, keep_inputs={"0.weight": [0]})


def test_a_weight_that_is_computed_from_others_is_named_by_any_of_them() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.gain = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(5, 1))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.w * self.gain)

    program = narrows.capture(Scaled().eval(), (torch.randn(2, 4),))
    for name in ("w", "gain", "w_computed"):
        assert narrows.plan(program, keep_inputs={name: [0]}).inputs == {"w_computed": (0,)}
    with pytest.raises(PlanError, match="the inputs of 'gain' take a mask of 4 entries, got 1"):
        narrows.plan(program, keep_inputs={"gain": [True]})


@pytest.mark.parametrize("masks", [["second.weight"], 3])
def test_masks_that_are_no_dict(program: Program, masks: Any) -> None:
    with pytest.raises(PlanError, match="keep_inputs takes a dict of masks by weight name"):
        narrows.plan(program, keep_inputs=masks)


# ------------------------------------------------------------------ nothing left


def test_all_channels_of_a_layer_masked(program: Program) -> None:
    """The layer becomes a constant, and the user is told."""
    plan = narrows.plan(program, keep_outputs={"first.weight": []}, zeros=False)
    result = narrows.apply(program, plan)
    x = torch.randn(3, 3, 8, 8)
    assert relative_error(result(x), plan.masked(program)(x)) < 1e-5
    assert any("nothing of the layer is left" in n.message for n in result.notes)


def test_no_consumer_left(program: Program) -> None:
    """A producer that nobody reads goes, however few channels that leaves."""
    plan = narrows.plan(program, keep_inputs={"second.weight": [False] * 8}, zeros=False)
    result = narrows.apply(program, plan)
    x = torch.randn(3, 3, 8, 8)
    assert relative_error(result(x), plan.masked(program)(x)) < 1e-5
    assert result.parameter_count < program.parameter_count
    assert any("the layer is a constant" in n.message for n in result.notes)


# ------------------------------------------------------------------ weights


@pytest.mark.parametrize("name", ["first.weight", "norm.running_var"])
def test_nan_in_the_weights(program: Program, name: str) -> None:
    weights = {n: t.clone() for n, t in program.weights.items()}
    weights[name].view(-1)[:2] = float("nan")
    broken = program.with_weights(weights)
    for act in (narrows.plan, narrows.apply):
        with pytest.raises(PlanError) as error:
            act(broken)
        assert lines(error)[0] == f"{name!r} holds 2 NaN"


def test_infinities_are_no_nan(program: Program) -> None:
    weights = {n: t.clone() for n, t in program.weights.items()}
    weights["second.weight"][0, 0, 0, 0] = float("inf")
    weights["second.weight"][0, 0, 0, 1] = float("-inf")
    masked = narrows.plan(program.with_weights(weights), {"second.weight": [1]}).masked(program)
    assert bool(masked.weights["second.weight"].isfinite().all())


# ------------------------------------------------------------------ plans of other models


def test_a_plan_of_another_width(program: Program) -> None:
    plan = ChannelPlan({"second.weight": (0, 1)}, widths={"second.weight": (16, 4)})
    with pytest.raises(PlanError) as error:
        narrows.apply(program, plan)
    assert lines(error)[0] == (
        "the plan is of another model: 'second.weight' has 16 inputs there, 8 here"
    )


def test_a_plan_of_another_model(program: Program) -> None:
    other = narrows.capture(nn.Sequential(nn.Linear(4, 3)).eval(), (torch.randn(2, 4),))
    plan = narrows.plan(other, {"0.weight": [1, 2]})
    with pytest.raises(PlanError, match=r"net has no weight '0\.weight'"):
        narrows.apply(program, plan)


# ------------------------------------------------------------------ plan files


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[str], str]:
    """Return how to damage a plan's text: by a change to its JSON value."""

    def damage(text: str) -> str:
        data = json.loads(text)
        change(data)
        return json.dumps(data)

    return damage


DAMAGE: dict[str, tuple[Callable[[str], str], str]] = {
    "empty": (lambda text: "", "is not JSON"),
    "cut": (lambda text: text[: len(text) // 2], "is not JSON"),
    "list": (lambda text: "[1, 2]", "is not a channel plan"),
    "foreign": (lambda text: '{"weights": {}}', "is not a channel plan"),
    "no-version": (edited(lambda d: d.pop("version")), "its version is None"),
    "newer": (edited(lambda d: d.update(version=99, narrows="9.0")), "9.0 wrote version 99"),
    "no-inputs": (edited(lambda d: d.pop("inputs")), "missing required field inputs"),
    "no-keep": (edited(lambda d: d["inputs"].update(w=3)), "expected array, got int"),
    "text-channel": (edited(lambda d: d["inputs"].update(w=["a"])), "expected int, got str"),
    "negative": (edited(lambda d: d["outputs"].update(w=[-1])), "expected int >= 0"),
    "unsorted": (edited(lambda d: d["outputs"].update(w=[2, 1])), "is not sorted"),
    "twice": (edited(lambda d: d["outputs"].update(w=[1, 1])), "names a channel twice"),
    "outside": (
        edited(lambda d: d["inputs"].update({"second.weight": [8]})), "names channel 8 of 8"
    ),
    "widths": (edited(lambda d: d["widths"].update(w=[1])), "array of length 2, got 1"),
    "reasons": (edited(lambda d: d["reasons"].update(w=1)), "expected str, got int"),
    "fingerprint": (edited(lambda d: d.update(fingerprint=1)), "fingerprint: expected str"),
    "notes": (edited(lambda d: d.update(notes=[{"where": 1}])), "notes.*expected str"),
    "notes-text": (edited(lambda d: d.update(notes="x")), "notes: expected array"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_plan_files_that_are_damaged_or_foreign(
    program: Program, tmp_path: Path, name: str
) -> None:
    damage, message = DAMAGE[name]
    path = narrows.plan(program, {"second.weight": [1, 2]}).save(tmp_path / "p.json")
    path.write_text(damage(path.read_text()))
    with pytest.raises(PlanError, match=message) as error:
        narrows.apply(program, path)
    assert "p.json" in str(error.value)


def test_plan_files_that_are_no_text_or_no_files(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\x80\x02\xff")
    with pytest.raises(PlanError, match="because it is not text"):
        ChannelPlan.load(tmp_path / "binary")
    with pytest.raises(PlanError, match="No such file"):
        ChannelPlan.load(tmp_path / "none.json")
    with pytest.raises(PlanError, match="Is a directory"):
        ChannelPlan.load(tmp_path)


def test_a_plan_cannot_be_written_everywhere(program: Program, tmp_path: Path) -> None:
    plan = narrows.plan(program, {"second.weight": [1, 2]})
    with pytest.raises(PlanError, match="cannot write"):
        plan.save(tmp_path / "no" / "folder" / "p.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(PlanError, match="cannot write"):
        plan.save(tmp_path / "folder")
    assert os.listdir(tmp_path) == ["folder"]
    assert os.listdir(tmp_path / "folder") == []


# ------------------------------------------------------------------ Ctrl-C


def interrupt(*args: Any, **kwargs: Any) -> Any:
    raise KeyboardInterrupt


def test_an_interrupted_save_leaves_the_old_file(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = narrows.plan(program, {"second.weight": [1, 2]})
    plan.save(tmp_path / "p.json")
    with monkeypatch.context() as patch:
        patch.setattr(planfile.os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            narrows.plan(program, {"second.weight": [3]}).save(tmp_path / "p.json")
    assert os.listdir(tmp_path) == ["p.json"]
    assert ChannelPlan.load(tmp_path / "p.json") == plan


def test_an_interrupted_apply_leaves_the_program_alone(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plan, before = narrows.plan(program, ratio=0.5), fingerprint(program)
    with monkeypatch.context() as patch:
        patch.setattr(form, "rewrite", interrupt)
        with pytest.raises(KeyboardInterrupt):
            narrows.apply(program, plan)
    assert fingerprint(program) == before
    assert os.listdir(tmp_path) == []
    assert narrows.apply(program, plan).parameter_count < program.parameter_count
