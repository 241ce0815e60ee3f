"""What layers see of data: one streamed pass that sums up what a criterion measures.

Start at `informed`. Batches go through the program once, for all layers. Of every layer and side
only sums are kept, so memory does not grow with the data. Where a criterion needs gradients, each
batch is sent back once, from the user's loss or from a probe of the network's own outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx

from narrows.errors import PlanError, PlanUsageError, users_code
from narrows.ir.program import Program
from narrows.ir.structure.layers import SIDES, Layer, layers_of
from narrows.passes.choosing.criteria.base import GRADIENTS, NoScoreError, comparable
from narrows.passes.choosing.criteria.chains import after
from narrows.passes.choosing.divergence import Divergence, refuse_nan_outputs
from narrows.passes.choosing.gradients import Loss, leaf, lost, send_back
from narrows.passes.choosing.seen import Seen, Sight, by_example, lead_of
from narrows.passes.choosing.statistics import examples_of
from narrows.passes.quant.batches import Told, as_inputs, with_items, without_extras

ASKED = Told(
    "what layers see is measured on it",
    "data=[images] or any iterable of inputs; an iterator is used up once",
)


@dataclass(frozen=True, eq=False)
class Informed:
    """A criterion that has seen data, and scores as one that needs none.

    Attributes:
        criterion: The criterion.
        sums: What was measured, by weight and side; an error where the criterion has no meaning.
    """

    criterion: Any
    sums: dict[tuple[str, str], dict[str, Tensor] | NoScoreError] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The criterion's name."""
        return self.criterion.name

    @property
    def sides(self) -> tuple[str, ...]:
        """The sides that the criterion scores."""
        return getattr(self.criterion, "sides", SIDES)

    @property
    def comparable(self) -> bool:
        """Whether the criterion's scores can be compared as they are."""
        return comparable(self.criterion)

    def score(self, program: Program, layer: Layer, side: str) -> Any:
        """Return what the criterion makes of what was measured."""
        known = self.sums.get((layer.weight, side))
        if known is None:
            why = f"no floating-point numbers were seen on its {side}"
            if layer.contraction is None:
                why = "it looks rows up, and multiplies nothing"
            raise NoScoreError(f"{self.name} has no score for it", why=why)
        if isinstance(known, NoScoreError):
            raise known
        return self.criterion.weigh(program, layer, side, known)

    def add(self, sides: Sequence[str], seen: Seen) -> None:
        """Add what a batch shows of a layer, to what is known of some sides of its weight."""
        keys = [(seen.layer.weight, side) for side in sides]
        known = self.sums.get(keys[0])
        if isinstance(known, NoScoreError):
            return
        what = f"{self.name} failed to measure the {seen.side} of {seen.layer.weight!r}"
        try:
            with users_code(what, PlanError):
                given = self.criterion.measure(seen)
        except NoScoreError as no:
            self.sums.update(dict.fromkeys(keys, no))
            return
        more = {"examples": torch.tensor(float(seen.examples)), **given}
        more = {name: value.detach().double() for name, value in more.items()}
        total = more if known is None else {n: known[n] + more[n] for n in more}
        self.sums.update(dict.fromkeys(keys, total))


def informed(
    program: Program,
    criterion: Any,
    data: Iterable[Any] | None,
    loss: Loss | None = None,
    sides: Sequence[str] = SIDES,
    outputs: str = "auto",
    seed: int = 0,
) -> Informed:
    """Return a criterion that has seen data.

    Args:
        program: The program.
        criterion: The criterion; see `narrows.passes.choosing.criteria.base.Measuring`.
        data: Batches, streamed once: each a tuple of positional inputs, a dict of inputs by name,
            or one tensor. With a loss, a tuple or a dict may hold more, such as labels.
        loss: ``(outputs, batch) -> number``, for a criterion that needs gradients, in place of the
            probe. It sums over the examples; a mean scales all scores alike.
        sides: The sides that are going to be scored.
        outputs: What the outputs are, to be probed: ``logits``, ``values`` or ``auto``; see
            `Divergence.of`.
        seed: Of the probe.

    Raises:
        PlanUsageError: There is no data, or a loss or a kind of outputs that has no effect, or is
            none.
        PlanError: The loss fails or is not finite, or the criterion fails.
        UsageError: An item is no batch.
        ProgramError: An item does not fit the program.
    """
    backward = getattr(criterion, "data", "") == GRADIENTS
    _refuse(criterion, data, loss, outputs, backward)
    result = Informed(criterion)
    wanted = [side for side in sides if side in result.sides]
    if not wanted:
        return result
    layers = [layer for layers in layers_of(program).values() for layer in layers]
    ends = {_end(layer): layer for layer in layers}
    generator = torch.Generator().manual_seed(seed)
    divergence: Divergence | None = None
    split = as_inputs if loss is None else without_extras(program)
    for flat, item in with_items(program, data, "scoring", split, ASKED):
        taken = _Pass(result, wanted, ends, examples_of(program, flat), backward)
        if not backward:
            with torch.no_grad():
                program.run_flat(flat, call=taken.call)
            continue
        with torch.inference_mode(False), torch.enable_grad():
            given = [leaf(t) if isinstance(t, Tensor) else t for t in flat]
            weights = {name: leaf(w) for name, w in program.weights.items()}
            made = program.run_flat(given, weights, call=taken.call)
            if loss is None:
                refuse_nan_outputs(program, made)
                divergence = divergence or Divergence.of(made, outputs)
                number = divergence.probe(made, generator)
            else:
                number = lost(loss, pytree.tree_unflatten(made, program.out_spec), item)
            send_back(program, number)
        taken.finish()
    return result


def _refuse(criterion: Any, data: Any, loss: Any, outputs: str, backward: bool) -> None:
    if data is None:
        raise PlanUsageError(
            f"{criterion.name} scores by data, and there is none",
            why="it measures what layers see" + (", and gradients" if backward else ""),
            hint="data=[images]",
        )
    if loss is not None and not backward:
        raise PlanUsageError(
            f"a loss has no effect with {criterion.name}",
            why="it needs no gradients",
            hint="criterion='taylor', or leave out loss",
        )
    if outputs != "auto" and (loss is not None or not backward):
        idle = criterion.name if loss is None else "a loss"
        raise PlanUsageError(
            f"outputs={outputs!r} has no effect with {idle}",
            why="no probe of the outputs is sent back",
            hint="leave it out",
        )
    if loss is not None and not callable(loss):
        raise PlanUsageError(f"a loss is a function (outputs, batch) -> number, got {loss!r:.60}")


class _Pass:
    """One batch on its way through the program."""

    def __init__(
        self,
        result: Informed,
        sides: Sequence[str],
        ends: dict[fx.Node, Layer],
        examples: int,
        backward: bool,
    ) -> None:
        self.result, self.sides, self.ends = result, sides, ends
        self.examples, self.backward = examples, backward
        self.layers = {layer.node: layer for layer in ends.values()}
        self.sights: dict[Layer, Sight] = {}

    def call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a node, and look at what it reads and makes."""
        layer, target = self.layers.get(node), node.target
        assert callable(target)
        if layer is not None:
            args, kwargs = self.reading(layer, args, kwargs)
        value = target(*args, **kwargs)
        owner = self.ends.get(node)
        if layer is None and owner is None:
            return value
        value = self.tapped(value)
        if layer is not None:
            self.sights[layer].result = value
        if owner is not None:
            self.sights[owner].end = value
        if not self.backward:
            self.look(layer, owner)
        return value

    def reading(
        self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with an activation of the layer's own, and begin its sight."""
        node, c, target = layer.node, layer.contraction, layer.node.target
        assert callable(target)
        if c is None:
            self.sights[layer] = Sight(layer, target, None, None)
            return args, kwargs
        given = [*zip(node.args, args, strict=True)]
        given += [(n, kwargs[name]) for name, n in node.kwargs.items()]
        x = self.tapped(next((v for n, v in given if n is c.x), None))
        weight = next((v for n, v in given if n is c.weight), None)

        def swapped(x: Any, weight: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
            values = {id(c.x): x, id(c.weight): weight}
            new = (values.get(id(n), v) for n, v in zip(node.args, args, strict=True))
            named = {k: values.get(id(n), kwargs[k]) for k, n in node.kwargs.items()}
            return tuple(new), named

        def apply(x: Tensor, weight: Tensor) -> Tensor:
            new, named = swapped(x, weight)
            return target(*new, **named)

        self.sights[layer] = Sight(layer, apply, x, weight)
        return swapped(x, weight)

    def tapped(self, value: Any) -> Any:
        """Return a tensor that keeps its gradient, if gradients are needed, else it as it is."""
        if not self.backward or not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if not value.requires_grad:
            return value.detach().requires_grad_()
        own = value.view_as(value)
        own.retain_grad()
        return own

    def look(self, layer: Layer | None, owner: Layer | None) -> None:
        """Measure what is complete: a layer's inputs when it has run, its outputs at its end."""
        if layer is not None and ("inputs" in self.sides or self.whole):
            self.measure(self.sights[layer], "inputs")
        if owner is not None:
            if "outputs" in self.sides and not self.whole:
                self.measure(self.sights[owner], "outputs")
            del self.sights[owner]

    @property
    def whole(self) -> bool:
        """Whether the criterion measures a layer once for both sides."""
        return getattr(self.result.criterion, "whole", False)

    def finish(self) -> None:
        """Measure all layers once gradients are there."""
        for layer in list(self.sights):
            for side in ("inputs",) if self.whole else self.sides:
                self.measure(self.sights[layer], side)
            del self.sights[layer]

    def measure(self, sight: Sight, side: str) -> None:
        """Add what one side of a layer shows."""
        layer, c = sight.layer, sight.layer.contraction
        value, at, node = sight.end, layer.y_axis, layer.node
        if side == "inputs":
            if c is None:  # a lookup reads no channels
                return
            value, at, node = sight.x, c.x_axis, c.x
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return
        sides = self.sides if self.whole else (side,)
        if self.backward and value.grad is None:
            self.result.sums.update({(layer.weight, side): self.cut() for side in sides})
            return
        lead = lead_of(node, at)
        grads = None
        if value.grad is not None:
            grads = by_example(value.grad, at, lead, self.examples)
        values = by_example(value.detach(), at, lead, self.examples)
        seen = Seen(layer, side, len(values), values, grads, sight)
        self.result.add(sides, seen)

    def cut(self) -> NoScoreError:
        """Return the error for a layer that no gradient reaches."""
        return NoScoreError(
            f"{self.result.name} has no score for it",
            why="no gradient reaches it: no output depends on it, or only through an operator that "
            "has no derivative",
            hint="criterion='wanda'",
        )


def _end(layer: Layer) -> fx.Node:
    """Return the node that holds a layer's channels as the rest of the network sees them."""
    return (after(layer) or [layer.node])[-1]
