"""`Sensitivity`: what the outputs lose to one change at a time, as a table that is kept."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from narrows.errors import PlanError, PlanUsageError
from narrows.files.reading import Count, fit, read_json
from narrows.files.writing import as_path, write_text

FORMAT = "narrows-sensitivity-1"

HEADER = ("what", "of", "change", "left", "macs", "divergence", "same class", "figure")


@dataclass(frozen=True)
class Row:
    """What one change does.

    Attributes:
        kind: What is changed: the channels of a ``coupling``, what a layer ``reads``; or a
            ``weight`` or an ``activation`` that is rounded.
        name: Of the coupling, the weight or the node.
        amount: The ratio of the channels that go, or the bits that are left.
        width: How many channels there are; 0 where something is rounded.
        removed: How many of them go.
        macs: The share of all multiply-accumulates that is left; ``None`` where something is
            rounded.
        divergence: How far the outputs are from the network's own, mean over the examples
            (`narrows.passes.choosing.divergence`); ``None`` where they are not finite.
        agreement: The share of the examples that are given the same class; ``None`` where outputs
            tell no classes.
        figure: What ``evaluate`` returned, if there was one.
    """

    kind: str
    name: str
    amount: float
    width: Count
    removed: Count
    macs: float | None
    divergence: float | None
    agreement: float | None
    figure: float | None

    @property
    def cells(self) -> tuple[str, ...]:
        """The row as text, in the order of `HEADER`."""
        pruned = bool(self.width)
        return (
            self.kind,
            self.name,
            f"-{self.amount:g}" if pruned else f"{self.amount:g} bits",
            f"{self.width - self.removed} of {self.width}" if pruned else "",
            "" if self.macs is None else f"{self.macs:.3f}",
            "not finite" if self.divergence is None else f"{self.divergence:.4g}",
            "" if self.agreement is None else f"{self.agreement:.1%}",
            "" if self.figure is None else f"{self.figure:.4g}",
        )


@dataclass(frozen=True)
class Sensitivity:
    """What a network's outputs lose to one change at a time.

    Attributes:
        program: The network's name.
        fingerprint: Of its operators and its weights' shapes.
        checkpoint: A hash of its weights.
        criterion: By which channels went.
        repair: How weights made up for it; empty if they did not.
        examples: On how many examples it was measured.
        rows: The changes, in the network's order.
        figure: What ``evaluate`` returned for the network as it is.
        skipped: What could not be changed, or is not, each with the reason.
        narrows: The version that made it.
    """

    program: str
    fingerprint: str
    checkpoint: str
    criterion: str
    repair: str
    examples: Count
    rows: tuple[Row, ...]
    figure: float | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)
    narrows: str = ""

    def __hash__(self) -> int:
        return hash((self.checkpoint, self.rows))

    def __str__(self) -> str:
        lines = [HEADER, *(row.cells for row in self.rows)]
        used = [i for i, _ in enumerate(HEADER) if any(line[i] for line in lines[1:])]
        wide = {i: max(len(line[i]) for line in lines) for i in used}
        text = ["  ".join(f"{line[i]:{wide[i]}}" for i in used).rstrip() for line in lines]
        text += [f"skipped: {name}: {why}" for name, why in self.skipped.items()]
        return "\n".join(text)

    def of(self, name: str) -> tuple[Row, ...]:
        """Return the rows of a coupling, a weight or a node."""
        return tuple(row for row in self.rows if row.name == name)

    # ------------------------------------------------------------------ as a file

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {"format": FORMAT, **dataclasses.asdict(self)}

    @staticmethod
    def from_json(data: Any) -> Sensitivity:
        """Return what `to_json` made; `PlanError` for anything else."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise PlanError("this is no sensitivity", why=f"its format is not {FORMAT}")
        try:
            return fit({k: v for k, v in data.items() if k != "format"}, Sensitivity)
        except ValueError as error:
            raise PlanError("this is no sensitivity", why=str(error)) from error

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Save it as JSON; the file is whole, or as it was before."""
        return write_text(json.dumps(self.to_json(), indent=1) + "\n", path, PlanError)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Sensitivity:
        """Load what `save` wrote; `PlanError` for anything else."""
        place = as_path(path, "a sensitivity", PlanError)
        try:
            data = read_json(place)
        except FileNotFoundError as cause:
            raise PlanUsageError(f"there is no file {str(place)!r}") from cause
        except (OSError, ValueError) as cause:
            raise PlanError(
                "the sensitivity cannot be read", where=str(place), why=str(cause)
            ) from cause
        try:
            return Sensitivity.from_json(data)
        except PlanError as error:
            raise PlanError(error.what, where=str(place), why=error.why) from None


__all__ = ["Row", "Sensitivity"]
