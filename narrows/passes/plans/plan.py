"""`ChannelPlan`: which channels every consumer reads and every producer makes, as data.

A plan names weights and kept channels, nothing else. It comes from masks, from zeros in the weights
or from a criterion (`narrows.passes.plans.choose`), and goes to JSON and back. What it means is the
program that `ChannelPlan.masked` returns; what it saves is what `narrows.passes.prune_channels`
removes.

Terms: a *keep* is a sorted tuple of kept channels; a *mask* is what a person gives instead, and
stays at the edge.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from narrows.errors import PlanError, PlanUsageError
from narrows.files.writing import as_path
from narrows.ir.meta import op_name, shape_of
from narrows.ir.program import Note, Program
from narrows.ir.structure.computed import settled
from narrows.ir.structure.layers import SIDES, Layer, layers_of
from narrows.ir.views import VIEWS
from narrows.passes.plans import planfile
from narrows.passes.plans.masking import Mask, mask_program, split_masks
from narrows.passes.plans.naming import find_layers
from narrows.version import VERSION

Keep = tuple[int, ...]


@dataclass(frozen=True)
class ChannelPlan:
    """Which channels stay, per weight; the rest counts as zero.

    An input keep holds for the consumer alone: the other channels count as zero in what it reads.
    An output keep holds for everyone: the contribution of the other channels is zero, after the
    norm that reads the producer if there is one. Channels are the operator's own: ``in_channels``
    of a convolution count over all its groups. A weight that several nodes read means each of them.

    A plan is a value: do not write into its mappings.

    Attributes:
        inputs: Per weight the kept input channels, sorted. May be empty: the layer is a constant.
        outputs: Per weight the kept output channels, sorted.
        widths: Per weight how many ``(inputs, outputs)`` the layer has, to tell a plan of another
            model. A weight that layers of several widths read belongs to those of this width.
        reasons: Per weight where its keeps come from: ``given``, ``zeros``, ``l1 0.5``.
        fingerprint: A hash of the structure of the program it was made for.
        narrows: The version of narrows that made it.
        notes: What choosing the channels had to say.
    """

    inputs: Mapping[str, Keep] = field(default_factory=dict)
    outputs: Mapping[str, Keep] = field(default_factory=dict)
    widths: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    fingerprint: str = ""
    narrows: str = ""
    notes: tuple[Note, ...] = ()

    def __hash__(self) -> int:
        return hash((tuple(sorted(self.inputs.items())), tuple(sorted(self.outputs.items()))))

    def __repr__(self) -> str:
        sides = f"{len(self.inputs)} inputs, {len(self.outputs)} outputs"
        return f"ChannelPlan({sides}, {self.removed:,} channels masked)"

    # ------------------------------------------------------------------ making

    @staticmethod
    def given(
        program: Program,
        keep_inputs: Mapping[str, Any] | None = None,
        keep_outputs: Mapping[str, Any] | None = None,
        reason: str = "given",
    ) -> ChannelPlan:
        """Return the plan that explicit masks spell.

        Args:
            program: The program.
            keep_inputs: Per weight name (or another name of a shared weight) the input channels it
                keeps: booleans are a mask with one entry per channel, integers are the kept
                channels. So ``[0, 1]`` keeps two channels, whatever the width.
            keep_outputs: The same for output channels.
            reason: What `reasons` says.

        Raises:
            PlanError: A weight is unknown or takes no mask, or a mask does not fit it.
        """
        program = settled(program)
        uses = layers_of(program)
        keeps: dict[str, dict[str, Keep]] = {side: {} for side in SIDES}
        widths: dict[str, list[int]] = {}
        notes = []
        for side, masks in zip(SIDES, (keep_inputs, keep_outputs), strict=True):
            for weight, mask in _items(masks, side):
                found = find_layers(program, uses, weight, side)
                name = found[0].weight
                if name in keeps[side]:
                    raise PlanUsageError(
                        f"{name!r} has two masks on its {side}",
                        why=f"{weight!r} is another name of it",
                    )
                values = listed(mask, weight)
                width = fitting_width(values, found, side)
                keep = kept(values, width, f"the {side} of {weight!r}")
                keeps[side][name] = keep
                at = SIDES.index(side)
                widths.setdefault(name, [found[0].inputs, found[0].outputs])[at] = width
                notes += [empty_note(name, side)] if not keep else []
        return ChannelPlan(
            **keeps,
            widths={name: (a, b) for name, (a, b) in widths.items()},
            reasons=dict.fromkeys(widths, reason),
            fingerprint=fingerprint(program),
            narrows=VERSION,
            notes=tuple(notes),
        )

    def merge(self, other: ChannelPlan) -> ChannelPlan:
        """Return the plan that keeps what both keep; ``a | b`` for short.

        `PlanError` if they give a weight different widths.
        """
        for name, widths in other.widths.items():
            mine = self.widths.get(name, widths)
            if tuple(mine) != tuple(widths):
                raise PlanError(
                    "two plans of different models cannot be merged",
                    where=name,
                    why=f"its (inputs, outputs) are {mine} in one and {widths} in the other",
                )
        reasons = dict(self.reasons)
        for name, reason in other.reasons.items():
            mine = reasons.get(name, reason)
            reasons[name] = mine if reason in mine.split(", ") else f"{mine}, {reason}"
        return ChannelPlan(
            inputs=_met(self.inputs, other.inputs),
            outputs=_met(self.outputs, other.outputs),
            widths={**self.widths, **other.widths},
            reasons=reasons,
            fingerprint=self.fingerprint if self.fingerprint == other.fingerprint else "",
            narrows=self.narrows or other.narrows,
            notes=tuple(dict.fromkeys((*self.notes, *other.notes))),
        )

    __or__ = merge

    # ------------------------------------------------------------------ using

    @property
    def removed(self) -> int:
        """How many channels it masks, both sides of every weight."""
        return sum(self.by_reason().values())

    def by_reason(self) -> dict[str, int]:
        """Return how many channels it masks for each reason."""
        counts: dict[str, int] = {}
        for at, side in enumerate(SIDES):
            for name, keep in getattr(self, side).items():
                width = self.widths[name][at] if name in self.widths else len(keep)
                reason = self.reasons.get(name, "given")
                counts[reason] = counts.get(reason, 0) + width - len(keep)
        return counts

    def masked(self, program: Program) -> Program:
        """Return the program that the plan means: original shapes, masked channels zero.

        A weight that the program computes from others is one of its own here.

        Weights without a mask are shared with ``program``. Where a norm follows that has no gain of
        its own, its result is multiplied by a constant mask; a weight that is masked in one place
        and not in another is untied.

        Raises:
            PlanError: The plan is of another model.
        """
        self._refuse_model(program)
        program = settled(program)
        return mask_program(program, self._masks(program))

    def split(self, program: Program) -> tuple[Program, dict[str, Any]]:
        """Return what a rewrite starts from; see `narrows.passes.plans.masking.split_masks`."""
        self._refuse_model(program)
        program = settled(program)
        return split_masks(program, self._masks(program))

    @staticmethod
    def _refuse_model(program: Any) -> None:
        if not isinstance(program, Program):
            raise PlanError(
                f"a plan is for a Program, got {type(program).__name__}",
                hint="narrows.capture(model, inputs) makes one",
            )

    def _masks(self, program: Program) -> list[Mask]:
        uses = layers_of(program)
        dead: dict[Layer, dict[str, Keep]] = {}
        for at, side in enumerate(SIDES):
            for weight, keep in getattr(self, side).items():
                found = find_layers(program, uses, weight, side)
                width = self.widths[weight][at] if weight in self.widths else found[0].width(side)
                own = [u for u in found if u.width(side) == width]
                if not own:
                    raise PlanUsageError(
                        f"the plan is of another model: {weight!r} has {width} {side} there, "
                        f"{found[0].width(side)} here",
                        hint="make a plan for this program with narrows.plan",
                    )
                stays = {*kept(keep, width, f"the {side} of {weight!r}")}
                gone = tuple(i for i in range(width) if i not in stays)
                for use in own if gone else ():
                    dead.setdefault(use, {})[side] = gone
        return [Mask(use, **sides) for use, sides in dead.items()]

    def shrink(self, program: Program, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return another checkpoint of the model, cut to the pruned program; see `passes.state`."""
        return VIEWS["shrink"](self, program, state)

    def restore(
        self, program: Program, state: Any, pruned: Program | None = None
    ) -> dict[str, Tensor]:
        """Return a pruned program's weights in the original shapes; see `passes.state`."""
        return VIEWS["restore"](self, program, state, pruned)

    # ------------------------------------------------------------------ JSON

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return planfile.encode(self)

    @staticmethod
    def from_json(data: Any) -> ChannelPlan:
        """Return the plan that `to_json` wrote; `PlanError` if it is not one or a newer one."""
        return ChannelPlan(**planfile.decode(data, "the plan"))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan as a JSON file and return its path; the file is whole or not there.

        ``-`` is standard output.
        """
        return planfile.write(self, path)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> ChannelPlan:
        """Return the plan of a file; `PlanError` if it is missing, damaged, foreign or newer."""
        return ChannelPlan(**planfile.read(as_path(path, "a channel plan", PlanError)))

    def with_notes(self, *notes: Note) -> ChannelPlan:
        """Return the plan with more notes."""
        return replace(self, notes=(*self.notes, *notes))


# ------------------------------------------------------------------ masks at the edge


def _items(masks: Any, side: str) -> Iterable[tuple[str, Any]]:
    if masks is None:
        return ()
    if not isinstance(masks, Mapping):
        raise PlanUsageError(
            f"keep_{side} takes a dict of masks by weight name, got {type(masks).__name__}",
            hint=f'keep_{side}={{"conv1.weight": [0, 2, 3]}}',
        )
    return masks.items()


def listed(mask: Any, weight: str) -> list[bool] | list[int]:
    """Return a mask as a list of booleans or of integers, whatever sequence it was."""
    if getattr(mask, "ndim", 1) != 1:
        raise PlanUsageError(
            f"the mask of {weight!r} has {mask.ndim} axes",
            why="it has one entry per channel",
            hint="of a mask of weights: mask.flatten(1).any(1) for outputs, "
            "mask.transpose(0, 1).flatten(1).any(1) for inputs",
        )
    if isinstance(mask, Tensor) or hasattr(mask, "tolist"):
        mask = mask.tolist()
    wrong = f"the mask of {weight!r} is neither booleans nor kept channels"
    if isinstance(mask, str | Mapping) or not isinstance(mask, Iterable):
        raise PlanUsageError(wrong, why=f"it is {mask!r:.60}")
    values = list(mask)
    kinds = set(map(type, values))
    if not kinds <= {bool, int}:
        values = [v.item() if hasattr(v, "item") else v for v in values]
        kinds = set(map(type, values))
    if not kinds <= {bool} and not kinds <= {int}:
        names = ", ".join(sorted(k.__name__ for k in kinds))
        raise PlanUsageError(wrong, why=f"it holds {names}", hint="convert it: mask.bool()")
    return values


def fitting_width(values: Sequence[Any], uses: Sequence[Layer], side: str) -> int:
    """Return the width a mask is for: its length where a use has that, else the first use's."""
    widths = [u.width(side) for u in uses]
    masked = values and isinstance(values[0], bool)
    return len(values) if masked and len(values) in widths else widths[0]


def kept(values: Sequence[Any], width: int, what: str) -> Keep:
    """Return the kept channels of a listed mask; `PlanError` naming ``what`` if it does not fit."""
    if values and isinstance(values[0], bool):
        if len(values) != width:
            raise PlanUsageError(f"{what} take a mask of {width} entries, got {len(values)}")
        return tuple(i for i, v in enumerate(values) if v)
    keep = tuple(sorted(values))
    if keep and (keep[0] < 0 or keep[-1] >= width):
        outside = next(v for v in keep if not 0 <= v < width)
        raise PlanUsageError(
            f"{what} are 0 to {width - 1}, got {outside}",
            hint="a list of integers names the kept channels; a mask is made of booleans",
        )
    if len(set(keep)) < len(keep):
        twice = next(a for a, b in pairwise(keep) if a == b)
        raise PlanUsageError(
            f"{what} name channel {twice} twice",
            hint="a list of integers names the kept channels; a mask is made of booleans",
        )
    return keep


def empty_note(weight: str, side: str) -> Note:
    """Return the note on a layer that keeps no channel at all."""
    became = "the layer is a constant" if side == "inputs" else "nothing of the layer is left"
    return Note(weight, "empty", f"the plan keeps none of its {side}: {became}")


def _met(mine: Mapping[str, Keep], other: Mapping[str, Keep]) -> dict[str, Keep]:
    met = dict(mine)
    for name, keep in other.items():
        met[name] = tuple(sorted({*met[name]} & {*keep})) if name in met else keep
    return met


def loaded(plan: ChannelPlan | str | os.PathLike[str]) -> ChannelPlan:
    """Return a plan, or the one of a path; `PlanError` for anything else."""
    if isinstance(plan, ChannelPlan):
        return plan
    if isinstance(plan, str | os.PathLike):
        return ChannelPlan.load(plan)
    raise PlanError(
        f"a plan is a ChannelPlan or its path, got {type(plan).__name__}",
        hint="make one with narrows.plan(program, ...)",
    )


# ------------------------------------------------------------------ what a plan belongs to


def fingerprint(program: Program) -> str:
    """Return a hash of a program's operators, its wiring and its weights' names and shapes.

    Values do not count: every checkpoint of a model has the same one.
    """
    return program.memo("fingerprint", lambda: _fingerprint(settled(program)))


def _fingerprint(program: Program) -> str:
    place = {node: i for i, node in enumerate(program.graph.nodes)}
    lines = [_line(node, place) for node in program.graph.nodes]
    lines += [f"{name} {list(t.shape)}" for name, t in sorted(program.weights.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _line(node: fx.Node, place: Mapping[fx.Node, int]) -> str:
    name = op_name(node) if node.op == "call_function" else str(node.target)
    if node.op == "placeholder":
        shape = shape_of(node)
        name = f"input {'?' if shape is None else len(shape)}"
    return f"{name} {[place[n] for n in node.all_input_nodes]}"


def refuse_nan(program: Program) -> None:
    """Raise `PlanError` if a weight holds NaN."""
    name, count = program.memo("nan", lambda: _first_nan(program))
    if count:
        raise PlanError(
            f"{name!r} holds {count:,} NaN",
            why="zero times NaN is NaN, so a masked channel would not be zero",
            hint="the checkpoint is damaged, or its training diverged",
        )


def _first_nan(program: Program) -> tuple[str, int]:
    for name, tensor in program.weights.items():
        if tensor.is_floating_point() and not bool(tensor.detach().sum().isfinite()):
            count = int(tensor.isnan().sum())
            if count:
                return name, count
    return "", 0


__all__ = ["ChannelPlan", "Keep", "fingerprint", "refuse_nan"]
