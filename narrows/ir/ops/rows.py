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
    softplus log_sigmoid hardshrink softshrink threshold rrelu abs neg sign sin cos tan atan
    asinh erf erfc floor ceil round trunc frac clamp clamp.Tensor nan_to_num logical_not bitwise_not
    isnan isinf isfinite
"""
_BINARY = """
    rsub.Scalar maximum minimum fmax fmin logaddexp atan2
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
    div.Tensor_mode floor_divide remainder.Tensor remainder.Scalar fmod.Tensor fmod.Scalar
    pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar addcdiv
"""


def _pointwise() -> Iterator[Row]:
    unary, binary = "y = f(x), element by element", "y = f(a, b), element by element, broadcasting"
    yield from _rows(Pointwise, _UNARY, unary)
    yield from _rows(Pointwise, _PARTIAL_UNARY, unary, partial=True)
    yield from _rows(Pointwise, _BINARY, binary)
    yield from _rows(Pointwise, _PARTIAL_BINARY, binary, partial=True)
    yield from _rows(Pointwise, "add.Tensor sub.Tensor", binary, identity=plus_zero)
    yield from _rows(Pointwise, "div.Tensor", binary, partial=True, identity=times_one)
    yield from _rows(
        Pointwise,
        "mul.Tensor",
        "y = a * b; a zero channel makes a zero channel",
        absorbs=True,
        identity=times_one,
    )
    chosen = {"where.self": "self other", "where.ScalarOther": "self", "where.ScalarSelf": "other"}
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
        "to.dtype to.device",
        "the same elements, perhaps in another dtype",
        identity=always,
    )
    yield from _rows(Pointwise, "full_like", "the same shape, perhaps in another dtype")
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
    unfold
"""


def _layout() -> Iterator[Row]:
    shape = "another shape for the same elements"
    view: dict[str, Any] = {"work_kind": "view"}
    same: dict[str, Any] = {"identity": always}
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
    yield from _rows(Layout, "permute", moving, keeps_axes=True, identity=in_order)
    view["any_width"] = True
    yield from _rows(Layout, "flatten.using_ints", moving, **view, **same)
    yield from _rows(Layout, "squeeze.dim", moving, keeps_axes=True, **view, **same)
    yield from _rows(Layout, "squeeze.dims", moving, **view, **same)
    yield from _rows(Layout, "unsqueeze", moving, keeps_axes=True, **view)
    yield from _rows(Layout, "clone contiguous alias", moving, keeps_axes=True, **view, **same)
    del view["any_width"]
    gone = "every axis of size 1 taken away"
    yield from _rows(Squeeze, "squeeze", gone, keeps_axes=True, **view, **same)
    part = "a part of an axis"
    yield from _rows(Selection, "slice.Tensor", part, identity=slices_all)
    yield from _rows(Selection, "split.sizes", part)
    yield from _rows(Selection, "index_select", part, work_kind="gather", identity=selects_all)
    yield from _rows(Selection, "select.int", "one index of an axis, which goes away", drops=True)
    beside = "tensors side by side along an axis"
    yield from _rows(Join, "cat", beside, parts=("tensors",))
    yield from _rows(Join, "stack", beside, stacks=True, parts=("tensors",))
    around = "constants around the elements, or elements over again"
    yield from _rows(Pad, "pad", around, parts=("self",))
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
    yield from _rows(Product, "matmul", matrices, costs=partial(product, left="self"))
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
        "softmax.int _safe_softmax log_softmax.int",
        "normalised over an axis",
        work_kind="softmax",
        **along,
    )
    yield from _rows(Mixing, "cumsum cumprod", "running over an axis", ordered=True, **along)
    yield from _rows(GroupNorm, "group_norm", "normalised over groups of channels", gain="weight")


_RESIZING = {
    1: "upsample_nearest1d.vec upsample_linear1d.vec",
    2: """
        upsample_nearest2d.vec upsample_bilinear2d.vec upsample_bicubic2d.vec
        _upsample_bilinear2d_aa.vec _upsample_nearest_exact2d.vec
    """,
    3: "upsample_nearest3d.vec upsample_trilinear3d.vec",
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
    var.correction std.correction logsumexp linalg_vector_norm prod.dim_int any.dim all.dim
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
    yield from _rows(Reduce, "sum.dim_IntList", "sum over axes", dims="dim", **total)
    yield from _rows(
        Reduce, "argmax argmin", "where an extremum is", dims="dim", constants=never, numbers=True
    )
    yield from _rows(Reduce, _STATISTICS, "statistic over axes", dims="dim", constants=never)


def _fills() -> Iterator[Row]:
    summary = "made of sizes and numbers"
    yield from _rows(Fill, "full", summary, value="fill_value")
    yield from _rows(Fill, "arange.start_step eye.m linspace", summary)
