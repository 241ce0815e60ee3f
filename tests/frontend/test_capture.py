"""What `capture` keeps of a model: inputs, outputs, weights by name, the batch, and training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from narrows.errors import ProgramError
from narrows.frontend import capture
from narrows.ir.compare import relative_error
from narrows.ir.meta import Meta, op_name
from narrows.ir.program import Program
from narrows.ir.verify import verify


class Residual(nn.Module):
    """A convolution block with an in-place residual, then a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        y = self.norm(self.conv(x))
        y += x
        return self.head(self.drop(self.relu(y).mean((2, 3))))


def build(module: nn.Module, seed: int = 0) -> Any:
    """Return the module in float64 and eval mode with random statistics and affine parts."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.1)
    return module


def images(batch: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 6, 6, generator=generator, dtype=torch.float64)


def assert_equal(program: Program, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    with torch.no_grad():
        expected = model(*args, **kwargs)
    assert relative_error(program(*args, **kwargs), expected) <= 1e-12


@pytest.fixture(scope="module")
def residual() -> Residual:
    return build(Residual())


@pytest.fixture(scope="module")
def program(residual: Residual) -> Program:
    return capture(residual, images(1))


def test_program_equals_model_at_every_batch(residual: Residual, program: Program) -> None:
    verify(program, shapes=True)
    for batch in (1, 2, 5):
        assert_equal(program, residual, images(batch, seed=batch))


def test_graph_reads_like_the_model(program: Program) -> None:
    nodes = [(n.name, op_name(n)) for n in program.nodes if n.op == "call_function"]
    assert nodes == [
        ("stem_0", "conv2d.default"),
        ("stem_1", "batch_norm.default"),
        ("relu", "relu.default"),
        ("conv", "conv2d.default"),
        ("norm", "batch_norm.default"),
        ("add", "add.Tensor"),
        ("relu_1", "relu.default"),
        ("mean", "mean.dim"),
        ("drop", "dropout.default"),
        ("head", "linear.default"),
    ]


def test_weights_stand_right_before_their_first_reader(program: Program) -> None:
    names = [n.name for n in program.nodes]
    assert names[:4] == ["x", "stem_0_weight", "stem_0_bias", "stem_0"]


def test_weights_keep_their_names_and_order(residual: Residual, program: Program) -> None:
    expected = [n for n in residual.state_dict() if not n.endswith("num_batches_tracked")]
    assert list(program.weights) == expected
    assert program.buffers == {n for n in expected if "running" in n}
    assert program.weights["conv.weight"].data_ptr() == residual.conv.weight.data_ptr()


def test_batch_of_one_is_traced_at_two(program: Program) -> None:
    assert program.dynamic_batch
    assert program.examples[0].shape == (2, 3, 6, 6)
    meta = Meta(program.node("conv"))
    assert (meta.shape, meta.dtype, meta.dynamic) == ((2, 4, 6, 6), torch.float64, (0,))
    assert Meta(program.node("conv_weight")).dynamic == ()


def test_large_batch_is_cut(residual: Residual) -> None:
    inputs = images(7)
    program = capture(residual, inputs)
    assert torch.equal(program.examples[0], inputs[:2])


def test_fixed_batch_on_request(residual: Residual) -> None:
    program = capture(residual, images(1), dynamic_batch=False)
    assert not program.dynamic_batch
    assert program.notes == ()
    assert_equal(program, residual, images(1, seed=3))
    with pytest.raises(ProgramError, match="shape"):
        program(images(2))


def test_model_is_left_as_it_was(residual: Residual) -> None:
    before = {n: t.clone() for n, t in residual.state_dict().items()}
    hooks, inputs = dict(vars(residual)), images(1)
    copy = inputs.clone()
    capture(residual, inputs)
    assert vars(residual).keys() == hooks.keys()
    assert not residual.training
    assert torch.equal(inputs, copy)
    assert all(torch.equal(before[n], t) for n, t in residual.state_dict().items())


def test_attributes_that_forward_assigns_are_put_back() -> None:
    class Caches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.last = x * 2
            return self.last + 1

    model = Caches().eval()
    assert_equal(capture(model, images(1)), model, images(3))
    assert model.calls == 1  # the call of assert_equal
    model = Caches().eval()
    capture(model, images(1))
    assert model.calls == 0
    assert not hasattr(model, "last")


def test_a_model_that_is_run_to_see_its_types_is_left_as_it_was() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.calls = nn.Embedding(5, 3), 0
            self.cache: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.cache is None:
                self.cache = torch.arange(3.0)
            return self.words(x) * self.cache

    model = Counting().eval()
    program = capture(model, torch.tensor([[1, 2]]))
    assert (model.calls, model.cache) == (0, None)
    assert "cache" not in program.weights


def test_name_is_the_class_unless_given(residual: Residual, program: Program) -> None:
    assert program.name == "residual"
    assert capture(residual, images(1), name="net").name == "net"


# ---------------------------------------------------------------------- inputs and outputs


class Nested(nn.Module):
    """Takes a dict, a list and keywords; returns them nested, with a size and a None."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(5, 4)

    def forward(
        self, pair: dict[str, Any], scale: float, *, extra: Tensor | None = None, flip: bool = False
    ) -> Any:
        total = self.left(pair["a"]) + self.right(pair["rest"][0]) * scale
        if extra is not None:
            total = total - extra
        if flip:
            total = -total
        return {"total": total, "parts": (total * 2, None), "batch": total.shape[0]}


def nested_inputs(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    generator = torch.Generator().manual_seed(batch)

    def make(width: int) -> Tensor:
        return torch.randn(batch, width, generator=generator, dtype=torch.float64)

    return ({"a": make(3), "rest": [make(5)]}, 0.5), {"flip": True, "extra": make(4)}


def test_nested_inputs_keywords_and_outputs() -> None:
    model = build(Nested())
    args, kwargs = nested_inputs(1)
    program = capture(model, args, kwargs=kwargs)
    verify(program, shapes=True)
    assert all(Meta(n).dynamic == (0,) for n in program.placeholders if Meta(n).shape)
    for batch in (1, 2, 4):
        args, kwargs = nested_inputs(batch)
        assert_equal(program, model, *args, **kwargs)
        assert program(*args, **kwargs)["batch"] == batch
        assert_equal(program, model, *args, **dict(reversed(kwargs.items())))


def test_constants_among_the_inputs_are_checked() -> None:
    args, kwargs = nested_inputs(2)
    program = capture(build(Nested()), args, kwargs=kwargs)
    with pytest.raises(ProgramError, match="captured with True"):
        program(*args, **{**kwargs, "flip": False})
    with pytest.raises(ProgramError, match="another structure"):
        program(*args)


def test_keywords_of_a_forward_with_var_keywords() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Nested()

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

    model = build(Wrapper())
    args, kwargs = nested_inputs(1)
    program = capture(model, args, kwargs=kwargs)
    assert program.dynamic_batch
    assert "forward" not in vars(model)
    args, kwargs = nested_inputs(3)
    assert_equal(program, model, *args, **kwargs)


def test_only_inputs_of_the_batch_size_are_free() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
            return x * table[0], table.sum()

    model = Scaled().eval()
    program = capture(model, (images(2), images(5)[:, :, :1, :1]))
    assert [Meta(n).dynamic for n in program.placeholders] == [(0,), ()]
    assert_equal(program, model, images(4), images(5)[:, :, :1, :1])


def test_one_tensor_given_twice_stays_two_inputs() -> None:
    class Difference(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x - y

    program = capture(Difference().eval(), (images(2), images(2)))
    assert_equal(program, Difference(), images(3, seed=1), images(3, seed=2))


def test_input_and_weight_as_outputs() -> None:
    class Echo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return x, self.weight, x

    model = build(Echo())
    program = capture(model, images(2))
    verify(program, shapes=True)
    assert_equal(program, model, images(3))


# ---------------------------------------------------------------------- weights


class Tied(nn.Module):
    """An encoder and a decoder that are one matrix, and a buffer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(4, 4)
        self.decoder.weight = self.encoder.weight
        self.register_buffer("offset", torch.ones(4))
        self.register_buffer("same", self.offset)
        self.register_buffer("local", torch.ones(4), persistent=False)
        self.plain = torch.full((4,), 2.0, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.decoder(torch.relu(self.encoder(x))) + self.offset * self.same
        return (x - self.local) * self.plain + torch.tensor([1.0, 2.0, 3.0, 4.0])


def tied() -> Any:
    model = build(Tied())
    model.same = model.offset  # .double() makes two of them
    return model


def test_shared_weights_stand_once() -> None:
    model = tied()
    program = capture(model, torch.randn(2, 4, dtype=torch.float64))
    verify(program, shapes=True)
    assert program.aliases == {"decoder.weight": "encoder.weight", "same": "offset"}
    assert len(program.users_of("decoder.weight")) == 2
    assert program.state_dict()["decoder.weight"] is program.weights["encoder.weight"]


def test_buffers_and_literals_have_names() -> None:
    program = capture(tied(), torch.randn(2, 4, dtype=torch.float64))
    assert program.buffers == {"offset", "local", "plain", "const_0"}
    assert program.weights["const_0"].tolist() == [1.0, 2.0, 3.0, 4.0]


def test_a_checkpoint_holds_the_persistent_buffers_but_no_literals() -> None:
    model, inputs = tied(), torch.randn(2, 4, dtype=torch.float64)
    program = capture(model, inputs)
    assert program.stored == program.buffers & model.state_dict().keys()
    assert "const_0" not in program.stored
    state = {n: t for n, t in model.state_dict().items() if n not in ("offset", "same")}
    with pytest.raises(ProgramError, match="no weight 'offset'"):
        program.with_weights(state)
    assert_equal(program.with_weights(model.state_dict()), model, inputs)
    again = capture(program.to_module(), inputs)
    assert again.stored == program.stored
    assert_equal(again.with_weights(model.state_dict()), model, inputs)


def test_tied_weights_stay_tied_in_the_module() -> None:
    model = tied()
    inputs = torch.randn(2, 4, dtype=torch.float64)
    program = capture(model, inputs)
    module = program.to_module()
    assert module.decoder.weight is module.encoder.weight
    again = capture(module, inputs)
    assert again.aliases == program.aliases
    assert set(again.weights) == set(program.weights)
    assert_equal(again, model, inputs)


# ---------------------------------------------------------------------- the round trip


def test_module_trains_and_is_captured_again(residual: Residual, program: Program) -> None:
    torch.manual_seed(0)
    module = program.to_module()
    assert_equal(program, module, images(2))
    module.train()
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
    inputs, mean = images(4), module.state_dict()["norm.running_mean"].clone()
    losses = []
    for _ in range(3):
        loss = module(inputs).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    module.eval()
    assert losses[-1] < losses[0]
    assert not torch.equal(module.state_dict()["norm.running_mean"], mean)
    again = capture(module, images(1))
    verify(again, shapes=True)
    assert_equal(again, module, images(3))
    assert relative_error(again(inputs), program(inputs)) > 1e-3


def test_recapture_keeps_names_and_provenance(program: Program) -> None:
    again = capture(program.to_module(), images(1))
    assert again.name == program.name
    assert [n.name for n in again.nodes] == [n.name for n in program.nodes]
    for old, new in zip(program.nodes, again.nodes, strict=True):
        for key in ("source", "code", "module", "shape", "dtype", "dynamic"):
            assert getattr(Meta(new), key) == getattr(Meta(old), key), (new.name, key)


def test_module_inside_another_is_captured(residual: Residual, program: Program) -> None:
    model = nn.Sequential(program.to_module(), nn.Softmax(1)).eval()
    again = capture(model, images(1))
    assert "0.stem.0.weight" in again.weights
    assert_equal(again, model, images(3))


def test_a_module_of_a_weight_normed_model_is_captured_again() -> None:
    layer = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 3))
    model, x = build(nn.Sequential(layer, nn.ReLU())), images(2)
    again = capture(capture(model, (x,)).to_module(), (x,))
    assert_equal(again, model, x)


# ---------------------------------------------------------------------- other kinds of models


def test_graph_module(residual: Residual) -> None:
    program = capture(fx.symbolic_trace(residual).eval(), images(1))
    verify(program, shapes=True)
    assert "stem.0.weight" in program.weights
    assert program.node("stem_0").target is torch.ops.aten.conv2d.default
    assert_equal(program, residual, images(3))


def test_graph_module_that_remembers_its_source(residual: Residual) -> None:
    tracer = fx.Tracer()
    tracer.record_stack_traces = True
    traced = fx.GraphModule(residual, tracer.trace(residual)).eval()
    program = capture(traced, images(1))
    meta = Meta(program.node("conv"))
    assert meta.source.startswith("tests/frontend/test_capture.py:")
    assert meta.code == "y = self.norm(self.conv(x))"


def test_compiled_module_is_unwrapped(residual: Residual) -> None:
    program = capture(torch.compile(residual, backend="eager"), images(1))
    assert "conv.weight" in program.weights


def test_sequential_has_valid_names() -> None:
    model = build(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Sequential(nn.Flatten())))
    program = capture(model, images(1))
    verify(program, shapes=True)
    names = [n.name for n in program.nodes]
    assert names == ["input_1", "_0_weight", "_0_bias", "_0", "_1", "_2_0", "output"]


def test_attention_is_plain_operators() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x)

    model = build(Attention()).requires_grad_(False)
    inputs = torch.randn(1, 5, 8, dtype=torch.float64)
    program = capture(model, inputs)
    assert {op_name(n) for n in program.nodes} >= {"linear.default", "layer_norm.default"}
    assert not any("native" in op_name(n) or "fwd" in op_name(n) for n in program.nodes)
    assert_equal(program, model, torch.randn(3, 5, 8, dtype=torch.float64))
