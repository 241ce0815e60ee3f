"""Every gate and every loss, on a small ViT as well as on the CNN of the other tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import narrows
from narrows import training
from narrows.errors import UsageError
from narrows.ir.compare import relative_error
from narrows.ir.program import Program
from tests.passes.scored import Block
from tests.training.digits import captured, digits, made, train
from tests.training.test_gates import KINDS
from tests.training.test_public import GATES

HIDDEN = "blocks.*.fc1.weight"


class Tokens(nn.Module):
    """Patches of the digits, two blocks, and a head on the mean over the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.head = nn.Conv2d(1, 8, 2, 2), nn.Linear(8, 10)
        self.blocks = nn.Sequential(Block(), Block())

    def tokens(self, x: Tensor) -> Tensor:
        return self.blocks(self.patch(x).flatten(2).transpose(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tokens(x).mean(1))


def vit() -> Tokens:
    torch.manual_seed(0)
    return Tokens()


ON_VIT: dict[str, Callable[[nn.Module, Program], training.Gates]] = {
    "SoftMasks": lambda m, p: training.SoftMasks(m, p, outputs=HIDDEN, ratio=0.3, interval=2),
    "DifferentiableMasks": lambda m, p: training.DifferentiableMasks(
        m, p, inputs="blocks.*.fc2.weight", ratio=0.3
    ),
    "GumbelGates": lambda m, p: training.GumbelGates(m, p, outputs=HIDDEN, ratio=0.3),
    "GeneratedGates": lambda m, p: training.GeneratedGates(m, p, outputs=HIDDEN),
    "AnnealedMasks": lambda m, p: training.AnnealedMasks(m, p, outputs=HIDDEN, steps=4),
    "AttendedRatios": lambda m, p: training.AttendedRatios(m, p, outputs=HIDDEN, ratio=0.3),
    "SearchedWidths": lambda m, p: training.SearchedWidths(m, p, outputs=HIDDEN, target=0.6),
    "Predictors": lambda m, p: training.Predictors(m, p, outputs=HIDDEN),
}  # fmt: skip


def test_the_tables_name_every_gate() -> None:
    assert {*ON_VIT, "NormSparsity"} == GATES
    on_cnn = {make.__code__.co_names for make in KINDS.values()}
    named = {name for names in on_cnn for name in names}
    assert named >= GATES - {"Predictors"}  # whose tests stand beside that table


@pytest.mark.parametrize("name", ON_VIT)
def test_every_gate_of_a_vit_becomes_a_plan(name: str) -> None:
    model, (images, _) = vit(), digits(16)
    program = captured(model)
    gates = ON_VIT[name](model, program)
    if name == "Predictors":
        model.eval()
        for _ in range(4):
            gates.zero_grad()
            model(images)
            gates.loss().backward()
            gates.step()
            with torch.no_grad():
                for parameter in gates.parameters():
                    parameter -= 0.05 * (0 if parameter.grad is None else parameter.grad)
    else:
        train(model, gates, steps=8)
    with torch.no_grad():
        expected = model(images)
    gates.remove()
    trained = program.with_weights(model.state_dict())
    plan = gates.plan(trained)
    small = narrows.apply(trained, plan)
    # float32, and sums in another order: the promise of an exact pass.
    assert relative_error(small(images), expected) < 1e-5
    if name not in ("GeneratedGates", "AnnealedMasks", "Predictors"):  # those have no ratio to meet
        assert plan.removed


def test_gains_are_those_of_batch_norms() -> None:
    model = vit()
    with pytest.raises(UsageError, match="norm"):
        training.NormSparsity(model, captured(model), outputs=HIDDEN, ratio=0.3, rate=1e-2)


LOSSES: dict[str, Callable[[Any, Any], Tensor]] = {
    "distillation": lambda s, t: training.distillation(s[0], t[0], 4.0),
    "self_supervised": lambda s, t: training.self_supervised(s[0], t[0]),
    "channel_wise": lambda s, t: training.channel_wise(s[1], t[1]),
    "spatial_attention": lambda s, t: training.spatial_attention(s[1], t[1]),
}


def outputs(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits, and features ``[n, C, positions...]``."""
    if isinstance(model, Tokens):
        return model(images), model.tokens(images).transpose(1, 2)
    features: list[Tensor] = []
    hook = model.block2.register_forward_hook(lambda _, __, out: features.append(out))
    logits = model(images)
    hook.remove()
    return logits, features[0]


@pytest.mark.parametrize("make", [made, vit], ids=["cnn", "vit"])
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_pulls_a_student_toward_its_teacher(name: str, make: Any) -> None:
    images, _ = digits(32)
    teacher, student = make().eval(), make().eval()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
        theirs = outputs(teacher, images)
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = LOSSES[name](outputs(student, images), theirs)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert training.stability(theirs[0], torch.arange(32) % 4) <= 1
