"""Attention becomes products and a softmax, which have integer forms; the numbers stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import narrows
from narrows.ir.compare import relative_error
from narrows.ir.program import Program
from narrows.ir.verify import verify
from narrows.passes.decompose_attention import DecomposeAttention
from tests.builder import Builder, aten, ramp

# Further arguments of attention, by what they are about; a tensor is a weight.
MASKS: dict[str, tuple[Any, ...]] = {
    "none": (),
    "causal": (None, 0.0, True),
    "yes or no": (torch.tensor([[True, False, True, True, False, True]] * 5),),
    "minus infinity": (torch.tensor([[0.0, -torch.inf, 0.0, 0.0, 0.0, -torch.inf]] * 5),),
    "numbers": (ramp(3, 5, 6),),
    "shared keys": (None, 0.0, False),
}


def attention(name: str, dtype: torch.dtype) -> Program:
    heads = 1 if name == "shared keys" else 3
    b = Builder((2, 3, 5, 4), (2, heads, 6, 4), (2, heads, 6, 4), dtype=dtype)
    mask, *rest = MASKS[name] or (None,)
    if isinstance(mask, Tensor):
        mask = b.weight("mask", mask.to(dtype) if mask.is_floating_point() else mask)
    how = {"enable_gqa": True} if heads == 1 else {}
    target = aten.scaled_dot_product_attention.default
    return b.program(b.call(target, *b.inputs, mask, *rest, **how))


@pytest.mark.parametrize("name", MASKS)
def test_attention_is_taken_apart(name: str) -> None:
    program = attention(name, torch.float64)
    result = DecomposeAttention().run(program).program
    verify(result)
    whole = aten.scaled_dot_product_attention.default
    assert whole not in {n.target for n in result.nodes}
    assert relative_error(result(*program.examples), program(*program.examples)) < 1e-12


@pytest.mark.parametrize("name", MASKS)
def test_attention_has_no_float_island(name: str) -> None:
    program = attention(name, torch.float32)
    made = narrows.quantize(program, [program.examples], strict=True)
    expected = program(*program.examples)
    # Codes of 8 bits in queries, keys, scores and shares: about a percent each.
    assert relative_error(made.program(*program.examples), expected) < 0.05


@pytest.mark.parametrize("kind", ["yes or no", "minus infinity"])
def test_attention_that_hides_all_keys_from_a_query_stays_whole(kind: str) -> None:
    b = Builder((2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 4))
    seen = torch.ones(5, 6, dtype=torch.bool)
    seen[2] = False
    additive = torch.zeros(5, 6).masked_fill(~seen, -torch.inf)
    mask = b.weight("mask", seen if kind == "yes or no" else additive)
    target = aten.scaled_dot_product_attention.default
    attention = b.call(target, *b.inputs, mask)
    program = b.program(b.call(aten.linear.default, attention, b.weight("w", ramp(4, 4))))
    result = DecomposeAttention().run(program)
    assert not result.changed
    (note,) = result.notes
    assert "hides all keys" in note.message
    made = narrows.quantize(program, [program.examples], check=False)
    wanted = program(*program.examples)
    assert not wanted[:, :, 2].any()  # that query gets no share of anything
    assert relative_error(made.program(*program.examples), wanted) < 0.05


def test_attention_with_dropout_stays_whole() -> None:
    b = Builder((2, 3, 5, 4), (2, 3, 5, 4), (2, 3, 5, 4))
    dropped = b.program(b.call(aten.scaled_dot_product_attention.default, *b.inputs, None, 0.1))
    kept = DecomposeAttention().run(dropped)
    assert not kept.changed
    assert "it has dropout" in kept.notes[0].message


def test_a_mask_that_is_made_of_truth_values_is_a_choice_again() -> None:
    """So ``nn.MultiheadAttention`` hands on what padding and what later tokens hide: added."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
            self.register_buffer("later", torch.ones(5, 5, dtype=torch.bool).triu(1))

        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            return self.layer(x, src_mask=self.later, src_key_padding_mask=padding)

    torch.manual_seed(0)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    given = torch.randn(2, 5, 8), padding
    program = narrows.capture(Encoder().eval(), given)
    result = DecomposeAttention().run(program).program
    verify(result)
    expected = program(*given)
    assert relative_error(result(*given), expected) < 1e-6
    made = narrows.quantize(program, [given], strict=True)
    assert relative_error(made.program(*given), expected) < 0.05
    other = given[0] + padding[..., None]  # of what is hidden nothing comes
    assert torch.equal(made.program(other, padding)[~padding], made.program(*given)[~padding])


def test_a_part_of_a_causal_mask_hides() -> None:
    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read = nn.Linear(8, 24)
            self.register_buffer("later", torch.full((16, 16), -torch.inf).triu(1))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.read(x).chunk(3, -1)
            t = x.shape[1]
            return ((q @ k.mT) + self.later[:t, :t]).softmax(-1) @ v

    torch.manual_seed(0)
    x = torch.randn(8, 6, 8)
    net = Causal().eval()
    made = narrows.quantize(narrows.capture(net, (x[:2],)), [x]).program
    assert relative_error(made(x), net(x)) < 0.1
