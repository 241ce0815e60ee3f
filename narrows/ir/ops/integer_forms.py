"""The integer forms of the operators that compute, and which operator has which form.

`narrows.ir.ops.integer` says what a form is. An operator's form stands in its row of the op table,
filled in from `STANDARD` as its samples are; a row added from outside brings its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import narrows.ir.integer.statistics as statistics
from narrows.ir.integer.comparisons import ANSWERS
from narrows.ir.integer.grid import Grid
from narrows.ir.meta import shape_of
from narrows.ir.ops.args import arguments, is_tensor
from narrows.ir.ops.integer import (
    AnyWidth,
    Call,
    Clip,
    Flat,
    Fold,
    IntegerForm,
    LayerWeights,
    Moves,
    Relabel,
    Settled,
    listed,
    spread,
)
from narrows.ir.ops.integer_averages import AveragePool, Mean
from narrows.ir.ops.integer_choices import (
    Cast,
    Compare,
    Constant,
    Extreme,
    Same,
    Triangle,
    Where,
)
from narrows.ir.ops.integer_functions import Lookup, Power, Slope, number
from narrows.ir.ops.integer_norms import GroupNorm, InstanceNorm, LayerNorm
from narrows.ir.ops.integer_padding import Nearest, Padding
from narrows.ir.ops.integer_quotients import Div, VectorNorm
from narrows.ir.ops.integer_windows import Resize

ops: Any = torch.ops.narrows
aten = torch.ops.aten


# ------------------------------------------------------------------ layers


@dataclass(frozen=True)
class Layer(AnyWidth):
    """A sum against a weight: multiply, add the bias, shift, clip.

    Attributes:
        spatial: Spatial axes of a convolution, 0 for a linear layer.
        transposed: Whether it is a transposed convolution.
        swapped: Whether the weight is ``[in, out]`` (addmm).
    """

    spatial: int = 0
    transposed: bool = False
    swapped: bool = False

    def operands(self, node: fx.Node) -> tuple[fx.Node, ...]:
        args = arguments(node)
        return (args["mat1"] if self.swapped else args["input"],)

    def weights(self, node: fx.Node) -> LayerWeights | None:
        args = arguments(node)
        if self.swapped:
            return LayerWeights(args["mat2"], args["self"], 1, transposed=True)
        groups = args["groups"] if self.transposed else 1
        return LayerWeights(args["weight"], args["bias"], int(self.transposed), groups=groups)

    def obstacle(self, node: fx.Node) -> str:
        args = arguments(node)
        layer = self.weights(node)
        assert layer is not None
        if layer.weight.op != "get_attr":
            return f"its weight is computed, by {layer.weight.name}"
        if layer.bias is not None and layer.bias.op != "get_attr":
            return f"its bias is computed, by {layer.bias.name}"
        if self.swapped and (args["alpha"] != 1 or args["beta"] != 1):
            return "it scales its product"
        if self.swapped and layer.bias is not None and len(shape_of(layer.bias)) != 1:
            return "its bias is no vector"
        if self.spatial and len(shape_of(args["input"])) != self.spatial + 2:
            return "its input has no batch axis"
        return ""

    def _padding(self, node: fx.Node) -> tuple[list[int], list[int]]:
        """Return the padding on both sides, and what there is more of it behind."""
        args = arguments(node)
        none = [0] * self.spatial
        if not isinstance(args["padding"], str):
            return spread(args["padding"], self.spatial), none
        if args["padding"] == "valid":
            return none, none
        kernel = shape_of(args["weight"])[2:]
        dilation = spread(args["dilation"], self.spatial)
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return [t // 2 for t in total], [t % 2 for t in total]

    def emit(self, fold: Fold, node: fx.Node, out: Settled) -> Call:
        layer = self.weights(node)
        assert layer is not None
        x, grid = fold.codes(self.operands(node)[0])
        weight, bias, shifts = fold.layer(node, layer, grid, out.grid)
        head = (x, weight, bias, shifts, grid.zero, *out.tail)
        if not self.spatial:
            return ops.linear.default, head
        args = arguments(node)
        stride, dilation = (spread(args[k], self.spatial) for k in ("stride", "dilation"))
        padding, more = self._padding(node)
        if any(more):  # the code of zero goes behind
            behind = [n for m in reversed(more) for n in (0, m)]
            padded = (x, behind, "constant", grid.zero)
            head = (fold.step(node, aten.pad.default, padded, "padded", grid), *head[1:])
        if not self.transposed:
            return ops.conv.default, (*head, stride, padding, dilation, args["groups"])
        extra = spread(args["output_padding"], self.spatial)
        tail = (stride, padding, extra, dilation, args["groups"])
        return ops.conv_transpose.default, (*head, *tail)


@dataclass(frozen=True)
class Matmul(AnyWidth):
    """The matrix product of two activations."""

    def operands(self, node: fx.Node) -> tuple[fx.Node, ...]:
        return tuple(list(arguments(node).values())[:2])

    def emit(self, fold: Fold, node: fx.Node, out: Settled) -> Call:
        (a, a_grid), (b, b_grid) = (fold.codes(n) for n in self.operands(node))
        fold.product_fits(node, shape_of(self.operands(node)[0])[-1], a_grid, b_grid)
        by = a_grid.exponent + b_grid.exponent - out.grid.exponent
        return ops.matmul.default, (a, b, by, a_grid.zero, b_grid.zero, *out.tail)


# ------------------------------------------------------------------ element by element


@dataclass(frozen=True)
class Add(AnyWidth):
    """``a + b`` or ``a - b``; with a number it is a table."""

    sign: int = 1

    def at(self, node: fx.Node) -> IntegerForm:
        return self if len(self.operands(node)) == 2 else Lookup()

    def operands(self, node: fx.Node) -> tuple[fx.Node, ...]:
        return tuple(a for a in list(arguments(node).values())[:2] if is_tensor(a))

    def obstacle(self, node: fx.Node) -> str:
        return "it scales an operand" if arguments(node).get("alpha", 1) != 1 else ""

    def emit(self, fold: Fold, node: fx.Node, out: Settled) -> Call:
        (a, a_grid), (b, b_grid) = (fold.codes(n) for n in self.operands(node))
        fine = max(a_grid.exponent, b_grid.exponent)
        aligned = (fine - a_grid.exponent, fine - b_grid.exponent, fine - out.grid.exponent)
        args = (a, b, *aligned, a_grid.zero, b_grid.zero, *out.tail, self.sign)
        return ops.add.default, args


@dataclass(frozen=True)
class Mul(AnyWidth):
    """``a * b``; with a number it is a table, and nothing at all with a power of two."""

    inverse: bool = False

    def at(self, node: fx.Node) -> IntegerForm:
        second = list(arguments(node).values())[1]
        if is_tensor(second):
            return Div() if self.inverse else self
        mantissa, power = math.frexp(abs(float(number(second)))) if number(second) else (0.0, 0)
        if mantissa != 0.5 or number(second) < 0:
            return Lookup(scales=number(second) != 0)
        return Relabel(power=1 - power if self.inverse else power - 1)

    def operands(self, node: fx.Node) -> tuple[fx.Node, ...]:
        return tuple(a for a in list(arguments(node).values())[:2] if is_tensor(a))

    def emit(self, fold: Fold, node: fx.Node, out: Settled) -> Call:
        (a, a_grid), (b, b_grid) = (fold.codes(n) for n in self.operands(node))
        by = a_grid.exponent + b_grid.exponent - out.grid.exponent
        return ops.mul.default, (a, b, by, a_grid.zero, b_grid.zero, *out.tail)


@dataclass(frozen=True)
class Concat(AnyWidth):
    """Tensors side by side, each shifted to the result's grid."""

    def operands(self, node: fx.Node) -> tuple[fx.Node, ...]:
        return tuple(arguments(node)["tensors"])

    def emit(self, fold: Fold, node: fx.Node, out: Settled) -> Call:
        parts = [fold.codes(n) for n in self.operands(node)]
        return self.joined(parts, arguments(node)["dim"], out)

    def joined(self, parts: list[tuple[fx.Node, Grid]], axis: int, out: Settled) -> Call:
        """Return the call that puts codes side by side."""
        shifts = [grid.exponent - out.grid.exponent for _, grid in parts]
        zeros = [grid.zero for _, grid in parts]
        return ops.concat.default, ([n for n, _ in parts], axis, shifts, zeros, *out.tail)


@dataclass(frozen=True)
class Stack(Concat):
    """Tensors side by side along an axis of their own."""

    def emit(self, fold: Fold, node: fx.Node, out: Settled) -> Call:
        axis, parts = arguments(node)["dim"] % len(shape_of(node)), []
        for i, operand in enumerate(self.operands(node)):
            x, grid = fold.codes(operand)
            parts.append(
                (fold.step(node, aten.unsqueeze.default, (x, axis), f"part{i}", grid), grid)
            )
        return self.joined(parts, axis, out)


# ------------------------------------------------------------------ statistics


@dataclass(frozen=True)
class Softmax(IntegerForm):
    """Softmax from a table of exponentials and one exact quotient."""

    def obstacle(self, node: fx.Node) -> str:
        long = shape_of(node)[arguments(node)["dim"]] > 2**16
        return "it sums more than 65,536 exponentials" if long else ""

    def fake(self, node: fx.Node, grids: list[Grid], out: Grid, rounding: str) -> Call | None:
        args = arguments(node)
        return ops.fake_softmax.default, (
            self.operands(node)[0], args["dim"], listed(grids[0]), listed(out), rounding,
        )  # fmt: skip

    def emit(self, fold: Fold, node: fx.Node, out: Settled) -> Call:
        x, axis, grid, *_ = node.args
        codes, _ = fold.codes(x)  # type: ignore[arg-type]
        bits = statistics.table_bits(out.grid.exponent, shape_of(node)[axis])  # type: ignore
        made = statistics.exponentials(grid[0], bits)  # type: ignore
        table = fold.table(node, made)
        return ops.softmax.default, (codes, table, axis, out.grid.exponent, *out.tail)


# ------------------------------------------------------------------ which operator has which form

_MOVES = """
    reshape unflatten.int flatten.using_ints squeeze squeeze.dim squeeze.dims unsqueeze clone
    contiguous alias expand permute roll flip pixel_shuffle pixel_unshuffle channel_shuffle repeat
    repeat_interleave.self_int slice.Tensor split.sizes index_select select.int max_pool2d
    max_pool3d amax amin dropout feature_dropout alpha_dropout feature_alpha_dropout embedding
"""
_LOOKUPS = """
    silu gelu sigmoid tanh hardswish hardsigmoid leaky_relu elu selu celu mish softplus log_sigmoid
    hardshrink softshrink threshold abs neg sign sin cos atan asinh erf erfc floor ceil round
    trunc frac exp exp2 expm1 tan sinh cosh rrelu pow.Scalar
    rsub.Scalar remainder.Scalar fmod.Scalar floor_divide div.Tensor_mode
"""
# Functions that end somewhere, or have a pole, by where they are defined.
_DOMAINS = {
    "log log2 log10 sqrt rsqrt": (0.0, math.inf),
    "log1p": (-1.0, math.inf),
    "asin acos atanh erfinv": (-1.0, 1.0),
    "acosh": (1.0, math.inf),
    "logit": (0.0, 1.0),
    "reciprocal": (-math.inf, math.inf),
}

RESIZINGS = {
    1: {"upsample_linear1d": "linear"},
    2: {
        "upsample_bilinear2d": "linear", "upsample_bicubic2d": "cubic",
        "_upsample_bilinear2d_aa": "smooth", "_upsample_nearest_exact2d": "nearest",
    },
    3: {"upsample_trilinear3d": "linear"},
}  # fmt: skip


def _standard() -> dict[str, IntegerForm]:
    forms: dict[str, IntegerForm] = {}

    def put(names: str, form: IntegerForm) -> None:
        forms.update({n if "." in n else f"{n}.default": form for n in names.split()})

    put(_MOVES, Moves())
    put(_LOOKUPS, Lookup())
    for name in ("sigmoid", "tanh", "gelu", "silu", "hardsigmoid"):
        put(name, Lookup(function=name))
    put("leaky_relu abs neg", Lookup(scales=True))
    for names, domain in _DOMAINS.items():
        put(names, Lookup(domain=domain))
    put("pow.Tensor_Scalar", Power())
    put("pad", Padding())
    for n in (1, 2, 3):
        put(f"upsample_nearest{n}d.vec", Nearest())
    put("max_pool1d", Flat())
    put("prelu", Slope())
    put("relu", Clip(lo=0.0))
    put("relu6", Clip(lo=0.0, hi=6.0))
    put("hardtanh", Clip(lo="min_val", hi="max_val"))
    put("clamp", Clip(lo="min", hi="max"))
    for n in (1, 2, 3):
        put(f"conv{n}d conv{n}d.padding", Layer(spatial=n))
        put(f"conv_transpose{n}d conv_transpose{n}d.input", Layer(spatial=n, transposed=True))
    put("linear", Layer())
    put("addmm", Layer(swapped=True))
    put("matmul", Matmul())
    put("add.Tensor", Add())
    put("sub.Tensor", Add(sign=-1))
    put("mul.Tensor", Mul())
    put("div.Tensor", Mul(inverse=True))
    for how in ANSWERS:
        put(f"{how}.Tensor {how}.Scalar", Compare(how))
    put("isnan isinf", Compare("lt", -math.inf))
    put("isfinite", Compare("gt", -math.inf))
    put("logical_not", Compare("eq", 0.0))
    put("where.self where.ScalarOther where.ScalarSelf where.Scalar", Where())
    largest, smallest = aten.maximum.default, aten.minimum.default
    put("maximum fmax", Extreme((("other", largest),)))
    put("minimum fmin", Extreme((("other", smallest),)))
    put("clamp.Tensor", Extreme((("min", largest), ("max", smallest))))
    put("to.dtype to.device", Cast())
    put("nan_to_num", Same())
    put("tril triu", Triangle())
    put("full_like", Constant(lo="fill_value", hi="fill_value"))
    put("linalg_vector_norm", VectorNorm())
    put("cat", Concat())
    put("stack", Stack())
    put("mean.dim", Mean())
    put("sum.dim_IntList", Mean(total=True))
    for n in (1, 2, 3):
        put(f"avg_pool{n}d", AveragePool(spatial=n))
        put(f"adaptive_avg_pool{n}d", AveragePool(spatial=n, adaptive=True))
    for n, names in RESIZINGS.items():
        for name, method in names.items():
            put(f"{name}.vec", Resize(n, method))
    put("softmax.int _safe_softmax", Softmax())
    put("layer_norm", LayerNorm())
    put("rms_norm", LayerNorm(centred=False))
    put("group_norm", GroupNorm())
    put("instance_norm", InstanceNorm())
    return forms


STANDARD = _standard()


# What only fake-quantized programs hold: what stands for two operators (`IntegerForm.fake`), and
# levels of unequal width.
FAKES: dict[Any, IntegerForm] = {
    ops.staircase.default: Lookup(),
    ops.fake_function.default: Lookup(),
    ops.fake_div.default: Div(),
    ops.fake_softmax.default: Softmax(),
    ops.fake_layer_norm.default: LayerNorm(),
    ops.fake_group_norm.default: GroupNorm(),
    ops.fake_resize.default: Resize(),
    ops.fake_prelu.default: Slope(),
}


def form_of(name: str) -> IntegerForm | None:
    """Return the integer form that comes along for an overload, spelled ``conv2d.default``."""
    return STANDARD.get(name)
