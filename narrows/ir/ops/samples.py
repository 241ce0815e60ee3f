"""Example calls for every row of the op table: what the table's test runs each operator on.

A `Sample` spells the arguments of one call; its tensors are `Made` by a layer, channel by channel,
a `Weight`, or `Given` to the model; a `Size` is a number that the model computes. The same object
twice is the same tensor twice.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class Made:
    """A tensor that a layer computes.

    Attributes:
        shape: Its shape.
        axes: The axes on which each index (each combination, if several) is a channel of the layer.
        low: The smallest value it takes; ``high``: the largest.
        dtype: The dtype it is cast to.
        silent: Whether the operator's result does not depend on its values.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...] = (1,)
    low: float = -2.0
    high: float = 2.0
    dtype: torch.dtype = torch.float64
    silent: bool = False


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight, or a constant: ``values`` where given, else random.

    Attributes:
        shape: Its shape.
        low: The smallest value; ``high``: the largest.
        zeros: Indices of axis 0 that are zero.
        values: The very values, flat.
        dtype: Its dtype.
    """

    shape: tuple[int, ...]
    low: float = -1.0
    high: float = 1.0
    zeros: tuple[int, ...] = ()
    values: tuple[float, ...] = ()
    dtype: torch.dtype = torch.float64


@dataclass(frozen=True, eq=False)
class Given:
    """An input of the model: ``high`` excluded for whole numbers."""

    shape: tuple[int, ...]
    low: float = -1.0
    high: float = 1.0
    dtype: torch.dtype = torch.float64


@dataclass(frozen=True, eq=False)
class Size:
    """The number of rows of a model input: the size of the free batch axis."""

    rows: int = 2


@dataclass(frozen=True)
class Sample:
    """One call of an operator.

    Attributes:
        args: Its arguments; ``kwargs``: those by name.
        note: What the sample is about.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    note: str = ""


def samples_of(name: str) -> tuple[Sample, ...]:
    """Return the samples of an overload, spelled as ATen does: ``conv2d.default``."""
    return tuple(_SAMPLES.get(name, ()))


def names() -> list[str]:
    """Return the overloads that have samples."""
    return sorted(_SAMPLES)


_SAMPLES: dict[str, list[Sample]] = {}


def _add(names: str, *args: Any, note: str = "", **kwargs: Any) -> None:
    for name in names.split():
        full = name if "." in name else f"{name}.default"
        _SAMPLES.setdefault(full, []).append(Sample(args, kwargs, note))


def _image(width: int = 6, height: int = 4, **facts: Any) -> Made:
    return Made((2, width, height, height), **facts)


def _tokens(width: int = 6, **facts: Any) -> Made:
    return Made((2, 5, width), (2,), **facts)


def _heads(count: int = 2, width: int = 3, **facts: Any) -> Made:
    return Made((2, count, 5, width), (1, 3), **facts)


def _grid(**facts: Any) -> Made:
    return Made((2, 2, 3, 4, 4), (1, 2), **facts)


BOOL, INT = torch.bool, torch.int64

# ---------------------------------------------------------------------- element by element

_add(
    "silu gelu sigmoid tanh hardtanh hardswish hardsigmoid leaky_relu elu selu celu softplus mish "
    "log_sigmoid hardshrink softshrink abs absolute neg negative exp exp2 expm1 square sin cos atan "
    "sinh cosh asinh erf erfc sign sgn nan_to_num rrelu relu",
    _image(),
)
_add("positive clone contiguous detach alias lift_fresh_copy", _image())
_add("relu gelu", _tokens())
_add("relu", _heads(), note="channels on two axes")
_add("relu", Made((5, 6)))
_add("gelu", _image(), approximate="tanh")
_add("relu6", _image(high=8.0))
_add("hardtanh", _image(), 0.3, 0.9, note="zero becomes 0.3")
_add("elu", _image(), 0.5, 2.0, 1.5)
_add("leaky_relu", _image(), 0.2)
_add("softplus", _image(), 2.0, 1.0)
_add("floor ceil round trunc frac", _image(low=-6.0, high=6.0))
_add("tan", _image(low=-1.4, high=1.4))
_add("asin acos atanh erfinv", _image(low=-0.9, high=0.9))
_add("acosh", _image(low=1.1, high=3.0))
_add("logit", _image(low=0.1, high=0.9))
_add("logit", _image(), 0.1)
_add("log log2 log10 sqrt rsqrt reciprocal", _image(low=0.1, high=3.0))
_add("log1p", _image(low=-0.8, high=3.0))
_add("threshold", _image(), 0.1, 0.5)
_add("clamp clip", _image(), 0.2, 0.9)
_add("clamp", _image(), None, 0.5)
_add("clamp_min clamp_max", _image(), 0.2)
_add("clamp.Tensor", _image(), Weight((6, 1, 1), -1.0, 0.0), Weight((6, 1, 1), 0.5, 1.0))
_add("clamp.Tensor", _image(), _image(low=-1.0, high=0.0), None)
_add("logical_not", _image(dtype=BOOL))
_add("bitwise_not", _image(dtype=BOOL))
_add("bitwise_not", _image(low=-9.0, high=9.0, dtype=INT))
_add("isnan isinf isfinite zeros_like ones_like", _image(silent=True))
_add("full_like", _image(silent=True), 0.7)
_add("dropout feature_dropout alpha_dropout feature_alpha_dropout", _image(), 0.4, False)
_add("to.dtype", _image(), torch.float64)
_add("to.dtype", _image(dtype=BOOL), torch.float64)
_add("to.dtype", _image(low=-9.0, high=9.0), INT)
_add("to.dtype_layout _to_copy", _image(dtype=BOOL), dtype=torch.float64)
_add("to.dtype_layout _to_copy", _image(), dtype=torch.float64, note="nothing changes")
_add("to.device", _image(), device=torch.device("cpu"), dtype=torch.float64)

for _names, _low, _high in (
    ("add.Tensor sub.Tensor subtract.Tensor rsub.Tensor mul.Tensor multiply.Tensor", -2.0, 2.0),
    ("maximum minimum max.other min.other fmax fmin logaddexp", -2.0, 2.0),
    ("clamp_min.Tensor clamp_max.Tensor", -2.0, 2.0),
    ("atan2 div.Tensor divide.Tensor true_divide.Tensor remainder.Tensor fmod.Tensor", 0.2, 2.0),
    ("pow.Tensor_Tensor", 0.2, 2.0),
    ("lt.Tensor le.Tensor gt.Tensor ge.Tensor", -2.0, 2.0),
):
    _range: Any = {"low": _low, "high": _high}
    _add(_names, _image(**_range), _image(**_range))
    _add(_names, _image(**_range), Weight((6, 1, 1), **_range), note="a parameter per channel")
    _add(_names, _image(**_range), Made((2, 6, 1, 1), **_range), note="a gate per channel")
    _add(_names, Made((2, 1, 4, 4), **_range), Weight((6, 1, 1), **_range), note="one becomes six")
    _add(_names, _image(**_range), Made((2, 1, 4, 4), **_range), note="one channel for all")
_add("add.Tensor sub.Tensor", _image(), _image(), alpha=0.5)
_add("add.Tensor", _tokens(), Weight((5, 6)), note="position embedding")
_add("add.Tensor mul.Tensor", _heads(), _heads(), note="channels on two axes")
_add("mul.Tensor", _heads(), Weight((5, 3)), note="rotary angles")
_add("mul.Tensor", _image(), Weight((6, 1, 1), zeros=(1, 4)), note="a zero scale")
_add("add.Tensor", _x := _image(), _x, note="twice the same")
_add("add.Tensor", Made((2, 6, 1, 1)), Made((2, 1, 4, 4)), note="an outer sum")
_add("add.Scalar sub.Scalar rsub.Scalar mul.Scalar div.Scalar", _image(), 0.7)
_add("multiply.Scalar", _image(), 0.7)
_add("remainder.Scalar fmod.Scalar", _image(), 0.7)
_add("floor_divide.Scalar", _image(low=-6.0, high=6.0), 0.7)
_add("div.Scalar_mode", _image(low=-6.0, high=6.0), 0.7, rounding_mode="floor")
_add("div.Tensor", _image(), 3.0)
_add("div.Tensor_mode", _image(low=-6.0, high=6.0), 0.7, rounding_mode="floor")
_add("floor_divide", _image(low=-6.0, high=6.0), 0.7)
_add(
    "div.Tensor_mode", _image(low=-6.0, high=6.0), _image(low=0.3, high=1.0), rounding_mode="trunc"
)
_add("floor_divide", _image(low=-6.0, high=6.0), _image(low=0.3, high=1.0))
_add("pow.Tensor_Scalar", _image(), 2)
_add("pow.Tensor_Scalar", _image(low=0.1), 0.5)
_add("pow.Tensor_Scalar", _image(silent=True), 0, note="a power of zero is one")
_add("pow.Scalar", 2.0, _image())
_add(
    "eq.Scalar ne.Scalar lt.Scalar le.Scalar gt.Scalar ge.Scalar",
    _image(low=-2.9, high=2.9, dtype=INT),
    1,
)
_add(
    "eq.Tensor ne.Tensor",
    _image(low=-1.9, high=1.9, dtype=INT),
    _image(low=-1.9, high=1.9, dtype=INT),
)
_add(
    "logical_and logical_or logical_xor bitwise_and.Tensor bitwise_or.Tensor bitwise_xor.Tensor "
    "__and__.Tensor __or__.Tensor",
    _image(dtype=BOOL),
    _image(dtype=BOOL),
)
_add("lt.Scalar le.Scalar gt.Scalar ge.Scalar", _image(), 0.7)
# Numbers that are drawn are never equal, and never zero.
_add("eq.Scalar ne.Scalar", _image(silent=True), 0.7)
_add("eq.Tensor ne.Tensor", _image(silent=True), _image(silent=True))
_add("logical_not", _image(silent=True))
_add("where.self", _image(dtype=BOOL), _image(), _image())
_below = Weight((5, 5), values=(1, 0, 0, 0, 0) * 5, dtype=BOOL)
_add("where.self", _below, Made((2, 3, 5, 5)), Weight(()), note="a mask of positions")
_add("where.ScalarOther", _image(dtype=BOOL), _image(), 0.3)
_add("where.ScalarSelf", _image(dtype=BOOL), 0.3, _image())
_add("where.Scalar", _image(dtype=BOOL), 0.3, 0.6)
_add("masked_fill.Scalar", _image(), _image(dtype=BOOL), 0.25)
_add("masked_fill.Scalar", Made((2, 3, 5, 5)), _below, -9.0)
_add("masked_fill.Tensor", _image(), _image(dtype=BOOL), Weight(()))
_add("lerp.Scalar", _image(), _image(), 0.3)
_add("lerp.Tensor", _image(), _image(), _image())
_add("addcmul", _image(), _image(), _image(), value=0.5)
_add("addcdiv", _image(), _image(), _image(low=0.4), value=0.5)

_add("prelu", _image(), Weight((6,)))
_add("prelu", _image(), Weight((1,), 0.1, 0.3))
_affine, _rest = (Weight((6,)), Weight((6,))), (False, 0.1, 1e-5, False)
_running = (Weight((6,)), Weight((6,), 0.5, 1.5), *_rest)
_some_zero = (Weight((6,), zeros=(1, 4)), Weight((6,)))
_add("batch_norm", _image(), *_affine, *_running)
_add("batch_norm", _image(), *_some_zero, *_running, note="zero scales")
_add("batch_norm", _image(), None, None, *_running)
_add("batch_norm", Made((5, 6)), *_affine, *_running)
_add(
    "batch_norm", Made((2, 6, 2, 2), (1, 2, 3)), *_affine, *_running, note="an image made by linear"
)
_own = (None, None, True, *_rest[1:])
_add("instance_norm", _image(), *_affine, *_own)
_add("instance_norm", _image(), None, None, *_own)
_add("instance_norm", _image(), *_affine, *_running, note="running statistics")

# ---------------------------------------------------------------------- layout

_add("view reshape _unsafe_view", _image(), [2, -1])
_add("view reshape _unsafe_view expand", _image(), [2, 6, 4, 4], note="nothing changes")
_add("view reshape", _image(), [2, 96])
_add("view reshape", _image(), [2, 6, 16])
_add("view reshape", _image(), [2, 2, 3, 4, 4])
_add("view reshape", _image(), [12, 4, 4], note="channels join the batch")
_add("view reshape", _grid(), [2, 6, 4, 4])
_add("view reshape", _tokens(12), [2, 5, 2, 6])
_add("unflatten.int", _image(), 1, [2, 3])
_add("unflatten.int", _tokens(), -1, [3, -1])
_add("expand", Made((2, 6, 1, 1)), [-1, -1, 3, 3])
_add("expand", Made((2, 6, 1, 1)), [2, 6, 3, 3])
_add("expand", Made((1, 6), (1,)), [4, 2, 6])
_add("expand", Made((2, 1, 4, 4)), [2, 5, 4, 4], note="one channel becomes five")
_add("flatten.using_ints", _image(), 1)
_add("flatten.using_ints", _image(), 2)
_add("flatten.using_ints", Made((5, 6)), 1, note="nothing changes")
_add("flatten.using_ints", Made((2, 6, 1, 1)), 1)
_add("flatten.using_ints", _grid(), 1, 2)
_add("permute", _image(), [0, 2, 3, 1])
_add("permute", _heads(), [0, 2, 1, 3])
_add("permute", _image(), [0, 1, -2, 3], note="nothing changes")
_add("transpose.int", _image(), 1, -3, note="nothing changes")
_add("transpose.int swapaxes swapdims movedim.int moveaxis.int", _image(), 1, 3)
_add("movedim.intlist moveaxis.intlist", _image(), [1, 2], [3, 0])
_add("t numpy_T", Made((5, 6)))
_add("mT adjoint", _tokens())
_add("squeeze", Made((2, 6, 1, 1)))
_add("squeeze", _image(), note="nothing changes")
_add("squeeze.dims", _image(), [2, 3], note="nothing changes")
_add("squeeze.dim", Made((2, 6, 1, 4)), 2)
_add("squeeze.dim", _image(), 2, note="nothing to squeeze")
_add("squeeze.dims", Made((2, 6, 1, 1)), [2, 3])
_add("unsqueeze", _image(), 2)
_add("unsqueeze", _image(), -1)
_add("roll", _image(), [2], [1])
_add("roll", _image(), [1, -1], [2, 3])
_add("flip", _image(), [1])
_add("flip", _image(), [3])
_add("rot90", _image(), 1, [2, 3])
_add("rot90", _image(4), 1, [1, 2], note="channels become rows")
_add("pixel_shuffle", _image(8), 2)
_add("pixel_unshuffle", _image(3), 2)
_add("channel_shuffle", _image(), 3)
_add("repeat tile", _image(), [1, 2, 1, 1])
_add("repeat", _image(), [1, 1, 2, 1])
_add("repeat_interleave.self_int", _image(), 2, 1)
_add("repeat_interleave.self_int", _heads(), 2, 1, note="keys for several queries")
_add("narrow_copy", _image(), 1, 1, 3)
_add("unfold", _image(), 2, 2, 2)

_add("slice.Tensor", _image(), 1, 1, 5)
_add("slice.Tensor", _image(), 1, 0, 9223372036854775807, note="nothing changes")
_add("slice.Tensor", _image(), 1, 0, 6, 2)
_add("slice.Tensor", _image(), 1, -3, 9223372036854775807)
_add("slice.Tensor", _image(), 2, 1, 3)
_add("slice.Tensor", _heads(), 3, 0, 2)
_add("narrow", _image(), 1, 1, 3)
_add("index_select", _image(), 1, Weight((4,), values=(5, 0, 3, 3), dtype=INT))
_add(
    "index_select",
    _image(),
    1,
    Weight((6,), values=(0, 1, 2, 3, 4, 5), dtype=INT),
    note="nothing changes",
)
_add("index_select", _image(), 2, Weight((3,), values=(1, 0, 1), dtype=INT))
_add("split.Tensor", _image(), 4, 1)
_add("split.Tensor", _image(), 2, 2)
_add("split.sizes split_with_sizes", _image(), [1, 3, 2], 1)
_add("chunk tensor_split.sections", _image(), 3, 1)
_add("chunk", _heads(2, 4), 2, -1)
_add("tensor_split.indices", _image(), [1, 4], 1)
_add("select.int", _image(), 1, 2)
_add("select.int", _image(), 2, -1)
_add("select.int", _grid(), 1, 1)
_add("unbind.int", _image(), 2)
_add("unbind.int", _grid(), 1)

for _name in ("cat", "concat"):
    _add(_name, [_image(4), _image(3)], 1)
    _add(_name, [_image(3), _x, _x], 1, note="twice the same")
    _add(_name, [_image(), Weight((2, 2, 4, 4))], 1, note="a constant")
    _add(_name, [_image(), _image()], 2, note="side by side in space")
    _add(_name, [_tokens(), Weight((2, 1, 6))], 1, note="a class token")
    _add(_name, [_heads(), _heads()], -1, note="rotary halves")
_add("stack", [_image(), _image()], 1)
_add("stack", [_image(), _image()], -1)
_add("stack", [_x, _image(), _x], 0)
_add("stack", [_image(), Weight((2, 6, 4, 4))], 2)

_add("pad", _image(), [1, 2, 0, 1])
_add("pad", _image(), [1, 1, 1, 1], "constant", 0.5)
_add("pad", _image(), [0, 0, 0, 0, 1, 2], note="new channels")
_add("pad", _image(), [0, 0, 0, 0, -1, 2], "constant", 0.3, note="fewer and new channels")
_add("pad", _image(), [1, 1, 1, 1], "reflect")
_add("pad", _image(), [2, 0, 1, 3], "replicate")
_add("pad", _image(), [0, 3, 2, 1], "circular")
_add("constant_pad_nd", _image(), [1, -1, 0, 1], 0.3)
_add("constant_pad_nd", _image(), [1, 2, 0, 1], 0.0)
_add("glu", _image(), 1)
_add("glu", _tokens())
_add("glu", _image(), 2, note="halves of space")

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
    _up = "conv_transpose1d.default" if _n == 1 else f"conv_transpose{_n}d.input"
    _add(_up, _in, Weight((6, 8, *(2,) * _n)), _bias, [2] * _n)
    _add(_up, _in, Weight((6, 4, *_k)), stride=[2] * _n, padding=[1] * _n, groups=2, note="grouped")
_add("conv2d", _image(), Weight((8, 6, 3, 3), zeros=(2, 5)), Weight((8,)), note="only their bias")
_add("conv2d", _image(), Weight((6, 1, 3, 3)), padding=[1, 1], groups=6, note="depthwise")
_add("conv2d", _image(), Weight((6, 1, 1, 1)), Weight((6,)), groups=6, note="depthwise")
_add("conv2d", _image(4), Weight((8, 1, 3, 3)), padding=[1, 1], groups=4, note="two of each")
_add("conv2d", _image(), Weight((3, 2, 3, 3)), stride=[2, 2], groups=3, note="one a group")
_add("conv2d", Made((2, 6, 2, 2), (1, 2, 3)), Weight((8, 6, 2, 2)), note="an image made by linear")
_add("conv_transpose2d.input", _image(), Weight((6, 1, 2, 2)), groups=6, note="depthwise")
_add("linear", _tokens(), Weight((8, 6)), Weight((8,)))
_add("linear", Made((5, 6)), Weight((8, 6), zeros=(1, 3)), Weight((8,)))
_add("linear", _heads(), Weight((8, 3)), None, note="each head on its own")
_add("linear", _image(), Weight((8, 4)), None, note="along space")
_add("linear", Made((2, 96), (1,)), Weight((8, 96)), Weight((8,)), note="a flattened image")
_add("addmm", Weight((8,)), Made((5, 6)), Weight((6, 8)))
_add("addmm", Weight((8,)), Made((5, 6)), Weight((6, 8)), beta=0.5, alpha=2.0)
_add("matmul", _tokens(), Weight((6, 8)))
_add("matmul", Weight((8, 6)), Made((2, 6, 5)))
_add("matmul", _heads(), Made((2, 2, 3, 5), (1, 2)), note="queries and keys")
_add("matmul", Made((2, 2, 5, 5)), _heads(), note="scores and values")
_add("matmul", _tokens(), Made((2, 6, 5)), note="tokens by channels by tokens")
_add("matmul", Made((2, 4, 6), (1, 2)), Made((2, 6, 3)), note="channels attend to channels")
_add("matmul", Made((2, 3, 6)), Made((2, 6, 4), (1, 2)), note="channels on both axes")
_add("mm", Made((5, 6)), Weight((6, 8)))
_add("mm", Made((5, 6)), Made((6, 4), (0,)))
_add("bmm", _tokens(), Made((2, 6, 5)))
_add("bmm", Given((2, 5, 5)), _tokens())
_attention = "scaled_dot_product_attention"
_add(_attention, _heads(), _heads(), _heads(2, 4))
_add(_attention, _heads(), _heads(), _heads(), None, 0.0, True, note="causal")
_add(
    _attention, _heads(), _heads(), _heads(), Weight((5, 5)), scale=0.3, note="a mask of positions"
)
_add(_attention, _heads(), _heads(), _heads(), Weight((1, 2, 5, 5)), note="a mask per head")
_add(_attention, _heads(4), _heads(), _heads(), enable_gqa=True, note="two queries a key")
_add(_attention, _tokens(), _tokens(), _tokens(4), note="one head")
_add("embedding", Weight((11, 6)), Given((2, 5), 0, 11, INT))
_add("embedding", Weight((11, 6)), Given((2, 5), 0, 11, INT), 3)

# ---------------------------------------------------------------------- norms, reductions, resizing

_add("layer_norm", _tokens(), [6], Weight((6,)), Weight((6,)))
_add("layer_norm", _tokens(), [6], Weight((6,), zeros=(1, 4)), Weight((6,)), note="zero scales")
_add("layer_norm", _image(), [4, 4], Weight((4, 4)), Weight((4, 4)), note="over space")
_add("layer_norm", _image(), [6, 4, 4], Weight((6, 4, 4)), None)
_add("layer_norm", _heads(), [3], note="each head on its own")
_add("rms_norm", _tokens(), [6], Weight((6,)))
_add("rms_norm", _heads(), [3], None, 1e-5, note="each head on its own")
_add("group_norm", _image(), 3, Weight((6,)), Weight((6,)))
_add("group_norm", _image(), 1, None, None)
_add("group_norm", Made((2, 6)), 2, Weight((6,)), None)
_add("softmax.int log_softmax.int", _image(), 1)
_add("softmax.int log_softmax.int", _image(), -1)
_add("softmax.int log_softmax.int", _grid(), 1, note="over branches")
_add("_safe_softmax", _image(), 1)
_add("_safe_softmax", _image(), 3)
_add("_softmax _log_softmax", _image(), 1, False)
_add("_softmax _log_softmax", _image(), 3, False)
_add("cumsum cumprod", _image(), 1)
_add("cumsum cumprod", _image(), 2)

for _n in (1, 2, 3):
    _in, _two, _one = Made((2, 6, *(5,) * _n)), [2] * _n, [1] * _n
    _add(f"max_pool{_n}d avg_pool{_n}d", _in, _two)
    _add(f"max_pool{_n}d avg_pool{_n}d", _in, [3] * _n, _two, _one, note="padded")
    _add(f"avg_pool{_n}d", _in, [3] * _n, _two, _one, False, False, note="padding not counted")
    _add(f"avg_pool{_n}d", _in, _two, _two, [0] * _n, True, note="ragged at the end")
    _add(f"adaptive_avg_pool{_n}d", _in, _one)
    _add(f"adaptive_avg_pool{_n}d", _in, _two)
    _linear = {1: "linear", 2: "bilinear", 3: "trilinear"}[_n]
    _add(f"upsample_nearest{_n}d", _in, [7] * _n)
    _add(f"upsample_nearest{_n}d.vec", _in, None, [2.0] * _n)
    _add(f"upsample_{_linear}{_n}d", _in, [7] * _n, False)
    _add(f"upsample_{_linear}{_n}d.vec", _in, None, True, [2.0] * _n)
_add("avg_pool2d", _image(), [2, 2], [2, 2], [0, 0], False, True, 3, note="another divisor")
_add("max_pool2d", _heads(), [2, 1], note="channels on a pooled axis")
_add("upsample_bicubic2d", _image(), [7, 7], False)
_add("upsample_bicubic2d.vec _upsample_bilinear2d_aa.vec", _image(), [7, 7], False, None)
_add("_upsample_nearest_exact2d.vec", _image(), None, [1.5, 1.5])
_add("reflection_pad1d replication_pad1d", Made((2, 6, 5)), [2, 1])
_add("reflection_pad2d replication_pad2d", _image(), [1, 0, 2, 1])
_add("reflection_pad3d replication_pad3d", Made((2, 6, 3, 4, 5)), [1, 0, 2, 1, 0, 2])

_reductions = "mean.dim sum.dim_IntList amax amin logsumexp var.dim std.dim"
_add(_reductions, _image(), [2, 3])
_add(_reductions, _image(), [-1, -2], keepdim=True)
_add(_reductions, _image(), [1])
_add(_reductions, _image(), [1], keepdim=True)
_add(_reductions, _grid(), [1], note="over branches")
_add(_reductions, _grid(), [2], note="within groups")
_add(_reductions, _tokens(), [1])
_add("mean.dim sum.dim_IntList", _image(), None)
_add("var.correction std.correction", _image(), [2, 3], correction=0, keepdim=True)
_add("var.correction std.correction", _image(), [1])
_add("prod.dim_int", _image(), 2)
_add("prod.dim_int", _image(), 1, True)
_add("any.dim all.dim", _image(dtype=BOOL), 2)
_add("any.dim all.dim", _image(3, dtype=BOOL), 1, True)
_add("norm.ScalarOpt_dim linalg_vector_norm", _image(), 2, [1], True)
_add("norm.ScalarOpt_dim linalg_vector_norm", _image(), 1, [2, 3])
_add("mean max min sum", _image(3))
_add("tril triu", Made((2, 6, 5, 5)))
_add("tril triu", Made((2, 6, 5, 5)), 1)
_add("tril", _tokens(), note="channels on its axes")

# ---------------------------------------------------------------------- made of sizes and numbers

_add("zeros ones", [Size(), 6])
_add("full", [Size(), 6], 0.7)
_add("arange eye", Size())
_add("arange.start eye.m", 1, Size())
_add("arange.start_step", 0, Size(), 2)
_add("linspace", 0.0, 1.0, Size())
