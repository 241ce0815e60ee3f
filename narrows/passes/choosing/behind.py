"""What becomes of a layer's result: the sum it goes into, the gate before that, the clip behind."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from narrows.ir.meta import shape_of
from narrows.ir.ops import dialect, table
from narrows.ir.ops.integer import Clip

LEAST_GATE = 0.1  # what a gate lets through at least when an error is divided by it

ANYWHERE = (-math.inf, math.inf)


@dataclass(frozen=True)
class Sum:
    """A sum that a layer's result goes into.

    Attributes:
        node: The sum.
        other: The other operand.
        gate: What the result is multiplied with before, or ``None``.
    """

    node: fx.Node
    other: fx.Node
    gate: fx.Node | None


def sum_after(node: fx.Node) -> Sum | None:
    """Return the sum that a layer's result goes into, at once or behind a gate.

    There is none where anything else reads the result: that wants it as it was, and neither with
    what the sum has lost made up for, nor with errors that a clip behind the sum hides. The gate
    alone may read what it gates, as in ``x * sigmoid(x)`` or a squeeze-and-excitation block; it is
    taken as it is in the unpruned network.
    """
    gate = None
    while True:
        user = _next(node, gate is not None)
        if user is None:
            return None
        other = _other(user, node)
        assert other is not None
        if user.target is dialect.ADD:
            plain = user.kwargs.get("alpha", 1) == 1 and shape_of(other) == shape_of(node)
            return Sum(user, other, gate) if plain else None
        gate, node = other, user


def _next(node: fx.Node, gated: bool) -> fx.Node | None:
    """Return the sum or the one gate that a result goes into, if nothing else reads it."""
    found = [u for u in node.users if shape_of(u) == shape_of(node) and _other(u, node) is not None]
    gates = [u for u in found if u.target is dialect.MULTIPLY]
    if len(node.users) == 1:
        return next(
            (u for u in found if u.target is dialect.ADD or (u in gates and not gated)), None
        )
    return gates[0] if len(gates) == 1 and not gated and _reads_alone(gates[0], node) else None


def _reads_alone(product: fx.Node, node: fx.Node) -> bool:
    """Whether all else that reads a result serves the gate that a product multiplies it with."""
    gate = _other(product, node)
    todo, seen = [u for u in node.users if u is not product], {product}
    while todo:
        n = todo.pop()
        if n in seen:
            continue
        seen.add(n)
        if n.op == "output" or (n is gate and len(n.users) > 1):
            return False
        todo += n.users
    return True


def clip_after(node: fx.Node) -> tuple[float, float]:
    """Return between which numbers all that read a tensor tell them apart: those of a clip.

    Below and above it makes no difference what a number is. It is `ANYWHERE` where something else
    reads the tensor, or where several clips have other bounds.
    """
    found = {_bounds(user) for user in node.users}
    return found.pop() if len(found) == 1 else ANYWHERE


def _bounds(node: fx.Node) -> tuple[float, float]:
    form = table.integer_form(node) if node.op == "call_function" else None
    return form.bounds(node) if isinstance(form, Clip) else ANYWHERE


def divided(error: Tensor, gate: Tensor | None) -> Tensor:
    """Return how far off a result has to be for an error behind a gate, the gate not too small."""
    if gate is None:
        return error
    return error / torch.where(gate < 0, gate.clamp(max=-LEAST_GATE), gate.clamp(min=LEAST_GATE))


def room(
    y: Tensor, total: Sum | None, clip: tuple[float, float], value: Callable[[fx.Node], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return how far a layer's result may be off, downwards and upwards, and no reader sees it.

    A ReLU makes the same of all that is not above zero. Such results bind no weights: what they
    leave free makes up for what is gone elsewhere (He et al. 2017 and Zhang et al., Accelerating
    Very Deep Convolutional Networks for Classification and Detection, TPAMI 2016, solve for what
    comes out of it, too).

    Args:
        y: What the unpruned layer makes.
        total: The sum that it goes into, if there is one.
        clip: Between which numbers the readers of that, or of ``y``, tell them apart.
        value: Gives the value of a node in the unpruned network.

    Returns:
        Numbers not above and not below zero, both zero where any error counts, each in the shape of
        ``y``.
    """
    gate = None if total is None or total.gate is None else value(total.gate)
    whole = y if gate is None else y * gate
    whole = whole if total is None else whole + value(total.other)
    low, high = clip
    nothing, endless = torch.zeros_like(whole), torch.full_like(whole, math.inf)
    below, above = whole <= low, whole >= high
    down = torch.where(below, -endless, torch.where(above, high - whole, nothing))
    up = torch.where(below, low - whole, torch.where(above, endless, nothing))
    if gate is None:
        return down, up
    # Behind a gate that is hardly open, or turns the sign, every error counts.
    open_ = gate > LEAST_GATE
    return torch.where(open_, down / gate, nothing), torch.where(open_, up / gate, nothing)


def _other(user: fx.Node, node: fx.Node) -> fx.Node | None:
    """Return the other one of two operands."""
    others = [n for n in user.all_input_nodes if n is not node]
    return others[0] if len(others) == 1 else None


__all__ = ["ANYWHERE", "Sum", "clip_after", "divided", "room", "sum_after"]
