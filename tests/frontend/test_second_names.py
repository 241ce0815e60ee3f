"""Second names of operators: the program has one spelling, and the numbers are the model's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import narrows
from narrows.frontend.spellings import PARTLY, SPELLINGS
from narrows.ir.meta import Meta
from narrows.ir.ops import table

aten = torch.ops.aten
Form = Callable[[Tensor, Tensor], Tensor]

FORMS: dict[str, Form] = {
    "subtract": lambda x, y: torch.subtract(x, y, alpha=2),
    "multiply": torch.multiply,
    "divide": torch.divide,
    "true_divide": torch.true_divide,
    "add a number": lambda x, _: aten.add.Scalar(x, 2, 3),
    "sub a number": lambda x, _: aten.sub.Scalar(x, 2, 0.5),
    "subtract a number": lambda x, _: aten.subtract.Scalar(x, 2),
    "mul by a number": lambda x, _: aten.mul.Scalar(x, 0.3),
    "multiply by a number": lambda x, _: aten.multiply.Scalar(x, 0.3),
    "div by a number": lambda x, _: aten.div.Scalar(x, 0.3),
    "divide by a number": lambda x, _: aten.divide.Scalar(x, 0.3),
    "true_divide by a number": lambda x, _: aten.true_divide.Scalar(x, 0.3),
    "absolute": lambda x, _: torch.absolute(x),
    "negative": lambda x, _: torch.negative(x),
    "positive": lambda x, _: torch.positive(x) + 1,
    "clip": lambda x, _: torch.clip(x, -0.5, 0.5),
    "clip by tensors": lambda x, y: torch.clip(x, y - 1, y),
    "max of two": torch.max,
    "min of two": torch.min,
    "and": lambda x, y: ((x > 0) & (y > 0)).to(x.dtype),
    "or": lambda x, y: ((x > 0) | (y > 0)).to(x.dtype),
    "xor": lambda x, y: ((x > 0) ^ (y > 0)).to(x.dtype),
    "concat": lambda x, y: torch.concat([x, y], 1),
    "concatenate": lambda x, y: torch.concatenate([x, y], -1),
    "swapaxes": lambda x, _: x.swapaxes(1, -1),
    "swapdims": lambda x, _: x.swapdims(-1, 1),
    "movedim": lambda x, _: x.movedim(1, -1),
    "movedim of two": lambda x, _: x.movedim([1, 3], [2, 1]),
    "moveaxis": lambda x, _: x.moveaxis(-1, 1),
    "moveaxis of two": lambda x, _: x.moveaxis([1, 2], [-1, 1]),
    "T": lambda x, _: aten.numpy_T(x[:, :, 0, 0]).sum(0, keepdim=True) + 0 * x[:, :1, 0, 0],
    "t": lambda x, _: x[0, :, :, 0].t()[None] + 0 * x[:, :1, :1, 0],
    "mT": lambda x, _: x.mT,
    "adjoint": lambda x, _: torch.adjoint(x),
    "narrow": lambda x, _: x.narrow(1, 2, 3),
    "narrow from the end": lambda x, _: x.narrow(1, -3, 3),
    "narrow before the end": lambda x, _: x.narrow(-1, -3, 2),
    "narrow of the batch": lambda x, _: x.narrow(0, 0, x.shape[0]) + x.narrow(2, 1, 1),
    "mul by a size": lambda x, _: aten.mul.Scalar(x, x.shape[0]),
    "by names": lambda x, y: torch.max(input=torch.swapaxes(x, axis0=2, axis1=3), other=y),
    "movedim by names": lambda x, _: torch.movedim(x, source=1, destination=2),
    "narrow_copy": lambda x, _: torch.narrow_copy(x, 2, 1, 2),
    "split": lambda x, _: torch.cat(x.split(4, 1)[::-1], 1),
    "chunk": lambda x, _: x.chunk(2, 1)[0] * x.chunk(2, -3)[1],
    "tensor_split at": lambda x, _: torch.cat(x.tensor_split([1, -2], 1)[::-1], 1),
    "tensor_split that overlaps": lambda x, _: torch.cat(x.tensor_split([4, 1], 1)[::-1], 1),
    "unbind": lambda x, _: x.unflatten(1, (3, 2)).unbind(1)[2] * x.unbind(-1)[0][:, :2, :, None],
    "one part of the batch's": lambda x, _: x + x.split(x.shape[0])[0],
    "split_with_sizes": lambda x, _: torch.split_with_sizes(x, [2, 4], 1)[1],
    "masked_fill": lambda x, y: x.masked_fill(y > 0, -9.0).clamp_min(-2),
    "a mask of positions": lambda x, _: x.masked_fill(torch.ones(4, 4).triu(1) > 0, float("-inf")),
    "masked_fill by another type": lambda x, y: x + x.long().masked_fill(y > 0, torch.tensor(2)),
    "zeros and ones": lambda x, _: torch.cat(
        [torch.zeros(x.shape[0], 1, 4, 4, dtype=x.dtype), torch.ones_like(x)], 1
    ),
    "numbers of the batch": lambda x, _: x + torch.arange(1, x.shape[0] + 1)[:, None, None, None],
    "a matrix of the batch's size": lambda x, _: x + torch.eye(x.shape[0])[:, :1, None, None],
    "detach": lambda x, _: x.detach() - x.mean() * x.max(),
    "square": lambda x, _: 1 - torch.square(x) / torch.rsub(x, x, alpha=3),
    "products": lambda x, y: torch.bmm(x.flatten(0, 1), y.flatten(0, 1)).view(-1, 6, 4, 4),
    "borders": lambda x, _: aten.reflection_pad2d(
        aten.constant_pad_nd(x, [1, 0], 0.5), [1, 2, 0, 1]
    ),
    "var": lambda x, _: aten.var.dim(x, [2, 3]),
    "var of all": lambda x, _: aten.var.dim(x, [2, 3], False, True),
    "std": lambda x, _: aten.std.dim(x, [1], True, True),
    "a layer by a vector": lambda x, y: (
        F.linear(x, y[0, 0, 0]) + F.linear(x, torch.arange(4.0).to(x))
    ),
}


class Net(nn.Module):
    def __init__(self, form: Form) -> None:
        super().__init__()
        self.a, self.b, self.form = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1), form

    def forward(self, x: Tensor) -> Tensor:
        return self.form(self.a(x), self.b(x))


@pytest.mark.parametrize("name", FORMS)
def test_one_spelling_reaches_the_program(name: str) -> None:
    torch.manual_seed(0)
    net = Net(FORMS[name]).double().eval()
    program = narrows.capture(net, (torch.randn(2, 3, 4, 4).double(),))
    targets = {n.target for n in program.nodes if n.op == "call_function"}
    assert not targets & set(SPELLINGS)
    assert table.missing(program) == {}
    x = torch.randn(2, 3, 4, 4).double()
    torch.testing.assert_close(program(x), net(x), rtol=0, atol=0)


def test_a_second_name_has_no_row() -> None:
    assert [row.name for row in table.rows() if row.target in SPELLINGS] == []


def test_a_respelled_node_is_named_as_it_is_spelled_and_keeps_the_users_line() -> None:
    program = narrows.capture(Net(FORMS["masked_fill"]).eval(), (torch.randn(2, 3, 4, 4),))
    found = {n.name: n for n in program.nodes if n.op == "call_function"}
    assert found["where"].target is aten.where.ScalarSelf
    assert found["clamp"].target is aten.clamp.default
    assert all("x.masked_fill(y > 0" in Meta(found[n]).code for n in ("where", "clamp"))


# ------------------------------------------------------------------ the same bits, in every type

IMAGE = (2, 6, 4, 5)
# Calls on tensors ``x``, ``y`` of that shape; each of a second name, and of what it may be told.
CALLS: list[tuple[Any, Callable[[Tensor, Tensor], tuple[Any, ...]]]] = [
    *((t, lambda x, y: (x, y)) for t in (
        aten.subtract.Tensor, aten.multiply.Tensor, aten.divide.Tensor, aten.true_divide.Tensor,
        aten.max.other, aten.min.other, aten.__and__.Tensor, aten.__or__.Tensor,
        aten.__xor__.Tensor, aten.rsub.Tensor, aten.clamp_min.Tensor, aten.clamp_max.Tensor,
        aten.clip.Tensor,
    )),
    *((t, lambda x, y: (x, 3)) for t in (
        aten.add.Scalar, aten.sub.Scalar, aten.subtract.Scalar, aten.mul.Scalar,
        aten.multiply.Scalar, aten.div.Scalar, aten.divide.Scalar, aten.true_divide.Scalar,
        aten.floor_divide.Scalar, aten.clamp_min.default, aten.clamp_max.default,
    )),
    *((t, lambda x, y: (x, 0.7)) for t in (
        aten.add.Scalar, aten.div.Scalar, aten.floor_divide.Scalar, aten.clamp_min.default,
        aten.clamp_max.default,
    )),
    *((t, lambda x, y: (x,)) for t in (
        aten.absolute.default, aten.negative.default, aten.positive.default, aten.sgn.default,
        aten.square.default, aten.mT.default, aten.adjoint.default, aten.detach.default,
        aten.lift_fresh_copy.default, aten.mean.default, aten.sum.default, aten.max.default,
        aten.min.default, aten.zeros_like.default, aten.ones_like.default,
        aten._to_copy.default, aten.to.dtype_layout,
    )),
    *((t, lambda x, y: (x, 1, -1)) for t in (
        aten.transpose.int, aten.swapaxes.default, aten.swapdims.default, aten.movedim.int,
        aten.moveaxis.int,
    )),
    *((t, lambda x, y: (x, [1, 3], [-2, 0])) for t in (
        aten.movedim.intlist, aten.moveaxis.intlist,
    )),
    *((t, lambda x, y: ([x, y], 1)) for t in (aten.concat.default, aten.concatenate.default)),
    *((t, lambda x, y: (x[0, 0],)) for t in (aten.t.default, aten.numpy_T.default)),
    *((t, lambda x, y: (x, 1, -4, 2)) for t in (aten.narrow.default, aten.narrow_copy.default)),
    *((t, lambda x, y, how=how: (x, how, 1))
      for t in (aten.split.Tensor, aten.chunk.default, aten.tensor_split.sections)
      for how in (1, 4, 5)),
    (aten.split_with_sizes.default, lambda x, y: (x, [1, 2, 3], -3)),
    (aten.tensor_split.indices, lambda x, y: (x, [2, 2, -1, 9], 1)),
    *((t, lambda x, y: (x.contiguous(), [2, -1, 5])) for t in (
        aten.view.default, aten._unsafe_view.default,
    )),
    (aten.tile.default, lambda x, y: (x, [2, 1])),
    (aten.clip.default, lambda x, y: (x, None, 2)),
    (aten.clip.Tensor, lambda x, y: (x, y - y, y)),
    (aten.clamp.Tensor, lambda x, y: (x, None, y)),
    (aten.masked_fill.Scalar, lambda x, y: (x, y > 1, 3)),
    (aten.masked_fill.Scalar, lambda x, y: (x, y[0, 0] > 1, float("-inf"))),
    (aten.masked_fill.Tensor, lambda x, y: (x, y > 1, y[0, 0, 0, 0])),
    (aten.masked_fill.Tensor, lambda x, y: (x, y > 1, torch.tensor(2))),
    (aten.constant_pad_nd.default, lambda x, y: (x, [1, 0, -1, 2], 0.5)),
    *((getattr(aten, f"{how}_pad{n}d").default, lambda x, y, n=n: (
        x.reshape(2, 3, *(2, 5, 4)[3 - n :], -1).select(-1, 0), [1, 2, 0, 1, 1, 0][: 2 * n]
    )) for how in ("reflection", "replication") for n in (1, 2, 3)),
    *((getattr(aten, f"upsample_nearest{n}d").default, lambda x, y, n=n, by=by: (
        x.reshape(2, 3, *(4, 5, 2)[:n], -1).select(-1, 0),
        *([[7, 3, 4][:n], *by] if by else [[7, 3, 5][:n]]),
    )) for n in (1, 2, 3) for by in ([], [1.9, 0.7, 2.0][:n])),
    *((t, lambda x, y, by=by, corners=corners: (
        x, *([[7, 8], corners, *by] if by else [[7, 3], corners])
    )) for t in (
        aten.upsample_bilinear2d.default, aten.upsample_bicubic2d.default,
        aten._upsample_bilinear2d_aa.default,
    ) for by in ([], [1.9, 1.7]) for corners in (False, True)),
    (aten.upsample_linear1d.default, lambda x, y: (x[0], [9], False, 1.9)),
    (aten.upsample_trilinear3d.default, lambda x, y: (x[None], [9, 7, 8], True, 1.5, 1.9, 1.7)),
    (aten._upsample_nearest_exact2d.default, lambda x, y: (x, [6, 7], 1.5, 1.5)),
    *((t, lambda x, y: (x, 1, False)) for t in (aten._softmax.default, aten._log_softmax.default)),
    (aten.mm.default, lambda x, y: (x[0, 0], y[0, 0].mT)),
    (aten.linear.default, lambda x, y: (x, y[0, 0, 0])),
    (aten.bmm.default, lambda x, y: (x[0], y[0].mT)),
    *((aten.norm.ScalarOpt_dim, lambda x, y, p=p, d=d: (x, p, d, True))
      for p in (None, 1, 2, 3.5, float("inf")) for d in ([1], [2, 3], [])),
    *((t, lambda x, y, n=n: (x, [1, 2], n, True))
      for t in (aten.var.dim, aten.std.dim) for n in (True, False)),
    *((t, lambda x, y: (6,)) for t in (aten.arange.default, aten.eye.default)),
    (aten.arange.default, lambda x, y: (2.5,)),
    (aten.arange.start, lambda x, y: (1, 4.5)),
    *((t, lambda x, y: ([2, 3],)) for t in (aten.zeros.default, aten.ones.default)),
    (aten.to.device, lambda x, y: (x, "cpu", torch.float64)),
]  # fmt: skip
NAMED: list[tuple[Any, Callable[[Tensor, Tensor], tuple[Any, ...]], dict[str, Any]]] = [
    (aten.rsub.Tensor, lambda x, y: (x, y), {"alpha": 3}),
    (aten.sub.Scalar, lambda x, y: (x, 2, 3), {}),
    *((t, lambda x, y: (x, y), {"rounding_mode": how})
      for t in (aten.div.Tensor_mode,) for how in ("floor", None)),
    *((t, lambda x, y, n=n: (x, n), {"rounding_mode": how})
      for t in (aten.div.Scalar_mode,) for how in ("floor", "trunc", None) for n in (0.7, 2, -3)),
    *((t, lambda x, y: (x,), {"dtype": kind})
      for t in (aten.to.dtype_layout, aten._to_copy.default, aten.sum.default,
                aten.zeros_like.default)
      for kind in (torch.float64, torch.int32)),
    (aten.mean.default, lambda x, y: (x,), {"dtype": torch.float64}),
    (aten.clone.default, lambda x, y: (x,), {"memory_format": torch.channels_last}),
    (aten.arange.start, lambda x, y: (1, 4), {"dtype": torch.float64}),
    (aten.ones.default, lambda x, y: ([3],), {"dtype": torch.bool}),
]  # fmt: skip
ALL = [*((t, args, {}) for t, args in CALLS), *NAMED]
TYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.uint8, torch.bool,
)  # fmt: skip


@pytest.mark.parametrize(
    ("target", "make", "named"), ALL, ids=[f"{i}-{c[0]}" for i, c in enumerate(ALL)]
)
def test_the_spelling_has_the_same_bits(
    target: Any, make: Callable[[Tensor, Tensor], tuple[Any, ...]], named: dict[str, Any]
) -> None:
    """In every type that torch computes the second name in, values that are no numbers included."""
    rule, tried = SPELLINGS.get(target) or PARTLY[target], 0
    for dtype in TYPES:
        x, y = _drawn(dtype), _drawn(dtype)
        try:
            args = make(x, y)
            expected = target(*args, **named)
        except (RuntimeError, NotImplementedError):  # torch does not compute it
            continue
        spelled = rule(*args, **named)
        if spelled is None:  # another type comes out than went in
            continue
        actual = spelled[0](*spelled[1], **spelled[2])
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
        tried += 1
    assert tried


def _drawn(dtype: torch.dtype) -> Tensor:
    made = torch.randn(IMAGE) * 3
    if dtype.is_floating_point:
        made[0, 0, 0, :4] = torch.tensor([float("nan"), float("inf"), -0.0, float("-inf")])
    return (made.abs() if dtype is torch.uint8 else made).to(dtype)


def test_every_second_name_is_tried() -> None:
    assert {t for t, *_ in ALL} == {*SPELLINGS, *PARTLY}


def test_a_part_that_overlaps_and_another_type_have_no_other_spelling() -> None:
    x = torch.randn(IMAGE)
    assert SPELLINGS[aten.tensor_split.indices](x, [4, 1], 1) is None
    assert SPELLINGS[aten.masked_fill.Scalar](x.long(), x > 0, 0.5) is None
    assert SPELLINGS[aten.upsample_bilinear2d.default](x, [8, 8], False, 1.3, None) is None
    assert PARTLY[aten.div.Tensor_mode](x, x, rounding_mode="trunc") is None
    assert PARTLY[aten.clone.default](x) is None


@pytest.mark.parametrize("keep", [False, True])
def test_the_largest_alone_needs_no_index(keep: bool) -> None:
    def both(x: Tensor, y: Tensor) -> Tensor:
        return x.max(-1, keepdim=keep).values + y.min(dim=2 if keep else -1, keepdim=keep)[0]

    net = Net(both).double().eval()
    program = narrows.capture(net, (torch.randn(2, 3, 4, 4).double(),))
    names = {n.target for n in program.nodes}
    assert {aten.amax.default, aten.amin.default} <= names
    assert aten.max.dim not in names
    x = torch.randn(2, 3, 4, 4).double()
    torch.testing.assert_close(program(x), net(x), rtol=0, atol=0)


def test_the_largest_with_its_index_stays() -> None:
    net = Net(lambda x, y: x.max(2).values + x.max(2).indices * y.mean(2)).double().eval()
    program = narrows.capture(net, (torch.randn(2, 3, 4, 4).double(),))
    assert aten.max.dim in {n.target for n in program.nodes}
    x = torch.randn(2, 3, 4, 4).double()
    torch.testing.assert_close(program(x), net(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "form",
    [
        lambda x, y: F.linear(x, y[0, 0, 0], torch.tensor(3.0)),
        lambda x, y: x.masked_fill(y > 0, x.shape[0]),
        lambda x, y: x.masked_fill(y > 0, 1.5 * x.shape[0]),
    ],
)
def test_what_has_more_than_the_other_spelling_can_say_is_kept(form: Form) -> None:
    net = Net(form).eval()
    program = narrows.capture(net, (torch.randn(2, 3, 4, 4),))
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(program(x), net(x))
