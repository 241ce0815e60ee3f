"""`Setting`: what a plan is made for, as everything that chooses channels is told it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from narrows.executors.base import Executor
from narrows.ir.costs import Costs
from narrows.ir.program import Program
from narrows.passes.choosing.repair import Progress
from narrows.passes.choosing.statistics import Batch
from narrows.passes.plans.options import Choosing
from narrows.passes.plans.plan import ChannelPlan
from narrows.passes.plans.rank import Options
from narrows.passes.quant.batches import CHOOSING, as_inputs, with_items, without_extras

# The time of a program where it really runs, over the unpruned one's, in so many bits or in floats.
Clock = Callable[[Program, int | None], float]


@dataclass(frozen=True, eq=False)
class Setting:
    """What a plan is made for.

    Attributes:
        program: The program as captured.
        given: The masks that were given; their layers are left alone.
        plan: They, and what is zero anyway.
        options: The criterion, which layers may lose channels, and how many stay at least.
        choosing: The options as they were given.
        costs: The target's cost table, or ``None``.
        clock: What runs a program on the target and tells the share of the unpruned one's seconds,
            or ``None``.
        progress: Told what is done, how far it is and of how much.
        parts: The data as flat inputs, once they are there: where a plan is made by what the
            outputs lose.
        executor: Where plans are tried that do not hang on one another; here unless given.
    """

    program: Program
    given: ChannelPlan
    plan: ChannelPlan
    options: Options
    choosing: Choosing
    costs: Costs | None = None
    clock: Clock | None = None
    progress: Progress | None = None
    parts: tuple[Batch, ...] | None = None
    executor: Executor | None = None

    @property
    def examples(self) -> int:
        """For how many examples costs are asked."""
        return self.choosing.batch or 1

    def batches(self) -> list[Batch]:
        """Return the data as flat inputs, batch by batch; it is streamed once."""
        if self.parts is not None:
            return [*self.parts]
        # Beside a loss the data may hold labels, which are no inputs.
        labels = self.choosing.loss is not None
        split = without_extras(self.program) if labels else as_inputs
        items = with_items(self.program, self.choosing.data, "choosing", split, CHOOSING)
        return [flat for flat, _ in items]

    def tell(self, what: str, done: int, total: int) -> None:
        """Say how far it is, if anybody asked."""
        if self.progress is not None:
            self.progress(what, done, total)


__all__ = ["Clock", "Setting"]
