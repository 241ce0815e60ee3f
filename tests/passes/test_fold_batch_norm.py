"""fold-batch-norm: what it computes, what it leaves alone, and why."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import narrows
from narrows.ir.compare import relative_error
from narrows.ir.program import Origin, Program
from narrows.ir.text import to_text
from narrows.ir.verify import verify
from narrows.passes.base import TOLERANCE, Fidelity, PassResult
from narrows.passes.fold_batch_norm import FoldBatchNorm
from narrows.passes.instruments import Promises
from narrows.passes.pipeline import Pipeline
from narrows.passes.plans.unfold import unfolded
from tests.builder import Builder, aten, ramp

EXACT = TOLERANCE[Fidelity.EXACT][torch.float64]


def fold(program: Program) -> PassResult:
    """Run the pass, held to its promises."""
    watch, pass_ = Promises(), FoldBatchNorm()
    watch.before(pass_, program)
    result = pass_.run(program)
    watch.after(pass_, program, result, 0.0)
    verify(result.program)
    return result


def ops(program: Program) -> list[str]:
    return [n.target._opname for n in program.nodes if n.op == "call_function"]


def error(a: Program, b: Program) -> float:
    return relative_error(a.run_flat(b.examples), b.run_flat(b.examples))


def randomise(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, -1, 1)
                nn.init.uniform_(module.bias, -1, 1)
    return model.double().eval()


LAYERS = {
    "linear": (nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)), (2, 6)),
    "conv1d": (nn.Sequential(nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8)), (2, 4, 9)),
    "conv2d": (nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8)), (2, 4, 5, 5)),
    "same": (nn.Sequential(nn.Conv2d(4, 8, 3, padding="same"), nn.BatchNorm2d(8)), (2, 4, 5, 5)),
    "grouped": (nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8)), (2, 4, 5, 5)),
    "depthwise": (nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8)), (2, 4, 5, 5)),
    "conv3d": (nn.Sequential(nn.Conv3d(4, 8, 2), nn.BatchNorm3d(8)), (2, 4, 3, 3, 3)),
    "transposed": (nn.Sequential(nn.ConvTranspose2d(4, 8, 3), nn.BatchNorm2d(8)), (2, 4, 5, 5)),
    "transposed-grouped": (
        nn.Sequential(nn.ConvTranspose2d(4, 8, 3, groups=2, bias=False), nn.BatchNorm2d(8)),
        (2, 4, 5, 5),
    ),
    "transposed-1d": (nn.Sequential(nn.ConvTranspose1d(4, 8, 3), nn.BatchNorm1d(8)), (2, 4, 5)),
    "no-affine": (
        nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8, affine=False)),
        (2, 4, 5, 5),
    ),
    "twice": (
        nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8)),
        (2, 4, 5, 5),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_folded_layer_computes_the_same(name: str):
    model, shape = LAYERS[name]
    program = narrows.capture(randomise(model), (torch.randn(shape, dtype=torch.float64),))
    result = fold(program)
    assert result.changed
    assert "batch_norm" not in ops(result.program)
    assert error(result.program, program) <= EXACT
    assert {"0.weight", "0.bias"} == set(result.program.weights)


def test_golden(golden):
    b = Builder((2, 2, 4, 4))
    x = b.relu(b.norm(b.conv(b.inputs[0], "conv1", 4, 2), "norm1", 4), "relu1")
    x = b.relu(b.norm(b.conv(x, "conv2", 4, 4, bias=True), "norm2", 4, affine=False), "relu2")
    program = b.program(b.norm(x, "norm3", 4))
    result = Pipeline((FoldBatchNorm(),)).run(program)
    golden(
        "fold_batch_norm",
        to_text(program, weights=True) + "\n" + to_text(result.program, weights=True),
    )
    assert error(result.program, program) <= TOLERANCE[Fidelity.EXACT][torch.float32]


def test_a_missing_bias_is_made_under_the_modules_name():
    b = Builder((2, 2, 4, 4))
    result = fold(b.program(b.norm(b.conv(b.inputs[0], "a.conv", 4, 2), "a.norm", 4))).program
    assert set(result.weights) == {"a.conv.weight", "a.conv.bias"}
    assert result.buffers == frozenset()


def test_a_bias_of_that_name_is_not_overwritten():
    b = Builder((2, 2, 4, 4))
    other = b.weight("conv.bias", ramp(4, 1, 1))
    y = b.norm(b.conv(b.inputs[0], "conv", 4, 2), "norm", 4)
    program = b.program(b.call(aten.add.Tensor, y, other))
    result = fold(program).program
    assert "conv.bias_1" in result.weights
    assert torch.equal(result.weights["conv.bias"], program.weights["conv.bias"])
    assert error(result, program) <= TOLERANCE[Fidelity.EXACT][torch.float32]


def test_origins_and_other_weights_are_kept():
    b = Builder((2, 2, 4, 4))
    program = b.program(b.norm(b.conv(b.inputs[0], "conv", 4, 2), "norm", 4))
    origin = Origin("conv.weight", (8, 2, 3, 3), ((0, 2, 4, 6), None, None, None))
    program = program.copy()
    program.origins = {"conv.weight": origin}
    assert fold(program).program.origins == {"conv.weight": origin}


def test_it_is_idempotent():
    b = Builder((2, 2, 4, 4))
    program = b.program(b.norm(b.conv(b.inputs[0], "conv", 4, 2), "norm", 4))
    once = fold(program)
    twice = fold(once.program)
    assert not twice.changed
    assert twice.program is once.program


# ------------------------------------------------------------------ what stays, and why


def stays(program: Program) -> tuple[str, str]:
    """Return reason and message of the one note that says why a norm stayed."""
    result = fold(program)
    assert not result.changed
    assert "batch_norm" in ops(result.program)
    (note,) = result.notes
    assert note.source.startswith("net.py:")
    assert note.channels == 0  # a norm that stays keeps no channel
    return note.reason, note.message


def test_an_output_that_is_read_elsewhere_stays():
    b = Builder((2, 2, 4, 4))
    y = b.conv(b.inputs[0], "conv", 4, 2)
    program = b.program(b.norm(y, "norm", 4), b.relu(y))
    assert stays(program) == ("branch", "not folded: the output of conv is also read by relu")


def test_of_many_other_readers_three_are_named():
    b = Builder((2, 2, 4, 4))
    y = b.conv(b.inputs[0], "conv", 4, 2)
    others = [b.call(aten.relu.default, y, name=f"reader_{i}") for i in range(6)]
    program = b.program(b.norm(y, "norm", 4), *others)
    assert stays(program)[1].endswith("read by reader_0, reader_1, reader_2 and 3 more")


def test_a_shared_weight_stays():
    b = Builder((2, 4, 4, 4))
    y = b.norm(b.conv(b.inputs[0], "conv", 4, 4), "norm", 4)
    again = b.call(
        aten.conv2d.default, y, b.weight("conv.weight", ramp(4, 4, 3, 3)), None, [1, 1], [1, 1]
    )
    assert stays(b.program(again)) == (
        "shared",
        "not folded: conv.weight is also read by conv2d_default",
    )


def test_a_shared_bias_stays():
    b = Builder((2, 2, 4, 4))
    y = b.norm(b.conv(b.inputs[0], "conv", 4, 2, bias=True), "norm", 4)
    flat = b.call(aten.mean.dim, y, [2, 3], name="mean")
    out = b.call(aten.add.Tensor, flat, b.weight("conv.bias", ramp(4)), name="add")
    assert stays(b.program(out)) == ("shared", "not folded: conv.bias is also read by add")


def test_a_weight_that_the_data_has_a_part_in_stays():
    b = Builder((2, 2, 4, 4))
    mean = b.call(aten.mean.dim, b.inputs[0], [0, 1, 2, 3], name="mean")
    w = b.call(aten.mul.Tensor, b.weight("conv.weight", ramp(4, 2, 3, 3)), mean, name="scaled")
    y = b.call(aten.conv2d.default, b.inputs[0], w, None, name="conv")
    assert stays(b.program(b.norm(y, "norm", 4))) == (
        "computed",
        "not folded: the weight of conv is computed by scaled",
    )


def test_a_weight_that_is_computed_from_weights_is_computed_and_takes_the_norm_in():
    b = Builder((2, 2, 4, 4))
    w = b.call(aten.tanh.default, b.weight("conv.weight", ramp(4, 2, 3, 3)), name="tanh")
    y = b.call(aten.conv2d.default, b.inputs[0], w, None, name="conv")
    program = b.program(b.norm(y, "norm", 4))
    result = fold(program)
    assert ops(result.program) == ["conv2d"]
    x = ramp(2, 2, 4, 4)
    assert relative_error(result.program(x), program(x)) < 1e-6


def test_a_norm_by_batch_statistics_stays():
    b = Builder((2, 2, 4, 4))
    y = b.conv(b.inputs[0], "conv", 4, 2)
    norm = b.call(
        aten.batch_norm.default, y, None, None, None, None, True, 0.1, 1e-5, False, name="norm"
    )
    assert stays(b.program(norm)) == (
        "training",
        "not folded: it normalises by the statistics of its input",
    )


def test_a_norm_over_another_axis_than_the_linear_layers_stays():
    b = Builder((2, 4, 6))
    w = b.weight("fc.weight", ramp(5, 6))
    y = b.call(aten.linear.default, b.inputs[0], w, name="fc")
    assert stays(b.program(b.norm(y, "norm", 4))) == (
        "axis",
        "not folded: it normalises another axis than the output channels of fc",
    )


def test_a_second_norm_waits_for_the_first():
    b = Builder((2, 2, 4, 4))
    y = b.conv(b.inputs[0], "conv", 4, 2)
    first = b.norm(y, "norm1", 4)
    program = b.program(b.norm(first, "norm2", 4), b.relu(y))
    assert [n.reason for n in fold(program).notes] == ["branch", "norm"]


def test_a_norm_before_the_convolution_stays_without_a_note():
    b = Builder((2, 2, 4, 4))
    program = b.program(b.conv(b.norm(b.inputs[0], "norm", 2), "conv", 4, 2))
    result = fold(program)
    assert not result.changed
    assert result.notes == ()
    assert result.program is program


def test_one_norm_that_stays_does_not_hold_up_another():
    b = Builder((2, 2, 4, 4))
    y = b.conv(b.inputs[0], "conv1", 4, 2)
    z = b.norm(b.conv(b.norm(y, "norm1", 4), "conv2", 4, 4), "norm2", 4)
    result = fold(b.program(z, b.relu(y)))
    assert ops(result.program).count("batch_norm") == 1
    assert [n.where for n in result.notes] == ["norm1"]


def added(**how: float) -> Program:
    """Return ``norm(addmm(bias, x, weight))``, whose weight is [in, out]."""
    b = Builder((5, 3), dtype=torch.float64)
    shape = (5, 4) if how.pop("matrix", 0) else (4,)
    double = torch.float64
    bias = b.weight("b", ramp(*shape, dtype=double))
    weight = b.weight("w", ramp(3, 4, dtype=double))
    y = b.call(aten.addmm.default, bias, b.inputs[0], weight, **how)
    norm = [
        b.weight(name, ramp(4, dtype=double).abs() + 0.5)
        for name in ("gain", "shift", "mean", "var")
    ]
    return b.program(b.call(aten.batch_norm.default, y, *norm, False, 0.1, 1e-5, True))


def test_a_product_with_its_weight_the_other_way_round_takes_a_norm() -> None:
    program = added()
    result = fold(program).program
    assert ops(result) == ["addmm"]
    assert error(result, program) <= EXACT
    back = unfolded(program, result)
    assert ops(back) == ["addmm", "batch_norm"]
    assert error(back, program) <= EXACT


@pytest.mark.parametrize("how", [{"alpha": 2.0}, {"beta": 0.5}, {"matrix": 1}])
def test_a_product_that_scales_its_terms_does_not(how: dict[str, float]) -> None:
    result = fold(added(**how))
    assert not result.changed
    assert [n.reason for n in result.notes] == ["bias"]


def test_a_folded_network_still_trains():
    b = Builder((2, 2, 4, 4))
    program = b.program(b.norm(b.conv(b.inputs[0], "conv", 4, 2), "norm", 4))
    module = fold(program).program.to_module().train()
    module(*program.examples).sum().backward()
    assert {n for n, p in module.named_parameters() if p.grad is not None} == {
        "conv.weight",
        "conv.bias",
    }
