"""merge-linear: what a merged layer computes, what is left alone, and why."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import narrows
from narrows.ir.compare import relative_error
from narrows.ir.program import Program
from narrows.ir.verify import verify
from narrows.passes.base import TOLERANCE, Fidelity, PassResult
from narrows.passes.instruments import Promises
from narrows.passes.merge_linear import MergeLinear, Window, merged

EXACT = TOLERANCE[Fidelity.EXACT][torch.float64]


def merge(program: Program, **options: bool) -> PassResult:
    """Run the pass, held to its promises."""
    watch, pass_ = Promises(), MergeLinear(**options)
    watch.before(pass_, program)
    result = pass_.run(program)
    watch.after(pass_, program, result, 0.0)
    verify(result.program)
    return result


def captured(module: nn.Module, *shape: int) -> Program:
    torch.manual_seed(0)
    for p in module.parameters():
        nn.init.normal_(p)
    return narrows.capture(module.double().eval(), (torch.randn(*shape).double(),))


def layers(program: Program) -> int:
    return sum(n.op == "call_function" for n in program.nodes)


def conv(inputs: int, outputs: int, size: int, **more: object) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, **more)  # type: ignore[arg-type]


PAIRS = {
    "linear": ((nn.Linear(5, 2), nn.Linear(2, 6)), (3, 5)),
    "linear on tokens": ((nn.Linear(5, 8, bias=False), nn.Linear(8, 3)), (2, 4, 5)),
    "1x1": ((conv(4, 6, 3, stride=2, padding=1), conv(6, 3, 1)), (2, 4, 9, 8)),
    "1x1 first": ((conv(4, 6, 1), conv(6, 3, 3)), (2, 4, 9, 8)),
    "strides": ((conv(4, 6, 3, stride=2, padding=1), conv(6, 3, 2, stride=2)), (2, 4, 15, 14)),
    "dilations": (
        (conv(3, 4, 3, dilation=2, stride=3), conv(4, 5, (2, 3), dilation=(3, 1))),
        (2, 3, 26, 25),
    ),
    "no bias, padded by all": (
        (conv(3, 4, 3, padding=2, bias=False), conv(4, 5, 3, padding=1)), (2, 3, 7, 6),
    ),
    "no bias, one position, strides": (
        (conv(3, 4, 1, stride=2, bias=False), conv(4, 5, 3, padding=1, stride=2)), (2, 3, 9, 12),
    ),
    "same": ((conv(3, 4, 3, padding="same"), conv(4, 5, 3, padding="valid")), (2, 3, 7, 6)),
    "1d": ((nn.Conv1d(3, 4, 2), nn.Conv1d(4, 5, 3, bias=False)), (2, 3, 11)),
    "3d": ((nn.Conv3d(2, 3, 2), nn.Conv3d(3, 2, (1, 2, 1))), (1, 2, 4, 5, 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_becomes_one_layer_that_computes_the_same(name: str):
    pair, shape = PAIRS[name]
    program = captured(nn.Sequential(*pair), *shape)
    result = merge(program, larger=True)
    assert layers(result.program) == 1
    x = torch.randn(5, *shape[1:]).double()
    assert relative_error(result.program(x), program(x)) <= EXACT
    assert set(result.remarks.values()) == {"merged _0"}
    assert not any(n.startswith(("0.", "1.weight")) for n in result.program.weights)


def test_the_kernel_is_the_convolution_of_both():
    """Of one position after another, summed by hand."""
    torch.manual_seed(0)
    a, b = torch.randn(3, 2, 2, 3).double(), torch.randn(4, 3, 3, 2).double()
    found = merged(
        a, b, Window((2, 3), (2, 1), (0, 0), (1, 2)), Window((3, 2), (1, 1), (0, 0), (1, 3))
    )
    wanted = torch.zeros(4, 2, 2 * 2 + 2, 3 + 5).double()
    for u1 in range(3):
        for u2 in range(2):
            for v1 in range(2):
                for v2 in range(3):
                    wanted[:, :, u1 * 2 + v1, u2 * 3 + v2 * 2] += b[:, :, u1, u2] @ a[:, :, v1, v2]
    torch.testing.assert_close(found, wanted)


def test_a_chain_becomes_one_layer():
    net = nn.Sequential(
        nn.Linear(6, 9), nn.Linear(9, 8), nn.Linear(8, 3), nn.ReLU(), nn.Linear(3, 2)
    )
    program = captured(net, 4, 6)
    result = merge(program)
    assert layers(result.program) == 3
    x = torch.randn(4, 6).double()
    assert relative_error(result.program(x), program(x)) <= EXACT
    assert result.program.weights["2.merged_weight"].shape == (3, 6)


class Branch(nn.Module):
    """A layer that two others read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x) + self.c(x)


class Shared(nn.Module):
    """One layer, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.a(x))


class Computed(nn.Module):
    """A weight that is computed from another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.w = nn.Linear(4, 3), nn.Parameter(torch.randn(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.a(x), self.w * 0.5)


LEFT = {
    "branch": (Branch(), (2, 4)),
    "shared": (Shared(), (2, 4)),
    "computed": (Computed(), (2, 4)),
    "groups": (nn.Sequential(conv(4, 4, 1, groups=2), conv(4, 3, 1)), (2, 4, 5, 5)),
    "transposed": (nn.Sequential(conv(4, 3, 1), nn.ConvTranspose2d(3, 2, 1)), (2, 4, 5, 5)),
    "larger": (nn.Sequential(nn.Linear(6, 2), nn.Linear(2, 6)), (2, 6)),
    "padding": (nn.Sequential(conv(3, 3, 1), conv(3, 3, 3, padding=1)), (2, 3, 5, 5)),
}


@pytest.mark.parametrize("reason", LEFT)
def test_what_cannot_be_merged_says_why(reason: str):
    module, shape = LEFT[reason]
    program = captured(module, *shape)
    result = merge(program)
    assert not result.changed
    assert result.program is program
    assert {n.reason for n in result.notes} == {reason}
    assert all(n.message.startswith("not merged: ") or reason in ("shared", "computed")
               for n in result.notes)  # fmt: skip


def test_padding_without_a_bias_has_to_reach_all_of_the_kernel():
    """A 3x3 kernel padded by one leaves half of a window in the image beside the border."""
    net = nn.Sequential(conv(3, 4, 3, padding=1, bias=False), conv(4, 5, 3, padding=1))
    result = merge(captured(net, 2, 3, 7, 6), larger=True)
    assert not result.changed
    assert [n.reason for n in result.notes] == ["padding"]


def test_folded_norms_are_no_obstacle_and_pruning_comes_before_or_after():
    torch.manual_seed(0)
    net = nn.Sequential(
        conv(3, 8, 3, padding=1), nn.BatchNorm2d(8), conv(8, 8, 1), nn.ReLU(), conv(8, 4, 1)
    )
    program = narrows.capture(net.double().eval(), (torch.randn(2, 3, 6, 6).double(),))
    made = narrows.Pipeline.parse("fold-batch-norm, merge-linear").run(program).program
    assert layers(made) == 3
    x = torch.randn(3, 3, 6, 6).double()
    assert relative_error(made(x), program(x)) <= EXACT
    plan = narrows.plan(made, ratio=0.5)
    assert plan.removed
    narrows.apply(made, plan)  # which holds it to the masked program
    before = narrows.plan(program, ratio=0.5)
    small = narrows.apply(program, before, pipeline="prune-channels, fold-batch-norm, merge-linear")
    assert relative_error(small(x), before.masked(program)(x)) <= EXACT
    assert layers(small) == 3
