"""`narrows.compress`: choose, compensate, prune, quantize, lower; each as elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from narrows import api
from narrows.errors import UsageError
from narrows.options import check_truths, gather, number, option, takes, whole

if TYPE_CHECKING:
    from narrows.backends.artifact import Artifact
    from narrows.backends.base import Target
    from narrows.ir.program import Program
    from narrows.passes.choosing.repair import Progress
    from narrows.passes.choosing.solved import Solved
    from narrows.passes.plans.plan import ChannelPlan

Evaluate = Callable[[Any], float]

LEAST = "least-squares"
BUDGETS = ("macs", "params", "latency", "accuracy_drop")


@dataclass(frozen=True)
class Compressing:
    """How much smaller, and in how many bits.

    Each layer chooses for itself what it reads, which keeps most for its multiply-accumulates; for
    a latency whole couplings go, so that nothing has to be copied.

    Attributes:
        macs: The share of the multiply-accumulates that may be left, above 0 and up to 1.
        params: The same of the weights.
        latency: The same of the predicted latency on the target.
        accuracy_drop: How many points may be lost: of ``evaluate`` where there is one, else of the
            share of a quarter of the data, in percent, that is given the class that the unpruned
            network gives. It is looked at before the result is quantized.
        bits: In how many bits weights and activations are held; floating-point unless given.
        outputs: What the outputs are: ``logits``, ``values`` or ``auto``.
        compensation: How the weights that are left make up for what is gone, as ``method`` of
            `compensate`: ``least-squares``, ``distill{seconds=60}``.
    """

    macs: float | None = option(None, metavar="M", read=number)
    params: float | None = option(None, metavar="P", read=number)
    latency: float | None = option(None, metavar="L", read=number)
    accuracy_drop: float | None = option(None, metavar="POINTS", read=number)
    bits: int | None = option(None, metavar="N", read=whole)
    outputs: str = option("auto", choices=("auto", "logits", "values"))
    compensation: str = option(LEAST, metavar="METHOD")

    def __post_init__(self) -> None:
        check_truths(self, UsageError)
        if len(self.budgets) > 1:
            raise UsageError(
                f"{' and '.join(self.budgets)} exclude each other",
                why="each of them alone says how small the result has to be",
                hint="leave all but one of them out",
            )
        drop = self.accuracy_drop
        if drop is not None and (isinstance(drop, bool) or not 0 <= float(drop) <= 100):
            raise UsageError(f"accuracy_drop is points from 0 to 100, got {drop!r}")
        if self.bits is not None and self.bits not in range(2, 9):
            raise UsageError(f"bits are 2 to 8, got {self.bits!r}")

    @property
    def budgets(self) -> list[str]:
        """Which budgets are given."""
        return [name for name in BUDGETS if getattr(self, name) is not None]

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
    macs: float | None = None,
    params: float | None = None,
    latency: float | None = None,
    accuracy_drop: float | None = None,
    bits: int | None = None,
    outputs: str = "auto",
    compensation: str = LEAST,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_batch: bool = True,
    name: str | None = None,
    check: bool = True,
    progress: Progress | None = None,
) -> Artifact:
    """Return the best artifact within a budget: nothing is trained, and no label is read.

    The model is captured, its channels are chosen by what its own outputs lose on the data, the
    weights that are left are solved for, and the result is pruned for the target, quantized if
    asked, lowered and checked.

    >>> artifact = narrows.compress(model, (x,), data=[images], macs=0.7)
    >>> artifact = narrows.compress(model, (x,), data=[images], latency=0.6, bits=8)
    >>> artifact = narrows.compress(model, (x,), data=[images], accuracy_drop=0.5, evaluate=f)

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
        progress: Called with what is done, how far it is and of how much.

    Raises:
        PlanError: The budget cannot be met; the message says the closest that can.
        UsageError: There is no data, no budget or several, or ``evaluate`` gives no number.
        CaptureError, PassError, FidelityError, LowerError: As for `compile`.
    """
    from narrows.backends import make_target

    asked = gather(Compressing, locals())
    asked.refuse_idle()
    given = kept(data)
    emitted = make_target(target)
    program = api.capture(model, inputs, kwargs=kwargs, dynamic_batch=dynamic_batch, name=name)
    return compressed(program, given, asked, emitted, evaluate, check, progress).artifact


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
    check: bool,
    progress: Progress | None,
) -> Compressed:
    """Return the artifact, and what it was made by.

    Args:
        program: The program as captured.
        data: Batches of inputs without labels.
        asked: How much smaller.
        target: What is emitted.
        evaluate: What a program is worth, in points; more is better.
        check: Whether passes and artifact are compared with what they have to equal.
        progress: Told what is done, how far it is and of how much.
    """
    from narrows.ir.program import Note
    from narrows.passes.choosing.compensations.catalog import find
    from narrows.passes.choosing.solved import Solved
    from narrows.passes.choosing.tolerance import worth

    asked.refuse_idle()
    common: dict[str, Any] = {"outputs": asked.outputs, "progress": progress}
    method = find(asked.compensation)  # fails now, or not at all
    plan, made, solved = None, program, None
    before = None if evaluate is None else worth(evaluate, program)  # fails now, or not at all
    if asked.budgets:
        plan = _planned(program, data, asked, target, evaluate, progress)
        made = api.compensate(program, plan, data=data, method=method, **common)
        solved = Solved.of(program, plan, made)
        if evaluate is not None:
            after = worth(evaluate, plan.masked(made))
            text = f"evaluate: {before:.4g} unpruned, {after:.4g} pruned and compensated"
            made = made.replace(notes=(*made.notes, Note(program.name, "evaluated", text)))
    told = [note.message for note in (*(plan.notes if plan else ()), *made.notes)]
    small = api.apply(made, plan, target=target, check=check)
    if asked.bits is not None:
        bits: dict[str, Any] = {"weights": asked.bits, "activations": asked.bits}
        small = api.quantize(small, data, **bits, check=check).program
        if evaluate is not None:
            after = worth(evaluate, small)
            text = f"evaluate: {before:.4g} unpruned, {after:.4g} in {asked.bits} bits"
            small = small.replace(notes=(*small.notes, Note(program.name, "evaluated", text)))
            told.append(text)
    return Compressed(api.lower(small, target, plan=plan), plan, solved, told)


def _planned(
    program: Program,
    data: Sequence[Any],
    asked: Compressing,
    target: Target,
    evaluate: Evaluate | None,
    progress: Progress | None,
) -> ChannelPlan:
    from narrows.passes.choosing.tolerance import tolerated

    common: dict[str, Any] = {"outputs": asked.outputs, "progress": progress}
    if asked.accuracy_drop is not None:
        drop = float(asked.accuracy_drop)
        return tolerated(program, data, drop, evaluate=evaluate, **common)
    (name,) = asked.budgets
    common |= {"target": target} if name == "latency" else {"constrained": False}
    return api.plan(program, data=data, **{name: getattr(asked, name)}, **common)


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
