"""The op table: one row per ATen overload.

An operator without a row is a barrier: nothing is removed through it and the report says so. Rows from
outside are added with `register`.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from narrows.errors import OpError
from narrows.ir.ops.args import arguments
from narrows.ir.ops.barrier import Barrier
from narrows.ir.ops.contract import Contract, Contraction, Lookup, contraction_macs
from narrows.ir.ops.fill import Fill
from narrows.ir.ops.layout import Glu, Item, Join, Layout, Pad, Selection, Squeeze
from narrows.ir.ops.mixing import GroupNorm, Mixing, Reduce, Spatial, never, zero_only
from narrows.ir.ops.pointwise import PerChannel, Pointwise
from narrows.ir.ops.product import Attention, Product
from narrows.ir.ops.row import Row
from narrows.ir.ops.samples import samples_of
from narrows.ir.program import Meta, Program, op_name, where

aten = torch.ops.aten

BARRIER = Barrier(target=None, summary="needs its operands whole")
ITEM = Item(target=operator.getitem, summary="one result of a split")

_ROWS: dict[Any, Row] = {}


def register(row: Row) -> Row:
    """Add a row; `OpError` naming both if the overload has one already.

    A row without samples is given those that `narrows.ir.ops.samples` has for it.
    """
    if row.target in _ROWS:
        raise OpError(
            f"{row.name} has a row already: {_ROWS[row.target].kind}, the new one is {row.kind}",
            hint="remove one of the two registrations",
        )
    if not row.samples:
        row = dataclasses.replace(row, samples=samples_of(row.name))
    _ROWS[row.target] = row
    return row


def find(node: fx.Node) -> Row | None:
    """Return the row of a node's operator, or ``None``."""
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        return ITEM
    return _ROWS.get(node.target)


def rows() -> list[Row]:
    """Return all rows, by name."""
    return sorted(_ROWS.values(), key=lambda r: r.name)


def missing(program: Program) -> dict[str, list[str]]:
    """Return every operator of ``program`` that lacks a row, with the places it is used at.

    What is computed from weights alone has no channels of its own and needs no row.
    """
    found: dict[str, list[str]] = {}
    computed: set[fx.Node] = set()
    for node in program.graph.nodes:
        if Meta(node).size is not None:
            continue
        if node.op == "placeholder" or any(n in computed for n in node.all_input_nodes):
            computed.add(node)
            if node.op == "call_function" and find(node) is None:
                found.setdefault(op_name(node), []).append(where(node))
    return found


def macs(node: fx.Node) -> int:
    """Return the multiply-accumulates of a node at the example's sizes."""
    row = find(node)
    return 0 if row is None else row.macs(node)


def contraction(facts: Any, node: fx.Node) -> Contraction | None:
    """Return a node's contraction with a weight, if it is one."""
    row = find(node)
    return row.contraction(facts, node) if isinstance(row, Contract) else None


# ---------------------------------------------------------------------- rows


# Infinite or undefined for some finite inputs.
_PARTIAL = frozenset(
    "exp exp2 expm1 log log2 log10 log1p logit sqrt rsqrt tan asin acos acosh atanh erfinv reciprocal cosh "
    "sinh pow div true_divide floor_divide remainder fmod addcdiv".split()
)


def _pointwise(names: str, summary: str, *, absorbs: bool = False) -> None:
    for target in _overloads(names):
        partial = target._schema.name.partition("::")[2] in _PARTIAL
        register(Pointwise(target=target, summary=summary, absorbs=absorbs, partial=partial))


def _overloads(names: str) -> Iterable[Any]:
    for name in names.split():
        op, _, overload = name.partition(".")
        packet = getattr(aten, op, None)
        target = getattr(packet, overload or "default", None) if packet is not None else None
        if target is not None:  # rows outlive a torch release that lacks an overload
            yield target


_pointwise(
    "relu relu6 silu gelu sigmoid tanh hardtanh hardswish hardsigmoid leaky_relu elu selu celu softplus mish "
    "log_sigmoid hardshrink softshrink threshold abs neg exp exp2 expm1 log log2 log10 "
    "log1p sqrt rsqrt square sin cos tan asin acos atan sinh cosh erf erfc reciprocal sign sgn floor ceil "
    "round trunc frac clamp clamp.Tensor clamp_min clamp_max clip nan_to_num logical_not bitwise_not "
    "isnan isinf isfinite rrelu asinh acosh atanh erfinv logit negative absolute",
    "y = f(x), element by element",
)
_pointwise("dropout feature_dropout alpha_dropout feature_alpha_dropout", "identity in eval mode")
_pointwise(
    "to.dtype to.dtype_layout to.device _to_copy positive zeros_like ones_like full_like",
    "the same elements or the same shape, perhaps in another dtype",
)
_pointwise(
    "add.Tensor add.Scalar sub.Tensor sub.Scalar rsub.Scalar rsub.Tensor maximum minimum max.other min.other "
    "pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar div.Scalar div.Tensor div.Tensor_mode div.Scalar_mode floor_divide "
    "remainder.Scalar remainder.Tensor fmod.Scalar fmod.Tensor atan2 eq.Tensor eq.Scalar ne.Tensor ne.Scalar "
    "lt.Tensor lt.Scalar le.Tensor le.Scalar gt.Tensor gt.Scalar ge.Tensor ge.Scalar logical_and logical_or "
    "logical_xor bitwise_and.Tensor bitwise_or.Tensor where.self where.ScalarOther where.ScalarSelf where.Scalar "
    "masked_fill.Scalar masked_fill.Tensor lerp.Scalar lerp.Tensor addcmul addcdiv true_divide.Tensor "
    "subtract.Tensor divide.Tensor floor_divide.Scalar fmax fmin logaddexp bitwise_xor.Tensor "
    "__and__.Tensor __or__.Tensor clamp_min.Tensor clamp_max.Tensor",
    "y = f(a, b), element by element with broadcasting",
)
_pointwise(
    "mul.Tensor mul.Scalar multiply.Tensor multiply.Scalar",
    "y = a * b; a zero channel makes a zero channel",
    absorbs=True,
)

register(PerChannel(
    target=aten.batch_norm.default, parameters=("weight", "bias", "running_mean", "running_var"), gain="weight",
    summary="scale and shift per channel, by running statistics",
))  # fmt: skip
register(PerChannel(
    target=aten.instance_norm.default, parameters=("weight", "bias", "running_mean", "running_var"), gain="weight",
    centered=True, summary="each channel normalised by its own statistics",
))  # fmt: skip
register(
    PerChannel(
        target=aten.prelu.default, parameters=("weight",), summary="leaky with a slope per channel"
    )
)


def _layout(names: str, summary: str, **facts: str) -> None:
    for target in _overloads(names):
        register(Layout(target=target, summary=summary, **facts))


_layout("view _unsafe_view", "another shape for the same elements", sizes="size")
_layout("reshape", "another shape for the same elements", sizes="shape")
_layout("unflatten.int", "one axis split into several", sizes="sizes", sizes_at="dim")
_layout("expand", "an axis of size 1 repeated without a copy", sizes="size")
_layout(
    "flatten.using_ints permute transpose.int t numpy_T mT adjoint swapaxes swapdims movedim.int movedim.intlist "
    "moveaxis.int moveaxis.intlist squeeze.dim squeeze.dims unsqueeze roll flip "
    "pixel_shuffle pixel_unshuffle channel_shuffle repeat repeat_interleave.self_int tile rot90 "
    "narrow_copy unfold clone contiguous detach alias lift_fresh_copy",
    "elements moved, none computed",
)


register(Squeeze(target=aten.squeeze.default, summary="every axis of size 1 taken away"))


def _selection(names: str, summary: str, **facts: Any) -> None:
    for target in _overloads(names):
        register(Selection(target=target, summary=summary, **facts))


_selection("slice.Tensor narrow index_select split.Tensor split.sizes split_with_sizes chunk tensor_split.sections "
           "tensor_split.indices", "a part of an axis")  # fmt: skip
_selection("select.int unbind.int", "one index of an axis, which goes away", drops=True)

for _target, _stacks in (
    (aten.cat.default, False),
    (aten.concat.default, False),
    (aten.stack.default, True),
):
    register(Join(target=_target, stacks=_stacks, summary="tensors side by side along an axis"))
for _target in _overloads("pad constant_pad_nd"):
    register(Pad(target=_target, summary="constants around the elements"))
register(
    Glu(target=aten.glu.default, summary="first half of an axis times the sigmoid of the second")
)

for _n in (1, 2, 3):
    _conv = f"conv{_n}d"
    for _target in _overloads(f"{_conv} {_conv}.padding"):
        register(Contract(
            target=_target, spatial=_n, summary="convolution: sums its group's input channels",
            costs=lambda node, n=_n: contraction_macs(node, n),
        ))  # fmt: skip
    for _target in _overloads(f"conv_transpose{_n}d conv_transpose{_n}d.input"):
        register(Contract(
            target=_target, spatial=_n, transposed=True, out_axis=1, in_axis=0,
            summary="transposed convolution", costs=lambda node, n=_n: contraction_macs(node, n, True),
        ))  # fmt: skip
register(Contract(
    target=aten.linear.default, summary="matrix product with a weight [out, in]",
    costs=lambda node: contraction_macs(node, 0),
))  # fmt: skip


def _product_macs(node: fx.Node, left: str) -> int:
    return math.prod(Meta(node).shape) * Meta(arguments(node)[left]).shape[-1]


register(Contract(
    target=aten.addmm.default, x="mat1", weight="mat2", bias="self", out_axis=1, in_axis=0,
    summary="matrix product with a weight [in, out]", costs=lambda node: _product_macs(node, "mat1"),
))  # fmt: skip
register(
    Product(
        target=aten.matmul.default,
        summary="matrix product",
        costs=lambda n: _product_macs(n, "self"),
    )
)
register(Product(
    target=aten.mm.default, right="mat2", summary="matrix product", costs=lambda n: _product_macs(n, "self")
))  # fmt: skip
register(Product(
    target=aten.bmm.default, right="mat2", summary="matrix products of a batch", costs=lambda n: _product_macs(n, "self")
))  # fmt: skip


def _attention_macs(node: fx.Node) -> int:
    args = arguments(node)
    q, k, v = (Meta(args[a]).shape for a in ("query", "key", "value"))
    return math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


register(Attention(
    target=aten.scaled_dot_product_attention.default, summary="softmax(q k^T) v", costs=_attention_macs
))  # fmt: skip
register(Lookup(target=aten.embedding.default, summary="rows of a table by index"))

for _target in _overloads("layer_norm"):
    register(Mixing(target=_target, shape_arg="normalized_shape", parameters=("weight", "bias"), constants=never,
                    summary="normalised over trailing axes"))  # fmt: skip
for _target in _overloads("rms_norm"):
    register(Mixing(target=_target, shape_arg="normalized_shape", parameters=("weight",), constants=never,
                    summary="scaled by the root mean square of trailing axes"))  # fmt: skip
for _target in _overloads(
    "softmax.int _softmax _safe_softmax log_softmax.int _log_softmax cumsum cumprod"
):
    register(Mixing(target=_target, dims="dim", constants=never, ordered="cum" in str(_target),
                    summary="mixes an axis"))  # fmt: skip
register(GroupNorm(target=aten.group_norm.default, summary="normalised over groups of channels"))


def _padded_mean(args: dict[str, Any]) -> str:
    padded = args["count_include_pad"] and any(args["padding"])
    return "zero" if padded or args["ceil_mode"] or args.get("divisor_override") else "same"


for _n in (1, 2, 3):
    for _target in _overloads(f"max_pool{_n}d adaptive_avg_pool{_n}d"):
        register(Spatial(target=_target, trailing=_n, summary="pooling over space"))
    for _target in _overloads(f"avg_pool{_n}d"):
        register(
            Spatial(
                target=_target, trailing=_n, constants=_padded_mean, summary="pooling over space"
            )
        )
for _n, _names in (
    (1, "upsample_nearest1d upsample_linear1d upsample_nearest1d.vec upsample_linear1d.vec"),
    (2, "upsample_nearest2d upsample_nearest2d.vec upsample_bilinear2d upsample_bilinear2d.vec "
        "upsample_bicubic2d upsample_bicubic2d.vec _upsample_bilinear2d_aa.vec _upsample_nearest_exact2d.vec "
        "reflection_pad2d replication_pad2d"),
    (3, "upsample_nearest3d upsample_nearest3d.vec upsample_trilinear3d upsample_trilinear3d.vec"),
):  # fmt: skip
    for _target in _overloads(_names):
        register(Spatial(target=_target, trailing=_n, summary="resizing over space"))

for _target in _overloads("tril triu"):
    register(
        Spatial(target=_target, trailing=2, constants=zero_only, summary="zeros beside a diagonal")
    )

for _target in _overloads("mean.dim amax amin"):
    register(Reduce(target=_target, dims="dim", summary="mean or extremum over axes"))
for _target in _overloads("sum.dim_IntList"):
    register(
        Reduce(
            target=_target,
            dims="dim",
            constants=zero_only,
            skips_zeros=True,
            summary="sum over axes",
        )
    )
for _target in _overloads("var.correction std.correction var.dim std.dim logsumexp norm.ScalarOpt_dim "
                          "linalg_vector_norm prod.dim_int any.dim all.dim"):  # fmt: skip
    register(Reduce(target=_target, dims="dim", constants=never, summary="reduction over axes"))
for _target in _overloads("mean max min"):
    register(Reduce(target=_target, summary="mean or extremum of everything"))
register(
    Reduce(
        target=aten.sum.default,
        constants=zero_only,
        skips_zeros=True,
        summary="sum of everything",
    )
)

for _names, _value in (
    ("zeros", 0.0),
    ("ones", 1.0),
    ("full", "fill_value"),
    ("arange arange.start arange.start_step eye eye.m linspace", None),
):
    for _target in _overloads(_names):
        register(Fill(target=_target, value=_value, summary="made of sizes and numbers"))
