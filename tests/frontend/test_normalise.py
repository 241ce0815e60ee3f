"""The dialect: no writes, no dead or idle nodes, literals folded, provenance on every node."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from narrows.errors import CaptureError
from narrows.frontend import capture
from narrows.ir.compare import relative_error
from narrows.ir.meta import Meta, op_name
from narrows.ir.program import Program
from narrows.ir.verify import verify

Forward = Callable[[Any, Tensor], Any]


class Around(nn.Module):
    """A module around one forward function, with a few weights to read."""

    def __init__(self, function: Forward) -> None:
        super().__init__()
        self.function = function
        self.scale = nn.Parameter(torch.linspace(-1, 2, 4, dtype=torch.float64))
        self.register_buffer("table", torch.linspace(0, 3, 16, dtype=torch.float64).view(4, 4))
        self.register_buffer("order", torch.tensor([2, 0, 3, 1]))
        self.conv = nn.Conv1d(4, 4, 1, dtype=torch.float64)
        self.eval()

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def rows(batch: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, 6, generator=generator, dtype=torch.float64)


def checked(function: Forward, *, free: bool = True) -> Program:
    """Return the program of a function; it equals the function at several batch sizes."""
    model = Around(function)
    program = capture(model, rows(2), dynamic_batch=free)
    verify(program, shapes=True)
    assert program.dynamic_batch is free
    for batch in (1, 2, 5) if free else (2,):
        with torch.no_grad():
            expected = model(rows(batch, seed=batch))
        assert relative_error(program(rows(batch, seed=batch)), expected) <= 1e-12
    return program


def ops(program: Program) -> list[str]:
    return [op_name(n).partition(".")[0] for n in program.nodes if n.op == "call_function"]


# ---------------------------------------------------------------------- writes that are renamed


def relu_then_add(m: Any, x: Tensor) -> Tensor:
    y = x * 2
    z = y.relu_()
    z += x
    return y - z


def through_a_view(m: Any, x: Tensor) -> Tensor:
    y = (x * 2).view(-1, 24)
    y.mul_(3)
    return y.sigmoid()


def into_an_input(m: Any, x: Tensor) -> Tensor:
    return torch.relu_(x.clone()) + nn.functional.relu(x, inplace=True)


def chained(m: Any, x: Tensor) -> Tensor:
    y = x + 1
    y.clamp_(-1, 1).mul_(2).sub_(x)
    y.masked_fill_(y > 0.5, 7.0)
    return y


def narrow_type_stays(m: Any, x: Tensor) -> Tensor:
    y = x.float() * 2
    y.add_(x)  # float32 += float64
    return y


def fills(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    a, b, c = x + 1, x + 2, x + 3
    a.zero_()
    b.fill_(4)
    c.copy_(m.scale.view(4, 1))
    return a, b, c


def copy_of_another_type(m: Any, x: Tensor) -> Tensor:
    y = (x * 2).float()
    y.copy_(x)
    return y


@pytest.mark.parametrize(
    "function",
    [
        relu_then_add,
        through_a_view,
        into_an_input,
        chained,
        narrow_type_stays,
        fills,
        copy_of_another_type,
    ],
)
def test_writes_become_functional(function: Forward) -> None:
    assert not any("scatter" in name or name == "cat" for name in ops(checked(function)))


def test_renaming_does_not_retrace() -> None:
    program = checked(relu_then_add)
    assert ops(program) == ["mul", "relu", "add", "sub"]


def test_write_into_an_input_is_noted() -> None:
    program = checked(into_an_input)
    (note,) = program.notes
    assert (note.reason, note.where) == ("input-mutation", "x")
    inputs = rows(2)
    before = inputs.clone()
    program(inputs)
    assert torch.equal(inputs, before)


# ---------------------------------------------------------------------- writes that others see


def base_read_after_a_write_to_its_view(m: Any, x: Tensor) -> Tensor:
    y = x * 2
    y[:, 1:3].add_(5)
    return y


def view_read_after_a_write_to_its_base(m: Any, x: Tensor) -> Tensor:
    y = x * 2
    view = y.transpose(1, 2)
    y.relu_()
    return view + 1


def interleaved(m: Any, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    y[..., ::2] = x[..., 1::2]
    y[..., 1::2] = -x[..., ::2]
    return y


def input_seen_through_dropout(m: Any, x: Tensor) -> Tensor:
    y = x + 0.5
    z = nn.functional.dropout(y, 0.5, training=False)  # in eval mode, y itself
    z.mul_(2)
    return y


def chunks_of_one_tensor(m: Any, x: Tensor) -> Tensor:
    y = x.exp()
    left, right = y.chunk(2, 1)
    left.mul_(right)
    return y.flatten(1)


def bytes_of_another_type(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    y = x * 2
    y.view(torch.int64).add_(1)
    return y, x.view(torch.int64)


def kinds_of_views(m: Any, x: Tensor) -> Tensor:
    y = x[:, :, :4].contiguous() + 0
    y.diagonal(0, 1, 2).zero_()
    y.narrow(2, 1, 2).mul_(3)
    y.movedim(0, 2).swapaxes(1, 2)[0].neg_()
    y.view(-1, 2, 2, 4).unbind(1)[1].select(1, 0).exp_()
    y[0].t()[1:].fill_(9)
    y.split([1, 3], 1)[1][:, :1].squeeze(1).add_(1)
    return y


def through_a_view_without_a_scatter(m: Any, x: Tensor) -> Tensor:
    y = x * 2
    torch.as_strided(y, (3,), (2,)).zero_()
    with torch.no_grad():
        return nn.functional.batch_norm(m.conv(y), m.scale, m.scale.square() + 1)


def with_a_batch_norm(m: Any, x: Tensor) -> Tensor:
    y = nn.functional.batch_norm(m.conv(x), m.scale, m.scale.square() + 1, m.scale, m.scale)
    y[:, 0].neg_()
    with torch.no_grad():
        return y.softmax(-1)


@pytest.mark.parametrize(
    "function",
    [
        base_read_after_a_write_to_its_view,
        view_read_after_a_write_to_its_base,
        interleaved,
        input_seen_through_dropout,
        chunks_of_one_tensor,
        bytes_of_another_type,
        kinds_of_views,
        through_a_view_without_a_scatter,
        with_a_batch_norm,
    ],
)
def test_writes_that_others_see(function: Forward) -> None:
    checked(function)


def test_views_are_scattered_only_where_somebody_reads() -> None:
    assert ops(checked(base_read_after_a_write_to_its_view)) == [
        "mul", "slice", "add", "slice", "slice", "cat"
    ]  # fmt: skip


def test_batch_that_torch_fixes_while_it_functionalises() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        y = x * 2
        y.unfold(2, 2, 2)[..., 0].zero_()
        return y

    program = capture(Around(function), rows(1))
    assert [n.reason for n in program.notes] == ["fixed-batch"]
    assert program.examples[0].shape[0] == 1
    assert relative_error(program(rows(1)), function(None, rows(1))) == 0


def test_undeclared_view_without_a_scatter_is_refused() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        y = nn.functional.dropout(x + 1, 0.5, training=False)
        y.unfold(2, 2, 2)[..., 0].zero_()
        return y

    with pytest.raises(CaptureError, match="shares memory that is written into"):
        capture(Around(function), rows(2))


def test_graph_that_torch_functionalised_speaks_the_dialect() -> None:
    names = ops(checked(through_a_view_without_a_scatter))
    assert "batch_norm" in names
    assert not any(n.startswith("_") or n in ("copy", "clone", "getitem") for n in names)


Pool = list[Tensor]

# Each takes the pool, one of its tensors, a scalar tensor made of another, and a number.
VIEWS: tuple[Callable[[Pool, Tensor, Tensor, float], Any], ...] = (
    lambda pool, a, b, c: pool.append(a.transpose(0, -1).transpose(0, -1).movedim(-1, -2)),
    lambda pool, a, b, c: pool.append(a[..., 1:3]),
    lambda pool, a, b, c: pool.append(a[..., :1].squeeze(-1).unsqueeze(-1)),
    lambda pool, a, b, c: pool.append(a.reshape(a.shape[0], -1, 1)),
    lambda pool, a, b, c: pool.append(nn.functional.dropout(a, 0.3, training=False)),
    lambda pool, a, b, c: pool.extend(a.chunk(2, -1)),
    lambda pool, a, b, c: pool.append(a.unbind(-1)[-1].unsqueeze(-1)),
    lambda pool, a, b, c: pool.append(a.flatten(1).unflatten(1, (-1, 1)).permute(0, 2, 1)),
    lambda pool, a, b, c: pool.append(a),
)
WRITES: tuple[Callable[[Pool, Tensor, Tensor, float], Any], ...] = (
    lambda pool, a, b, c: a.add_(b),
    lambda pool, a, b, c: a.mul_(b),
    lambda pool, a, b, c: a.relu_(),
    lambda pool, a, b, c: a.copy_(b.expand_as(a)),
    lambda pool, a, b, c: pool.append(a + b),
    lambda pool, a, b, c: pool.append(a.new_full(a.shape, c)),
    lambda pool, a, b, c: pool.append(a + masked(b, c)),
)


def masked(b: Tensor, c: float) -> Tensor:
    """Return the sum of a literal that numbers, and sometimes data, are written into."""
    mask = torch.zeros(3, 4, dtype=b.dtype)
    mask[1:, :2].fill_(c)
    mask[0].add_(b if c < 0.3 else c)
    return mask.sum()


def random_writer(seed: int) -> Forward:
    """Return a function of random views, writes and sums over a growing pool of tensors."""
    source = random.Random(seed)
    steps = []
    for _ in range(7):
        step = source.choice(VIEWS if source.random() < 0.5 else WRITES)
        steps.append((step, source.random(), source.random()))

    def function(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        pool = [x * 2, x.transpose(1, 2) + 1]
        for step, first, second in steps:
            a, b = pool[int(first * len(pool))], pool[int(second * len(pool))]
            step(pool, a, b.mean() * second, second)
        return tuple(pool)

    return function


@pytest.mark.parametrize("seed", range(12))
def test_random_writes(seed: int) -> None:
    checked(random_writer(seed))


def test_write_into_a_literal_that_outlives_the_call() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        m.plain.add_(1)
        return x * m.plain

    model = Around(function)
    model.plain = torch.ones((), dtype=torch.float64)
    with pytest.raises(CaptureError, match="forward changes 'plain'"):
        capture(model, rows(2))


# ---------------------------------------------------------------------- clean-up


def idle(m: Any, x: Tensor) -> Tensor:
    y = x[:, 0:, :].detach().to(torch.float64).type_as(x).expand(-1, 4, 6).view(-1, 4, 6)
    y = nn.functional.pad(y, (0, 0, 0, 0)).clone()
    y = nn.functional.dropout(y, 0.0)
    unused = y.exp().sum()
    assert unused.dim() == 0
    return y + 1


def test_nodes_that_do_nothing_are_removed() -> None:
    assert ops(checked(idle)) == ["add"]


def test_nodes_that_do_something_stay() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        y = x[:, ::2].transpose(1, 2).clone(memory_format=torch.contiguous_format).view(-1, 12)
        return nn.functional.dropout(y, 0.5, training=False).float()

    program = checked(function)
    assert ops(program)[-4:] == ["contiguous", "reshape", "dropout", "to"]
    assert program.node("dropout").args[1:] == (0.5, False)


def test_contexts_are_inlined() -> None:
    def function(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = x.exp()
            with torch.enable_grad():
                y = y + 1
        with torch.autocast("cpu", enabled=False):
            return y * m.scale.view(4, 1)

    program = checked(function)
    assert ops(program) == ["exp", "add", "reshape", "mul"]
    assert all(Meta(n).source for n in program.nodes if n.op == "call_function")


def test_several_results() -> None:
    def function(m: Any, x: Tensor) -> tuple[Any, ...]:
        left, right = x.split(2, 1)
        values, indices = x.max(1)
        return left * values.unsqueeze(1), [right, indices], None, 3

    program = checked(function)
    assert ops(program).count("getitem") == 4


# ---------------------------------------------------------------------- provenance


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.twice = nn.Sequential(nn.Linear(6, 6), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        return shifted(self.relu(self.twice(x)) + self.relu(x))


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Inner(), Inner()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.flatten(1)


def shifted(x: Tensor) -> Tensor:
    return x - 1


def test_names_modules_and_sources() -> None:
    program = capture(Outer().double().eval(), rows(2))
    first = [n for n in program.nodes if n.op == "call_function"][:6]
    assert [(n.name, Meta(n).module) for n in first] == [
        ("blocks_0_twice_0", "blocks.0.twice.0"),
        ("blocks_0_twice_1", "blocks.0.twice.1"),
        ("blocks_0_relu", "blocks.0.relu"),
        ("blocks_0_relu_1", "blocks.0.relu"),
        ("blocks_0_add", "blocks.0"),
        ("blocks_0_sub", "blocks.0"),
    ]
    assert {Meta(n).source.rpartition(":")[0] for n in first} == {
        "tests/frontend/test_normalise.py"
    }
    assert Meta(first[5]).code == "return x - 1"  # the line in the function that forward calls
    assert Meta(first[0]).code == "return shifted(self.relu(self.twice(x)) + self.relu(x))"
    assert Meta(program.node("blocks_0_twice_0_weight")).module == "blocks.0.twice.0"
