"""The intermediate representation: programs, the op table, the channel analysis, the rewriter."""

from __future__ import annotations

from typing import Any

from narrows.ir.views import VIEWS


def _couplings(program: Any) -> Any:
    from narrows.ir.structure import structure_of
    from narrows.ir.structure.computed import settled

    return structure_of(settled(program)).ties


def _module(program: Any) -> Any:
    from narrows.ir.module import ProgramModule

    return ProgramModule(program)


def _text(program: Any) -> str:
    from narrows.ir.text import to_text

    return to_text(program)


def _parcel(program: Any) -> Any:
    from narrows.ir.parcels import parcel

    return parcel(program)


def _with_state(program: Any, state: Any) -> Any:
    from narrows.ir.weights import with_state

    return with_state(program, state)


def _in_precision(program: Any, dtype: Any) -> Any:
    from narrows.ir.weights import in_precision

    return in_precision(program, dtype)


VIEWS.update(
    couplings=_couplings,
    module=_module,
    parcel=_parcel,
    text=_text,
    with_state=_with_state,
    in_precision=_in_precision,
)
