"""Every construct that cannot be captured has an error that says which, where, and what to do."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from narrows.errors import CaptureError
from narrows.frontend import capture
from narrows.ir.compare import relative_error

HERE = "tests/frontend/test_refuse.py:"


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(4))
        self.eval()


def refused(model: Any, *inputs: Any, **options: Any) -> CaptureError:
    with pytest.raises(CaptureError) as info:
        capture(model, inputs or (torch.randn(2, 4),), **options)
    return info.value


# ---------------------------------------------------------------------- in forward


class Branch(Model):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # here
            return self.linear(x)
        return x


class Loop(Model):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(x[0, 0])):  # here
            x = self.linear(x)
        return x


class Select(Model):
    def forward(self, x: Tensor) -> Tensor:
        return x[x > 0]  # here


class Listed(Model):
    def forward(self, x: Tensor) -> Tensor:
        return x * x[0].tolist()[0]  # here


class Parts(Model):
    def forward(self, x: Tensor) -> Tensor:
        return x.tensor_split(torch.tensor([1, 3]), 1)[1]  # here


class Conditional(Model):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))  # here


class Spectrum(Model):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(x).abs()  # here


class Noise(Model):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand(4)  # here


class AlwaysDrops(Model):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.1)  # here


class Autocast(Model):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.linear(x)  # here


class Numpy(Model):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy() * 2)  # here


class Counts(Model):
    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)  # here
        return x + self.count


class BatchStatistics(Model):
    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.count, self.count
        return nn.functional.batch_norm(x, mean, var, training=True)  # here


@pytest.mark.parametrize(
    ("model", "what", "hint"),
    [
        (Branch, "control flow, or a size, depends on the data", "torch.where"),
        (Loop, "control flow, or a size, depends on the data", "plain Python argument"),
        (Select, "a size or a number depends on the data", "torch.where"),
        (Parts, "a size or a number depends on the data", "torch.where"),
        (Listed, "a size or a number depends on the data", "plain Python argument"),
        (Conditional, "operator cond", "torch.where"),
        (Spectrum, "complex", "keep that part out"),
        (Noise, "draws random numbers", "pass noise in"),
        (AlwaysDrops, "draws random numbers", "training=self.training"),
        (Autocast, "autocast", ".to(dtype)"),
        (Numpy, "numpy", "keep numpy"),
        (Counts, "forward changes 'count'", "return the value as an output"),
        (BatchStatistics, "updates its running ones", "model.eval()"),
    ],
)
def test_construct_is_named_with_its_line(model: type[Model], what: str, hint: str) -> None:
    error = refused(model())
    assert what in error.what
    assert error.where.startswith(HERE)
    assert "# here" in error.where
    assert hint in error.hint


def test_failed_capture_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    refused(Branch())
    assert capfd.readouterr() == ("", "")


def test_buffer_that_is_assigned() -> None:
    class Replaces(Model):
        def forward(self, x: Tensor) -> Tensor:
            self.count = self.count + 1
            return x + self.count

    assert "'count'" in refused(Replaces()).what


def test_outputs_of_an_unknown_class() -> None:
    class Result:
        pass

    class Returns(Model):
        def forward(self, x: Tensor) -> Result:
            return Result()

    error = refused(Returns())
    assert "no tensor" in error.what
    assert "Returns.forward" in error.where
    assert "register_pytree_node" in error.hint


def test_model_that_fails_by_itself() -> None:
    error = refused(Branch(), torch.randn(2, 5))
    assert "fails on the example inputs" in refused(nn.Linear(4, 4).eval(), torch.randn(2, 5)).what
    assert error.where.startswith(HERE)


# ---------------------------------------------------------------------- the model


def test_train_mode() -> None:
    error = refused(nn.Linear(4, 4).train())
    assert "train mode" in error.what
    assert "model.eval()" in error.hint


def test_submodule_in_train_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    model[1].train()
    assert "model.eval()" in refused(model).hint


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weight_that_is_not_finite(bad: float) -> None:
    model = nn.Linear(4, 4).eval()
    with torch.no_grad():
        model.weight[1, 2] = bad
    error = refused(model)
    assert "'weight'" in error.what
    assert "1 NaN or infinite entry of 16" in error.what


def test_large_finite_weights_and_infinite_masks_are_fine() -> None:
    class Masked(Model):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.tensor([0.0, 0.0, float("-inf"), 0.0]))
            nn.init.constant_(self.linear.weight, 3e38)  # the sum overflows, no entry does

        def forward(self, x: Tensor) -> Tensor:
            return (self.linear(x * 0) + self.mask).softmax(-1)

    model, inputs = Masked(), torch.randn(2, 4)
    assert relative_error(capture(model, inputs)(inputs), model(inputs)) == 0


def test_complex_weight() -> None:
    class Rotates(Model):
        def __init__(self) -> None:
            super().__init__()
            self.phase = nn.Parameter(torch.ones(4, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.phase).real

    assert refused(Rotates()).what == "weight 'phase' is complex (torch.complex64)"


def test_quantized_module() -> None:
    class Quantized(nn.Linear):
        pass

    Quantized.__module__ = "torch.ao.nn.quantized.modules.linear"
    error = refused(nn.Sequential(Quantized(4, 4)).eval())
    assert "0 is already quantized (Quantized)" in error.what


def test_lazy_module() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.LazyLinear(4).eval()
    assert "run the model once" in refused(model).hint


def test_scripted_module() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.jit.script(nn.Linear(4, 4).eval())
    assert "TorchScript" in refused(model).what


def test_quantized_input() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.quantize_per_tensor(torch.ones(2, 4), 0.1, 0, torch.qint8)
    assert refused(Branch(), quantized).what == "input 0 is quantized (torch.qint8)"


def test_pruned_weight_is_noted() -> None:
    model = Branch().linear.eval()
    prune.l1_unstructured(model, "weight", 0.5)
    program = capture(model, torch.randn(2, 4))
    assert [(n.where, n.reason) for n in program.notes] == [("weight", "reparametrised")]
    assert {"weight_orig", "weight_mask"} <= set(program.weights)
    prune.remove(model, "weight")
    assert capture(model, torch.randn(2, 4)).notes == ()


# ---------------------------------------------------------------------- the arguments


def test_not_a_model() -> None:
    assert refused(lambda x: x).what == "cannot capture a function"


def test_inputs_left_out() -> None:
    with pytest.raises(CaptureError, match="needs example_inputs"):
        capture(nn.Linear(4, 4).eval())


@pytest.mark.parametrize(
    ("inputs", "what"),
    [
        ((torch.ones(2, 4, dtype=torch.complex64),), "input 0 is complex"),
        ((torch.ones(2, 4).to_sparse(),), "input 0 is sparse"),
        ((torch.ones(2, 4), object()), "input 1 is a object"),
        ((3,), "no tensor"),
        ((torch.ones(0, 4),), "batch is empty"),
        ({"x": 1}, "example_inputs is a dict"),
    ],
)
def test_unfit_inputs(inputs: Any, what: str) -> None:
    with pytest.raises(CaptureError, match=what):
        capture(nn.Linear(4, 4).eval(), inputs)


@pytest.mark.parametrize(("weights", "example"), [("half", "float"), ("float", "double")])
def test_inputs_of_another_precision_than_the_weights(weights: str, example: str) -> None:
    """torch.export would take them: without data, no layer minds."""
    model = getattr(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), weights)()
    error = refused(model, getattr(torch.randn(2, 3, 6, 6), example)())
    assert "the model fails on the example inputs" in error.what
    assert str(next(model.parameters()).dtype) in error.hint
    assert ".to(dtype)" in error.hint
