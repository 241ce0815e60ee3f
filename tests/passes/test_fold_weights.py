"""Weights that are computed from weights become weights before anything is quantized."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import narrows
from narrows.ir.compare import relative_error
from narrows.ir.verify import verify
from narrows.passes.quant.fold_weights import FoldWeights


class Written(nn.Module):
    """A layer, and another one whose weight forward makes."""

    def __init__(self, second: Callable[[nn.Conv2d, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.layer, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), second

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.layer, self.first(x).relu())


class Crossed(nn.Module):
    """Attention whose queries and keys are made by parts of one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)[..., :40].unflatten(-1, (5, 8)).flatten(1, 2)
        return self.attention(tokens[:, :4], tokens, tokens, need_weights=False)[0]


NETS: dict[str, Callable[[], nn.Module]] = {
    "normed": lambda: nn.Sequential(weight_norm(nn.Conv2d(3, 6, 3)), nn.ReLU(), nn.Conv2d(6, 2, 1)),
    "standardised": lambda: Written(lambda layer, x: F.conv2d(
        x, (layer.weight - layer.weight.mean((1, 2, 3), True)) * 1.5, layer.weight.sum((1, 2, 3)))),
    "blur": lambda: Written(lambda layer, x: F.conv2d(
        x, layer.weight[:1, :1].abs().expand(6, 1, 3, 3), groups=6)),
    "norm": lambda: Written(lambda layer, x: F.group_norm(x, 2, layer.weight[0, :, 0, 0] + 1)),
    "parts": Crossed,
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_nothing_that_is_computed_from_weights_stays_float(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    program = narrows.capture(NETS[name]().eval(), (x,))
    result = FoldWeights().run(program)
    assert result.changed
    verify(result.program)
    assert relative_error(result.program(x), program(x)) == 0
    assert not FoldWeights().run(result.program).changed
    made = narrows.quantize(program, [x], strict=True)
    assert relative_error(made.program(x), program(x)) < 0.05
    again = narrows.quantize(program, plan=made.plan)
    assert torch.equal(again.program(x), made.program(x))


def test_what_the_data_has_a_part_in_stays() -> None:
    net = Written(lambda layer, x: F.conv2d(x, layer.weight * x.mean()))
    program = narrows.capture(net.eval(), (torch.randn(2, 3, 8, 8),))
    assert not FoldWeights().run(program).changed
