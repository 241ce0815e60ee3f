"""`narrows.compress`: choose, compensate, prune, quantize, lower; each as elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from narrows import api
from narrows.api.planning import counted
from narrows.errors import UsageError
from narrows.options import gather, option, takes, whole
from narrows.passes.plans.within import Ratio, Within

if TYPE_CHECKING:
    from narrows.backends.artifact import Artifact
    from narrows.backends.base import Target
    from narrows.ir.program import Note, Program
    from narrows.passes.choosing.allocators.base import Allocator
    from narrows.passes.choosing.repair import Progress
    from narrows.passes.choosing.solved import Solved
    from narrows.passes.plans.plan import ChannelPlan

Evaluate = Callable[[Any], float]

LEAST = "least-squares"
COMPARED = 64  # examples: integers are interpreted, and that many tell what bits cost


@dataclass(frozen=True)
class Compressing(Within):
    """How much smaller, and in how many bits.

    Each layer chooses for itself what it reads, which keeps most for its multiply-accumulates; for
    a budget such as a latency whole couplings go, so that nothing has to be copied. What may be
    lost is looked at before the result is quantized.

    Attributes:
        bits: In how many bits weights and activations are held; floating-point unless given.
        compensation: How the weights that are left make up for what is gone, as ``method`` of
            `compensate`: ``least-squares``, ``distill{seconds=60}``.
    """

    bits: int | None = option(None, metavar="N", read=whole)
    compensation: str = option(LEAST, metavar="METHOD")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits is not None and self.bits not in range(2, 9):
            raise UsageError(f"bits are 2 to 8, got {self.bits!r}")

    def refuse_idle(self) -> None:
        """Raise `UsageError` if nothing is asked for."""
        if not self.budgets and self.compensation != LEAST:
            raise UsageError(
                f"compensation {self.compensation!r} without a budget",
                why="nothing goes that could be made up for",
                hint="macs=0.7, params=0.5, latency=0.6 or accuracy_drop=0.5",
            )
        if not self.budgets and self.bits is None:
            raise UsageError(
                "there is no budget",
                why="it says how small the result has to be",
                hint="macs=0.7, params=0.5, latency=0.6 or accuracy_drop=0.5; or bits=8 alone",
            )


@takes(Compressing)
def compress(
    model: Any,
    inputs: Any,
    *,
    data: Iterable[Any],
    target: str | Target = "onnx",
    evaluate: Evaluate | None = None,
    macs: Ratio | None = None,
    params: Ratio | None = None,
    latency: float | None = None,
    accuracy_drop: float | None = None,
    divergence: float | None = None,
    limits: Mapping[str, Ratio] | None = None,
    groups: Mapping[str, str | Sequence[str]] | None = None,
    allocator: str | Allocator | None = None,
    outputs: str = "auto",
    bits: int | None = None,
    compensation: str = LEAST,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_batch: bool = True,
    name: str | None = None,
    check: bool = True,
    contest: bool | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Return the best artifact within budgets: nothing is trained, and no label is read.

    The model is captured, its channels are chosen by what its own outputs lose on the data, the
    weights that are left are solved for, and the result is pruned for the target, quantized if
    asked, lowered and checked.

    >>> artifact = narrows.compress(model, (x,), data=[images], macs=0.7)
    >>> artifact = narrows.compress(model, (x,), data=[images], latency=0.6, bits=8)
    >>> artifact = narrows.compress(model, (x,), data=[images], accuracy_drop=0.5, evaluate=f)
    >>> artifact = narrows.compress(model, (x,), data=[images], latency=0.6, divergence=0.1)

    Args:
        model: As for `capture`.
        inputs: As ``example_inputs`` of `capture`.
        data: Batches of inputs like the real ones, some hundred examples: each a tuple of inputs, a
            dict by name, or one tensor.
        target: As for `lower`.
        evaluate: A function that is given a program, which is called as the model is, and returns
            what it is worth in points, such as an accuracy in percent; more is better.
        macs, ...: The options, those of `narrows.api.compressing.Compressing`.
        kwargs, dynamic_batch, name: As for `capture`.
        check: Whether passes and artifact are compared with what they have to equal.
        contest: Whether forms are timed on the runtime here, as for `compile`.
        progress: Called with what is done, how far it is and of how much.

    Raises:
        PlanError: A budget cannot be met; the message says the closest that can.
        UsageError: There is no data or no budget, or ``evaluate`` gives no number.
        CaptureError, PassError, FidelityError, LowerError: As for `compile`.
    """
    from narrows.backends import make_target

    asked = gather(Compressing, locals())
    asked.refuse_idle()
    given = kept(data)
    emitted = make_target(target)
    program = api.capture(model, inputs, kwargs=kwargs, dynamic_batch=dynamic_batch, name=name)
    how: dict[str, Any] = {"check": check, "contest": contest, "progress": progress}
    return compressed(program, given, asked, emitted, evaluate, **how).artifact


@dataclass(frozen=True)
class Compressed:
    """What a model became.

    Attributes:
        artifact: The artifact.
        plan: Which channels are left; ``None`` where only bits were asked for.
        solved: The plan with the weights that were found for it.
        told: What there is to say: what was tried, and what is lost.
    """

    artifact: Artifact
    plan: ChannelPlan | None
    solved: Solved | None
    told: list[str]


def compressed(
    program: Program,
    data: Sequence[Any],
    asked: Compressing,
    target: Target,
    evaluate: Evaluate | None,
    *,
    check: bool = True,
    contest: bool | None = None,
    progress: Progress | None = None,
) -> Compressed:
    """Return the artifact, and what it was made by.

    Args:
        program: The program as captured.
        data: Batches of inputs without labels.
        asked: How much smaller.
        target: What is emitted.
        evaluate: What a program is worth, in points; more is better.
        check: Whether passes and artifact are compared with what they have to equal.
        contest: Whether forms are timed, as for `compile`.
        progress: Told what is done, how far it is and of how much.
    """
    from narrows.api import contest as contests
    from narrows.api.gains import Size, gains
    from narrows.api.integers import quick
    from narrows.ir.program import Note
    from narrows.passes.choosing.compensations.catalog import find
    from narrows.passes.choosing.judged import worth
    from narrows.passes.choosing.solved import Solved
    from narrows.passes.quant.options import Quantization

    asked.refuse_idle()
    common: dict[str, Any] = {"outputs": asked.outputs, "progress": progress}
    method = find(asked.compensation)  # fails now, or not at all
    plan, made, solved = None, program, None
    first = None if evaluate is None else worth(evaluate, program)  # fails now, or not at all
    if asked.budgets:
        plan = _planned(program, data, asked, target, evaluate, progress)
        made = api.compensate(program, plan, data=data, method=method, **common)
        solved = Solved.of(program, plan, made)
        if evaluate is not None:
            now = worth(evaluate, plan.masked(made))
            text = f"evaluate: {first:.4g} unpruned, {now:.4g} pruned and compensated"
            made = made.replace(notes=(*made.notes, Note(program.name, "evaluated", text)))
    told = [note.message for note in (*(plan.notes if plan else ()), *made.notes)]
    bits: dict[str, Any] = {}
    if asked.bits is not None:
        bits = {"weights": asked.bits, "activations": asked.bits}
    passes = api.passes_for(made, plan, target, None, None, bool(bits))
    quantize = quick({"options": Quantization(**bits)} if bits else None)
    watches = api.checks_of(passes, check)
    ran = contests.run(made, passes, target, watches, asked=contest, quantize=quantize)
    small = ran.result.program
    if left := counted(program, asked, target, small, bool(bits)):
        note = Note(program.name, "counted", f"left in what is lowered: {left}")
        small = small.replace(notes=(*small.notes, note))
        told.append(note.message)
    before, after = Size.of(program, ran.passes), Size.of(small, ran.passes)
    if bits:
        small = api.quantize(small, data, **bits, check=check).program
        notes = _in_bits(program, small, data, asked)
        if evaluate is not None:
            now = worth(evaluate, small)
            text = f"evaluate: {first:.4g} unpruned, {now:.4g} in {asked.bits} bits"
            notes.append(Note(program.name, "evaluated", text))
        small = small.replace(notes=(*small.notes, *notes))
        told += [note.message for note in notes]
    artifact = api.lower(small, target, plan=plan)
    artifact.manifest.update(gains(before, after, artifact, ran.contest))
    return Compressed(artifact, plan, solved, told)


def _in_bits(
    program: Program, small: Program, data: Sequence[Any], asked: Compressing
) -> list[Note]:
    """Return how like the unpruned network's own outputs those of the integers are."""
    from narrows.ir.program import Note
    from narrows.passes.choosing.closeness import closeness
    from narrows.passes.choosing.statistics import first
    from narrows.passes.quant.batches import CHOOSING, batches

    some = first(program, batches(program, data, "comparing", CHOOSING), COMPARED)
    (found,), count = closeness(program, [small], some, asked.outputs)
    text = f"in {asked.bits} bits: divergence from the unpruned outputs {found.far:.4g}"
    if found.same is not None:
        text += f", same class for {found.same:.1%} of {count} examples"
    return [Note(program.name, "compared", text), *found.notes(program, "quantized")]


def _planned(
    program: Program,
    data: Sequence[Any],
    asked: Compressing,
    target: Target,
    evaluate: Evaluate | None,
    progress: Progress | None,
) -> ChannelPlan:
    from narrows.passes.choosing.budgets.catalog import find

    found = [find(name) for name in asked.budgets]
    return api.plan(
        program,
        data=data,
        target=target if any(budget.timed for budget in found) else None,
        integers=asked.bits is not None and any(budget.timed for budget in found),
        constrained=any(budget.coupled for budget in found),
        evaluate=evaluate if "accuracy_drop" in asked.budgets else None,
        progress=progress,
        **{field.name: getattr(asked, field.name) for field in fields(Within)},
    )


def kept(data: Iterable[Any] | None) -> list[Any]:
    """Return data that is read more than once; `UsageError` if there is none."""
    from narrows.passes.quant.batches import CHOOSING
    from narrows.passes.quant.batches import kept as run

    found = run(data, CHOOSING)
    if not found:
        raise UsageError(
            "there is no data",
            why="channels are chosen, and weights found anew, by what the outputs lose on it",
            hint="data=[images], some hundred without labels",
        )
    return found


__all__ = ["Compressed", "Compressing", "Evaluate", "compress", "compressed", "kept"]
