"""What `narrows.lower` and `narrows.compile` do behind a program, in the order that spares memory.

A model's weights are in memory once as the user's, once more as the program's, whose norms are
folded, and once more as a runtime rearranges them. The second have to go before the third come.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from narrows.backends.artifact import Artifact
    from narrows.backends.base import Pair, Target, Written
    from narrows.ir.program import Program

LARGE = 1 << 24  # bytes of weights from which it is worth a few milliseconds to return memory


def lower_freeing(
    made: list[Program],
    again: Callable[[], Program],
    target: Target,
    *,
    plan: Any = None,
) -> Artifact:
    """Return what `narrows.lower` does, without the program in memory while the artifact is
    checked.

    The check needs what the program gives, and itself only where an output differs.

    Args:
        made: Holds the program, and nothing afterwards; so the caller has to let go of it, too.
        again: Makes it again.
        target: The target, with its options.
        plan: As for `narrows.lower`.
    """
    size = sum(t.nbytes for t in made[0].weights.values())
    written = write(made.pop(), target, plan, {})
    if size >= LARGE:
        give_back()
    return written.settled(lambda: pair_of(again()))


def give_back() -> None:
    """Have the C library return what was freed to the system, where it can be asked to.

    What weights leave between other things is of no use to a runtime whose pieces are larger.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
        if trim is not None:
            trim(0)


def write(program: Program, target: str | Target, plan: Any, options: Mapping[str, Any]) -> Written:
    """Return what `narrows.lower` does before the check."""
    from narrows.backends.base import write as run
    from narrows.passes.plans.plan import loaded

    plan_json = None if plan is None else loaded(plan).to_json()
    return run(pair_of(program), target, plan_json, **options)


def pair_of(program: Program) -> Pair:
    """Return what is lowered of a program, and what has to come of it."""
    from narrows.backends.base import Pair, in_types_of_numpy
    from narrows.passes.fold_batch_norm import FoldBatchNorm, fold
    from narrows.passes.pipeline import Pipeline

    program = in_types_of_numpy(program)  # first, as norms are folded with its rounding
    folds = fold(program)[1]
    folded = Pipeline((FoldBatchNorm(),)).run(program).program if folds else program
    return Pair(folded, program)


__all__ = ["lower_freeing", "pair_of", "write"]
