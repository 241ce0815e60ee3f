"""What a compensation is: how weights make up for what is gone, and what it is told for that.

There are two kinds. One finds a layer's weights anew, layer by layer in execution order, from what
was summed over data of that layer (`LayerWise`). The other is given the whole network (`Whole`).
Those of narrows are dataclasses, whose fields are options.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from narrows.errors import PlanError, users_code
from narrows.ir.labels import Bools
from narrows.ir.program import Note, Program
from narrows.passes.choosing.left import Left
from narrows.passes.choosing.reads import Reads
from narrows.passes.plans.plan import ChannelPlan

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Sums:
    """What was summed over data of one layer. All in float64; the last column is the bias.

    Attributes:
        now: Its weights, zero where they are gone, ``[groups, outputs, columns + 1]``.
        kept: Which columns are there, ``[groups, columns + 1]``.
        square: ``mean(x x^T)`` of what it reads, ``[groups, columns + 1, columns + 1]``.
        cross: ``mean(y x^T)`` with what it should make, ``[groups, outputs, columns + 1]``.
        power: ``mean(y^2)``, ``[groups, outputs]``.
    """

    now: Tensor
    kept: Tensor
    square: Tensor
    cross: Tensor
    power: Tensor


@runtime_checkable
class LayerWise(Protocol):
    """Finds a layer's weights anew.

    Attributes:
        name: What the command line calls it.
        reads_pruned: Whether a layer is told what the pruned network feeds it, or what the unpruned
            one does. With the former, what a layer makes has to make up for what was lost before.

    One that has a number ``turns`` is asked again so often where a layer's result is clipped, with
    the errors that the clip hides by then wanted as they are.
    """

    name: ClassVar[str]
    reads_pruned: ClassVar[bool]

    def solve(self, sums: Sums) -> Tensor:
        """Return the weights, ``[groups, outputs, columns + 1]``, zero where columns are gone."""
        ...


def solved(method: LayerWise, sums: Sums) -> Tensor:
    """Return the weights that a compensation finds.

    Raises:
        PlanError: They are not as many as before, or not finite; or it fails.
    """
    with users_code(f"the compensation {method.name!r} failed", PlanError):
        found = method.solve(sums)
    if not isinstance(found, Tensor) or found.shape != sums.now.shape:
        given = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise PlanError(
            f"the compensation {method.name!r} gives weights of {given} for a layer of "
            f"{list(sums.now.shape)}",
            why="it finds the weights anew, [groups, outputs, columns + 1]",
        )
    refuse_infinite(method.name, found)
    return found


def refuse_infinite(name: str, weights: Tensor) -> None:
    """Raise `PlanError` where a compensation gives weights that are not finite."""
    if not weights.isfinite().all():
        raise PlanError(
            f"the compensation {name!r} gives weights that are not finite",
            why="a network with them computes nothing",
            hint="more data, or method='least-squares'",
        )


@dataclass(frozen=True, eq=False)
class Task:
    """A network of which some is gone.

    Attributes:
        program: The program as captured, its norms apart.
        base: The same prepared: norms folded, a bias in every layer.
        begun: ``base`` with the weights that the masks leave.
        plan: What is left of it.
        reads: The reads of ``base``.
        left: What is left of every layer.
        there: Per read whether it is there.
        batches: Flat inputs of at most some examples each; none where there are no data.
        outputs: How outputs are compared: ``logits``, ``values`` or ``auto``.
        progress: Told what is done, how far it is and of how much.
        cuttable: Whether Ctrl-C may end steps early, and what they led to so far is the result. Off
            where a network is one of many, and Ctrl-C is for whoever asked for all.
    """

    program: Program
    base: Program
    begun: Program
    plan: ChannelPlan
    reads: Reads
    left: Left
    there: Bools
    batches: Sequence[Sequence[Any]]
    outputs: str = "auto"
    progress: Progress | None = None
    cuttable: bool = True

    def tell(self, what: str, done: int, total: int) -> None:
        """Say what is done, how far it is and of how much."""
        if self.progress is not None:
            self.progress(what, done, total)


@runtime_checkable
class Whole(Protocol):
    """Finds the weights of a whole network anew.

    Attributes:
        name: What the command line calls it.
        needs_data: Whether it goes by data; else by the weights alone.

    One that ends by the clock says so by an attribute ``clocked`` that is true: what it finds is
    not kept for a later run.
    """

    name: ClassVar[str]
    needs_data: ClassVar[bool]

    def made(self, task: Task) -> tuple[Program, list[Note]]:
        """Return ``task.base`` with other weights, and what there is to say of them.

        They are zero where something is gone.
        """
        ...


Compensation = LayerWise | Whole


__all__ = [
    "Compensation", "LayerWise", "Progress", "Sums", "Task", "Whole", "refuse_infinite", "solved",
]  # fmt: skip
