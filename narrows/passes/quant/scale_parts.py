"""`ScaleParts`: the parts of concatenations get powers of two of their own, so that they fit one
grid; what reads them makes up for it.

A part is multiplied before it is joined, which costs nothing on a grid of powers of two. A layer
divides the columns of its weight; a tensor of one part alone is divided as a whole; an output, or
an island, has its codes read with an exponent per channel. The network stays what it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

import narrows.ir.integer.library  # noqa: F401  (defines torch.ops.narrows)
from narrows.errors import PlanError
from narrows.ir.editing import add_weight
from narrows.ir.meta import Meta, copy_meta, shape_of
from narrows.ir.ops import dialect
from narrows.ir.ops.args import arguments, changed
from narrows.ir.ops.integer import LayerWeights
from narrows.ir.program import Draft, Program
from narrows.passes.base import Fidelity, Pass, PassResult
from narrows.passes.quant.parts import NOTHING, Labels, Parts, columns, find_parts
from narrows.passes.quant.plan import QuantPlan, of_pass
from narrows.passes.quant.survey import Survey, survey

Powers = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class ScaleParts(Pass):
    """Multiplies the parts of concatenations by the powers of two that a plan has for them.

    Attributes:
        plan: The plan, or the path of a saved one.
    """

    name: ClassVar[str] = "scale-parts"
    fidelity: ClassVar[Fidelity] = Fidelity.EXACT

    plan: QuantPlan | str | None = None

    def run(self, program: Program) -> PassResult:
        """Return the program with its parts scaled.

        Raises:
            PassError: There is no plan.
            PlanError: The plan is of another program.
        """
        plan = of_pass(self.name, self.plan)
        if not plan.parts:
            return PassResult(program, False)
        result = program.copy()
        found = survey(result, floats=plan.floats)
        parts = find_parts(result, found)
        remarks = Scaling(result, found, parts, powers_of(parts, plan.parts)).run()
        return PassResult(result, True, remarks=remarks)


def powers_of(parts: Parts, given: Powers) -> list[int]:
    """Return the power of every label; `PlanError` if the plan is of another program."""
    powers = [0] * (len(parts.sources) + 1)
    known = {cat.name for cat, _ in parts.sources}
    for label, (cat, index) in enumerate(parts.sources, 1):
        asked = given.get(cat.name, ())
        if asked and len(asked) != len(arguments(cat)["tensors"]):  # pruning dropped an operand
            raise _foreign(cat.name)
        powers[label] = asked[index] if asked else 0
    for name in given:
        if name not in known:
            raise _foreign(name)
    for label in range(1, len(powers)):
        if powers[label] != powers[parts.leader(label)]:
            raise _foreign(parts.sources[label - 1][0].name)
    return powers


def _foreign(name: str) -> PlanError:
    return PlanError(
        f"the plan scales the parts of {name!r} otherwise than this program can",
        why="it is of another program, or of one with other operands",
        hint="calibrate this program with narrows.quantize",
    )


class Scaling:
    """Scales the parts of a draft.

    Args:
        program: The draft.
        found: What works on codes in it.
        parts: Where its parts go.
        powers: Per label the power of two of the part.

    Attributes:
        restored: By the name of a tensor that holds one part as it was, the tensor's that it was
            made of.
    """

    def __init__(self, program: Draft, found: Survey, parts: Parts, powers: Sequence[int]) -> None:
        self.program, self.found, self.parts, self.powers = program, found, parts, powers
        self.graph = program.graph
        self.restored: dict[str, str] = {}

    def run(self) -> dict[str, str]:
        """Scale; return what a dump is to say of the nodes."""
        remarks: dict[str, str] = {}
        joins: dict[fx.Node, dict[int, int]] = {}
        for label, (cat, index) in enumerate(self.parts.sources, 1):
            if self.powers[label]:
                joins.setdefault(cat, {})[index] = self.powers[label]
        for layer in self.parts.absorbed:
            self._absorb(layer)
        for tensor, labels in self.parts.single.items():
            self._restore(tensor, labels, list(tensor.users))
        for tensor, reader in self.parts.read:
            held = self.parts.of(tensor)
            if held is not None:
                self._restore(tensor, held, [reader])
        # Last, as a concatenation may itself read one that is restored for it.
        for cat, powers in joins.items():
            self._join(cat, powers)
            remarks[cat.name] = "parts times " + ", ".join(
                f"2^{powers.get(i, 0)}" for i in range(len(arguments(cat)["tensors"]))
            )
        return remarks

    def _join(self, cat: fx.Node, powers: Mapping[int, int]) -> None:
        """Multiply operands of a concatenation."""
        operands = list(arguments(cat)["tensors"])
        for index, power in powers.items():
            name = f"{cat.name}_part{index}"
            with self.graph.inserting_before(cat):
                operands[index] = self._times(operands[index], power, name, cat)
        cat.args, cat.kwargs = changed(cat, {"tensors": operands})

    def _times(self, x: fx.Node, power: int, name: str, origin: fx.Node) -> fx.Node:
        made = self.graph.create_node("call_function", dialect.MULTIPLY, (x, 2.0**power), name=name)
        return _like(made, x, origin)

    def _absorb(self, node: fx.Node) -> None:
        """Divide the columns of a layer's weight."""
        form: Any = self.found.forms[node]
        layer: LayerWeights = form.weights(node)
        operand = form.operands(node)[0]
        labels = self.parts.of(operand)
        assert labels is not None
        powers = self._of(labels)
        if not any(powers):
            return
        weight = self.program.tensor(layer.weight).detach()
        factor = torch.exp2(-columns(form, layer, node, powers)).to(weight.device)
        scaled = (weight.double() * factor).to(weight.dtype)
        name = str(layer.weight.target)
        if len(self.program.users_of(name)) == 1:
            self.program.weights[name] = scaled
            return
        made = add_weight(self.program, f"{name}_{node.name}", scaled, origin=name)
        role = next(r for r, value in arguments(node).items() if value is layer.weight)
        node.args, node.kwargs = changed(node, {role: made})

    def _restore(self, tensor: fx.Node, labels: Labels, readers: Sequence[fx.Node]) -> None:
        """Let some read a tensor as it was."""
        powers = self._of(labels)
        left = {p for p, x in zip(powers, labels.along, strict=True) if x != NOTHING}
        if not any(left):
            return
        name = f"{tensor.name}_parts"
        with self.graph.inserting_after(tensor):
            if len(left) == 1:
                made = self._times(tensor, -left.pop(), name, tensor)
                self.restored[made.name] = tensor.name
            else:
                call = (tensor, powers, labels.axis)
                target = torch.ops.narrows.scale_parts.default
                made = self.graph.create_node("call_function", target, call, name=name)
                _like(made, tensor, tensor)
        for reader in readers:
            reader.replace_input_with(tensor, made)

    def _of(self, labels: Labels) -> list[int]:
        return [self.powers[x] for x in labels.along]


def unscaled(operand: fx.Node) -> tuple[fx.Node, float]:
    """Return what an operand of a concatenation was before it was scaled, and by which factor."""
    (reader, *_) = operand.users
    if operand.target is dialect.MULTIPLY and operand.name.startswith(f"{reader.name}_part"):
        return operand.args[0], float(operand.args[1])  # type: ignore[return-value, arg-type]
    return operand, 1.0


def _like(made: fx.Node, like: fx.Node, origin: fx.Node) -> fx.Node:
    copy_meta(origin, made)
    Meta(made).dynamic = Meta(like).dynamic
    Meta(made).shape, Meta(made).dtype = shape_of(like), Meta(like).dtype
    return made


__all__ = ["ScaleParts", "Scaling", "powers_of", "unscaled"]
