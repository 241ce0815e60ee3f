"""Example calls for every row of the op table: what the table's test runs each operator on.

A `Sample` spells the arguments of one call; its tensors are `Made` by a layer, channel by channel,
a `Weight`, or `Given` to the model; a `Size` is a number that the model computes. The same object
twice is the same tensor twice.
"""

from __future__ import annotations

from typing import Any

import torch

from narrows.ir.ops.index_samples import index_samples
from narrows.ir.ops.sample import (
    BOOL,
    INT,
    Given,
    Made,
    Sample,
    Size,
    Weight,
    grid,
    heads,
    image,
    tokens,
)


def samples_of(name: str) -> tuple[Sample, ...]:
    """Return the samples of an overload, spelled as ATen does: ``conv2d.default``."""
    return tuple(_SAMPLES.get(name, ()))


def names() -> list[str]:
    """Return the overloads that have samples."""
    return sorted(_SAMPLES)


_SAMPLES: dict[str, list[Sample]] = {}


def _put(names: str, sample: Sample) -> None:
    for name in names.split():
        full = name if "." in name else f"{name}.default"
        _SAMPLES.setdefault(full, []).append(sample)


def _add(names: str, *args: Any, note: str = "", **kwargs: Any) -> None:
    _put(names, Sample(args, kwargs, note))


# ---------------------------------------------------------------------- element by element

_add(
    "silu gelu sigmoid tanh hardtanh hardswish hardsigmoid leaky_relu elu selu celu softplus mish "
    "log_sigmoid hardshrink softshrink abs neg exp exp2 expm1 sin cos atan "
    "sinh cosh asinh erf erfc sign nan_to_num rrelu relu",
    image(),
)
_add("clone contiguous alias", image())
_add("relu gelu", tokens())
_add("relu", heads(), note="channels on two axes")
_add("relu", Made((5, 6)))
_add("gelu", image(), approximate="tanh")
_add("relu6", image(high=8.0))
_add("hardtanh", image(), 0.3, 0.9, note="zero becomes 0.3")
_add("elu", image(), 0.5, 2.0, 1.5)
_add("leaky_relu", image(), 0.2)
_add("softplus", image(), 2.0, 1.0)
_add("floor ceil round trunc frac", image(low=-6.0, high=6.0))
_add("tan", image(low=-1.4, high=1.4))
_add("asin acos atanh erfinv", image(low=-0.9, high=0.9))
_add("acosh", image(low=1.1, high=3.0))
_add("logit", image(low=0.1, high=0.9))
_add("logit", image(), 0.1)
_add("log log2 log10 sqrt rsqrt reciprocal", image(low=0.1, high=3.0))
_add("log1p", image(low=-0.8, high=3.0))
_add("threshold", image(), 0.1, 0.5)
_add("clamp", image(), 0.2, 0.9)
_add("clamp", image(), None, 0.5)
_add("clamp", image(), 0.2)
_add("clamp.Tensor", image(), Weight((6, 1, 1), -1.0, 0.0), Weight((6, 1, 1), 0.5, 1.0))
_add("clamp.Tensor", image(), image(low=-1.0, high=0.0), None)
_add("logical_not", image(dtype=BOOL))
_add("bitwise_not", image(dtype=BOOL))
_add("bitwise_not", image(low=-9.0, high=9.0, dtype=INT))
_add("isnan isinf isfinite", image(silent=True))
_add("full_like", image(silent=True), 0)
_add("full_like", image(silent=True), 0.7)
_add("dropout feature_dropout alpha_dropout feature_alpha_dropout", image(), 0.4, False)
_add("to.dtype", image(dtype=BOOL), torch.float64)
_add("to.dtype", image(low=-9.0, high=9.0), INT)
_add("to.dtype", image(), torch.float64, note="nothing changes")
_add("to.device", image(), device=torch.device("cpu"), dtype=torch.float64)

for _names, _low, _high in (
    ("add.Tensor sub.Tensor mul.Tensor", -2.0, 2.0),
    ("maximum minimum fmax fmin logaddexp", -2.0, 2.0),
    ("atan2 div.Tensor remainder.Tensor fmod.Tensor", 0.2, 2.0),
    ("pow.Tensor_Tensor", 0.2, 2.0),
    ("lt.Tensor le.Tensor gt.Tensor ge.Tensor", -2.0, 2.0),
):
    _range: Any = {"low": _low, "high": _high}
    _add(_names, image(**_range), image(**_range))
    _add(_names, image(**_range), Weight((6, 1, 1), **_range), note="a parameter per channel")
    _add(_names, image(**_range), Made((2, 6, 1, 1), **_range), note="a gate per channel")
    _add(_names, Made((2, 1, 4, 4), **_range), Weight((6, 1, 1), **_range), note="one becomes six")
    _add(_names, image(**_range), Made((2, 1, 4, 4), **_range), note="one channel for all")
_add("add.Tensor sub.Tensor", image(), image(), alpha=0.5)
_add("add.Tensor", tokens(), Weight((5, 6)), note="position embedding")
_add("add.Tensor mul.Tensor", heads(), heads(), note="channels on two axes")
_add("mul.Tensor", heads(), Weight((5, 3)), note="rotary angles")
_add("mul.Tensor", image(), Weight((6, 1, 1), zeros=(1, 4)), note="a zero scale")
_add("add.Tensor", _x := image(), _x, note="twice the same")
_add("add.Tensor", Made((2, 6, 1, 1)), Made((2, 1, 4, 4)), note="an outer sum")
_add("add.Tensor sub.Tensor rsub.Scalar mul.Tensor div.Tensor", image(), 0.7)
_add("remainder.Scalar fmod.Scalar", image(), 0.7)
_add("div.Tensor", image(), 3.0)
_add("floor_divide", image(low=-6.0, high=6.0), 0.7)
_add("div.Tensor_mode", image(low=-6.0, high=6.0), 0.7, rounding_mode="trunc")
_add("div.Tensor_mode", image(low=-6.0, high=6.0), image(low=0.3, high=1.0), rounding_mode="trunc")
_add("floor_divide", image(low=-6.0, high=6.0), image(low=0.3, high=1.0))
_add("pow.Tensor_Scalar", image(), 2)
_add("pow.Tensor_Scalar", image(low=0.1), 0.5)
_add("pow.Tensor_Scalar", image(silent=True), 0, note="a power of zero is one")
_add("pow.Scalar", 2.0, image())
_add(
    "eq.Scalar ne.Scalar lt.Scalar le.Scalar gt.Scalar ge.Scalar",
    image(low=-2.9, high=2.9, dtype=INT),
    1,
)
_add(
    "eq.Tensor ne.Tensor",
    image(low=-1.9, high=1.9, dtype=INT),
    image(low=-1.9, high=1.9, dtype=INT),
)
_add(
    "logical_and logical_or logical_xor bitwise_and.Tensor bitwise_or.Tensor bitwise_xor.Tensor",
    image(dtype=BOOL),
    image(dtype=BOOL),
)
_add("lt.Scalar le.Scalar gt.Scalar ge.Scalar", image(), 0.7)
# Numbers that are drawn are never equal, and never zero.
_add("eq.Scalar ne.Scalar", image(silent=True), 0.7)
_add("eq.Tensor ne.Tensor", image(silent=True), image(silent=True))
_add("logical_not", image(silent=True))
_add("where.self", image(dtype=BOOL), image(), image())
_below = Weight((5, 5), values=(1, 0, 0, 0, 0) * 5, dtype=BOOL)
_add("where.self", _below, Made((2, 3, 5, 5)), Weight(()), note="a mask of positions")
_add("where.ScalarOther", image(dtype=BOOL), image(), 0.3)
_add("where.ScalarSelf", image(dtype=BOOL), 0.3, image())
_add("where.Scalar", image(dtype=BOOL), 0.3, 0.6)
_add("where.ScalarSelf", _below, -9.0, Made((2, 3, 5, 5)), note="a mask of positions")
_add("lerp.Scalar", image(), image(), 0.3)
_add("lerp.Tensor", image(), image(), image())
_add("addcmul", image(), image(), image(), value=0.5)
_add("addcdiv", image(), image(), image(low=0.4), value=0.5)

_add("prelu", image(), Weight((6,)))
_add("prelu", image(), Weight((1,), 0.1, 0.3))
_affine, _rest = (Weight((6,)), Weight((6,))), (False, 0.1, 1e-5, False)
_running = (Weight((6,)), Weight((6,), 0.5, 1.5), *_rest)
_some_zero = (Weight((6,), zeros=(1, 4)), Weight((6,)))
_add("batch_norm", image(), *_affine, *_running)
_add("batch_norm", image(), *_some_zero, *_running, note="zero scales")
_add("batch_norm", image(), None, None, *_running)
_add("batch_norm", Made((5, 6)), *_affine, *_running)
_add(
    "batch_norm", Made((2, 6, 2, 2), (1, 2, 3)), *_affine, *_running, note="an image made by linear"
)
_own = (None, None, True, *_rest[1:])
_add("instance_norm", image(), *_affine, *_own)
_add("instance_norm", image(), None, None, *_own)
_add("instance_norm", image(), *_affine, *_running, note="running statistics")

# ---------------------------------------------------------------------- layout

_add("reshape", image(), [2, -1])
_add("reshape expand", image(), [2, 6, 4, 4], note="nothing changes")
_add("reshape", image(), [2, 96])
_add("reshape", image(), [2, 6, 16])
_add("reshape", image(), [2, 2, 3, 4, 4])
_add("reshape", image(), [12, 4, 4], note="channels join the batch")
_add("reshape", grid(), [2, 6, 4, 4])
_add("reshape", tokens(12), [2, 5, 2, 6])
_add("unflatten.int", image(), 1, [2, 3])
_add("unflatten.int", tokens(), -1, [3, -1])
_add("expand", Made((2, 6, 1, 1)), [-1, -1, 3, 3])
_add("expand", Made((2, 6, 1, 1)), [2, 6, 3, 3])
_add("expand", Made((1, 6), (1,)), [4, 2, 6])
_add("expand", Made((2, 1, 4, 4)), [2, 5, 4, 4], note="one channel becomes five")
_add("flatten.using_ints", image(), 1)
_add("flatten.using_ints", image(), 2)
_add("flatten.using_ints", Made((5, 6)), 1, note="nothing changes")
_add("flatten.using_ints", Made((2, 6, 1, 1)), 1)
_add("flatten.using_ints", grid(), 1, 2)
_add("permute", image(), [0, 2, 3, 1])
_add("permute", heads(), [0, 2, 1, 3])
_add("permute", image(), [0, 1, -2, 3], note="nothing changes")
_add("permute", image(), [0, 3, 2, 1])
_add("permute", Made((5, 6)), [1, 0])
_add("squeeze", Made((2, 6, 1, 1)))
_add("squeeze", image(), note="nothing changes")
_add("squeeze.dims", image(), [2, 3], note="nothing changes")
_add("squeeze.dim", Made((2, 6, 1, 4)), 2)
_add("squeeze.dim", image(), 2, note="nothing to squeeze")
_add("squeeze.dims", Made((2, 6, 1, 1)), [2, 3])
_add("unsqueeze", image(), 2)
_add("unsqueeze", image(), -1)
_add("roll", image(), [2], [1])
_add("roll", image(), [1, -1], [2, 3])
_add("flip", image(), [1])
_add("flip", image(), [3])
_add("rot90", image(), 1, [2, 3])
_add("rot90", image(4), 1, [1, 2], note="channels become rows")
_add("pixel_shuffle", image(8), 2)
_add("pixel_unshuffle", image(3), 2)
_add("channel_shuffle", image(), 3)
_add("repeat", image(), [1, 2, 1, 1])
_add("repeat", image(), [1, 1, 2, 1])
_add("repeat_interleave.self_int", image(), 2, 1)
_add("repeat_interleave.self_int", heads(), 2, 1, note="keys for several queries")
_add("unfold", image(), 2, 2, 2)

_add("slice.Tensor", image(), 1, 1, 5)
_add("slice.Tensor", image(), 1, 0, 9223372036854775807, note="nothing changes")
_add("slice.Tensor", image(), 1, 0, 6, 2)
_add("slice.Tensor", image(), 1, -3, 9223372036854775807)
_add("slice.Tensor", image(), 2, 1, 3)
_add("slice.Tensor", heads(), 3, 0, 2)
_add("index_select", image(), 1, Weight((4,), values=(5, 0, 3, 3), dtype=INT))
_add(
    "index_select",
    image(),
    1,
    Weight((6,), values=(0, 1, 2, 3, 4, 5), dtype=INT),
    note="nothing changes",
)
_add("index_select", image(), 2, Weight((3,), values=(1, 0, 1), dtype=INT))
_add("split.sizes", image(), [4, 2], 1)
_add("split.sizes", image(), [2, 2], 2)
_add("split.sizes", image(), [1, 3, 2], 1)
_add("split.sizes", heads(2, 4), [2, 2], -1)
_add("select.int", image(), 1, 2)
_add("select.int", image(), 2, -1)
_add("select.int", grid(), 1, 1)

_add("cat", [image(4), image(3)], 1)
_add("cat", [image(3), _x, _x], 1, note="twice the same")
_add("cat", [image(), Weight((2, 2, 4, 4))], 1, note="a constant")
_add("cat", [image(), image()], 2, note="side by side in space")
_add("cat", [tokens(), Weight((2, 1, 6))], 1, note="a class token")
_add("cat", [heads(), heads()], -1, note="rotary halves")
_add("stack", [image(), image()], 1)
_add("stack", [image(), image()], -1)
_add("stack", [_x, image(), _x], 0)
_add("stack", [image(), Weight((2, 6, 4, 4))], 2)

_add("pad", image(), [1, 2, 0, 1])
_add("pad", image(), [1, 1, 1, 1], "constant", 0.5)
_add("pad", image(), [0, 0, 0, 0, 1, 2], note="new channels")
_add("pad", image(), [0, 0, 0, 0, -1, 2], "constant", 0.3, note="fewer and new channels")
_add("pad", image(), [1, 1, 1, 1], "reflect")
_add("pad", image(), [2, 0, 1, 3], "replicate")
_add("pad", image(), [0, 3, 2, 1], "circular")
_add("pad", image(), [1, -1, 0, 1], "constant", 0.3)
_add("glu", image(), 1)
_add("glu", tokens())
_add("glu", image(), 2, note="halves of space")

# ---------------------------------------------------------------------- contractions and products

for _n in (1, 2, 3):
    _conv = f"conv{_n}d"
    _in, _bias, _k = Made((2, 6, *(4,) * _n)), Weight((8,)), (3,) * _n
    _dense, _halves = Weight((8, 6, *_k)), Weight((8, 3, *_k))
    _add(_conv, _in, _dense, _bias)
    _add(_conv, _in, _dense, padding=[1] * _n, note="padded")
    _add(_conv, _in, _halves, _bias, groups=2, note="grouped")
    _add(f"{_conv}.padding", _in, _dense, _bias, [1] * _n, "same")
    _add(f"{_conv}.padding", _in, _dense, _bias, [1] * _n, "valid")
    _add(f"{_conv}.padding", _in, _halves, _bias, [1] * _n, "same", [1] * _n, 2, note="grouped")
    _up = "conv_transpose1d.default" if _n == 1 else f"conv_transpose{_n}d.input"
    _add(_up, _in, Weight((6, 8, *(2,) * _n)), _bias, [2] * _n)
    _add(_up, _in, Weight((6, 4, *_k)), stride=[2] * _n, padding=[1] * _n, groups=2, note="grouped")
_add("conv2d", image(), Weight((8, 6, 3, 3), zeros=(2, 5)), Weight((8,)), note="only their bias")
_add("conv2d", image(), Weight((6, 1, 3, 3)), padding=[1, 1], groups=6, note="depthwise")
_add("conv2d", image(), Weight((6, 1, 1, 1)), Weight((6,)), groups=6, note="depthwise")
_add("conv2d", image(4), Weight((8, 1, 3, 3)), padding=[1, 1], groups=4, note="two of each")
_add("conv2d", image(), Weight((3, 2, 3, 3)), stride=[2, 2], groups=3, note="one a group")
_add("conv2d", Made((2, 6, 2, 2), (1, 2, 3)), Weight((8, 6, 2, 2)), note="an image made by linear")
_add("conv_transpose2d.input", image(), Weight((6, 1, 2, 2)), groups=6, note="depthwise")
_add("linear", tokens(), Weight((8, 6)), Weight((8,)))
_add("linear", Made((5, 6)), Weight((8, 6), zeros=(1, 3)), Weight((8,)))
_add("linear", heads(), Weight((8, 3)), None, note="each head on its own")
_add("linear", image(), Weight((8, 4)), None, note="along space")
_add("linear", Made((2, 96), (1,)), Weight((8, 96)), Weight((8,)), note="a flattened image")
_add("addmm", Weight((8,)), Made((5, 6)), Weight((6, 8)))
_add("addmm", Weight((8,)), Made((5, 6)), Weight((6, 8)), beta=0.5, alpha=2.0)
_add("matmul", tokens(), Weight((6, 8)))
_add("matmul", Weight((8, 6)), Made((2, 6, 5)))
_add("matmul", heads(), Made((2, 2, 3, 5), (1, 2)), note="queries and keys")
_add("matmul", Made((2, 2, 5, 5)), heads(), note="scores and values")
_add("matmul", tokens(), Made((2, 6, 5)), note="tokens by channels by tokens")
_add("matmul", Made((2, 4, 6), (1, 2)), Made((2, 6, 3)), note="channels attend to channels")
_add("matmul", Made((2, 3, 6)), Made((2, 6, 4), (1, 2)), note="channels on both axes")
_add("matmul", Made((5, 6)), Weight((6, 8)))
_add("matmul", Made((5, 6)), Made((6, 4), (0,)))
_add("matmul", Given((2, 5, 5)), tokens())
_attention = "scaled_dot_product_attention"
_add(_attention, heads(), heads(), heads(2, 4))
_add(_attention, heads(), heads(), heads(), None, 0.0, True, note="causal")
_add(_attention, heads(), heads(), heads(), Weight((5, 5)), scale=0.3, note="a mask of positions")
_add(_attention, heads(), heads(), heads(), Weight((1, 2, 5, 5)), note="a mask per head")
_add(_attention, heads(4), heads(), heads(), enable_gqa=True, note="two queries a key")
_add(_attention, tokens(), tokens(), tokens(4), note="one head")
_add("embedding", Weight((11, 6)), Given((2, 5), 0, 11, INT))
_add("embedding", Weight((11, 6)), Given((2, 5), 0, 11, INT), 3)

# ---------------------------------------------------------------------- norms, reductions, resizing

_add("layer_norm", tokens(), [6], Weight((6,)), Weight((6,)))
_add("layer_norm", tokens(), [6], Weight((6,), zeros=(1, 4)), Weight((6,)), note="zero scales")
_add("layer_norm", image(), [4, 4], Weight((4, 4)), Weight((4, 4)), note="over space")
_add("layer_norm", image(), [6, 4, 4], Weight((6, 4, 4)), None)
_add("layer_norm", heads(), [3], note="each head on its own")
_add("rms_norm", tokens(), [6], Weight((6,)))
_add("rms_norm", heads(), [3], None, 1e-5, note="each head on its own")
_add("group_norm", image(), 3, Weight((6,)), Weight((6,)))
_add("group_norm", image(), 1, None, None)
_add("group_norm", Made((2, 6)), 2, Weight((6,)), None)
_add("softmax.int log_softmax.int", image(), 1)
_add("softmax.int log_softmax.int", image(), -1)
_add("softmax.int log_softmax.int", grid(), 1, note="over branches")
_add("_safe_softmax", image(), 1)
_add("_safe_softmax", image(), 3)
_add("cumsum cumprod", image(), 1)
_add("cumsum cumprod", image(), 2)

for _n in (1, 2, 3):
    _in, _two, _one = Made((2, 6, *(5,) * _n)), [2] * _n, [1] * _n
    _add(f"max_pool{_n}d avg_pool{_n}d", _in, _two)
    _add(f"max_pool{_n}d avg_pool{_n}d", _in, [3] * _n, _two, _one, note="padded")
    _add(f"avg_pool{_n}d", _in, [3] * _n, _two, _one, False, False, note="padding not counted")
    _add(f"avg_pool{_n}d", _in, _two, _two, [0] * _n, True, note="ragged at the end")
    _add(f"adaptive_avg_pool{_n}d", _in, _one)
    _add(f"adaptive_avg_pool{_n}d", _in, _two)
    _linear = {1: "linear", 2: "bilinear", 3: "trilinear"}[_n]
    _add(f"upsample_nearest{_n}d.vec", _in, [7] * _n, None)
    _add(f"upsample_nearest{_n}d.vec", _in, None, [2.0] * _n)
    _add(f"upsample_{_linear}{_n}d.vec", _in, [7] * _n, False, None)
    _add(f"upsample_{_linear}{_n}d.vec", _in, None, True, [2.0] * _n)
_add("avg_pool2d", image(), [2, 2], [2, 2], [0, 0], False, True, 3, note="another divisor")
_add("max_pool2d", heads(), [2, 1], note="channels on a pooled axis")
_add("upsample_bicubic2d.vec _upsample_bilinear2d_aa.vec", image(), [7, 7], False, None)
_add("_upsample_nearest_exact2d.vec", image(), None, [1.5, 1.5])
for _mode in ("reflect", "replicate"):
    _add("pad", Made((2, 6, 5)), [2, 1], _mode)
    _add("pad", Made((2, 6, 3, 4, 5)), [1, 0, 2, 1, 0, 2], _mode)

_reductions = "mean.dim sum.dim_IntList amax amin logsumexp"
_add(_reductions, image(), [2, 3])
_add(_reductions, image(), [-1, -2], keepdim=True)
_add(_reductions, image(), [1])
_add(_reductions, image(), [1], keepdim=True)
_add(_reductions, grid(), [1], note="over branches")
_add(_reductions, grid(), [2], note="within groups")
_add(_reductions, tokens(), [1])
_add("mean.dim sum.dim_IntList", image(), None)
_add("var.correction std.correction", image(), [2, 3], correction=0, keepdim=True)
_add("var.correction std.correction", image(), [1])
_add("prod.dim_int", image(), 2)
_add("prod.dim_int", image(), 1, True)
_add("any.dim all.dim", image(dtype=BOOL), 2)
_add("any.dim all.dim", image(3, dtype=BOOL), 1, True)
_add("linalg_vector_norm", image(), 2, [1], True)
_add("linalg_vector_norm", image(), 1, [2, 3])
_add("mean.dim amax amin sum.dim_IntList", image(3), [0, 1, 2, 3], note="of everything")
_add("tril triu", Made((2, 6, 5, 5)))
_add("tril triu", Made((2, 6, 5, 5)), 1)
_add("tril", tokens(), note="channels on its axes")

# ---------------------------------------------------------------------- made of sizes and numbers

_add("full", [Size(), 6], 0.0)
_add("full", [Size(), 6], 0.7)
_add("eye.m", Size(), Size())
_add("eye.m", 1, Size())
_add("arange.start_step", 1, Size())
_add("arange.start_step", 0, Size(), 2)
_add("linspace", 0.0, 1.0, Size())

for _names, _sample in index_samples():
    _put(_names, _sample)
