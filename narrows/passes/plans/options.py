"""`Choosing`: the options of `narrows.plan`; torch is not imported."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from narrows.errors import PlanUsageError, UsageError
from narrows.options import check_truths, number, option, per_glob, several, whole

if TYPE_CHECKING:
    from narrows.ir.costs import Costs

Ratio = float | Mapping[str, float]

SIDES = ("input", "output", "both")
SCOPES = ("local", "global")
OUTPUTS = ("auto", "logits", "values")
BUDGETS = ("macs", "params", "latency")  # those that have an option of their own


def _ratios(texts: list[str], flag: str) -> Ratio:
    return per_glob(texts, flag, float, "0.5")


def _limits(texts: list[str], flag: str) -> dict[str, Ratio]:
    """Return per budget its share; ``NAME:GROUP=SHARE`` is for one group."""
    found: dict[str, Any] = {}
    for text in texts:
        label, equals, value = text.rpartition("=")
        name, _, group = label.partition(":")
        if not equals or (name in found and not (group and isinstance(found[name], dict))):
            what = f"{flag} {text}: there is one for {name!r} already" if equals else ""
            raise UsageError(
                what or f"{flag} {text}: it names no budget",
                hint=f"{flag} memory=0.8, or {flag} memory:body=0.8",
            )
        share = number(value, flag)
        if group:
            found.setdefault(name, {})[group] = share
        else:
            found[name] = share
    return found


def _groups(texts: list[str], flag: str) -> dict[str, list[str]]:
    """Return per group its globs."""
    found: dict[str, list[str]] = {}
    for text in texts:
        name, equals, glob = text.partition("=")
        if not equals:
            raise UsageError(f"{flag} {text}: it names no group", hint=f"{flag} body=layer1.*")
        found.setdefault(name, []).append(glob)
    return found


@dataclass(frozen=True)
class Choosing:
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
        latency: In place of a ratio: keep as much as a latency of at most this share of the
            unpruned program's allows, above 0 and up to 1. Both are what the target's costs
            predict. Whole couplings lose channels, so that as much score mass stays as can; see
            `narrows.passes.plans.latency`.
        macs: In place of a ratio: the share of the multiply-accumulates of all layers with weights
            that may be left, above 0 and up to 1; for the layers of a group, or of a glob, where
            there is a dict of them. With data and no other criterion than the default the channels
            are chosen by what the network's own outputs lose (`narrows.passes.choosing.search`), as
            they are with a latency then; else by the criterion, over the whole network.
        params: The same of the weights of the layers that multiply; tables that are looked up in do
            not count. Several budgets are all met.
        limits: Any budgets of ``narrows budgets`` by name, ``{"channels": 0.8}``, beside these.
        groups: Layers by a name that budgets may be given for, as globs on weight names:
            ``{"body": ["layer1.*", "layer2.*"]}``.
        allocator: What says how many channels each layer or coupling keeps within the budgets, one
            of ``narrows allocators``; which one that is unless given depends on the budgets and the
            data.
        outputs: With data, what the outputs are where they are compared or probed: ``logits``,
            which are compared as class probabilities, with classes along axis 1 of maps (four axes
            or more) and else along the last; ``values``; or ``auto``: matrices of several columns
            are logits, or probabilities where their rows add up to one, and all else is values.
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
    ratio: Ratio | None = option(None, metavar="R|GLOB=R", many=True, read=_ratios)
    latency: float | None = option(None, metavar="L", read=number)
    macs: Ratio | None = option(None, metavar="M|GROUP=M", many=True, read=_ratios)
    params: Ratio | None = option(None, metavar="P|GROUP=P", many=True, read=_ratios)
    limits: Mapping[str, Ratio] | None = option(
        None, name="limit", metavar="BUDGET=SHARE", many=True, read=_limits
    )
    groups: Mapping[str, str | Sequence[str]] | None = option(
        None, name="group", metavar="NAME=GLOB", many=True, read=_groups
    )
    allocator: Any = option(None, metavar="NAME")
    outputs: str = option("auto", choices=OUTPUTS)
    costs: Costs | str | os.PathLike[str] | None = option(None, metavar="FILE")
    batch: int | None = option(None, metavar="N", read=whole)
    constrained: bool = option(True)
    side: str | None = option(None, choices=SIDES)
    scope: str = option("local", choices=SCOPES)
    include: str | Sequence[str] = option((), metavar="GLOB", many=True, read=several)
    exclude: str | Sequence[str] = option((), metavar="GLOB", many=True, read=several)
    min_width: int = option(1, metavar="N", read=whole)

    @property
    def budgets(self) -> dict[str, Ratio]:
        """The budgets that are given, by name."""
        own = {name: getattr(self, name) for name in BUDGETS}
        return {**{n: v for n, v in own.items() if v is not None}, **(self.limits or {})}

    @property
    def by_losses(self) -> bool:
        """Whether channels are chosen by what the outputs lose: with data, but no criterion."""
        return bool(self.budgets) and self.data is not None and self.criterion == "l1"

    def __post_init__(self) -> None:
        check_truths(self, PlanUsageError)
        for name, value in (("costs", self.costs), ("batch", self.batch)):
            idle = self.latency is None and self.ratio is None and not self.limits
            if value is not None and idle:
                why = f"{name} has no effect without a latency or a ratio"
                raise PlanUsageError(why, hint="latency=0.8")
        for name, value in (("batch", self.batch), ("min_width", self.min_width)):
            if value is not None and not _counts(value):
                raise PlanUsageError(f"{name} is a whole number of at least 1, got {value!r}")
        if self.scope not in SCOPES:
            raise PlanUsageError(f"scope is 'local' or 'global', got {self.scope!r}")
        if self.outputs not in OUTPUTS:
            raise PlanUsageError(f"outputs is one of {', '.join(OUTPUTS)}, got {self.outputs!r}")
        self._check_aims()
        self._check_side()
        if self.ratio is None and not self.budgets:
            self._refuse_idle()

    def _check_aims(self) -> None:
        """Raise unless ratio and latency are shares, and at most one of them is given."""
        ratios: Mapping[str, Any] = self.ratio if isinstance(self.ratio, Mapping) else {}
        if self.ratio is not None and not isinstance(self.ratio, Mapping):
            ratios = {"*": self.ratio}
        for glob, value in ratios.items():
            if not _is_number(value) or not 0 <= value <= 1:
                what = f"a ratio is a share from 0 to 1, got {value!r}"
                raise PlanUsageError(what, where=repr(glob))
        if self.ratio is not None and self.budgets:
            raise PlanUsageError(
                f"ratio and {' and '.join(self.budgets)} exclude each other",
                why="each of them alone says how much goes",
                hint="leave the ratio out",
            )
        self._check_limits()
        if self.loss is not None and self.by_losses:
            raise PlanUsageError(
                "loss has no effect without a criterion",
                why="with data alone, channels are chosen by how far the outputs go from their own",
                hint="criterion='taylor'",
            )
        if self.budgets:
            self._check_budget()
        if self.latency is None:
            return
        if not self.constrained:
            raise PlanUsageError(
                "a latency takes whole couplings",
                why="layers that choose for themselves make copies, which cost time",
                hint="leave out constrained=False",
            )
        if self.scope == "global":
            why = "a latency compares the channels of all couplings anyway"
            raise PlanUsageError("scope has no effect with a latency", why=why)

    def _check_limits(self) -> None:
        """Raise unless budgets are shares, those with groups dicts, and each is given once."""
        for name in BUDGETS:
            value = getattr(self, name)
            for share in value.values() if isinstance(value, Mapping) else (value,):
                if share is not None and (not _is_number(share) or not 0 < share <= 1):
                    are = "a latency is" if name == "latency" else f"{name} are"
                    raise PlanUsageError(
                        f"{are} above 0 and up to 1, got {share!r}",
                        why="it is relative to the unpruned program's",
                    )
        for name in ("limits", "groups"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Mapping):
                raise PlanUsageError(
                    f"{name} is a dict by name, got {value!r:.60}",
                    hint='limits={"channels": 0.8}, groups={"body": "layer1.*"}',
                )
        for name in BUDGETS:
            if getattr(self, name) is not None and name in (self.limits or ()):
                raise PlanUsageError(f"{name} is given twice: as an option, and in limits")
        for name in ("groups", "allocator"):
            if getattr(self, name) is not None and not self.budgets:
                raise PlanUsageError(f"{name} has no effect without a budget", hint="macs=0.7")

    def _check_budget(self) -> None:
        """Raise for an option that has no effect with a budget."""
        for name, idle in (
            ("scope", self.scope == "global" and self.latency is None),
            ("side", self.side not in (None, "input")),
        ):
            if idle:
                why = "a budget compares what all layers read"
                raise PlanUsageError(f"{name} has no effect with a budget", why=why)

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


def _counts(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
