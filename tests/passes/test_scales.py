"""What a layer's error comes to at the outputs, once all behind it is repaired."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

import narrows
from narrows.passes.choosing.divergence import Divergence
from narrows.passes.choosing.prepare import prepared
from narrows.passes.choosing.reads import reads_of
from narrows.passes.choosing.scales import MENDED, behind, compared
from narrows.passes.choosing.statistics import measured


class Branches(nn.Module):
    """Two paths, one of two layers and one of none, then a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.head((x + self.two(self.one(x).relu())).relu())


def test_layers_are_counted_along_the_longest_way():
    reads = reads_of(prepared(narrows.capture(Branches().eval(), (torch.randn(2, 4),))))
    found = dict(zip([p.layer.weight for p in reads.products], behind(reads), strict=True))
    assert found == {"stem.weight": 3, "one.weight": 2, "two.weight": 1, "head.weight": 0}


def test_an_error_is_what_it_does_less_what_the_layers_behind_make_up_for():
    """All channels of one layer are taken away by hand, the rest of the network runs."""
    torch.manual_seed(0)
    program = prepared(narrows.capture(Branches().eval(), (torch.randn(2, 4),)))
    reads, x = reads_of(program), torch.randn(64, 4)
    divergence = Divergence.of(program.run_flat([x]), "logits")
    found = measured(program, reads, [[x]], divergence)
    _, true = compared(program, reads, [(found, [[x]])], divergence, reads.all(), 1.0)
    number = [p.layer.weight for p in reads.products].index("one.weight")
    without = {**program.weights, "one.weight": torch.zeros_like(program.weights["one.weight"])}
    # A constant is all that is left, and the mean of what it made is the best one.
    w = program.weights
    y = nn.functional.linear(x, w["stem.weight"], w["stem.bias"]).relu()
    y = nn.functional.linear(y, w["one.weight"], w["one.bias"])
    without["one.bias"] = y.mean(0)
    far = divergence.between(program.run_flat([x]), program.run_flat([x], without))
    np.testing.assert_allclose(true[number], far * np.exp(-2 * MENDED), rtol=1e-4)
