"""`Quantization` and `WeightOnly`: the options of `narrows.quantize` and `quantize_weights`.

torch is not imported, so that the command line can read them.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from narrows.errors import UsageError
from narrows.ir.integer.grid import (
    ACTIVATION_BITS,
    BITS,
    ROUNDINGS,
    WeightGrid,
    check_groups,
    check_rounding,
)
from narrows.options import (
    check_truths,
    globs,
    number,
    option,
    per_glob,
    several,
    whole,
    whole_or_text,
)
from narrows.passes.quant.learning import LOSSES, Learning

AUTO = "auto"
METHODS = (AUTO, "mse", "minmax", "percentile", "rapq")
FLOAT = "float"
LEVEL_BITS = 5  # at most where levels are chosen: with more, their steps are a code or two
PERCENTILE = 99.99

LEARNED = ("budget", "checkpoint", "loss", "seed")  # the options of rapq alone
AXES = {"input": (1,), "output": (0,), "auto": (1, 0)}  # along which groups of weights lie
ROUNDED = ("nearest", "gptq")  # how weights alone are
MULTIPLIED = ("float", "dynamic")  # by what
SHARED_GROUPS = (16, 32, 64, 128, 256)  # of weights and of what they multiply

Bits = int | Mapping[str, int]
Codings = int | str | Mapping[str, int | str]


def _bits(texts: list[str], flag: str) -> Bits:
    return _rest(per_glob(texts, flag, int, "8"))


def _codings(texts: list[str], flag: str) -> Codings:
    def coding(text: str) -> int | str:
        return text if text.startswith("pot") else int(text)

    return _rest(per_glob(texts, flag, coding, "8"))


def _rest(asked: Any) -> Any:
    """Return bits per glob with those of the rest, where nothing is said of them."""
    return {**asked, "*": asked.get("*", 8)} if isinstance(asked, Mapping) else asked


def _outer(text: str, flag: str) -> int | str | None:
    if text in ("none", FLOAT):
        return None if text == "none" else text
    return whole(text, flag)


@dataclass(frozen=True)
class Quantization:
    """How a program becomes integers.

    Attributes:
        weights: Bits of the weights, 2 to 8, or ``pot4`` or ``pot4x2``: powers of two, or sums of
            two; for those of a name where there is a glob. Globs are held against node names,
            module paths and weight names, and the first match counts: ``{"head": 8, "*": 4}``.
            ``pot4`` are signed powers of two, in 4 bits a sign and an exponent; ``pot4x2`` are sums
            of two of them. They are shifts where a target has no multiplier, else int8 like others.
        activations: Bits of the activations, 2 to 16; for those of a name where there is a glob.
            With more than 8, as ``{"head*": 16, "*": 8}`` asks for some, they are stored in int16.
        method: How exponents are chosen; ``rapq`` learns the rounding of the weights, too. ``mse``
            takes the smallest squared error, ``minmax`` covers all that was seen, ``percentile``
            most of it. ``auto`` takes the one of these that changes the outputs least on samples
            that are held back; where none holds, tensors with channels far larger than the others
            get 16 bits, if that helps. A note says what was tried, and warns. ``rapq`` goes block
            by block, by what the network computes; the calibration data stays in memory, and it
            runs on CUDA where there is one.
        percentile: For ``percentile``: the share of the magnitudes that is covered, in percent.
        first_last: At least this many bits for the first and the last layers; or ``float``, which
            leaves them floating-point. The bits hold for what these layers read, too, for the
            outputs, and for what no multiplication is saved by: a layer with one weight a channel,
            activations that are only added, averaged, gated or scaled channel by channel. ``None``
            makes no exception of them.
        skip: Globs of what stays floating-point.
        rounding: How shifts settle ties.
        align: Whether concatenated tensors share a grid, so that joining them computes nothing.
        equalize: Whether powers of two move between layers that follow each other through ReLU, to
            balance their channels' ranges. The float network stays the same bit for bit.
        correct_bias: Whether the mean error of rounded weights is taken from the biases.
        strict: Whether an operator without an integer form is an error, not a float island.
        levels: Whether activations of 5 bits and fewer may be cut into levels of unequal width.
            They are where that lowers the errors of block and outputs; the calibration data stays
            in memory.
        allow_lost: Whether a part of a concatenation may become one number beside larger ones.
        budget: For ``rapq``: iterations in all, 500 a block unless given, or a time: 600s, 10m, 2h.
        checkpoint: For ``rapq``: a file written after every block; the same call goes on from it.
        loss: For ``rapq``: the error that counts, ``l2`` unless given. ``norm`` is ``L_p`` with a
            ``p`` from 1 to 3 by the gains of each block's last batch norm.
        seed: For ``rapq``: what chance comes from, 0 unless given.
    """

    weights: Codings = option(8, name="weight-bits", metavar="N|GLOB=N", many=True, read=_codings)
    activations: Bits = option(8, name="activation-bits", metavar="N|GLOB=N", many=True, read=_bits)
    method: str = option(AUTO, choices=METHODS)
    percentile: float = option(PERCENTILE, metavar="P", read=number)
    first_last: int | str | None = option(8, metavar="N|float|none", read=_outer)
    skip: tuple[str, ...] = option((), metavar="GLOB", many=True, read=several)
    rounding: str = option("half_even", choices=ROUNDINGS)
    align: bool = option(True)
    equalize: bool = option(False)
    correct_bias: bool = option(True)
    strict: bool = option(False)
    levels: bool = option(False)
    allow_lost: bool = option(False)
    budget: int | str | None = option(None, metavar="N|TIME", read=whole_or_text)
    checkpoint: str | os.PathLike[str] | None = option(None, metavar="FILE")
    loss: str | None = option(None, choices=LOSSES)
    seed: int | None = option(None, metavar="N", read=whole)

    def __post_init__(self) -> None:
        object.__setattr__(self, "skip", _globs(self.skip))
        check_truths(self)
        check_rounding(self.rounding)
        if self.method not in METHODS:
            raise UsageError(f"method is {', '.join(METHODS)}, got {self.method!r}")
        counts = isinstance(self.percentile, int | float) and self.percentile is not True
        if not counts or not 0 < self.percentile <= 100:
            raise UsageError(f"percentile lies above 0 and up to 100, got {self.percentile!r}")
        if self.percentile != PERCENTILE and self.method != "percentile":
            raise UsageError(
                f"percentile is an option of method='percentile', not of {self.method!r}"
            )
        self._check_bits()
        self.learning  # noqa: B018  (refuses what cannot be learned by)

    def _check_bits(self) -> None:
        """Raise unless bits are such that codes can have, and fit the other options."""
        for what in ("weights", "activations"):
            given = getattr(self, what)
            for bits in given.values() if isinstance(given, Mapping) else (given,):
                if isinstance(bits, str) and what == "weights":
                    check_coding(bits)
                else:
                    check_bits(what, bits, ACTIVATION_BITS if what == "activations" else BITS)
        if self.first_last not in (None, FLOAT):
            check_bits("first_last", self.first_last)
        least = self.activations if isinstance(self.activations, int) else BITS[0]
        if self.levels and least > LEVEL_BITS:
            raise UsageError(
                f"levels of unequal width are for activations of {LEVEL_BITS} bits and fewer",
                why="their thresholds lie between codes of 8 bits",
                hint="activations=4",
            )
        codings = self.weights.values() if isinstance(self.weights, Mapping) else (self.weights,)
        named = [coding for coding in codings if isinstance(coding, str)]
        if named and self.method == "rapq":
            raise UsageError(
                f"rapq does not learn weights of the coding {named[0]!r}",
                why="it rounds to one of the two whole numbers next to a weight",
                hint="method='mse', or a number of bits",
            )

    @property
    def learning(self) -> Learning | None:
        """How ``rapq`` learns; ``None`` for a method that does not."""
        given = {name: getattr(self, name) for name in LEARNED if getattr(self, name) is not None}
        if self.method == "rapq":
            return Learning(**given)
        for name in given:
            raise UsageError(
                f"{name} is an option of method='rapq', not of {self.method!r}",
                why="the other methods learn nothing",
            )
        return None

    @property
    def outer(self) -> int:
        """At least how many bits ``first_last`` asks for."""
        return self.first_last if isinstance(self.first_last, int) else BITS[0]

    def unlearned(self, **changes: Any) -> Quantization:
        """Return these options without those of learning, and with some changed."""
        return dataclasses.replace(self, **dict.fromkeys(LEARNED), **changes)

    def refuse_idle(self, used: Collection[str]) -> None:
        """Raise `UsageError` for an option that a plan leaves nothing to say about.

        Args:
            used: Those that count beside the plan.
        """
        for f in dataclasses.fields(self):
            if f.name not in used and getattr(self, f.name) != f.default:
                raise UsageError(
                    f"{f.name} would have no effect beside a plan",
                    why="the plan says which grids there are, and how they were chosen",
                    hint=f"leave out {f.name}, or the plan to choose grids anew",
                )


@dataclass(frozen=True)
class WeightOnly:
    """How the weights of linear layers become codes, while all else stays floating-point.

    Attributes:
        bits: Bits of a code, 2 to 8.
        group: How many weights share a scale and a zero point.
        groups: Along which axis the weights of a group lie: those of one output channel, ``input``,
            or of one input channel, ``output``. ``auto`` takes for every layer the one of the
            smaller error of its results.
        method: How weights are rounded. ``nearest``, or ``gptq``: the error of every rounded weight
            is made up for by those of the inputs that follow.
        activations: What the layers multiply: numbers as they are, ``float``, or ``dynamic``, those
            that 8-bit codes stand for, with a scale per group found when the program runs. Then
            groups lie along the inputs, and have 16, 32, 64, 128 or 256 weights.
        skip: Globs of layers that stay floating-point.
    """

    bits: int = option(4, metavar="N", read=whole)
    group: int = option(32, metavar="N", read=whole)
    groups: str = option("auto", choices=tuple(AXES))
    method: str = option("gptq", choices=ROUNDED)
    activations: str = option("float", choices=MULTIPLIED)
    skip: tuple[str, ...] = option((), metavar="GLOB", many=True, read=several)

    def __post_init__(self) -> None:
        object.__setattr__(self, "skip", _globs(self.skip))
        if self.activations not in MULTIPLIED:
            raise UsageError(
                f"activations is {', '.join(MULTIPLIED)}, got {self.activations!r}",
                hint="narrows.quantize makes codes of activations beforehand",
            )
        self._check_dynamic()
        if self.groups not in tuple(AXES):
            raise UsageError(f"groups is {', '.join(AXES)}, got {self.groups!r}")
        if self.method not in ROUNDED:
            raise UsageError(f"method is {', '.join(ROUNDED)}, got {self.method!r}")
        check_groups(self.bits, self.group)

    def _check_dynamic(self) -> None:
        """Raise `UsageError` for groups in which no input can be rounded as the weights are."""
        if self.activations != "dynamic":
            return
        if self.groups == "output":
            raise UsageError(
                "dynamic activations have no groups along the outputs",
                why="a scale of the input serves the inputs that share a scale of the weight",
                hint="groups='input', or activations='float'",
            )
        if self.group not in SHARED_GROUPS:
            known = ", ".join(map(str, SHARED_GROUPS))
            raise UsageError(
                f"dynamic activations take groups of {known}, got {self.group!r}",
                why="these are what runtimes have kernels for",
            )

    @property
    def axes(self) -> tuple[int, ...]:
        """Along which axes of a weight its groups may lie."""
        return AXES["input"] if self.activations == "dynamic" else AXES[self.groups]

    @property
    def needs_data(self) -> bool:
        """Whether the choice goes by the results of the layers."""
        return self.method == "gptq" or len(self.axes) > 1

    def check_data(
        self,
        data: Any,
        hint: str = "calibration=[tokens], or method='nearest', groups='input'",
    ) -> None:
        """Raise `UsageError`, with a hint, if there is no data and there has to be."""
        if data is None and self.needs_data:
            raise UsageError(
                "there is no calibration data",
                why="GPTQ and the choice of the axis go by the results of the layers",
                hint=hint,
            )


# ------------------------------------------------------------------ checks


def _globs(given: Any) -> tuple[str, ...]:
    found = globs(given)
    for glob in found:
        if not isinstance(glob, str):
            raise UsageError(f"skip takes globs, got {glob!r}", hint="skip=['head', 'norm*']")
    return found


def check_bits(what: str, bits: Any, known: range = BITS) -> None:
    """Raise `UsageError` unless ``bits`` is a number of bits that codes can have."""
    if not isinstance(bits, int) or isinstance(bits, bool) or bits not in known:
        raise UsageError(
            f"{what} takes {known[0]} to {known[-1]} bits, got {bits!r}",
            why=f"codes are stored in {known[-1]} bits, and one bit holds no sign and magnitude",
            hint=f"{what}=8; for sensitive layers activations={{'head*': 16, '*': 8}}",
        )


def check_coding(coding: str) -> None:
    """Raise `UsageError` unless ``coding`` names powers of two."""
    try:
        WeightGrid.spelled(coding)
    except UsageError as error:
        raise UsageError(
            f"weights takes 2 to 8 bits, or pot2, pot3, pot4, got {coding!r}",
            why=error.why,
            hint="weights='pot4' for signed powers of two, 'pot4x2' for sums of two of them",
        ) from error
