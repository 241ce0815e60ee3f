"""What `narrows.quantize` does, and what `narrows.compile` asks of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from narrows.options import from_json
from narrows.passes.quant.options import PERCENTILE, Quantization

if TYPE_CHECKING:
    from narrows.ir.program import Program
    from narrows.passes.pipeline import Instrument
    from narrows.passes.quant.quantization import Quantized


def quantized(
    program: Program,
    calibration: Iterable[Any] | None,
    options: Quantization,
    plan: Any,
    check: bool,
    instruments: Sequence[Instrument],
) -> Quantized:
    """Return a program in integers; the arguments are those of `narrows.quantize`."""
    from narrows.passes.instruments import Verify
    from narrows.passes.proof import Numerics
    from narrows.passes.quant.plan import loaded
    from narrows.passes.quant.quantization import quantize as run

    plan = None if plan is None else loaded(plan)
    checks: list[Instrument] = [Verify(), Numerics()] if check else []
    return run(program, calibration, options, plan=plan, instruments=[*checks, *instruments])


def asked_of(given: Iterable[Any] | Mapping[str, Any], check: bool) -> dict[str, Any]:
    """Return the arguments of `quantized` that ``compile(..., quantize=given)`` asks for.

    `UsageError` with a suggestion if one is not an argument of `narrows.quantize`.

    Args:
        given: Calibration data, or arguments of `narrows.quantize` by their names.
        check: Whether to check, unless it is among them.
    """
    others = {"calibration": None, "plan": None, "check": check, "instruments": ()}
    if not isinstance(given, Mapping):
        return {**others, "calibration": given, "options": Quantization()}
    options = from_json(Quantization, given, "quantize", list(others))
    return {**others, **{n: given[n] for n in others if n in given}, "options": options}


def quick(asked: Mapping[str, Any] | None) -> Callable[[Program], Program] | None:
    """Return what makes integers of a program to see how long they take, if any are asked for.

    It calibrates on the example inputs: what numbers there are makes no difference to the time, and
    nobody sees them.

    Args:
        asked: What `asked_of` returned.
    """
    if asked is None:
        return None
    options = asked["options"].unlearned(
        method="minmax", percentile=PERCENTILE, equalize=False, correct_bias=False, levels=False,
        allow_lost=True,
    )  # fmt: skip

    def integers(program: Program) -> Program:
        return quantized(program, [tuple(program.examples)], options, None, False, ()).program

    return integers
