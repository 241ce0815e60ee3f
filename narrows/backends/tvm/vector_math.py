"""exp, tanh, sigmoid and erf as arithmetic that runs on whole vectors.

LLVM calls the C library for them, element by element. These have an absolute error of about 4e-7
relative to 1, which is what float32 holds, and nothing but multiplications, additions and one
division.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tvm import tirx

# exp(r) for |r| <= log(2) / 2: its Taylor series, whose next term is below 1e-8.
_SERIES = [1 / math.factorial(n) for n in range(8)]

# log(2) in two parts, the first of which has few enough digits to be multiplied without rounding.
_LOG2_HIGH = 0.693359375
_LOG2_LOW = math.log(2) - _LOG2_HIGH

# Beyond these the result is 0 or infinite in float32; 2^n stays a normal number between them.
_LOWEST, _HIGHEST = -87.3, 88.3

# Abramowitz and Stegun 7.1.26.
_ERF_STEP = 0.3275911
_ERF = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)


def install() -> None:
    """Tell TVM's code generator for CPUs to write the functions so, in float32."""
    for name, form in _FORMS.items():
        tirx.register_intrin_lowering(name, target="llvm", f=_lowering(form), level=200)


def _lowering(form: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def lower(call: Any) -> Any:
        # Returned as it is, a call goes on to the lowering of a lower level.
        return form(call.args[0]) if str(call.ty.dtype).startswith("float32") else call

    return lower


def _dtype(x: Any) -> str:
    """Return the dtype of an expression, which may be a vector: ``float32x16``."""
    return str(x.ty.dtype)


def _number(value: float, like: Any) -> Any:
    return tirx.const(value, _dtype(like))


def exp(x: Any) -> Any:
    """Return e to the power of ``x``: 2^n times a polynomial in the rest."""
    x = tirx.min(tirx.max(x, _number(_LOWEST, x)), _number(_HIGHEST, x))
    whole = tirx.floor(x * _number(1 / math.log(2), x) + _number(0.5, x))
    rest = x - whole * _number(_LOG2_HIGH, x) - whole * _number(_LOG2_LOW, x)
    kind = _dtype(x).replace("float", "int")
    biased = tirx.Cast(kind, whole) + tirx.const(127, kind)
    power = tirx.reinterpret(_dtype(x), tirx.shift_left(biased, tirx.const(23, kind)))
    return _polynomial(_SERIES, rest) * power


def _polynomial(factors: list[float], x: Any) -> Any:
    result = _number(factors[-1], x)
    for factor in reversed(factors[:-1]):
        result = result * x + _number(factor, x)
    return result


def sigmoid(x: Any) -> Any:
    """Return 1 / (1 + exp(-x))."""
    return _number(1, x) / (_number(1, x) + exp(_number(0, x) - x))


def tanh(x: Any) -> Any:
    """Return the hyperbolic tangent."""
    return _number(1, x) - _number(2, x) / (exp(x * _number(2, x)) + _number(1, x))


def erf(x: Any) -> Any:
    """Return the error function."""
    size = tirx.max(x, _number(0, x) - x)
    t = _number(1, x) / (_number(1, x) + _number(_ERF_STEP, x) * size)
    tail = _polynomial([0.0, *_ERF], t) * exp(_number(0, x) - size * size)
    positive = _number(1, x) - tail
    return tirx.Select(x < _number(0, x), _number(0, x) - positive, positive)


_FORMS: dict[str, Callable[[Any], Any]] = {
    "tirx.exp": exp,
    "tirx.sigmoid": sigmoid,
    "tirx.tanh": tanh,
    "tirx.erf": erf,
}
