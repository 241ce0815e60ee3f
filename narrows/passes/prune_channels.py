"""`PruneChannels`: channels that nothing reads, and channels that are constants, go.

Three steps, each of its own module: the plan's masked program (`narrows.passes.plans.masking`), the
analysis of its channels (`narrows.ir.channels`), and the rewrite (`narrows.ir.rewrite`). Zeros that
are in the weights without a plan are found in the same way. Which order the channels come out in is
for `narrows.passes.forms.families` to say.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from narrows.errors import PassError
from narrows.ir.labels import Bools
from narrows.ir.meta import shape_of
from narrows.ir.ops import dialect
from narrows.ir.program import Note, Program
from narrows.ir.rewrite import Base, rewrite
from narrows.passes.base import Fidelity, Pass, PassResult
from narrows.passes.eliminate_dead import identity_of
from narrows.passes.forms.families import orders
from narrows.passes.plans.plan import ChannelPlan, fingerprint, refuse_nan
from narrows.passes.plans.remains import constant_outputs, remaining

# Rounds that a program gets to settle in; the second finds nothing, as a rule.
ROUNDS = 4


@dataclass(frozen=True)
class PruneChannels(Pass):
    """Removes channels that a plan drops, or that are dead or constant anyway.

    Attributes:
        plan: The plan, or the path of a saved one; ``None`` for no more than what is dead anyway.
        order: Whether the channels that stay are put in the order of `reorder-channels` as well.
            The form is the one that both passes make one after the other, made once.
    """

    name: ClassVar[str] = "prune-channels"
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT
    plan: ChannelPlan | str | os.PathLike | None = None
    order: bool = False

    def run(self, program: Program) -> PassResult:
        """Return the program that computes only what is needed; notes say what stays, and why."""
        refuse_nan(program)
        plan = self._loaded()
        result, found = _settled(*plan.split(program), order=self.order)
        result = result.replace(notes=program.notes)
        found = (*found, *remaining(program, plan, result, found))
        found = (*found, *constant_outputs(program, result))
        notes = (*plan.notes, *_on_plan(plan, program), *found)
        if is_idle(program, result):
            idle = Note(program.name, "idle", "no channel is masked, dead or constant")
            return PassResult(program, False, (*notes, idle))
        return PassResult(result, True, notes)

    def reference(self, program: Program) -> Program:
        """Return the plan's masked program."""
        return self._loaded().masked(program)

    def _loaded(self) -> ChannelPlan:
        if self.plan is None:
            return ChannelPlan()
        if isinstance(self.plan, str | os.PathLike):
            return ChannelPlan.load(self.plan)
        if not isinstance(self.plan, ChannelPlan):
            raise PassError(
                f"prune-channels takes a plan or its path, got {type(self.plan).__name__}",
                hint="make one with narrows.plan(program, ...)",
            )
        return self.plan


def _on_plan(plan: ChannelPlan, program: Program) -> Iterator[Note]:
    """Yield how many channels the plan masks, and whether it was made for another structure."""
    counts = {reason: count for reason, count in plan.by_reason().items() if count}
    if counts:
        parts = ", ".join(f"{reason} {count:,}" for reason, count in sorted(counts.items()))
        yield Note(program.name, "plan", f"the plan masks {plan.removed:,} channels: {parts}")
    if plan.fingerprint and plan.fingerprint != fingerprint(program):
        yield Note(
            program.name, "plan", "the plan was made before other rewrites, or for another model"
        )


def _settled(
    program: Program, ignored: Mapping[str, Bools], *, order: bool
) -> tuple[Program, tuple[Note, ...]]:
    """Return a program rewritten until nothing more goes, and what the last removal had to say."""
    program = program.replace(notes=())
    notes: tuple[Note, ...] = ()
    for turn in range(ROUNDS):
        base = Base(program, {} if turn else ignored)
        ranks, told = orders(base) if order else ({}, ())
        pruned = emit(base.choose(replace(base.choices, order=ranks)))
        if turn and is_idle(program, pruned):
            break
        notes, program = (*pruned.notes, *told), pruned.replace(notes=())
        if not _is_restless(program, notes):
            break
    return program, notes


def emit(base: Base) -> Program:
    """Return the exact form of a base program that its choices ask for; its notes say why."""
    return _without_gates(rewrite(base)[0]).replace(base=base)


def _is_restless(program: Program, notes: tuple[Note, ...]) -> bool:
    """Whether another rewrite may find more.

    It may where a layer reads nothing and keeps one channel of zeros for its operator's sake, which
    makes constants of what comes after it; where layers that share a weight had to wait for one
    another; and where a tensor stayed for the sake of a shape that it no longer has.
    """
    if any(note.reason in ("shared", "ragged") for note in notes):
        return True
    weights = [program.tensor(n) for n in program.graph.nodes if n.op == "get_attr"]
    wide = [w for w in weights if w.dim() > 1]
    return not all(bool(w.reshape(-1)[:64].any()) or bool(w.any()) for w in wide)


def _without_gates(program: Program) -> Program:
    """Return the program without products with a literal that is one everywhere.

    A mask of a plan is such a literal once the channels that it zeroes are gone.
    """
    if not any(_is_idle_gate(program, node) for node in program.graph.nodes):
        return program
    result = program.copy()
    for node in list(result.graph.nodes):
        if not _is_idle_gate(result, node):
            continue
        source, gate = node.args
        node.replace_all_uses_with(source)
        result.graph.erase_node(node)
        if not gate.users:
            result.graph.erase_node(gate)
            del result.weights[str(gate.target)]
            result.buffers = result.buffers - {str(gate.target)}
    return result.seal()


def _is_idle_gate(program: Program, node: fx.Node) -> bool:
    """Whether a node multiplies by a literal, one that no checkpoint holds, and changes nothing."""
    if node.target is not dialect.MULTIPLY or identity_of(program, node) is None:
        return False
    gate = node.args[1]
    return isinstance(gate, fx.Node) and str(gate.target) not in program.stored


# ------------------------------------------------------------------ did anything change?


def is_idle(old: Program, new: Program) -> bool:
    """Whether a rewrite has removed nothing: the same weights, and every tensor of the same shape.

    The rewriter may spell some operators otherwise, ``unbind`` as slices; that alone is no change.
    """
    if old.weights.keys() != new.weights.keys() or old.aliases != new.aliases:
        return False
    shapes = {node.name: shape_of(node) for node in new.graph.nodes}
    for node in old.graph.nodes:
        if shape_of(node) is not None and shapes.get(node.name) != shape_of(node):
            return False
    return all(_same_tensor(t, new.weights[name]) for name, t in old.weights.items())


def _same_tensor(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))
