"""The rows of the op table, kind by kind.

A line lists overloads as ATen spells them (``.default`` left out), what they do, and the facts that
the kind's class asks for. `narrows.ir.ops.samples` holds the calls that every row is tested on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from narrows.ir.ops.contract import Contract
from narrows.ir.ops.fill import Fill
from narrows.ir.ops.identities import (
    always,
    in_order,
    plus_zero,
    same_axis,
    selects_all,
    slices_all,
    times_one,
)
from narrows.ir.ops.join import Join
from narrows.ir.ops.layout import Glu, Layout, Pad, Squeeze
from narrows.ir.ops.lookup import Lookup
from narrows.ir.ops.mixing import GroupNorm, Mixing, Reduce, Spatial, never, zero_only
from narrows.ir.ops.picking import Gather, Indexed, Sampled
from narrows.ir.ops.pointwise import PerChannel, Pointwise
from narrows.ir.ops.product import Attention, Product
from narrows.ir.ops.row import Row
from narrows.ir.ops.selection import Selection
from narrows.ir.ops.several import Ranked
from narrows.ir.ops.windows import Columns, Folded
from narrows.ir.ops.works import attention, convolution, linear, product

aten = torch.ops.aten


def standard_rows() -> Iterator[Row]:
    """Yield the rows that narrows brings along."""
    yield from _pointwise()
    yield from _layout()
    yield from _contractions()
    yield from _mixing()
    yield from _spatial()
    yield from _reductions()
    yield from _picking()
    yield from _fills()


def _rows(kind: Callable[..., Row], names: str, summary: str, **facts: Any) -> Iterator[Row]:
    for name in names.split():
        op, _, overload = name.partition(".")
        packet = getattr(aten, op, None)
        target = getattr(packet, overload or "default", None)
        if target is not None:  # a row outlives a torch release that lacks its overload
            yield kind(target=target, summary=summary, **facts)


# ---------------------------------------------------------------------- element by element

_UNARY = """
    relu relu6 silu gelu sigmoid tanh hardtanh hardswish hardsigmoid leaky_relu elu selu celu mish
    softplus log_sigmoid hardshrink softshrink threshold rrelu abs neg sign sgn
    square sin cos tan atan asinh erf erfc floor ceil round trunc frac clamp clamp.Tensor clamp_min
    clamp_max clamp_min.Tensor clamp_max.Tensor nan_to_num logical_not bitwise_not isnan isinf
    isfinite
"""
_BINARY = """
    rsub.Tensor rsub.Scalar maximum minimum fmax fmin logaddexp atan2
    eq.Tensor eq.Scalar ne.Tensor ne.Scalar lt.Tensor lt.Scalar le.Tensor le.Scalar gt.Tensor
    gt.Scalar ge.Tensor ge.Scalar logical_and logical_or logical_xor bitwise_and.Tensor
    bitwise_or.Tensor bitwise_xor.Tensor where.Scalar lerp.Scalar lerp.Tensor addcmul
"""
# Infinite or undefined for some finite inputs.
_PARTIAL_UNARY = """
    exp exp2 expm1 log log2 log10 log1p logit sqrt rsqrt reciprocal asin acos acosh atanh
    erfinv sinh cosh
"""
_PARTIAL_BINARY = """
    div.Tensor_mode div.Scalar_mode floor_divide floor_divide.Scalar remainder.Tensor
    remainder.Scalar fmod.Tensor fmod.Scalar
    pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar addcdiv
"""


def _pointwise() -> Iterator[Row]:
    unary, binary = "y = f(x), element by element", "y = f(a, b), element by element, broadcasting"
    yield from _rows(Pointwise, _UNARY, unary)
    yield from _rows(Pointwise, _PARTIAL_UNARY, unary, partial=True)
    yield from _rows(Pointwise, _BINARY, binary)
    yield from _rows(Pointwise, _PARTIAL_BINARY, binary, partial=True)
    sums = "add.Tensor sub.Tensor"
    yield from _rows(Pointwise, sums, binary, identity=plus_zero)
    quotients = "div.Tensor"
    yield from _rows(Pointwise, quotients, binary, partial=True, identity=times_one)
    yield from _rows(
        Pointwise,
        "mul.Tensor",
        "y = a * b; a zero channel makes a zero channel",
        absorbs=True,
        identity=times_one,
    )
    chosen = {"where.self": "self other", "where.ScalarOther": "self", "where.ScalarSelf": "other",
              "masked_fill.Scalar": "self", "masked_fill.Tensor": "self"}  # fmt: skip
    for name, parts in chosen.items():
        yield from _rows(Pointwise, name, binary, parts=tuple(parts.split()))
    yield from _rows(
        Pointwise,
        "dropout feature_dropout alpha_dropout feature_alpha_dropout",
        "identity in eval mode",
        work_kind="view",
    )
    yield from _rows(
        Pointwise,
        "to.dtype to.dtype_layout to.device _to_copy",
        "the same elements, perhaps in another dtype",
        identity=always,
    )
    yield from _rows(
        Pointwise,
        "zeros_like ones_like full_like",
        "the same shape, perhaps in another dtype",
    )
    statistics = ("weight", "bias", "running_mean", "running_var")
    yield from _rows(
        PerChannel,
        "batch_norm",
        "scale and shift per channel, by running statistics",
        parameters=statistics,
        gain="weight",
        affine=True,
    )
    yield from _rows(
        PerChannel,
        "instance_norm",
        "each channel normalised by its own statistics",
        work_kind="norm",
        parameters=statistics,
        gain="weight",
        centered=True,
    )
    yield from _rows(
        PerChannel,
        "prelu",
        "leaky with a slope per channel",
        parameters=("weight",),
        work_kind="pointwise",
    )


# ---------------------------------------------------------------------- moving

_MOVES = """
    roll flip rot90 pixel_shuffle pixel_unshuffle channel_shuffle repeat repeat_interleave.self_int
    tile unfold
"""
# Each axis stays one.
_TURNS = {"permute": in_order, "transpose.int": same_axis}
_COPIES = "clone contiguous detach alias lift_fresh_copy"
_PARTS = """
    split.Tensor split.sizes chunk
    tensor_split.sections tensor_split.indices
"""


def _layout() -> Iterator[Row]:
    shape = "another shape for the same elements"
    view: dict[str, Any] = {"work_kind": "view"}
    same: dict[str, Any] = {"identity": always}
    yield from _rows(Layout, "view _unsafe_view", shape, sizes="size", **view, **same)
    yield from _rows(Layout, "reshape", shape, sizes="shape", **view, **same)
    yield from _rows(
        Layout,
        "unflatten.int",
        "one axis split into several",
        sizes="sizes",
        sizes_at="dim",
        **view,
    )
    repeated = "an axis of size 1 repeated without a copy"
    yield from _rows(Layout, "expand", repeated, sizes="size", keeps_axes=True, **same)
    moving = "elements moved, none computed"
    yield from _rows(Layout, _MOVES, moving)
    for name, rule in _TURNS.items():
        yield from _rows(Layout, name, moving, keeps_axes=True, identity=rule)
    view["any_width"] = True
    yield from _rows(Layout, "flatten.using_ints", moving, **view, **same)
    yield from _rows(Layout, "squeeze.dim", moving, keeps_axes=True, **view, **same)
    yield from _rows(Layout, "squeeze.dims", moving, **view, **same)
    yield from _rows(Layout, "unsqueeze", moving, keeps_axes=True, **view)
    yield from _rows(Layout, _COPIES, moving, keeps_axes=True, **view, **same)
    del view["any_width"]
    gone = "every axis of size 1 taken away"
    yield from _rows(Squeeze, "squeeze", gone, keeps_axes=True, **view, **same)
    part = "a part of an axis"
    yield from _rows(Selection, "slice.Tensor", part, identity=slices_all)
    yield from _rows(Selection, _PARTS, part)
    yield from _rows(Selection, "index_select", part, work_kind="gather", identity=selects_all)
    yield from _rows(
        Selection, "select.int unbind.int", "one index of an axis, which goes away", drops=True
    )
    beside = "tensors side by side along an axis"
    yield from _rows(Join, "cat", beside, parts=("tensors",))
    yield from _rows(Join, "stack", beside, stacks=True, parts=("tensors",))
    yield from _rows(Pad, "pad constant_pad_nd", "constants around the elements", parts=("self",))
    yield from _rows(Glu, "glu", "first half of an axis times the sigmoid of the second")


# ---------------------------------------------------------------------- sums against a factor


def _contractions() -> Iterator[Row]:
    for n in (1, 2, 3):
        yield from _rows(
            Contract,
            f"conv{n}d conv{n}d.padding",
            "convolution: sums its group's input channels",
            spatial=n,
            costs=partial(convolution, spatial=n),
        )
        yield from _rows(
            Contract,
            f"conv_transpose{n}d conv_transpose{n}d.input",
            "transposed convolution",
            spatial=n,
            transposed=True,
            out_axis=1,
            in_axis=0,
            costs=partial(convolution, spatial=n, transposed=True),
        )
    yield from _rows(
        Contract,
        "linear",
        "matrix product with a weight [out, in]",
        costs=linear,
    )
    yield from _rows(
        Contract,
        "addmm",
        "matrix product with a weight [in, out]",
        x="mat1",
        weight="mat2",
        bias="self",
        out_axis=1,
        in_axis=0,
        costs=partial(product, left="mat1"),
    )
    matrices = "matrix product, of two activations or with a weight"
    cost = {"costs": partial(product, left="self")}
    yield from _rows(Product, "matmul", matrices, **cost)
    yield from _rows(Product, "mm bmm", matrices, right="mat2", **cost)
    yield from _rows(Attention, "scaled_dot_product_attention", "softmax(q k^T) v", costs=attention)
    yield from _rows(Lookup, "embedding", "rows of a table by index")


# ---------------------------------------------------------------------- mixing positions


def _mixing() -> Iterator[Row]:
    trailing: dict[str, Any] = {"shape_arg": "normalized_shape", "constants": never}
    yield from _rows(
        Mixing,
        "layer_norm",
        "normalised over trailing axes",
        parameters=("weight", "bias"),
        gain="weight",
        **trailing,
    )
    yield from _rows(
        Mixing,
        "rms_norm",
        "scaled by the root mean square of trailing axes",
        parameters=("weight",),
        gain="weight",
        **trailing,
    )
    along: dict[str, Any] = {"dims": "dim", "constants": never}
    yield from _rows(
        Mixing,
        "softmax.int _softmax _safe_softmax log_softmax.int _log_softmax",
        "normalised over an axis",
        work_kind="softmax",
        **along,
    )
    yield from _rows(Mixing, "cumsum cumprod", "running over an axis", ordered=True, **along)
    yield from _rows(GroupNorm, "group_norm", "normalised over groups of channels", gain="weight")


_RESIZING = {
    1: """
        upsample_nearest1d upsample_nearest1d.vec upsample_linear1d upsample_linear1d.vec
        reflection_pad1d replication_pad1d
    """,
    2: """
        upsample_nearest2d upsample_nearest2d.vec upsample_bilinear2d upsample_bilinear2d.vec
        upsample_bicubic2d upsample_bicubic2d.vec _upsample_bilinear2d_aa.vec
        _upsample_nearest_exact2d.vec reflection_pad2d replication_pad2d
    """,
    3: """
        upsample_nearest3d upsample_nearest3d.vec upsample_trilinear3d upsample_trilinear3d.vec
        reflection_pad3d replication_pad3d
    """,
}


def _spatial() -> Iterator[Row]:
    pooling, resizing = "pooling over space", "resizing over space"
    for n, names in _RESIZING.items():
        yield from _rows(Spatial, f"max_pool{n}d adaptive_avg_pool{n}d", pooling, trailing=n)
        yield from _rows(Spatial, f"avg_pool{n}d", pooling, trailing=n, constants=_padded_mean)
        yield from _rows(Spatial, names, resizing, trailing=n, work_kind="copy")
    yield from _rows(
        Spatial, "tril triu", "zeros beside a diagonal", trailing=2, constants=zero_only
    )


def _padded_mean(args: dict[str, Any]) -> str:
    padded = args["count_include_pad"] and any(args["padding"])
    return "zero" if padded or args["ceil_mode"] or args.get("divisor_override") else "same"


# ---------------------------------------------------------------------- reductions

_STATISTICS = """
    var.correction std.correction logsumexp norm.ScalarOpt_dim linalg_vector_norm
    prod.dim_int any.dim all.dim
"""


def _picking() -> Iterator[Row]:
    where = "elements from where an index says"
    yield from _rows(Gather, "gather", where)
    yield from _rows(Gather, "take_along_dim", where)
    written = "elements written where an index says"
    yield from _rows(Gather, "scatter.src scatter.value scatter_add", written, picks=False)
    yield from _rows(Indexed, "index.Tensor", where)
    yield from _rows(Sampled, "grid_sampler", "read between pixels where a grid says")
    best = "elements in their order, and where they were"
    ranks = "topk sort sort.stable max.dim min.dim median.dim kthvalue cummax cummin"
    yield from _rows(Ranked, ranks, best, dims="dim")
    yield from _rows(
        Spatial, "argsort argsort.stable", "where elements in their order are", dims="dim",
        constants=never, work_kind="copy", any_width=False,
    )  # fmt: skip
    yield from _rows(Columns, "im2col", "windows as columns")
    yield from _rows(Folded, "col2im", "columns summed into an image")


def _reductions() -> Iterator[Row]:
    total: dict[str, Any] = {"constants": zero_only, "skips_zeros": True}
    yield from _rows(Reduce, "mean.dim amax amin", "mean or extremum over axes", dims="dim")
    yield from _rows(Reduce, "mean max min", "mean or extremum of everything")
    yield from _rows(Reduce, "sum.dim_IntList", "sum over axes", dims="dim", **total)
    yield from _rows(Reduce, "sum", "sum of everything", **total)
    yield from _rows(
        Reduce, "argmax argmin", "where an extremum is", dims="dim", constants=never, numbers=True
    )
    yield from _rows(Reduce, _STATISTICS, "statistic over axes", dims="dim", constants=never)


def _fills() -> Iterator[Row]:
    summary = "made of sizes and numbers"
    yield from _rows(Fill, "zeros", summary, value=0.0)
    yield from _rows(Fill, "ones", summary, value=1.0)
    yield from _rows(Fill, "full", summary, value="fill_value")
    yield from _rows(Fill, "arange arange.start arange.start_step eye eye.m linspace", summary)
