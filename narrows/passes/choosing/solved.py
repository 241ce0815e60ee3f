"""`Solved`: a plan and the weights that were found for it, as one thing that is saved."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from narrows.errors import PlanError, PlanUsageError
from narrows.files.writing import as_path, replacing
from narrows.ir.program import Program
from narrows.passes.choosing.prepare import prepared
from narrows.passes.plans.plan import ChannelPlan

FORMAT = "narrows-solved-plan"


@dataclass(frozen=True, eq=False)
class Solved:
    """A plan with the weights that make up for what it drops.

    Attributes:
        plan: The plan.
        weights: The weights that differ from the model's, by name, norms folded into them.
        source: A hash of the model's own weights: these belong to that checkpoint alone.
    """

    plan: ChannelPlan
    weights: dict[str, Tensor]
    source: str

    @staticmethod
    def of(program: Program, plan: ChannelPlan, made: Program) -> Solved:
        """Return what `narrows.compensate` made of a program for a plan."""
        base = prepared(program)
        changed = {
            name: tensor
            for name, tensor in made.weights.items()
            if name not in base.weights or not tensor.equal(base.weights[name])
        }
        return Solved(plan, changed, checkpoint(program))

    def applied(self, program: Program) -> Program:
        """Return the program that was solved for, from the same model with the same weights.

        Raises:
            PlanError: The model or its weights are others.
        """
        if checkpoint(program) != self.source:
            raise PlanError(
                "the weights were found for another checkpoint",
                why="they make up for what the plan drops of that one",
                hint="compensate anew: narrows.compensate(program, plan, data=[images])",
            )
        base = prepared(program)
        return base.with_weights({**base.weights, **self.weights})

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Save plan and weights as one safetensors file; it is whole, or as it was before."""
        told = {"format": FORMAT, "plan": json.dumps(self.plan.to_json()), "source": self.source}
        tensors = {name: t.detach().contiguous() for name, t in self.weights.items()}
        with replacing(path, PlanError) as file:
            file.write(safetensors.torch.save(tensors, told))
        return Path(path)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Solved:
        """Load what `save` wrote; `PlanError` for anything else."""
        place = as_path(path, "a solved plan", PlanError)
        try:
            with safetensors.safe_open(str(place), "pt") as file:
                told = file.metadata() or {}
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError as cause:
            raise PlanUsageError(f"there is no file {str(place)!r}") from cause
        except (OSError, safetensors.SafetensorError) as cause:
            raise PlanError(f"{place} is no solved plan", why=str(cause)) from cause
        if told.get("format") != FORMAT or not told.get("source"):
            raise PlanError(
                f"{place} is no solved plan",
                why="its header does not say that it is one",
                hint="such files are written by Solved.save and `narrows compress --save-solved`",
            )
        try:
            data = json.loads(told.get("plan", ""))
        except ValueError as cause:
            raise PlanError(f"{place} is damaged", why="its plan is no JSON") from cause
        return Solved(ChannelPlan.from_json(data), weights, told["source"])


def checkpoint(program: Program) -> str:
    """Return a hash of a program's weights."""
    return program.memo("checkpoint", lambda: _hash(program))


def _hash(program: Program) -> str:
    made = hashlib.sha256()
    for name, tensor in sorted(program.weights.items()):
        made.update(f"{name} {tensor.dtype} {list(tensor.shape)}\0".encode())
        made.update(safetensors.torch.save({"t": tensor.detach().contiguous()}))
    return made.hexdigest()[:32]


__all__ = ["Solved", "checkpoint"]
