"""Every kind of gates: trained on digits, compiled by narrows, and held to the gated model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import narrows
from narrows import training
from narrows.errors import CaptureError, UsageError
from narrows.ir.compare import relative_error
from narrows.ir.program import Program
from narrows.training.gates import Gates
from tests.networks import randomise
from tests.networks.generated import Generated
from tests.training.digits import Net, accuracy, captured, digits, train
from tests.training.kinds import KINDS, SPREAD, parts


def compiled(gates: Gates, model: nn.Module, program: Program) -> tuple[Program, Any]:
    """Return the pruned program of a gated model, and the plan."""
    gates.remove()
    trained = program.with_weights(model.state_dict())
    plan = gates.plan(trained)
    return narrows.apply(trained, plan), plan


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_compiled_is_the_gated_model(
    kind: str, program: Program, fresh: Callable[[], Net]
) -> None:
    model, (images, _) = fresh(), digits(16)
    names = [n for n, _ in model.named_parameters()]
    gates = KINDS[kind](model, program)
    train(model, gates, steps=16, gate_rate=0.002 if kind in SPREAD else 0.05)
    assert [n for n, _ in model.named_parameters()] == names
    with torch.no_grad():
        expected = model(images)
    pruned, plan = compiled(gates, model, program)
    assert plan.removed > 0
    assert plan.reasons[gates.gates[0].sides[0].weight].startswith("gates ")
    # float32, and sums in another order: the promise of an exact pass.
    assert relative_error(pruned(images), expected) < 1e-5
    assert pruned.parameter_count < program.parameter_count
    with torch.no_grad():  # the gates are off the model
        assert relative_error(model(images), expected) > 1e-5


def test_predictors_become_a_plan_through_their_mean_decision(
    program: Program, fresh: Callable[[], Net]
) -> None:
    model, (images, _) = fresh().eval(), digits(64)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    gates = training.Predictors(model, program, outputs="*", mass=0.7, momentum=0.3)
    optimizer = torch.optim.Adam(gates.parameters(), 0.05)
    losses = []
    for _ in range(20):
        with torch.no_grad():  # the network stands still
            model(images)
        loss = gates.loss()
        losses.append(loss.item())
        loss.backward()
        gates.step()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    gates.eval()
    with torch.no_grad():
        static = model(images)
        with gates.dynamic():
            assert relative_error(model(images), static) > 1e-3
    pruned, plan = compiled(gates, model, program)
    assert plan.removed > 0
    assert relative_error(pruned(images), static) < 1e-5


def test_dynamic_predictors_gate_each_input(program: Program, fresh: Callable[[], Net]) -> None:
    model, (images, _) = fresh().eval(), digits(8)
    gates = training.Predictors(model, program, outputs="plain.weight")
    (predictor,) = gates.predictors
    with torch.no_grad(), gates.off():
        x = model.block2(model.block1(F.relu(model.norm(model.stem(images)))))
        open_ = torch.sigmoid(predictor(x.amax((2, 3)))) > 0.5
        y = F.relu(model.plain(x) * open_[:, :, None, None]).mean((2, 3))
        expected = model.head(y)
    with torch.no_grad(), gates.dynamic():
        assert torch.allclose(model(images), expected, atol=1e-6)


def test_a_gate_of_outputs_is_zero_behind_the_norm(
    program: Program, fresh: Callable[[], Net]
) -> None:
    model, (images, _) = fresh(), digits(8)
    gates = training.GumbelGates(model, program, outputs="block1.conv1.weight")
    with torch.no_grad():
        gates.scores[0].copy_(torch.tensor([1.0, -1, 1, 1, -1, 1, 1, 1]))
        gates.ratio = 0.25
        seen: list[Tensor] = []
        handle = model.block1.norm1.register_forward_hook(lambda m, x, y: seen.append(y))
        model.eval()(images)
        handle.remove()
    alive = seen[0].abs().amax((0, 2, 3)) > 0
    assert alive.tolist() == [True, False, True, True, False, True, True, True]


def test_captured_anew_it_is_the_same(fresh: Callable[[], Net], program: Program) -> None:
    model, (images, _) = fresh(), digits(8)
    gates = training.SoftMasks(model, program, inputs="*", ratio=0.3, interval=2)
    train(model, gates, steps=4)
    with torch.no_grad():
        expected = model(images)
    with pytest.raises(CaptureError, match=r"gates.remove\(\) first"):
        captured(model)
    assert gates.remove() is model
    again = captured(model)
    assert relative_error(narrows.apply(again, gates.plan(again))(images), expected) < 1e-5


def test_the_state_dict_and_the_optimizer_do_not_see_gates(
    program: Program, fresh: Callable[[], Net]
) -> None:
    model, (images, _) = fresh(), digits(8)
    before = dict(model.named_parameters())
    gates = training.GumbelGates(model, program, outputs="*")
    with pytest.raises(RuntimeError):  # a call that fails, too
        model(images[:, :, 0])
    model(images).sum().backward()
    assert all(before[n] is p for n, p in model.named_parameters())
    assert model.block1.norm1.weight.grad is not None
    assert all(s.grad is not None for s in gates.scores)
    with gates.off(), torch.no_grad():
        off = model.eval()(images)
    gates.remove()
    assert torch.equal(model(images), off)


@pytest.mark.parametrize("kind", KINDS)
def test_gates_are_a_module_like_any_other(
    kind: str, program: Program, fresh: Callable[[], Net]
) -> None:
    gates = KINDS[kind](fresh(), program)
    state = gates.state_dict()
    assert set(state) == {name for name, _ in gates.named_parameters()}
    assert list(gates.children()) == [m for m in gates.children() if list(m.parameters())]
    assert gates in {gates}  # by identity, not by the options
    other = KINDS[kind](fresh(), program)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(state)
    assert all(map(torch.equal, gates.parameters(), other.parameters()))
    assert repr(other) == repr(gates)
    for copied in (gates, gates._model):
        with pytest.raises(UsageError, match="neither copied nor pickled") as error:
            copy.deepcopy(copied)
        parts(error.value)
    assert next(gates.double().parameters(), torch.zeros(1).double()).dtype is torch.float64


def test_a_layer_that_runs_by_itself_is_told(program: Program, fresh: Callable[[], Net]) -> None:
    model, (images, _) = fresh().eval(), digits(4)
    gates = training.GumbelGates(model, program, outputs="*")
    with pytest.raises(UsageError, match="outside of a call of the model") as error:
        model.stem(images)
    parts(error.value)
    with gates.off():
        model.stem(images)

    class Again(nn.Module):  # a layer runs a second time in the backward call
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            if torch.compiler.is_exporting():
                return self.b(self.a(x))
            return self.b(checkpoint(self.a, x, use_reentrant=False))  # type: ignore[arg-type]

    again, x = Again().eval(), torch.randn(2, 4)
    training.GumbelGates(again, narrows.capture(again, (x,)), outputs="*")
    with pytest.raises(UsageError, match="checkpointing"):
        again.train()(x).sum().backward()


def test_a_weight_that_two_modules_share_is_gated_in_both(fresh: Callable[[], Net]) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.c(F.relu(self.b(F.relu(self.a(x)))))

    torch.manual_seed(0)
    model, x = Twice(), torch.randn(3, 4)
    program = narrows.capture(model.eval(), (x,))
    gates = training.GumbelGates(model, program, inputs="b.weight", ratio=0.5)
    with torch.no_grad():
        gates.scores[0].copy_(torch.tensor([1.0, -1, 1, -2]))
        gates._forwards = 1
        expected = model(x)
    pruned, _ = compiled(gates, model, program)
    assert relative_error(pruned(x), expected) < 1e-5


def test_grouped_and_normless_layers_and_flattened_channels() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 8, 3)
            self.b = nn.Conv2d(8, 8, 3, groups=2)
            self.c = nn.ConvTranspose2d(8, 6, 2, bias=False)
            self.norm = nn.BatchNorm1d(6 * 4)
            self.d = nn.Linear(24, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.c(F.relu(self.b(F.relu(self.a(x)))))
            return self.d(self.norm(y.flatten(1)))

    torch.manual_seed(0)
    model, x = Mixed().eval(), torch.randn(4, 3, 5, 5)
    nn.init.normal_(model.norm.weight)
    nn.init.normal_(model.norm.bias)
    program = narrows.capture(model, (x,))
    gates = training.GumbelGates(
        model, program, outputs=["a.weight", "c.weight"], inputs=["b.weight"], ratio=0.4
    )
    with torch.no_grad():
        for score in gates.scores:
            score.copy_(torch.randn(len(score)))
        gates._forwards = 1
        expected = model(x)
    pruned, plan = compiled(gates, model, program)
    assert plan.removed == round(0.4 * 22)
    assert relative_error(pruned(x), expected) < 1e-5


DRAWN: tuple[list[Any], ...] = (
    [("concat", 3, 1), ("split", 2, 1), ("shuffle", 0, 0), ("grouped", 4, 2)],
    [("residual", 1, 0), ("depthwise", 2, 1), ("attention", 1, 0), ("norm", 1, 2)],
)


@pytest.mark.parametrize("steps", DRAWN)
def test_every_gate_of_all_kinds_of_blocks_means_what_a_plan_does(steps: list[Any]) -> None:
    torch.manual_seed(0)
    model, x = Generated(steps, "both").double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    randomise(model, 0, (x,))
    program = narrows.capture(model, (x,))
    for tied in (False, True):
        gates = training.GumbelGates(model, program, outputs="*", inputs="*", tied=tied, ratio=0.4)
        said = gates.skipped.values()
        assert all(why.startswith(("no gate:", "a gate of its own:")) for why in said)
        with torch.no_grad():
            for scores in gates.scores:
                scores.copy_(torch.randn(len(scores)))
            gates._forwards = 1
            expected = model(x)
        plan = gates.plan(program)
        gates.remove()
        assert relative_error(plan.masked(program)(x), expected) < 1e-12
        assert relative_error(narrows.apply(program, plan)(x), expected) < 1e-12
        assert relative_error(program(x), expected) > 1e-3


def test_accuracy_of_the_digits(fresh: Callable[[], Net]) -> None:
    assert accuracy(fresh().eval()) > 0.5  # chance is 0.1: there is something to lose
