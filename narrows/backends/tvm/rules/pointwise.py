"""Rules for operators that work element by element, in whatever order their operands are stored."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import relax

from narrows.backends.tvm.lowering import Lowering
from narrows.backends.tvm.rules.table import Call, rule
from narrows.backends.tvm.values import Value

op, nn = relax.op, relax.op.nn


# ---------------------------------------------------------------------- building blocks


def unary(low: Lowering, value: Value, function: Callable[[Any], Any], dtype: str = "") -> Value:
    """Return ``function`` of a value, which stays stored as it is."""
    if value.array is not None:
        value = low.made(low.expr(value), value.shape, value.dtype)
    return low.like(value, low.emit(function(value.expr)), dtype or None)


def binary(
    low: Lowering, a: Value, b: Value, function: Callable[[Any, Any], Any], dtype: str = ""
) -> Value:
    """Return ``function`` of two values of one dtype, which are broadcast."""
    (x, y), like = low.aligned([a, b])
    return low.like(like, low.emit(function(x, y)), dtype or None)


def operand(low: Lowering, value: Any, dtype: str) -> Value:
    """Return an argument, a tensor or a number, as a value of a dtype."""
    if isinstance(value, Value):
        return low.cast(value, dtype)
    return Value.constant(np.asarray(value, dtype))


def common(*values: Any) -> str:
    """Return the dtype that operands are computed in; tensors decide before numbers do."""
    tensors = [v for v in values if isinstance(v, Value)]
    shaped = [v.dtype for v in tensors if v.shape] or [v.dtype for v in tensors]
    dtype = np.result_type(*shaped).name
    numbers = [v for v in values if not isinstance(v, Value) and v is not None]
    if any(isinstance(n, float) for n in numbers) and np.dtype(dtype).kind != "f":
        return "float32"
    if dtype == "bool" and any(type(n) is int for n in numbers):
        return "int64"
    return dtype


# ---------------------------------------------------------------------- one operand


def _gelu(low: Lowering, call: Call) -> Value:
    if call.args["approximate"] == "tanh":
        return unary(low, call.args["self"], nn.gelu_tanh)
    return unary(low, call.args["self"], nn.gelu)


def _const(low: Lowering, call: Call, number: float) -> Any:
    return low.scalar(number, call.dtype)


_DIRECT: dict[str, Callable[[Any], Any]] = {
    "relu": nn.relu, "sigmoid": op.sigmoid, "tanh": op.tanh, "abs": op.abs,
    "neg": op.negative, "sign": op.sign,
    "sin": op.sin, "cos": op.cos,
    "atan": op.atan, "erf": op.erf, "floor": op.floor, "ceil": op.ceil,
    "trunc": op.trunc, "exp": op.exp, "log": op.log, "sqrt": op.sqrt, "rsqrt": op.rsqrt,
    "tan": op.tan, "asin": op.asin, "acos": op.acos, 
    "isnan": op.isnan, "isinf": op.isinf,
    "isfinite": op.isfinite,
}  # fmt: skip

# In terms of x, and c: numbers of the operand's dtype.
_COMPOSED: dict[str, Callable[[Any, Callable[[float], Any]], Any]] = {
    "relu6": lambda x, c: op.minimum(nn.relu(x), c(6)),
    "silu": lambda x, c: op.multiply(x, op.sigmoid(x)),
    "hardsigmoid": lambda x, c: _ramp(x, c),
    "hardswish": lambda x, c: op.multiply(x, _ramp(x, c)),
    "mish": lambda x, c: op.multiply(x, op.tanh(_softplus(x, c))),
    "log_sigmoid": lambda x, c: op.negative(_softplus(op.negative(x), c)),
    "sinh": lambda x, c: op.multiply(op.subtract(op.exp(x), op.exp(op.negative(x))), c(0.5)),
    "cosh": lambda x, c: op.multiply(op.add(op.exp(x), op.exp(op.negative(x))), c(0.5)),
    "asinh": lambda x, c: op.multiply(
        op.sign(x), op.log(op.add(op.abs(x), op.sqrt(op.add(op.multiply(x, x), c(1)))))
    ),
    "acosh": lambda x, c: op.log(op.add(x, op.sqrt(op.subtract(op.multiply(x, x), c(1))))),
    "atanh": lambda x, c: op.multiply(
        op.log(op.divide(op.add(c(1), x), op.subtract(c(1), x))), c(0.5)
    ),
    "erfc": lambda x, c: op.subtract(c(1), op.erf(x)),
    "frac": lambda x, c: op.subtract(x, op.trunc(x)),
    "exp2": lambda x, c: op.exp(op.multiply(x, c(math.log(2)))),
    "expm1": lambda x, c: op.subtract(op.exp(x), c(1)),
    "log1p": lambda x, c: op.log(op.add(x, c(1))),
    "log2": lambda x, c: op.multiply(op.log(x), c(1 / math.log(2))),
    "log10": lambda x, c: op.multiply(op.log(x), c(1 / math.log(10))),
    "reciprocal": lambda x, c: op.divide(c(1), x),
    "round": lambda x, c: _round_even(x, c),
}


def _ramp(x: Any, c: Callable[[float], Any]) -> Any:
    """Return clamp(x + 3, 0, 6) / 6."""
    raised = op.minimum(nn.relu(op.add(x, c(3))), c(6))
    return op.multiply(raised, c(1 / 6))


def _softplus(x: Any, c: Callable[[float], Any]) -> Any:
    """Return log(1 + exp(x)), computed so that exp does not overflow."""
    return op.add(nn.relu(x), op.log(op.add(c(1), op.exp(op.negative(op.abs(x))))))


def _round_even(x: Any, c: Callable[[float], Any]) -> Any:
    """Return x rounded, halves to the even neighbour."""
    down = op.floor(x)
    rest = op.subtract(x, down)
    odd = op.subtract(down, op.multiply(c(2), op.floor(op.multiply(down, c(0.5)))))
    up = op.add(down, c(1))
    half = op.where(op.greater(odd, c(0.5)), up, down)
    return op.where(
        op.less(rest, c(0.5)), down, op.where(op.greater(rest, c(0.5)), up, half)
    )  # fmt: skip


def _is_float(dtype: str) -> bool:
    return np.dtype(dtype).kind == "f"


def _enter_unary() -> None:
    def direct(function: Callable[[Any], Any]) -> Callable[[Lowering, Call], Value]:
        def lower(low: Lowering, call: Call) -> Value:
            x = call.args["self"]
            x = low.cast(x, call.dtype) if _is_float(call.dtype) else x
            return unary(low, x, function, call.dtype)

        return lower

    def composed(function: Callable[..., Any]) -> Callable[[Lowering, Call], Value]:
        def lower(low: Lowering, call: Call) -> Value:
            x = low.cast(call.args["self"], call.dtype)
            return unary(low, x, lambda e: function(e, lambda n: _const(low, call, n)))

        return lower

    for name, function in _DIRECT.items():
        rule(name)(direct(function))
    for name, function in _COMPOSED.items():
        rule(name)(composed(function))
    rule("gelu")(_gelu)


_enter_unary()


@rule("bitwise_not")
def _bitwise_not(low: Lowering, call: Call) -> Value:
    logical = call.dtype == "bool"
    return unary(low, call.args["self"], op.logical_not if logical else op.bitwise_not)


@rule("nan_to_num")
def _nan_to_num(low: Lowering, call: Call) -> Value:
    x, limits = call.args["self"], np.finfo(call.dtype)
    nan, top, bottom = (call.args[k] for k in ("nan", "posinf", "neginf"))
    numbers = [
        _const(low, call, n)
        for n in (
            0.0 if nan is None else nan,
            limits.max if top is None else top,
            limits.min if bottom is None else bottom,
        )
    ]
    zero = _const(low, call, 0)

    def replaced(e: Any) -> Any:
        e = op.where(op.isnan(e), numbers[0], e)
        infinite = op.where(op.greater(e, zero), numbers[1], numbers[2])
        return op.where(op.isinf(e), infinite, e)

    return unary(low, x, replaced)


@rule("hardtanh clamp")
def _clamp(low: Lowering, call: Call) -> Value:
    low_end = call.args.get("min", call.args.get("min_val"))
    high_end = call.args.get("max", call.args.get("max_val"))
    x = low.cast(call.args["self"], call.dtype)

    # Written so, a bound of zero is a relu and fuses like one.
    def clamped(e: Any) -> Any:
        e = e if low_end is None else op.maximum(e, _const(low, call, low_end))
        return e if high_end is None else op.minimum(e, _const(low, call, high_end))

    return unary(low, x, clamped)


@rule("clamp.Tensor")
def _clamp_tensor(low: Lowering, call: Call) -> Value:
    x = low.cast(call.args["self"], call.dtype)
    for key, function in (("min", op.maximum), ("max", op.minimum)):
        bound = call.args.get(key)
        if bound is not None:
            x = binary(low, x, operand(low, bound, call.dtype), function)
    return x


@rule("leaky_relu rrelu")
def _leaky_relu(low: Lowering, call: Call) -> Value:
    slope = call.args.get("negative_slope")
    if slope is None:
        slope = (call.args["lower"] + call.args["upper"]) / 2
    number = _const(low, call, slope)
    zero = _const(low, call, 0)
    return unary(
        low,
        call.args["self"],
        lambda e: op.where(op.greater(e, zero), e, op.multiply(e, number)),
    )


@rule("elu selu celu")
def _elu(low: Lowering, call: Call) -> Value:
    kind = call.op.partition(".")[0]
    alpha, scale, inner = call.args.get("alpha", 1.0), call.args.get("scale", 1.0), 1.0
    if kind == "selu":
        alpha, scale = 1.6732632423543772, 1.0507009873554805
    if kind == "celu":
        inner = 1 / alpha
    inner = call.args.get("input_scale", inner)
    zero, one, a, s, i = (_const(low, call, n) for n in (0, 1, alpha * scale, scale, inner))

    def curve(e: Any) -> Any:
        bent = op.subtract(op.exp(op.multiply(op.minimum(e, zero), i)), one)
        return op.where(op.greater(e, zero), op.multiply(e, s), op.multiply(bent, a))

    return unary(low, call.args["self"], curve)


@rule("softplus")
def _softplus_rule(low: Lowering, call: Call) -> Value:
    beta, threshold = call.args["beta"], call.args["threshold"]
    b, t, inverse = (_const(low, call, n) for n in (beta, threshold, 1 / beta))

    def curve(e: Any) -> Any:
        scaled = op.multiply(e, b)
        soft = op.multiply(_softplus(scaled, lambda n: _const(low, call, n)), inverse)
        return op.where(op.greater(scaled, t), e, soft)

    return unary(low, call.args["self"], curve)


@rule("hardshrink softshrink")
def _shrink(low: Lowering, call: Call) -> Value:
    number = call.args["lambd"]
    top, bottom, zero = (_const(low, call, n) for n in (number, -number, 0))
    soft = call.op.startswith("soft")

    def curve(e: Any) -> Any:
        above = op.subtract(e, top) if soft else e
        below = op.add(e, top) if soft else e
        lower = op.where(op.less(e, bottom), below, zero)
        return op.where(op.greater(e, top), above, lower)

    return unary(low, call.args["self"], curve)


@rule("threshold")
def _threshold(low: Lowering, call: Call) -> Value:
    limit, other = (_const(low, call, call.args[k]) for k in ("threshold", "value"))
    return unary(low, call.args["self"], lambda e: op.where(op.greater(e, limit), e, other))


@rule("logit")
def _logit(low: Lowering, call: Call) -> Value:
    eps, one = call.args["eps"], _const(low, call, 1)

    def curve(e: Any) -> Any:
        if eps is not None:
            e = op.minimum(op.maximum(e, _const(low, call, eps)), _const(low, call, 1 - eps))
        return op.log(op.divide(e, op.subtract(one, e)))

    return unary(low, call.args["self"], curve)


@rule(
    "dropout feature_dropout alpha_dropout feature_alpha_dropout clone contiguous alias "
    "to.dtype to.device"
)
def _identity(low: Lowering, call: Call) -> Value:
    if call.args.get("train"):
        raise low.refuse("dropout in train mode draws random numbers")
    return low.cast(call.args.get("self", call.args.get("input")), call.dtype)


@rule("full_like")
def _filled(low: Lowering, call: Call) -> Value:
    return Value.constant(np.full(call.shape, call.args["fill_value"], call.dtype))


# ---------------------------------------------------------------------- two operands

_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "mul.Tensor": op.multiply,
    "maximum fmax": op.maximum,
    "minimum fmin": op.minimum,
    "div.Tensor": op.divide,
    "pow.Tensor_Tensor": op.power,
    "atan2": op.atan2,
    "fmod.Tensor fmod.Scalar": op.mod,
}

_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": op.equal, "ne": op.not_equal, "lt": op.less, "le": op.less_equal,
    "gt": op.greater, "ge": op.greater_equal,
}  # fmt: skip

_LOGICAL: dict[str, tuple[Callable[[Any, Any], Any], Callable[[Any, Any], Any]]] = {
    "and": (op.logical_and, op.bitwise_and),
    "or": (op.logical_or, op.bitwise_or),
    "xor": (op.logical_xor, op.bitwise_xor),
}


def _pair(low: Lowering, call: Call, dtype: str) -> tuple[Value, Value]:
    first, second = list(call.args.values())[:2]
    return operand(low, first, dtype), operand(low, second, dtype)


def _enter_binary() -> None:
    def arithmetic(function: Callable[[Any, Any], Any]) -> Callable[[Lowering, Call], Value]:
        return lambda low, call: binary(low, *_pair(low, call, call.dtype), function)

    def comparison(function: Callable[[Any, Any], Any]) -> Callable[[Lowering, Call], Value]:
        def lower(low: Lowering, call: Call) -> Value:
            dtype = common(*list(call.args.values())[:2])
            return binary(low, *_pair(low, call, dtype), function, "bool")

        return lower

    def logical(kinds: Any) -> Callable[[Lowering, Call], Value]:
        def lower(low: Lowering, call: Call) -> Value:
            of_truth = call.dtype == "bool"
            return binary(low, *_pair(low, call, call.dtype), kinds[not of_truth])

        return lower

    for names, function in _BINARY.items():
        rule(names)(arithmetic(function))
    for name, function in _COMPARISONS.items():
        rule(f"{name}.Tensor {name}.Scalar")(comparison(function))
    for name, kinds in _LOGICAL.items():
        rule(f"logical_{name} bitwise_{name}.Tensor __{name}__.Tensor")(logical(kinds))


_enter_binary()


@rule("add.Tensor sub.Tensor rsub.Scalar")
def _add(low: Lowering, call: Call) -> Value:
    a, b = _pair(low, call, call.dtype)
    alpha = call.args.get("alpha", 1)
    if alpha != 1:
        number = operand(low, alpha, call.dtype)
        if call.op.startswith("rsub"):
            a = binary(low, a, number, op.multiply)
        else:
            b = binary(low, b, number, op.multiply)
    if call.op.startswith("add"):
        return binary(low, a, b, op.add)
    return binary(low, *((b, a) if call.op.startswith("rsub") else (a, b)), op.subtract)


@rule("div.Tensor_mode floor_divide")
def _div_mode(low: Lowering, call: Call) -> Value:
    mode = call.args.get("rounding_mode", "floor")
    a, b = _pair(low, call, call.dtype)
    if mode is None:
        return binary(low, a, b, op.divide)
    if not _is_float(call.dtype):
        if mode == "floor":
            return binary(low, a, b, op.floor_divide)
        raise low.refuse("a division of whole numbers that truncates")
    if mode == "trunc":
        return unary(low, binary(low, a, b, op.divide), op.trunc)
    half, zero = _const(low, call, 0.5), _const(low, call, 0)

    def floored(x: Any, y: Any) -> Any:
        # A quotient just below a whole number rounds up to it; the remainder knows better.
        rest = _floor_rest(x, y, zero)
        return op.floor(op.add(op.divide(op.subtract(x, rest), y), half))

    return binary(low, a, b, floored)


def _floor_rest(x: Any, y: Any, zero: Any) -> Any:
    """Return the remainder of a division that rounds down; it has the sign of ``y``."""
    rest = op.mod(x, y)
    return op.where(op.less(op.multiply(rest, y), zero), op.add(rest, y), rest)


@rule("remainder.Tensor remainder.Scalar")
def _remainder(low: Lowering, call: Call) -> Value:
    a, b = _pair(low, call, call.dtype)
    if not _is_float(call.dtype):
        return binary(low, a, b, op.floor_mod)
    zero = _const(low, call, 0)
    return binary(low, a, b, lambda x, y: _floor_rest(x, y, zero))


@rule("logaddexp")
def _logaddexp(low: Lowering, call: Call) -> Value:
    a, b = _pair(low, call, call.dtype)

    def number(n: float) -> Any:
        return _const(low, call, n)

    return binary(low, a, b, lambda x, y: op.add(y, _softplus(op.subtract(x, y), number)))


@rule("pow.Tensor_Scalar")
def _pow(low: Lowering, call: Call) -> Value:
    exponent = call.args["exponent"]
    x = low.cast(call.args["self"], call.dtype)
    if isinstance(exponent, int | float) and exponent in (1, 2, 3, 4):
        return unary(low, x, lambda e: _whole_power(e, int(exponent)))
    if exponent in (0.5, -0.5):
        return unary(low, x, op.sqrt if exponent > 0 else op.rsqrt)
    return binary(low, x, operand(low, exponent, call.dtype), op.power)


def _whole_power(e: Any, exponent: int) -> Any:
    result = e
    for _ in range(exponent - 1):
        result = op.multiply(result, e)
    return result


@rule("pow.Scalar")
def _pow_scalar(low: Lowering, call: Call) -> Value:
    base = operand(low, call.args["self"], call.dtype)
    return binary(low, base, operand(low, call.args["exponent"], call.dtype), op.power)


# ---------------------------------------------------------------------- three operands


@rule("where.self where.ScalarOther where.ScalarSelf where.Scalar")
def _where(low: Lowering, call: Call) -> Value:
    a, b = (operand(low, call.args[k], call.dtype) for k in ("self", "other"))
    exprs, like = low.aligned([call.args["condition"], a, b])
    return low.like(like, low.emit(op.where(*exprs)), a.dtype)


@rule("lerp.Scalar lerp.Tensor")
def _lerp(low: Lowering, call: Call) -> Value:
    a, b, w = (operand(low, call.args[k], call.dtype) for k in ("self", "end", "weight"))
    step = binary(low, binary(low, b, a, op.subtract), w, op.multiply)
    return binary(low, a, step, op.add)


@rule("addcmul addcdiv")
def _addc(low: Lowering, call: Call) -> Value:
    function = op.multiply if call.op.startswith("addcmul") else op.divide
    a, b, c = (operand(low, call.args[k], call.dtype) for k in ("self", "tensor1", "tensor2"))
    value = operand(low, call.args.get("value", 1), call.dtype)
    return binary(low, a, binary(low, binary(low, b, c, function), value, op.multiply), op.add)


@rule("prelu")
def _prelu(low: Lowering, call: Call) -> Value:
    x, weight = call.args["self"], call.args["weight"]
    if weight.shape[0] > 1:
        weight = low.reshaped(weight, (weight.shape[0], *(1,) * max(0, x.rank - 2)))
    zero = _const(low, call, 0)

    def curve(e: Any, slope: Any) -> Any:
        return op.where(op.greater(e, zero), e, op.multiply(e, slope))

    return binary(low, x, weight, curve)
