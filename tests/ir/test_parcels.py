"""A program that was pickled is the same program, sealed, and of the same plans."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

import narrows
from narrows.errors import ProgramError
from narrows.ir.program import Program
from narrows.passes.plans.plan import fingerprint
from tests.networks import NETWORKS


def again(program: Program) -> Program:
    return pickle.loads(pickle.dumps(program))


@pytest.mark.parametrize("name", sorted(NETWORKS)[::12])
def test_a_pickled_program_is_the_same(name: str):
    network = NETWORKS[name]
    program = narrows.capture(network.build(), network.inputs())
    made = again(program)
    assert str(made) == str(program)
    assert fingerprint(made) == fingerprint(program)
    assert (made.in_spec, made.out_spec) == (program.in_spec, program.out_spec)
    for found, wanted in zip(
        made.run_flat(made.examples), program.run_flat(program.examples), strict=True
    ):
        torch.testing.assert_close(found, wanted, atol=0, rtol=0, equal_nan=True)


def test_integers_go_as_well_and_what_was_pruned_does_not():
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)).eval()
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    program = narrows.capture(net, (x,))
    made = narrows.quantize(program, [x]).program
    assert torch.equal(again(made)(x), made(x))
    small = narrows.apply(program, narrows.plan(program, ratio=0.5))
    assert small.pruning is not None
    assert again(small).pruning is None
    assert again(small).origins == small.origins
    with pytest.raises(ProgramError, match="a finished program is not changed"):
        again(small).name = "other"
    assert not hasattr(again(small.copy()), "_sealed")
