"""Sensitivity: every row by numbers, what is kept and gone on with, and what is refused."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import narrows
from narrows import Sensitivity
from narrows.errors import PlanError, PlanUsageError, UsageError
from narrows.executors.base import Work
from narrows.ir.program import Program
from narrows.passes.choosing.divergence import Divergence
from narrows.passes.plans.plan import ChannelPlan
from narrows.passes.sensing.identity import identity
from tests.passes.residual import images, model

DATA = [images(32)]


@pytest.fixture(scope="module")
def program() -> Program:
    return narrows.capture(model(), (images(2),))


def points(program: Any) -> float:
    return 100 * float(program(DATA[0]).softmax(1)[:, 0].mean())


def doubled(program: Any) -> float:
    return 2 * points(program)


@dataclass
class Counting:
    """Runs jobs here, and counts them; it may be interrupted."""

    most: int = 1 << 30
    count: int = 0
    name: str = "counting"
    alone: bool = True
    seen: list[Any] = field(default_factory=list)

    def run(self, work: Work, jobs: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        for number, job in enumerate(jobs):
            if self.count == self.most:
                raise KeyboardInterrupt
            self.count += 1
            self.seen.append(job)
            yield number, work(job)


def far(program: Program, changed: Program, data: Tensor = DATA[0], outputs: str = "auto") -> float:
    own = program.run_flat([data])
    with torch.no_grad():
        return Divergence.of(own, outputs).between(own, changed.run_flat([data]))


# ------------------------------------------------------------------ rows, by numbers


def test_a_coupling_s_row_is_that_of_the_masked_network(program: Program):
    found = narrows.sense(program, data=DATA, ratios=0.5, evaluate=points)
    assert [row.name for row in found.rows] == ["stem_0", "first_0", "gate_0", "last"]
    whole = narrows.plan(program, ratio=0.5, zeros=False)
    ties = {tie.name: tie for tie in program.couplings()}
    for row in found.rows:
        keeps: dict[str, dict[str, Any]] = {"inputs": {}, "outputs": {}}
        for member in ties[row.name].members:
            for side, keep in (("inputs", whole.inputs), ("outputs", whole.outputs)):
                if (member.role == "in") == (side == "inputs") and member.weight in keep:
                    keeps[side][member.weight] = keep[member.weight]
        plan = ChannelPlan.given(program, keeps["inputs"], keeps["outputs"])
        masked = plan.masked(program)
        assert row.divergence == pytest.approx(far(program, masked), rel=1e-4)
        assert row.figure == pytest.approx(points(masked), rel=1e-5)
        assert row.removed * 2 == row.width == ties[row.name].width
        assert row.macs is not None
        assert 0 < row.macs < 1
    assert found.figure == pytest.approx(points(program), rel=1e-6)
    assert found.skipped
    assert found.of("last") == found.rows[-1:]


def test_what_a_layer_reads_goes_by_itself(program: Program):
    found = narrows.sense(program, data=DATA, ratios=(0.25,), criterion="wanda", constrained=False)
    whole = narrows.plan(program, ratio=0.25, criterion="wanda", data=DATA, constrained=False,
                         zeros=False)  # fmt: skip
    assert [row.name for row in found.rows] == [*whole.inputs]
    for row in found.rows:
        plan = ChannelPlan.given(program, {row.name: whole.inputs[row.name]})
        assert row.kind == "reads"
        assert row.divergence == pytest.approx(far(program, plan.masked(program)), rel=1e-4)


def test_weights_are_found_on_one_half_and_held_to_the_other(program: Program):
    settings: dict[str, Any] = {"ratios": 0.5, "constrained": False}
    found = narrows.sense(program, data=DATA, repair="least-squares", **settings)
    row = found.rows[-1]
    plan = narrows.plan(program, ratio=0.5, constrained=False, include=row.name, zeros=False)
    made = narrows.compensate(program, plan, data=[DATA[0][:16]])
    wanted = far(program, plan.masked(made), DATA[0][16:])
    assert row.divergence == pytest.approx(wanted, rel=1e-3)
    assert (found.examples, found.repair) == (16, "least-squares")


def test_one_quantizer_at_a_time(program: Program):
    found = narrows.sense(program, data=DATA, ratios=(), bits=(4, 8))
    rows = {(row.kind, row.name, row.amount): row for row in found.rows}
    made = narrows.quantize(program, DATA, weights=4, activations=4, first_last=None)
    base, (grid, on) = made.prepared, (made.plan.weights["last.weight"], None)
    scale = torch.tensor([2.0**-e for e in grid.exponents])[:, None, None, None]
    rounded = (base.weights["last.weight"] / scale).round().clamp(-7, 7) * scale
    changed = base.with_weights({**base.weights, "last.weight": rounded.detach()})
    row = rows["weight", "last.weight", 4.0]
    assert row.divergence == pytest.approx(far(program, changed), rel=1e-3)

    name, on = next((n, g) for n, g in made.plan.activations.items() if n.startswith("relu"))

    def call(node: Any, args: Any, kwargs: Any) -> Any:
        value = node.target(*args, **kwargs)
        if node.name != name:
            return value
        codes = (value * 2.0**on.exponent + on.zero).round().clamp(on.low, on.high)
        return (codes - on.zero) * 2.0**-on.exponent

    own = program.run_flat(DATA)
    wanted = Divergence.of(own).between(own, base.run_flat(DATA, call=call))
    row = rows["activation", name, 4.0]
    assert row.divergence == pytest.approx(wanted, rel=1e-3)
    total = {bits: sum(r.divergence for r in found.rows if r.amount == bits) for bits in (4, 8)}
    assert total[8] < total[4] / 10
    assert all(row.macs is None and not row.width for row in found.rows)


def test_outputs_that_overflow_are_not_finite(program: Program):
    large = program.with_weights({**program.weights, "head.bias": torch.full((10,), 3e38)})
    found = narrows.sense(large, data=DATA, ratios=0.5, outputs="values")
    assert [row.divergence for row in found.rows] == [0.0] * len(found.rows)
    broken = program.with_weights({**program.weights, "head.weight": torch.full((10, 32), 3e38)})
    found = narrows.sense(broken, data=DATA, ratios=0.5)
    assert found.rows[-1].divergence is None
    assert "not finite" in str(found)
    assert Sensitivity.from_json(json.loads(json.dumps(found.to_json()))) == found


# ------------------------------------------------------------------ what is kept


def test_a_run_that_was_cut_off_goes_on(program: Program, tmp_path: Path):
    cache = tmp_path / "kept"
    how: dict[str, Any] = {"data": DATA, "evaluate": points, "cache": cache}
    wanted = narrows.sense(program, data=DATA, evaluate=points)
    cut, rest, more = Counting(most=5), Counting(), Counting()
    with pytest.raises(KeyboardInterrupt):
        narrows.sense(program, **how, executor=cut)
    assert len([*cache.iterdir()]) == 5
    told: list[tuple[int, int]] = []
    found = narrows.sense(
        program, **how, executor=rest, progress=lambda what, done, total: told.append((done, total))
    )
    assert found == wanted
    assert not {*cut.seen} & {*rest.seen}
    assert told[0] == (5, 13)
    assert told[-1] == (13, 13)
    narrows.sense(program, **how, ratios=(0.25, 0.4), executor=more)
    assert more.count == 3  # of the four channels of gate_0 0.4 is one, as 0.25 is


def test_what_a_result_hangs_on_is_part_of_its_key(program: Program, tmp_path: Path):
    known: dict[str, Any] = {"data": DATA, "ratios": 0.5, "cache": tmp_path, "evaluate": points}
    narrows.sense(program, **known)
    weights = {**program.weights, "head.bias": program.weights["head.bias"] + 1}
    for given, other in (
        (program, {"data": [DATA[0][:31]]}), (program, {"outputs": "values"}),
        (program, {"repair": "mean"}), (program, {"evaluate": doubled}),
        (program, {"evaluate": None}), (program.with_weights(weights), {}),
    ):  # fmt: skip
        counting = Counting()
        narrows.sense(given, **{**known, **other}, executor=counting)
        evaluated = {**known, **other}["evaluate"] is not None
        assert counting.count == 4 + evaluated, other
    counting = Counting()
    narrows.sense(program, **{**known, "criterion": "l2"}, executor=counting)
    assert counting.count < 4  # what is the same by another criterion is not measured again


def test_an_operator_s_arguments_are_part_of_the_key(tmp_path: Path):
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 8, 3), torch.nn.LeakyReLU(0.01), torch.nn.Conv2d(8, 4, 3)]
    found = []
    for slope in (0.01, 0.9):
        layers[1] = torch.nn.LeakyReLU(slope)
        net = narrows.capture(torch.nn.Sequential(*layers).eval(), (images(2),))
        how: dict[str, Any] = {"data": DATA, "ratios": 0.5}
        found.append(narrows.sense(net, **how, cache=tmp_path).rows)
        assert found[-1] == narrows.sense(net, **how).rows
        again = Counting()
        narrows.sense(net, **how, cache=tmp_path, executor=again)
        assert not again.count
    assert found[0] != found[1]


class Worth:
    """A person's object, which says what a program is worth."""

    def __init__(self, value: float, held: Any = None) -> None:
        self.value, self.held = value, held

    def __call__(self, program: Any) -> float:
        return self.value


def closing(value: Any) -> Any:
    return lambda program, more=1.0: float(value) * more


def test_objects_are_known_by_what_they_hold(program: Program, tmp_path: Path):
    for make in (Worth, closing, lambda v: partial(scaled, by=v), lambda v: Worth(v).__call__):
        for value in (1.0, 2.0):
            found = narrows.sense(
                program, data=DATA, ratios=0.5, cache=tmp_path, evaluate=make(value)
            )
            assert {row.figure for row in found.rows} == {value}
            again = Counting()
            narrows.sense(program, data=DATA, ratios=0.5, cache=tmp_path, evaluate=make(value),
                          executor=again)  # fmt: skip
            assert not again.count


def scaled(program: Any, by: float) -> float:
    return by


def test_identities():
    one, two = (lambda: 1), (lambda: 2)

    def itself(n: int) -> int:
        return itself(n - 1)

    for value in (
        closing, itself, Worth(1.0, {"x": [torch.ones(2), np.ones(2)], "y": {"a", "b"}}), Worth,
        points, partial(points, 1), math.sqrt, torch.nn.Linear(1, 1).forward, Random(3), None,
    ):  # fmt: skip
        assert identity("x", value) == identity("x", value)
    different = [
        one, two, closing(1), closing(True), closing(torch.ones(2)), closing(torch.ones(1, 2)),
        partial(points, 1), partial(points, 2), Worth(1), Worth(2), Random(3), Random(4), ["ab"],
        ["a", "b"], [["a"], "b"], math.sqrt, math.exp, 0.0, -0.0, {1, 2}, {1, 3}, "1", 1, b"1",
    ]  # fmt: skip
    assert len({identity("x", value) for value in different}) == len(different)


def test_what_would_not_be_known_again_is_not_kept(program: Program, tmp_path: Path):
    how: dict[str, Any] = {"data": DATA, "ratios": 0.5}
    held = Worth(1.0, threading.Lock())
    for given, message in (
        ({"evaluate": held}, "results with this evaluate cannot be kept"),
        ({"repair": "distill{seconds=60}"}, "results with the repair distill cannot be kept"),
    ):
        with pytest.raises(PlanUsageError, match=message) as caught:
            narrows.sense(program, **how, **given, cache=tmp_path)
        assert "leave out cache" in caught.value.hint
    assert narrows.sense(program, **how, evaluate=held).figure == 1.0


@pytest.mark.parametrize("repair", ["distill{steps=3}", "blocks{steps=3}"])
def test_an_interruption_of_steps_ends_the_run(
    program: Program, repair: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def stop(*given: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.Adam, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        narrows.sense(program, data=DATA, ratios=0.5, repair=repair, cache=tmp_path)
    assert not [*tmp_path.iterdir()]


def test_a_criterion_is_told_what_outputs_are(program: Program, monkeypatch: pytest.MonkeyPatch):
    for kind in ("values", "logits"):
        found = narrows.sense(program, data=DATA, ratios=0.5, criterion="taylor", outputs=kind)
        whole = narrows.plan(program, ratio=0.5, criterion="taylor", outputs=kind, data=DATA,
                             include="last.weight", zeros=False)  # fmt: skip
        assert found.of("last")[0].divergence == pytest.approx(
            far(program, whole.masked(program), outputs=kind), rel=1e-4
        )


def test_a_damaged_result_is_refused(program: Program, tmp_path: Path):
    narrows.sense(program, data=DATA, ratios=0.5, cache=tmp_path)
    place = next(tmp_path.iterdir())
    for text, why in (("{", "not JSON"), ("{}", "its format"), (
        '{"format": "narrows-sense-1", "divergence": "x", "agreement": 1, "figure": null}',
        "divergence",
    )):  # fmt: skip
        place.write_text(text)
        with pytest.raises(UsageError, match="a kept result cannot be read") as caught:
            narrows.sense(program, data=DATA, ratios=0.5, cache=tmp_path)
        assert why in caught.value.why
    with pytest.raises(UsageError, match="cannot keep results"):
        narrows.sense(program, data=DATA, cache=place)


def test_a_sensitivity_is_a_file(program: Program, tmp_path: Path):
    found = narrows.sense(program, data=DATA, ratios=0.5)
    place = found.save(tmp_path / "s.json")
    assert Sensitivity.load(place) == found
    assert {found: 1}[Sensitivity.load(place)] == 1
    lines = str(found).splitlines()
    assert lines[0].split() == [
        "what",
        "of",
        "change",
        "left",
        "macs",
        "divergence",
        "same",
        "class",
    ]
    assert lines[1].split()[:6] == ["coupling", "stem_0", "-0.5", "8", "of", "16"]
    data = found.to_json()
    for wrong, message in (
        ({**data, "format": "x"}, "its format is not"),
        ({**data, "rows": [{**data["rows"][0], "width": -1}]}, "width"),
        ([], "its format"),
    ):
        place.write_text(json.dumps(wrong))
        with pytest.raises(PlanError, match="this is no sensitivity") as caught:
            Sensitivity.load(place)
        assert message in caught.value.why
        assert str(place) in caught.value.where
    with pytest.raises(UsageError, match="there is no file"):
        Sensitivity.load(tmp_path / "other.json")
    place.write_text("{")
    with pytest.raises(PlanError, match="the sensitivity cannot be read"):
        Sensitivity.load(place)


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratios": 1.0}, r"a ratio lies above 0 and below 1, got 1\.0"),
        ({"ratios": (0.5, True)}, "a ratio lies above 0"),
        ({"ratios": ()}, "there is nothing to try"),
        ({"ratios": (), "bits": 4, "criterion": "l2"}, "criterion has no effect without ratios"),
        ({"ratios": (), "bits": 4, "repair": "mean"}, "repair has no effect without ratios"),
        ({"bits": 9}, "bits are 2 to 8, got 9"),
        ({"outputs": "x"}, "outputs is one of"),
        ({"repair": "least-square"}, "there is no compensation"),
        ({"criterion": "l3"}, "there is no criterion"),
        ({"data": []}, "there is no data"),
        ({"data": DATA[0]}, "not batches"),
        ({"data": 5}, r"(?s)the data is a int.*data=\[images\]"),
        ({"evaluate": 3}, "evaluate is a function"),
        ({"evaluate": lambda program: "x"}, "evaluate did not return a number"),
        ({"cache": 3}, "the folder for results is a path"),
        ({"ratio": 0.5}, "sense has no option 'ratio'"),
        ({"jobs": 2, "evaluate": lambda program: 1.0}, "cannot be sent to another process"),
    ],
)
def test_wrong_arguments(program: Program, options: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        narrows.sense(program, **{"data": DATA, **options})


def test_a_failing_evaluate_is_told(program: Program):
    with pytest.raises(PlanError, match="evaluate failed: ZeroDivisionError"):
        narrows.sense(program, data=DATA, evaluate=lambda program: 1 / 0)


def test_a_network_without_anything_to_change(program: Program):
    x = images(2)
    net = narrows.capture(torch.nn.Conv2d(3, 4, 3).eval(), (x,))
    with pytest.raises(PlanError, match="nothing of the network can be changed") as caught:
        narrows.sense(net, data=[x])
    assert "input" in caught.value.why
    with pytest.raises(PlanUsageError, match="a ratio"):
        narrows.sense(net, data=[x], ratios="0.5")  # type: ignore[arg-type]
