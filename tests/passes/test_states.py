"""States: an input and an output that are one, and lose the same channels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import narrows
from narrows.api import rewrite
from narrows.ir.program import Program
from narrows.ir.verify import verify
from narrows.passes.pipeline import Pipeline
from narrows.passes.plans.plan import ChannelPlan
from narrows.passes.prune_channels import PruneChannels


class Attention(nn.Module):
    """Two heads of eight channels, whose keys and values of earlier tokens are handed in."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

    def heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], -1, 2, 8).transpose(1, 2)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
        keys = torch.cat((keys, self.heads(self.k(x))), 2)
        values = torch.cat((values, self.heads(self.v(x))), 2)
        y = F.scaled_dot_product_attention(self.heads(self.q(x)), keys, values)
        return self.o(y.transpose(1, 2).flatten(2)), keys, values


class Streaming(nn.Module):
    """A causal depthwise convolution that is handed the frames before."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.d = nn.Conv1d(3, 8, 1), nn.Conv1d(8, 8, 3, groups=8)
        self.b = nn.Conv1d(8, 2, 1)

    def forward(self, x: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        frames = torch.cat((frames, self.a(x).relu()), 2)
        return self.b(self.d(frames).relu()), frames[:, :, -2:]


class Decay(nn.Module):
    """A leaky sum of what a layer makes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 10), nn.Linear(10, 3)
        self.rate = nn.Parameter(torch.rand(10))

    def forward(self, x: Tensor, h: Tensor) -> dict[str, Tensor]:
        h = h * self.rate + self.a(x)
        return {"y": self.b(h.relu()), "h": h}


class Recurrent(nn.Module):
    """An Elman cell: the state goes through a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.h, self.o = nn.Linear(4, 10), nn.Linear(10, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor, state: tuple[Tensor]) -> tuple[Tensor, tuple[Tensor]]:
        h = torch.tanh(self.i(x) + self.h(state[0]))
        return self.o(h), (h,)


def numbers(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


CASES: dict[str, tuple[type[nn.Module], tuple[Any, ...], dict[str, Any]]] = {
    "cache": (
        Attention,
        (numbers(2, 1, 16), numbers(2, 2, 5, 8), numbers(2, 2, 6 - 1, 8)),
        {"keys": 1, "values": 2},
    ),
    "frames": (Streaming, (numbers(2, 3, 6), numbers(2, 8, 2)), {"frames": 1}),
    "decay": (Decay, (numbers(2, 4), numbers(2, 10)), {"h": ("h",)}),
    "cell": (Recurrent, (numbers(2, 4), (numbers(2, 10),)), {"state": 1}),
}


def captured(case: str, **options: Any) -> Program:
    kind, inputs, state = CASES[case]
    torch.manual_seed(0)
    return narrows.capture(kind().double().eval(), inputs, state=state, **options)


def leaves(result: Any) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(result)


def assert_masked(small: Program, plan: ChannelPlan, program: Program) -> None:
    """Two calls in a row give what the masked program gives, whose states are whole."""
    masked, names = plan.masked(program), [n.name for n in program.placeholders]
    flat = list(program.examples)
    growing = any(s.axes != (1,) for s in program.states)
    for _ in range(1 if growing else 2):
        given = list(flat)
        for state in small.states:
            at = names.index(state.name)
            given[at] = state.gather(flat[at])
        got, wanted = small.run_flat(given), masked.run_flat(flat)
        for state in small.states:
            flat[names.index(state.name)] = wanted[state.output]
            wanted[state.output] = state.gather(wanted[state.output])
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * float(b.abs().max()))


@pytest.mark.parametrize("constrained", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_a_state_loses_its_channels_on_both_sides(case: str, constrained: bool) -> None:
    program = captured(case)
    plan = narrows.plan(program, ratio=0.5, constrained=constrained)
    result = rewrite(program, plan)  # each pass against its reference
    small = result.program
    verify(small, shapes=True)
    assert_masked(small, plan, program)
    if constrained or case == "decay":
        for state in small.states:
            assert np.prod(state.sizes) * 2 == np.prod(state.whole), str(state)
            assert any(n.where == state.name and str(state) in n.message for n in small.notes)


@pytest.mark.parametrize("case", CASES)
def test_the_form_for_a_target_takes_and_returns_a_state_too(case: str) -> None:
    program = captured(case)
    plan = narrows.plan(program, ratio=0.5)
    assert_masked(narrows.apply(program, plan, target="onnx"), plan, program)


def test_heads_may_keep_other_channels_of_a_cache() -> None:
    program = captured("cache")
    keep = [0, 1, 2, 9, 10, 15]
    plan = narrows.plan(program, keep_outputs={"k.weight": keep, "q.weight": keep})
    small = narrows.apply(program, plan)
    assert small.state("keys").kept == tuple(keep)
    assert small.state("keys").sizes == (2, 3)
    assert str(small.state("keys")) == "2x8 -> 2x3 channels (kept: 0-2, 9-10, 15 of 16)"
    assert_masked(small, plan, program)
    again = narrows.plan(small, ratio=0.5)  # what is left is told in channels of the model's
    less = narrows.apply(small, again)
    assert set(less.state("keys").kept or ()) < set(keep)
    wanted = [program.state("keys").gather(program.examples[1]), program.examples[2]]
    gathered = [less.state(n).gather(w) for n, w in zip(("keys", "values"), wanted, strict=True)]
    for mine, own in zip(gathered, less.examples[1:], strict=True):
        assert torch.equal(mine, own)


def test_heads_that_keep_unequal_numbers_are_filled_up() -> None:
    program = captured("cache")
    keep = [0, 1, 2, 15]
    plan = narrows.plan(program, keep_outputs={"k.weight": keep, "q.weight": keep})
    small = narrows.apply(program, plan)
    assert small.state("keys").sizes == (2, 3)
    assert_masked(small, plan, program)


def test_a_mask_of_keys_alone_says_what_holds_them() -> None:
    """What a cache holds already need not be zero where a mask makes zeros from now on."""
    program = captured("cache")
    plan = narrows.plan(program, keep_outputs={"k.weight": list(range(8))})
    small = narrows.apply(program, plan)
    assert small.state("keys").kept is None
    assert any("the state keys" in n.message for n in small.notes)
    assert_masked(small, plan, program)


def test_a_state_that_only_feeds_itself_is_left_one_channel() -> None:
    program = captured("decay")
    plan = narrows.plan(program, keep_inputs={"b.weight": []})
    small = narrows.apply(program, plan)
    assert small.state("h").sizes == (1,)
    assert_masked(small, plan, program)


def test_an_output_that_is_a_state_and_a_result_stays_whole_as_a_result() -> None:
    class Twice(Decay):
        def forward(self, x: Tensor, h: Tensor) -> Any:
            h = super().forward(x, h)["h"]
            return h, self.b(h), h

    torch.manual_seed(0)
    inputs = numbers(2, 4), numbers(2, 10)
    program = narrows.capture(Twice().double().eval(), inputs, state={"h": 2})
    plan = narrows.plan(program, keep_inputs={"b.weight": [1, 4, 5]})
    small = narrows.apply(program, plan)
    assert small.state("h").kept is None
    assert_masked(small, plan, program)


def test_without_a_declaration_a_cache_is_a_barrier() -> None:
    kind, inputs, _ = CASES["cache"]
    program = narrows.capture(kind().double().eval(), inputs)
    assert all(c.barrier for c in program.couplings())
    assert not any(c.barrier for c in captured("cache").couplings() if c.name in "kv")


def test_a_module_of_a_program_is_captured_with_its_states() -> None:
    program = captured("decay")
    small = narrows.apply(program, narrows.plan(program, ratio=0.5))
    args, kwargs = small.in_spec.unflatten(small.examples)
    again = narrows.capture(small.to_module(), args, kwargs=kwargs)
    assert again.states == small.states


def test_a_whole_state_is_refused_with_the_way_to_cut_it() -> None:
    program = captured("decay")
    small = narrows.apply(program, narrows.plan(program, ratio=0.5))
    with pytest.raises(narrows.NarrowsError, match=r"program\.state\('h'\)\.gather\(h\)"):
        small(*program.examples)
    with pytest.raises(narrows.NarrowsError, match="10 channels along axis 1"):
        small.state("h").gather(numbers(2, 5))
    with pytest.raises(narrows.NarrowsError, match="no state 'x'"):
        small.state("x")


@pytest.mark.parametrize("target", ["onnx", "torch"])
@pytest.mark.parametrize("case", ["cache", "cell"])
def test_artifacts_take_and_return_the_smaller_state(case: str, target: str) -> None:
    program = captured(case).to(torch.float32)
    small = narrows.apply(program, narrows.plan(program, ratio=0.5))
    artifact = narrows.lower(small, target)
    names, arrays = [n.name for n in small.placeholders], [e.numpy() for e in program.examples]
    for state in small.states:
        at = names.index(state.name)
        arrays[at] = artifact.gather_state(state.name, arrays[at])
        assert f"state   {state.name}  goes in again from output" in artifact.report
        assert str(state) in artifact.report
    got, wanted = artifact.run_flat(arrays), small.run_flat(list(small.examples))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(torch.as_tensor(a), b, rtol=0, atol=1e-5)
    with pytest.raises(narrows.NarrowsError, match="'x' is no state"):
        artifact.gather_state("x", arrays[0])
    with pytest.raises(narrows.NarrowsError, match="has shape"):
        artifact.gather_state(names[1], arrays[0])


def test_states_that_are_handed_on_lose_channels_in_turn() -> None:
    """A delay of two calls: what came in as one state goes out as the next."""

    class Delay(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 10), nn.Linear(20, 3)

        def forward(self, x: Tensor, one: Tensor, two: Tensor) -> tuple[Tensor, ...]:
            new = self.a(x).relu()
            return self.b(torch.cat((new, two), 1)), new, one

    torch.manual_seed(0)
    inputs = numbers(2, 4), numbers(2, 10), numbers(2, 10) + 1
    program = narrows.capture(Delay().double().eval(), inputs, state={"one": 1, "two": 2})
    plan = narrows.plan(program, keep_inputs={"b.weight": [0, 1, 12, 13, 17]})
    small = narrows.apply(program, plan)
    assert small.state("one").kept == small.state("two").kept == (2, 3, 7)
    assert_masked(small, plan, program)


def test_a_wrong_output_at_a_state_is_found() -> None:
    """The channels that both have are compared."""
    from narrows.passes.instruments import compare

    program = captured("decay")
    plan = narrows.plan(program, ratio=0.5)
    small = narrows.apply(program, plan)
    masked = plan.masked(program)
    assert compare(small, masked) <= 1e-12
    wrong = small.replace(weights={**small.weights, "rate": small.weights["rate"] + 1})
    assert compare(wrong, masked) > 1e-3


def test_a_pipeline_with_the_order_of_channels_keeps_a_states_own() -> None:
    program = captured("frames")
    plan = narrows.plan(program, keep_inputs={"b.weight": [6, 1, 3]})
    small = Pipeline((PruneChannels(plan, order=True),)).run(program).program
    assert small.state("frames").kept == (1, 3, 6)
    assert_masked(small, plan, program)
