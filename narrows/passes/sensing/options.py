"""`Sensing`: the options of `narrows.sense`; torch is not imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from narrows.errors import PlanUsageError
from narrows.options import check_truths, number, option, whole
from narrows.passes.plans.within import OUTPUTS

RATIOS = (0.25, 0.5, 0.75)
BITS = range(2, 9)


def _numbers(texts: list[str], flag: str) -> tuple[float, ...]:
    return tuple(number(text, flag) for text in texts)


def _wholes(texts: list[str], flag: str) -> tuple[int, ...]:
    return tuple(whole(text, flag) for text in texts)


@dataclass(frozen=True)
class Sensing:
    """Which changes are tried, one at a time.

    Attributes:
        ratios: Which shares of the channels go, above 0 and below 1: of one coupling, or of what
            one layer reads, those that the criterion scores lowest. None may be given.
        criterion: How channels are scored, as for a plan.
        constrained: Whether whole couplings lose channels, or else what each layer reads.
        repair: How the weights that are left make up for it: ``least-squares`` or another of
            ``narrows compensations``. They are found on one half of the data, and what the outputs
            lose is measured on the other. Nothing makes up for it unless given.
        bits: In how many bits one weight, or one activation, is held while all else stays
            floating-point, 2 to 8. None are tried unless given.
        outputs: What the outputs are: ``logits``, ``values`` or ``auto``, as for a plan.
    """

    ratios: tuple[float, ...] = option(RATIOS, metavar="R", rest=True, read=_numbers)
    criterion: Any = option("l1", metavar="NAME")
    constrained: bool = option(True)
    repair: Any = option(None, metavar="METHOD")
    bits: tuple[int, ...] = option((), metavar="N", rest=True, read=_wholes)
    outputs: str = option("auto", choices=OUTPUTS)

    def __post_init__(self) -> None:
        check_truths(self, PlanUsageError)
        for name in ("ratios", "bits"):
            given = getattr(self, name)
            if not isinstance(given, tuple | list | range):
                given = (given,)
            object.__setattr__(self, name, tuple(dict.fromkeys(given)))
        for ratio in self.ratios:
            if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < 1:
                raise PlanUsageError(f"a ratio lies above 0 and below 1, got {ratio!r}")
        for bits in self.bits:
            if isinstance(bits, bool) or not isinstance(bits, int) or bits not in BITS:
                raise PlanUsageError(f"bits are {BITS[0]} to {BITS[-1]}, got {bits!r}")
        if self.outputs not in OUTPUTS:
            raise PlanUsageError(f"outputs is one of {', '.join(OUTPUTS)}, got {self.outputs!r}")
        if not self.ratios and not self.bits:
            raise PlanUsageError("there is nothing to try", hint="ratios=(0.25, 0.5), or bits=(4,)")
        idle = {
            "criterion": self.criterion != "l1", "constrained": not self.constrained,
            "repair": self.repair is not None,
        }  # fmt: skip
        for name in (n for n, given in idle.items() if given and not self.ratios):
            why = "it is about channels that go, and none do"
            raise PlanUsageError(f"{name} has no effect without ratios", why=why)
