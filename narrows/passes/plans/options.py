"""`Choosing`: the options of `narrows.plan`; torch is not imported."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from narrows.errors import PlanUsageError
from narrows.options import option, several, whole
from narrows.passes.plans.within import Ratio, Within, is_number, read_ratios, refuse_no_whole

if TYPE_CHECKING:
    from narrows.ir.costs import Costs

SIDES = ("input", "output", "both")
SCOPES = ("local", "global")


@dataclass(frozen=True)
class Choosing(Within):
    """How channels are chosen.

    Attributes:
        zeros: Whether to take channels whose weights are zero, and such whose contribution is zero
            already. They change nothing that the program computes.
        criterion: How channels are scored: ``l1``, ``random{seed=3}`` or another of
            ``narrows criteria``. In Python also a `Criterion`, or a function
            ``(program, layer, side) -> scores``.
        data: Inputs like the real ones, for a criterion that goes by them: an iterable of batches,
            streamed once. On the command line it is a ``.npy`` file, or ``.npz`` with an array per
            input.
        loss: What a criterion takes gradients of, in place of a probe of the network's own outputs:
            a function ``(outputs, batch) -> number``. A tuple or a dict of the data may then hold
            more than inputs, such as labels.
        ratio: The share of channels to remove, 0 to 1; for the weights of a name where there is a
            glob. It is rounded down. Of several globs the first that matches counts:
            ``{"layer4.*": 0.7, "*": 0.5}``.
        evaluate: What a program is worth, in points, for ``accuracy_drop``: a function that is
            given a program, which is called as the model is, and returns a number; more is better.
        costs: A cost table to predict by in place of the target's own, or its file. With a ratio,
            channels are kept after all that a target of these costs has a place for anyway
            (`narrows.passes.plans.take_back.take_back`).
        batch: The number of examples that costs are asked for, 1 unless given.
        constrained: Whether to remove whole couplings, or else let each layer choose for itself. A
            coupling goes by the sum of a channel's scores in every weight that makes or reads it,
            averaged over those weights, so that no tensor has to be copied.
        side: Unconstrained: which of its own channels each layer chooses among, ``input`` unless
            given. The model's own inputs and outputs are left alone.
        scope: Whether scores are compared by layer, ``local``, or overall, ``global``. The first
            takes the ratio from every coupling or layer; the second ranks the channels of all of
            them together, or of all that one glob gives its ratio. Scores are divided by the mean
            of their coupling or layer, unless the criterion's compare as they are.
        include: Globs on weight names: only layers of these names. Constrained, only couplings that
            one of these weights makes.
        exclude: Globs on weight names: no layer, and no coupling with a layer, of these names.
        min_width: How many channels to leave at least. With 1, and where channels are chosen by
            what the outputs lose, a branch that another path goes around may still go whole.
    """

    zeros: bool = option(True)
    criterion: Any = option("l1", metavar="NAME")
    data: Any = option(None, metavar="FILE")
    loss: Any = option(None, name="criterion-loss", metavar="MODULE:FUNCTION")
    ratio: Ratio | None = option(None, metavar="R|GLOB=R", many=True, read=read_ratios)
    evaluate: Any = option(None, metavar="MODULE:FUNCTION")
    costs: Costs | str | os.PathLike[str] | None = option(None, metavar="FILE")
    batch: int | None = option(None, metavar="N", read=whole)
    constrained: bool = option(True)
    side: str | None = option(None, choices=SIDES)
    scope: str = option("local", choices=SCOPES)
    include: str | Sequence[str] = option((), metavar="GLOB", many=True, read=several)
    exclude: str | Sequence[str] = option((), metavar="GLOB", many=True, read=several)
    min_width: int = option(1, metavar="N", read=whole)

    @property
    def by_losses(self) -> bool:
        """Whether channels are chosen by what the outputs lose: with data, but no criterion."""
        return bool(self.budgets) and self.data is not None and self.criterion == "l1"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("costs", self.costs), ("batch", self.batch)):
            others = [b for b in self.budgets if b not in ("macs", "params")]
            if value is not None and self.ratio is None and not others:
                why = f"{name} has no effect without a latency or a ratio"
                raise PlanUsageError(why, hint="latency=0.8")
        for name, value in (("batch", self.batch), ("min_width", self.min_width)):
            if value is not None:
                refuse_no_whole(name, value, 1)
        if self.scope not in SCOPES:
            raise PlanUsageError(f"scope is 'local' or 'global', got {self.scope!r}")
        self._check_ratio()
        if self.budgets:
            self._check_budget()
        self._check_evaluate()
        self._check_side()
        if self.ratio is None and not self.budgets:
            self._refuse_idle()

    def _check_ratio(self) -> None:
        """Raise unless ratios are shares, and nothing else says how much goes."""
        ratios: Mapping[str, Any] = self.ratio if isinstance(self.ratio, Mapping) else {}
        if self.ratio is not None and not isinstance(self.ratio, Mapping):
            ratios = {"*": self.ratio}
        for glob, value in ratios.items():
            if not is_number(value) or not 0 <= value <= 1:
                what = f"a ratio is a share from 0 to 1, got {value!r}"
                raise PlanUsageError(what, where=repr(glob))
        if self.ratio is not None and self.budgets:
            raise PlanUsageError(
                f"ratio and {' and '.join(self.budgets)} exclude each other",
                why="each of them alone says how much goes",
                hint="leave the ratio out",
            )

    def _check_budget(self) -> None:
        """Raise for an option that has no effect with a budget."""
        if self.loss is not None and self.by_losses:
            raise PlanUsageError(
                "loss has no effect without a criterion",
                why="with data alone, channels are chosen by how far the outputs go from their own",
                hint="criterion='taylor'",
            )
        for name, idle in (
            ("scope", self.scope == "global"),
            ("side", self.side not in (None, "input")),
        ):
            if idle:
                why = "a budget compares what all layers read"
                raise PlanUsageError(f"{name} has no effect with a budget", why=why)

    def _check_evaluate(self) -> None:
        """Raise for a function that is none, or that no budget asks."""
        if self.evaluate is None:
            return
        if "accuracy_drop" not in self.budgets:
            raise PlanUsageError(
                "evaluate has no effect without accuracy_drop",
                why="it says what a program is worth",
                hint="accuracy_drop=0.5",
            )
        if not callable(self.evaluate) and not isinstance(self.evaluate, str):
            raise PlanUsageError(f"evaluate is a function of a program, got {self.evaluate!r:.60}")

    def _check_side(self) -> None:
        """Raise for a side that is none, or that nothing asks for."""
        if self.side is not None and self.side not in SIDES:
            raise PlanUsageError(f"side is one of {', '.join(SIDES)}, got {self.side!r}")
        if self.side is not None and self.constrained:
            raise PlanUsageError(
                f"side={self.side!r} has no effect",
                why="a coupling goes with all that makes and reads it",
                hint="constrained=False ranks one side of each layer",
            )

    def _refuse_idle(self) -> None:
        """Raise for an option that does nothing without a ratio or a latency."""
        given = {
            "data": self.data is not None, "loss": self.loss is not None,
            "include": self.include, "exclude": self.exclude, "side": self.side,
            "scope": self.scope == "global", "min_width": self.min_width > 1,
            "outputs": self.outputs != "auto",
        }  # fmt: skip
        for name, value in given.items():
            if value:
                why = f"{name} has no effect without a ratio or a latency"
                raise PlanUsageError(why, hint="ratio=0.5")
