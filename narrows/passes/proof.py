"""`Proof`: what all passes together made equals the masked program, compared once on the examples.

`Numerics` holds every pass to its own reference, which costs two runs a pass. A proof runs the
reference and the result once each, so that `narrows.apply` can afford it always. Only where the two
differ do both look further: in float64, and then for the pass and the node to blame (`settle`).
`Unproven` says of a program that nobody compared it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from narrows.errors import FidelityError, PassError
from narrows.ir.compare import relative_error
from narrows.ir.meta import where
from narrows.ir.program import Note, Program
from narrows.ir.verify import verify
from narrows.passes.base import Fidelity, Pass, PassResult, tolerance
from narrows.passes.instruments import (
    Watch,
    alike,
    fed,
    has_floats,
    name_of,
    outputs_of,
    precision,
)

Outputs = list[Any]
HINT = "report this with the model, please; check=False returns the program as it is"
# When a node is looked for: entries of a channel that are compared, as a wrong one differs in most,
# and pairs of channels that are not too many to compare.
SAMPLE, PAIRS = 256, 2**24
# How much farther off than the reference itself, by its own rounding, a result may be.
CARRIED = 100.0
# How far off, by its own size, a channel may be before it is looked at in float64; and how much
# smaller than the largest one a channel counts by its own size.
APART, SMALLEST = 1e-3, 1e-6


class Unproven(Watch):
    """Notes after the last pass that the program was not compared with its reference.

    Args:
        passes: How many passes the pipeline has.
    """

    def __init__(self, passes: int) -> None:
        self._left = passes

    def after(
        self, pass_: Pass, program: Program, result: PassResult, seconds: float
    ) -> tuple[Note, ...]:
        """Return the note once all passes have run."""
        self._left -= 1
        if self._left:
            return ()
        text = "nobody compared this program with the masked one: check=False left it out"
        return (Note(program.name, "unchecked", text),)


@dataclass
class Stretch:
    """Passes in a row whose result has to equal one program, the first one's reference.

    Attributes:
        start: What the first pass was given.
        wanted: The outputs of the reference; ``None`` where it does not run in its own precision.
        passes: The passes so far.
    """

    start: Program
    wanted: Outputs | None
    passes: list[Pass] = field(default_factory=list)

    def reference(self, program: Program) -> Program:
        """Return what the first pass has to equal if it is given ``program``."""
        return self.passes[0].reference(program)

    def bound(self, dtype: torch.dtype) -> float:
        """Return the largest relative error that the passes together may make."""
        return max(tolerance(p.fidelity, dtype) for p in self.passes)

    @property
    def meant(self) -> str:
        """What the reference is called."""
        planned = any(getattr(p, "plan", None) is not None for p in self.passes)
        return "the masked program" if planned else "the program before the passes"


class Proof(Watch):
    """Compares the pipeline's result with its reference once, and verifies it.

    The reference is that of the first pass: the masked program, as a rule. A later pass that means
    something else by its reference begins a new comparison, and a lossy one is left out. An excess
    in the program's own precision, or a result that is not finite there, is judged in float64: of
    the same program first, then of the same passes on a float64 program, which leaves no rounding
    to blame. The error is recorded with the last pass, under the program's dtype.

    Args:
        passes: How many passes the pipeline has.
    """

    def __init__(self, passes: int) -> None:
        self._left = passes
        self._stretch: Stretch | None = None

    def after(
        self, pass_: Pass, program: Program, result: PassResult, seconds: float
    ) -> tuple[Note, ...]:
        """Compare where something ends; return what a person should know of the comparison.

        Raises:
            FidelityError: The result is not its reference.
            PassError: The result breaks an invariant, or does not run.
        """
        self._left -= 1
        notes: tuple[Note, ...] = ()
        lossy = pass_.fidelity is Fidelity.LOSSY
        reference = program if lossy else pass_.reference(program)
        if self._stretch is not None and (lossy or reference is not program):
            notes = settle(self._stretch, program, result.measured)
            self._stretch = None
        if not lossy:
            if self._stretch is None:
                self._stretch = Stretch(program, _run_or_none(reference))
            self._stretch.passes.append(pass_)
        if not self._left:
            _verify(result.program)
            if self._stretch is not None:
                notes += settle(self._stretch, result.program, result.measured)
        return notes


class Numerics(Watch):
    """Runs each pass's result and its reference on the examples, and holds it to its fidelity.

    The error is recorded under the program's dtype, that of a lossy pass, too. Rounding alone can
    carry a deep float32 network over its tolerance; what it excuses is what it does in a `Proof`.

    Args:
        double: Whether to run every pass in float64 as well, and record that error.
    """

    def __init__(self, *, double: bool = False) -> None:
        self.double = double
        self.errors: list[tuple[str, dict[str, float]]] = []
        self._last: tuple[Program, Outputs] | None = None

    def after(self, pass_: Pass, program: Program, result: PassResult, seconds: float) -> None:
        """Measure, record, and raise `FidelityError` beyond the tolerance."""
        reference = pass_.reference(program)
        known = self._last
        same = known is not None and known[0] is reference  # what the pass before has made
        wanted = known[1] if known is not None and same else _run_or_none(reference)
        got = outputs_of(result.program, fed(result.program, reference.examples))
        shared = result.program.examples is reference.examples
        self._last = (result.program, got) if shared else None
        try:
            _hold(Stretch(program, wanted, [pass_]), result.program, result.measured, got)
            if self.double and has_floats(program) and precision(program) is not torch.float64:
                wide = program.to(torch.float64)
                stretch = Stretch(wide, _run(pass_.reference(wide)), [pass_])
                _hold(stretch, pass_.run(wide).program, result.measured)
        finally:
            self.errors.append((str(pass_), dict(result.measured)))


def _hold(
    stretch: Stretch, program: Program, measured: dict[str, float], got: Outputs | None = None
) -> None:
    """Measure what one pass made, and settle it unless the pass is lossy."""
    if stretch.passes[0].fidelity is not Fidelity.LOSSY:
        settle(stretch, program, measured, got)
    elif stretch.wanted is not None:
        outputs = _run(program) if got is None else got
        name = name_of(precision(stretch.start))
        pair = alike(program, outputs, stretch.start, stretch.wanted)
        measured[name] = max(errors_of(*pair), default=0.0)


def settle(
    stretch: Stretch, program: Program, measured: dict[str, float], ran: Outputs | None = None
) -> tuple[Note, ...]:
    """Return notes on the comparison of ``program``, the end of a stretch, with its reference.

    Args:
        stretch: The passes that made it.
        program: What they made.
        measured: Gets the errors by dtype.
        ran: What the program gives, where it was run already.

    Raises:
        FidelityError: They differ by more than rounding.
        PassError: The result does not run where its reference does, or neither runs in float64.
    """
    dtype = precision(stretch.start)
    errors, blind = [torch.inf], [0]  # where the reference does not run in its own precision
    got = meant = None
    if stretch.wanted is not None:
        got, meant = alike(program, ran or _run(program), stretch.start, stretch.wanted)
        errors, blind = errors_of(got, meant), unseen(meant)
        measured[name_of(dtype)] = max(errors, default=0.0)
        if _is_lost(got, meant):
            raise _refusal(stretch, program, errors, stretch.start)
    excess = max(errors, default=0.0) > stretch.bound(dtype)
    if not excess and not any(blind) and not _apart(got, meant):
        return _zeros(program, meant)
    start = stretch.start.to(torch.float64) if has_floats(stretch.start) else stretch.start
    wanted = None if dtype is torch.float64 else _run_or_none(stretch.reference(start))
    if wanted is not None:
        return _settle_wide(stretch, program, measured, start, wanted)
    if stretch.wanted is None:
        _run(stretch.reference(stretch.start))  # its own error says why
    if excess:
        raise _refusal(stretch, program, errors, stretch.start)
    return (*_blindness(program, blind, dtype), *_zeros(program, meant))


def _settle_wide(
    stretch: Stretch,
    program: Program,
    measured: dict[str, float],
    start: Program,
    wanted: Outputs,
) -> tuple[Note, ...]:
    """Compare in float64: what was made, then what the passes make without rounding a weight."""
    own, dtype = precision(stretch.start), torch.float64
    found = measured.get(name_of(own), torch.inf)
    got, meant = alike(program, _run(program.to(dtype)), start, wanted)
    notes = _blindness(program, unseen(meant), dtype)
    error = max(errors_of(got, meant), default=0.0)
    measured[name_of(dtype)] = error
    if error <= stretch.bound(own) and not _apart(got, meant):
        return notes
    again = start
    for pass_ in stretch.passes:
        again = pass_.run(again).program
    errors = errors_of(*alike(again, _run(again), start, wanted))
    measured[name_of(dtype)] = max(errors, default=0.0)
    if measured[name_of(dtype)] > stretch.bound(dtype):
        raise _refusal(stretch, again, errors, start)
    if found <= stretch.bound(own):  # a small channel was looked at, and is right
        return notes
    _bound_rounding(stretch, program, found, wanted)
    text = (
        f"the outputs differ by {found:.1e} from those of {stretch.meant}: rounding in "
        f"{name_of(own)}, for the same passes are exact in float64"
    )
    return (*notes, Note(program.name, "rounding", text))


def _bound_rounding(stretch: Stretch, program: Program, found: float, wanted: Outputs) -> None:
    """Raise if an error is larger than rounding can be, for all that float64 says.

    A weight that no longer fits its precision is no rounding, nor is what lies far beyond what the
    reference itself loses in it.
    """
    before, after = stretch.start.weights.values(), program.weights.items()
    if all(_is_finite(t) for t in before):
        lost = next((n for n, t in after if not _is_finite(t)), None)
        if lost is not None:
            raise FidelityError(
                f"{lost} has numbers that {name_of(precision(program))} does not hold",
                where=program.name,
                why=f"the outputs then differ by {found:.2g} (relative)",
                hint="apply the passes to program.to(torch.float32)",
            )
    if stretch.wanted is None:  # it does not run in its own precision
        return
    own = max(errors_of(stretch.wanted, wanted), default=0.0)
    if found > CARRIED * max(own, stretch.bound(precision(stretch.start))):
        raise _refusal(stretch, program, [found], stretch.start)


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


# ------------------------------------------------------------------ running and comparing


def _run(program: Program) -> Outputs:
    return outputs_of(program, program.examples)


def _run_or_none(program: Program) -> Outputs | None:
    try:
        return _run(program)
    except PassError:
        return None


def errors_of(actual: Outputs, wanted: Outputs) -> list[float]:
    """Return the relative error of every output; whole numbers are equal or wrong."""
    if len(actual) != len(wanted):
        return [torch.inf]
    return [_error_of(a, b) for a, b in zip(actual, wanted, strict=True)]


def _error_of(actual: Any, wanted: Any) -> float:
    if isinstance(wanted, Tensor) and isinstance(actual, Tensor):
        whole = not wanted.is_floating_point() and not wanted.is_complex()
        if whole or not actual.is_floating_point():
            same = actual.dtype == wanted.dtype and torch.equal(actual, wanted)
            return 0.0 if same else torch.inf
    return relative_error(actual, wanted)


def _apart(actual: Outputs | None, wanted: Outputs | None) -> bool:
    """Whether a channel is another by its own size, which a larger one beside it hides."""
    if actual is None or wanted is None:
        return False
    pairs = zip(actual, wanted, strict=True)
    return any(
        isinstance(b, Tensor) and b.is_floating_point() and b.dim() > 1 and _channels_apart(a, b)
        for a, b in pairs
    )


def _channels_apart(actual: Tensor, wanted: Tensor) -> bool:
    b = wanted.detach().double().nan_to_num(0.0, 0.0, 0.0)
    off = (actual.detach().double().nan_to_num(0.0, 0.0, 0.0) - b).abs()
    for axis in {1, b.dim() - 1} if b.numel() else ():
        other = [a for a in range(b.dim()) if a != axis]
        size = b.abs().amax(other)
        if bool((off.amax(other) > APART * size.clamp(min=SMALLEST * float(size.max()))).any()):
            return True
    return False


def _zeros(program: Program, outputs: Outputs | None) -> tuple[Note, ...]:
    """Return a note per output that is zero throughout, where a wrong channel is zero as well."""
    return tuple(
        Note(
            program.name,
            "all zero",
            f"the examples give nothing but zeros in output {output_name(program, i)}, which "
            "proves little: capture with other examples",
        )
        for i, o in enumerate(outputs or ())
        if isinstance(o, Tensor) and o.is_floating_point() and o.numel() > 1 and not bool(o.any())
    )


def unseen(outputs: Outputs) -> list[int]:
    """Return of every output how many numbers are NaN or infinite, of which nothing is proven."""
    return [
        int((~o.isfinite()).sum()) if isinstance(o, Tensor) and o.is_floating_point() else 0
        for o in outputs
    ]


def _is_lost(actual: Outputs, wanted: Outputs) -> bool:
    """Whether an output has another shape, or a NaN where a number was: no rounding does that."""
    if len(actual) != len(wanted):
        return True
    for a, b in zip(actual, wanted, strict=True):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            continue
        if a.shape != b.shape or bool((a.isnan() & b.isfinite()).any()):
            return True
    return False


def _blindness(program: Program, counts: list[int], dtype: torch.dtype) -> tuple[Note, ...]:
    """Return a note per output with numbers that a comparison says nothing of."""
    return tuple(
        Note(
            program.name,
            "not finite",
            f"the examples give NaN or infinity {count:,} times in output {output_name(program, i)}"
            f" ({name_of(dtype)}): they were the same there, which proves little",
        )
        for i, count in enumerate(counts)
        if count
    )


def output_name(program: Program, index: int) -> str:
    """Return an output's position and, where it has one, its node's name: ``0 (linear)``."""
    outputs: Any = program.output.args[0]
    node = outputs[index] if index < len(outputs) else None
    name = getattr(node, "name", "")
    return f"{index} ({name})" if name else str(index)


def _verify(program: Program) -> None:
    try:
        verify(program)
    except Exception as error:
        what = getattr(error, "what", str(error))
        raise PassError(
            f"the program is broken after the passes: {what}",
            where=getattr(error, "where", ""),
            why=getattr(error, "why", ""),
            hint=HINT,
        ) from error


# ------------------------------------------------------------------ whose fault it is


def _refusal(
    stretch: Stretch, program: Program, errors: list[float], start: Program
) -> FidelityError:
    """Return the error for a result that differs; it names the output, the pass and the node."""
    worst, dtype = max(range(len(errors)), key=errors.__getitem__), precision(start)
    return FidelityError(
        f"output {output_name(program, worst)} is not that of {stretch.meant}: it differs by "
        f"{errors[worst]:.2g} (relative, {name_of(dtype)})",
        where=_culprit(stretch, start),
        why=f"rounding explains {stretch.bound(dtype):g} at most",
        hint=HINT,
    )


def _culprit(stretch: Stretch, start: Program) -> str:
    """Return the first pass whose result differs, and the first node where it does."""
    program, dtype = start, precision(start)
    for pass_ in stretch.passes:
        made, reference = pass_.run(program).program, pass_.reference(program)
        errors = errors_of(*alike(made, _run(made), reference, _run(reference)))
        bound = tolerance(pass_.fidelity, dtype)
        if max(errors, default=0.0) > bound:
            node = first_difference(made, reference, bound)
            return pass_.name + (f", from {node} on" if node else "")
        program = made
    return "all passes together"


def first_difference(actual: Program, wanted: Program, bound: float) -> str:
    """Return the first node of ``actual`` that makes what no channel of its namesake is.

    A tensor that lost channels on one axis is compared channel by channel with any of the other's.
    Nodes that lost channels on several axes, or have no namesake, are passed over.
    """
    values: dict[str, Any] = {}
    with torch.no_grad():
        wanted.run_flat(wanted.examples, observe=lambda n, v: values.setdefault(n.name, v))
        found: list[str] = []

        def look(node: Any, value: Any) -> None:
            theirs = values.get(node.name)
            called = node.op == "call_function" and isinstance(value, Tensor)
            if found or not called or not isinstance(theirs, Tensor):
                return
            if not is_part(value, theirs, bound):
                found.append(where(node))

        actual.run_flat(actual.examples, observe=look)
    return found[0] if found else ""


def is_part(part: Tensor, whole: Tensor, bound: float) -> bool:
    """Whether every channel of ``part`` is one of ``whole``, on the one axis where they differ."""
    if part.dim() != whole.dim():
        return True
    axes = [a for a in range(part.dim()) if part.shape[a] != whole.shape[a]]
    if not axes:
        return relative_error(part, whole) <= bound
    if len(axes) > 1 or part.shape[axes[0]] * whole.shape[axes[0]] > PAIRS:
        return True
    rows, others = (t.double().movedim(axes[0], 0).flatten(1)[:, :SAMPLE] for t in (part, whole))
    scale = float(others.abs().max()) if others.numel() else 0.0
    nearest = torch.cdist(rows, others, p=torch.inf).min(1).values
    return bool((nearest <= bound * max(scale, 1e-300)).all())


__all__: Sequence[str] = ("Numerics", "Proof", "Unproven", "first_difference", "settle")
