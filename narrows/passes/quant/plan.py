"""`QuantPlan`: which grid every tensor of a network lies on; plain data that JSON holds.

A plan is made for a *prepared* program (norms folded, attention taken apart) by
`narrows.passes.quant.calibrate` or by a reconstruction (`narrows.passes.quant.rapq`), and used by
the pass ``quantize``. It holds exponents, zero points, bits, whole numbers that correct biases,
and, where a reconstruction chose them, the codes of the weights. Once it was used, it also holds a
`Record` of what rounding made of the checkpoint, so that it gives the same integers ever after.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from narrows.errors import NarrowsError, PassError, PlanError, PlanUsageError
from narrows.files.reading import fit
from narrows.files.writing import as_path, write_text
from narrows.ir.integer.codes import WeightCodes
from narrows.ir.integer.grid import ACTIVATION_BITS, HALF_EVEN, ROUNDINGS, Grid, Levels, WeightGrid
from narrows.ir.meta import Meta
from narrows.ir.program import Note, Program
from narrows.passes.plans import planfile
from narrows.passes.plans.state import place_of
from narrows.passes.quant.record import Record
from narrows.passes.quant.schema import LIMIT, QuantFile

FORMAT = "narrows-quant-plan"
# 3 knows records, preparations, parts and wide codes; 2 codes, terms and levels; 1 none of them.
VERSION = 3


@dataclass(frozen=True)
class Preparation:
    """How a program is prepared for a plan, as far as that can differ.

    Attributes:
        bits: How many bits clips are widened to.
        equalize: Whether powers of two move between layers.
    """

    bits: int = 8
    equalize: bool = False


@dataclass(frozen=True)
class QuantPlan:
    """Which grid every activation and every weight of a program lies on.

    Attributes:
        activations: Per node the grid of its result. A node that is not named has none of its own:
            it hands on the codes it reads, or stays floating-point.
        weights: Per weight name its grid, with an exponent per output channel.
        offsets: Per name of a layer's weight what is added to the layer's bias, one whole number
            per output channel in steps of the accumulator: the correction of the mean error.
        codes: Per weight name its codes, where they are not those of plain rounding.
        levels: Per node of ``activations`` the levels that its codes become, where those are not
            equally wide; made elsewhere, as in training with learned thresholds.
        floats: The nodes that stay floating-point, each with the reason.
        parts: Per concatenation the powers of two that its operands are multiplied by before
            (`narrows.passes.quant.scale_parts`), where they have any.
        rounding: ``half_even`` or ``half_up``: how every shift settles ties.
        record: What rounding made of the checkpoint; ``None`` before a plan was used, or in one of
            an older narrows. Without it the integers are made of the floating-point numbers alone.
        preparation: How the program is prepared; ``None`` where the caller has to know.
        fingerprint: Of the program it was made for (`narrows.passes.plans.plan.fingerprint`).
        narrows: The version that made it.
        notes: What a person should know.
    """

    activations: Mapping[str, Grid]
    weights: Mapping[str, WeightGrid]
    offsets: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    codes: Mapping[str, WeightCodes] = field(default_factory=dict)
    levels: Mapping[str, Levels] = field(default_factory=dict)
    floats: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    rounding: str = HALF_EVEN
    record: Record | None = None
    preparation: Preparation | None = None
    fingerprint: str = ""
    narrows: str = ""
    notes: tuple[Note, ...] = ()

    def __hash__(self) -> int:
        return hash((tuple(sorted(self.weights)), tuple(sorted(self.activations)), self.rounding))

    def __repr__(self) -> str:
        counts = f"{len(self.weights)} weights, {len(self.activations)} activations"
        return f"QuantPlan({counts}, {len(self.floats)} stay float, {self.rounding})"

    def follow(self, program: Program) -> QuantPlan:
        """Return the plan for a program that lost channels since: exponents go with their channels.

        Where a pass says from which channels a weight was made (`Program.origins`), its exponents,
        offsets and codes are those of these channels. Nodes that are gone are dropped; what is made
        a second time has the grids of the first. The record is left behind: pruning folds constants
        into biases. It is made anew when the plan is used.

        Raises:
            PlanError: A weight has another number of channels, and no pass says which.
        """
        names = {n.name: Meta(n).twin for n in program.graph.nodes}

        def left(known: Mapping[str, Any]) -> dict[str, Any]:
            first = ((n, n if n in known else twin) for n, twin in names.items())
            return {n: known[old] for n, old in first if old in known}

        weights: dict[str, WeightGrid] = {}
        offsets: dict[str, tuple[int, ...]] = {}
        codes: dict[str, WeightCodes] = {}
        for name in program.weights:
            old = name
            if name not in self.weights and name in program.origins:
                old = program.origins[name].name
            grid = self.weights.get(old)
            if grid is None:
                continue
            width = program.weights[name].shape[grid.axis]
            kept = _kept(program, name, grid.axis)
            exponents = _picked(name, grid.exponents, kept, width, min(grid.exponents, default=0))
            weights[name] = replace(grid, exponents=exponents)
            if old in self.offsets:
                offsets[name] = _picked(name, self.offsets[old], kept, width, 0)
            if old in self.codes:
                codes[name] = _left(self.codes[old], program, name)
        return replace(
            self,
            activations=left(self.activations),
            weights=weights,
            offsets=offsets,
            codes=codes,
            levels=left(self.levels),
            floats=left(self.floats),
            parts=left(self.parts),
            record=None,
            fingerprint="",
        )

    def with_notes(self, *notes: Note) -> QuantPlan:
        """Return the plan with more notes."""
        return replace(self, notes=(*self.notes, *notes))

    def bare(self) -> QuantPlan:
        """Return the grids alone, for another checkpoint of the model: no record, no codes."""
        return replace(self, record=None, codes={})

    @property
    def _version(self) -> int:
        """The oldest version of the format that knows all that it holds."""
        wide = any(g.wide for g in self.activations.values())
        if wide or self.parts or self.record is not None or self.preparation is not None:
            return VERSION
        newer = self.codes or self.levels or any(g.terms for g in self.weights.values())
        return 2 if newer else 1

    # ------------------------------------------------------------------ JSON

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        levels = {
            n: {"grid": _grid_json(v.grid), "thresholds": list(v.thresholds)}
            for n, v in self.levels.items()
        }
        return {
            "format": FORMAT,
            "version": self._version,
            "narrows": self.narrows,
            "fingerprint": self.fingerprint,
            "rounding": self.rounding,
            "activations": {n: _grid_json(g) for n, g in self.activations.items()},
            "weights": {
                n: {
                    "exponents": list(g.exponents),
                    "bits": g.bits,
                    "axis": g.axis,
                    **({"terms": g.terms} if g.terms else {}),
                }
                for n, g in self.weights.items()
            },
            "offsets": {n: list(o) for n, o in self.offsets.items()},
            **({"codes": {n: c.to_json() for n, c in self.codes.items()}} if self.codes else {}),
            **({"levels": levels} if levels else {}),
            **({} if self.preparation is None else {"preparation": vars(self.preparation)}),
            "floats": dict(self.floats),
            **({"parts": {n: list(p) for n, p in self.parts.items()}} if self.parts else {}),
            "notes": [vars(note) for note in self.notes],
            **_record_json(self.record),
        }

    @staticmethod
    def from_json(data: Any, what: str = "the plan") -> QuantPlan:
        """Return the plan that `to_json` wrote; `PlanError` if it is not one or a newer one."""
        hint = "plans are written by QuantPlan.save and `narrows quantize`"
        planfile.check_header(data, what, "a quantization plan", FORMAT, VERSION, hint)
        try:
            fit(data, QuantFile)
            return _decode(data)
        except (
            KeyError, TypeError, AttributeError, ValueError, OverflowError, MemoryError,
            NarrowsError,
        ) as error:  # fmt: skip
            why = (
                error.what
                if isinstance(error, NarrowsError)
                else f"{type(error).__name__}: {error}"
            )
            raise PlanError(f"{what} is damaged", why=why) from error

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan as a JSON file and return its path; the file is whole or not there.

        ``-`` is standard output.
        """
        return write_text(planfile.layout(self.to_json()), path, PlanError)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> QuantPlan:
        """Return the plan of a file; `PlanError` if it is missing, damaged, foreign or newer."""
        place = as_path(path, "a quantization plan", PlanError)
        data = planfile.read_plan(place, "a quantization plan", LIMIT)
        return QuantPlan.from_json(data, str(path))


def loaded(plan: QuantPlan | str | os.PathLike[str]) -> QuantPlan:
    """Return a plan, or the one of a path; `PlanUsageError` for anything else."""
    if isinstance(plan, QuantPlan):
        return plan
    if isinstance(plan, str | os.PathLike):
        return QuantPlan.load(plan)
    raise PlanUsageError(
        f"plan takes a QuantPlan or its path, got {type(plan).__name__}",
        hint="narrows.quantize(...).plan is one",
    )


def of_pass(name: str, plan: QuantPlan | str | None) -> QuantPlan:
    """Return the plan that a pass was given; `PassError` if it has none."""
    if plan is None:
        hint = "narrows.quantize makes one from calibration data"
        raise PassError(f"{name} has no plan", hint=hint)
    return loaded(plan)


def _decode(data: dict[str, Any]) -> QuantPlan:
    if data["rounding"] not in ROUNDINGS:
        raise ValueError(f"its rounding is {data['rounding']!r}")
    return QuantPlan(
        activations={str(n): _grid(g) for n, g in data["activations"].items()},
        weights={
            str(n): WeightGrid(
                tuple(map(_whole, g["exponents"])),
                _whole(g["bits"]),
                _whole(g["axis"]),
                _whole(g.get("terms", 0)),
            )
            for n, g in data["weights"].items()
        },
        offsets={str(n): tuple(map(_whole, o)) for n, o in data["offsets"].items()},
        codes={str(n): WeightCodes.from_json(c) for n, c in data.get("codes", {}).items()},
        levels={
            str(n): Levels(_grid(v["grid"]), tuple(map(_whole, v["thresholds"])))
            for n, v in data.get("levels", {}).items()
        },
        floats={str(n): str(r) for n, r in data["floats"].items()},
        parts={str(n): tuple(map(_whole, p)) for n, p in data.get("parts", {}).items()},
        rounding=data["rounding"],
        record=Record.from_json(_record_of(data)) if RECORDS[0] in data else None,
        preparation=_preparation(data["preparation"]) if "preparation" in data else None,
        fingerprint=str(data["fingerprint"]),
        narrows=str(data["narrows"]),
        notes=fit(data["notes"], tuple[Note, ...]),
    )


# One table each, so that a file has a line for every tensor.
RECORDS = ("record weights", "record activations", "record biases", "record tables", "record norms")


def _record_json(record: Record | None) -> dict[str, Any]:
    return {} if record is None else {f"record {k}": v for k, v in record.to_json().items()}


def _record_of(data: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("record "): data[name] for name in RECORDS}


def _preparation(data: dict[str, Any]) -> Preparation:
    if type(data["equalize"]) is not bool or _whole(data["bits"]) not in ACTIVATION_BITS:
        raise ValueError(f"its preparation is {data!r}")
    return Preparation(data["bits"], data["equalize"])


def _grid(data: dict[str, Any]) -> Grid:
    signed = data.get("signed", False)
    if type(signed) is not bool:
        raise ValueError(f"{signed!r} is neither true nor false")
    return Grid(_whole(data["exponent"]), _whole(data["zero"]), _whole(data["bits"]), signed)


def _grid_json(grid: Grid) -> dict[str, Any]:
    facts = {"exponent": grid.exponent, "zero": grid.zero, "bits": grid.bits}
    return {**facts, "signed": True} if grid.signed else facts


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{value!r} is no whole number")
    return value


def _kept(program: Program, name: str, axis: int) -> tuple[int, ...] | None:
    origin = program.origins.get(name)
    return None if origin is None else origin.index[axis]


def _picked(
    name: str, values: tuple[int, ...], kept: tuple[int, ...] | None, width: int, added: int
) -> tuple[int, ...]:
    """Return the values of the channels that are left; those that were added have ``added``."""
    if len(values) == 1 or (kept is None and len(values) == width):
        return values
    if kept is None or not all(isinstance(k, int) and k < len(values) for k in kept):
        raise PlanUsageError(
            f"the plan is of another model: {name!r} has {len(values)} channels there, "
            f"{width} here",
            hint="calibrate this program with narrows.quantize",
        )
    return tuple(values[k] if k >= 0 else added for k in kept)


def _left(codes: WeightCodes, program: Program, name: str) -> WeightCodes:
    """Return the codes of the elements that are left of a weight."""
    origin = program.origins.get(name)
    if origin is None:
        return codes
    kept = codes.tensor()[place_of(origin)]
    # A pass fills a place that only the shape asks for with zeros.
    return WeightCodes.of(kept * (program.weights[name] != 0).to(kept.dtype))


__all__ = ["Preparation", "QuantPlan", "loaded", "of_pass"]
