"""Zeros that are in the weights already, as a plan."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from narrows.ir.channels import Facts, analyse
from narrows.ir.ops.contraction import used_columns
from narrows.ir.program import Program
from narrows.ir.structure.layers import Layer
from narrows.passes.plans.masking import followers
from narrows.passes.plans.plan import ChannelPlan, empty_note, fingerprint


def zeros_in(program: Program, uses: Mapping[str, tuple[Layer, ...]]) -> ChannelPlan:
    """Return the plan of the channels whose weights, or whose contributions, are zero already."""
    facts = analyse(program)
    inputs: dict[str, tuple[int, ...]] = {}
    outputs: dict[str, tuple[int, ...]] = {}
    notes = []
    for name, where in uses.items():
        first = where[0]
        alive = _read(first)
        if first.contraction is not None and not alive.all():
            inputs[name] = tuple(np.flatnonzero(alive).tolist())
            notes += [empty_note(name, "inputs")] if not inputs[name] else []
        same = [u for u in where if u.outputs == first.outputs]
        alive = np.any([_contributes(facts, u) for u in same], axis=0)
        if not alive.all() and len(same) == len(where):
            outputs[name] = tuple(np.flatnonzero(alive).tolist())
            notes += [empty_note(name, "outputs")] if not outputs[name] else []
    named = [name for name in uses if name in inputs or name in outputs]
    return ChannelPlan(
        inputs=inputs,
        outputs=outputs,
        widths={name: (uses[name][0].inputs, uses[name][0].outputs) for name in named},
        reasons=dict.fromkeys(named, "zeros"),
        fingerprint=fingerprint(program),
        notes=tuple(notes),
    )


def _read(use: Layer) -> np.ndarray:
    """Return which inputs have a weight other than zero."""
    if use.contraction is None:
        return np.ones(0, dtype=bool)
    rows = np.ones(use.contraction.blocks.shape[:2], dtype=bool)
    return used_columns(use.contraction, rows).flatten()


def _contributes(facts: Facts, use: Layer) -> np.ndarray:
    """Return which outputs are not zero where a mask on them would make them zero."""
    if facts.value(use.node).free:
        return np.ones(use.outputs, dtype=bool)
    norms, others = followers(use)
    alive = np.zeros(use.outputs, dtype=bool)
    if others or not norms:
        value = facts.value(use.node)
        along = value.tensor.movedim(use.y_axis, 0)
        labels = along.reshape(len(along), -1).expand(use.outputs, -1).numpy()
        alive |= (value.const[labels] != 0).any(1)
    for norm, labels in norms:
        value = facts.value(norm)
        moves = torch.from_numpy(value.const != 0)[value.tensor]
        moves, labels = torch.broadcast_tensors(moves, labels)
        alive[labels[moves].unique().numpy()] = True
    return alive
