"""`Within`: the budgets that a plan has to meet, as options; torch is not imported."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from narrows.errors import PlanUsageError, UsageError
from narrows.options import check_truths, number, option, per_glob

Ratio = float | Mapping[str, float]

OUTPUTS = ("auto", "logits", "values")
SHARES = ("macs", "params", "latency")  # budgets with an option of their own: shares of the whole
LOSSES = {"accuracy_drop": 100.0, "divergence": math.inf}  # those of what is lost: at most how much


def read_ratios(texts: list[str], flag: str) -> Ratio:
    """Return a share, or one per glob."""
    return per_glob(texts, flag, float, "0.5")


def _limits(texts: list[str], flag: str) -> dict[str, Ratio]:
    """Return per budget its share; ``NAME:GROUP=SHARE`` is for one group."""
    found: dict[str, Any] = {}
    for text in texts:
        label, equals, value = text.rpartition("=")
        name, _, group = label.partition(":")
        known = found.get(name)
        apart = known is None or (group and isinstance(known, dict) and group not in known)
        if not equals or not apart:
            what = f"{flag} {text}: there is one for {label!r} already" if equals else ""
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
class Within:
    """How small a program has to be, and what it may lose.

    Attributes:
        macs: The share of the multiply-accumulates of all layers with weights that may be left,
            above 0 and up to 1; for the layers of a group, or of a glob, where there is a dict of
            them. With data and no other criterion than the default the channels are chosen by what
            the network's own outputs lose (`narrows.passes.choosing.search`), as they are with any
            budget then; else by the criterion, over the whole network.
        params: The same of the weights of the layers that multiply; tables that are looked up in do
            not count. Several budgets are all met.
        latency: The share of the unpruned program's latency that may be left, above 0 and up to 1.
            Both are what the target's costs predict. Whole couplings lose channels, so that as much
            score mass stays as can; see `narrows.passes.plans.latency`.
        accuracy_drop: How many points may be lost: of ``evaluate`` where there is one, else of the
            share of a quarter of the data, in percent, that is given the class that the unpruned
            network gives. Where no other budget says how small the program has to be, as much goes
            as this allows. With data, the weights that are left make up for what is gone first.
        divergence: The same of how far the outputs are from the unpruned network's own on a quarter
            of the data, in nats an example.
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
    """

    macs: Ratio | None = option(None, metavar="M|GROUP=M", many=True, read=read_ratios)
    params: Ratio | None = option(None, metavar="P|GROUP=P", many=True, read=read_ratios)
    latency: float | None = option(None, metavar="L", read=number)
    accuracy_drop: float | None = option(None, metavar="POINTS", read=number)
    divergence: float | None = option(None, metavar="NATS", read=number)
    limits: Mapping[str, Ratio] | None = option(
        None, name="limit", metavar="BUDGET=SHARE", many=True, read=_limits
    )
    groups: Mapping[str, str | Sequence[str]] | None = option(
        None, name="group", metavar="NAME=GLOB", many=True, read=_groups
    )
    allocator: Any = option(None, metavar="NAME")
    outputs: str = option("auto", choices=OUTPUTS)

    @property
    def budgets(self) -> dict[str, Ratio]:
        """The budgets that are given, by name."""
        own = {name: getattr(self, name) for name in (*SHARES, *LOSSES)}
        return {**{n: v for n, v in own.items() if v is not None}, **(self.limits or {})}

    def __post_init__(self) -> None:
        check_truths(self, PlanUsageError)
        if self.outputs not in OUTPUTS:
            raise PlanUsageError(f"outputs is one of {', '.join(OUTPUTS)}, got {self.outputs!r}")
        for name in SHARES:
            if getattr(self, name) is not None:
                refuse_no_share(name, getattr(self, name))
        for name, most in LOSSES.items():
            if getattr(self, name) is not None:
                refuse_no_loss(name, getattr(self, name), most)
        for name in ("limits", "groups"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Mapping):
                raise PlanUsageError(
                    f"{name} is a dict by name, got {value!r:.60}",
                    hint='limits={"channels": 0.8}, groups={"body": "layer1.*"}',
                )
        for name in (*SHARES, *LOSSES):
            if getattr(self, name) is not None and name in (self.limits or ()):
                raise PlanUsageError(f"{name} is given twice: as an option, and in limits")
        for name in ("groups", "allocator"):
            if getattr(self, name) is not None and not self.budgets:
                raise PlanUsageError(f"{name} has no effect without a budget", hint="macs=0.7")


def is_number(value: Any) -> bool:
    """Whether an option is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def refuse_no_whole(name: str, value: Any, least: int = 0) -> None:
    """Raise `PlanUsageError` unless an option is a whole number, and not below the least."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise PlanUsageError(f"{name} is a whole number of at least {least}, got {value!r}")


def refuse_no_share(name: str, given: Any) -> None:
    """Raise `PlanUsageError` unless a budget is a share, or a dict of shares by layers."""
    if isinstance(given, Mapping) and not given:
        raise PlanUsageError(
            f"{name} says of no layers what may be left",
            hint=f"{name}=0.7, or {name}={{'layer4.*': 0.7}}",
        )
    for share in given.values() if isinstance(given, Mapping) else (given,):
        if not is_number(share) or not 0 < share <= 1:
            raise PlanUsageError(
                f"a budget of {name} is above 0 and up to 1, got {share!r}",
                why="it is relative to the unpruned program's",
            )


def refuse_no_loss(name: str, given: Any, most: float) -> None:
    """Raise `PlanUsageError` unless a budget is how much may be lost.

    Args:
        name: The budget's name.
        given: What was given.
        most: The most that there is to lose.
    """
    if not is_number(given) or not 0 <= given <= most or math.isinf(given):
        upward = f"from 0 to {most:g}" if math.isfinite(most) else "of at least 0"
        raise PlanUsageError(
            f"a budget of {name} is a number {upward}, got {given!r}",
            why="it is how much may be lost of the whole program",
        )


__all__ = [
    "LOSSES", "OUTPUTS", "SHARES", "Ratio", "Within", "is_number", "read_ratios", "refuse_no_loss",
    "refuse_no_share", "refuse_no_whole",
]  # fmt: skip
