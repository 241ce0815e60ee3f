"""Predictors that decide per input which filters of a layer fire, and their static mean (FTWT).

S. Elkerdawy, M. Elhoushi, H. Zhang, N. Ray: Fire Together Wire Together, CVPR 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from narrows.errors import UsageError
from narrows.training.gates import Gates
from narrows.training.sites import Gate, Names, output_of


def firing(activations: Tensor, mass: float, axis: int = 1) -> Tensor:
    """Return per input the filters with the most activation mass, booleans ``[n, channels]``.

    A filter's mass is the sum of its absolute activations. They are taken largest first, as few as
    make up the share ``mass`` of the whole.

    Args:
        activations: ``[n, ...]``.
        mass: The share, above 0, at most 1.
        axis: The axis of the channels.
    """
    sizes = activations.detach().abs().movedim(axis, 1).flatten(2).sum(-1)
    order = sizes.argsort(dim=1, descending=True, stable=True)
    sorted_sizes = sizes.gather(1, order)
    before = sorted_sizes.cumsum(1) - sorted_sizes
    fires = before < mass * sizes.sum(1, keepdim=True)
    return torch.zeros_like(fires).scatter(1, order, fires)


@dataclass(eq=False, repr=False, kw_only=True)
class Predictors(Gates):
    """A predictor beside each layer: ``sigmoid(V maxpool(x) + v)`` per filter, from the layer's
    input.

    The network stands still, in eval mode, while the predictors learn which filters fire: `loss` is
    the binary cross-entropy to `firing` of the ungated activations. So while ``gates.training`` the
    model runs without masks, and after ``gates.eval()`` with the static ones.

    What they predict is a decision per input, which no smaller program can take. `plan` and eval
    mode are static: a filter stays if it fired, as predicted, in the running mean of the training
    inputs at least half of the time (`mean_decisions`). Within ``with gates.dynamic():`` the model
    runs with the decisions per input, to compare.

    >>> gates = training.Predictors(model.eval(), program, outputs="*", mass=0.9)
    >>> for x in images:
    ...     model(x); gates.loss().backward(); gates.step()
    ...     optimizer.step(); optimizer.zero_grad()

    Each layer is a module, with one norm behind it at most.

    Args, beside the first three of `Gates`:
        mass: The share of the activation mass that the filters to be predicted make up.
        momentum: How fast the running mean of decisions follows.
        seed: The seed of the predictors' weights.
    """

    inputs: ClassVar[Names] = ()
    tied: ClassVar[bool] = False
    mass: float = 0.9
    momentum: float = 0.1
    seed: int = 0

    def _build(self) -> None:
        if not 0 < self.mass <= 1:
            raise UsageError(
                f"filters cannot make up {self.mass!r} of the activation mass",
                where="mass",
                why="it is a share of the whole",
                hint="mass=0.9",
            )
        self._dynamic = False
        layers = [g.sides[0].layer for g in self.gates]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.predictors = nn.ModuleList(nn.Linear(u.inputs, u.outputs) for u in layers)
        for predictor in self.predictors:
            nn.init.constant_(predictor.bias, 1.0)  # type: ignore[arg-type]
        self.predictors.to(self._device())
        self.mean_decisions = [torch.ones(g.width) for g in self.gates]
        self._logits: dict[int, Tensor] = {}
        self._losses: dict[int, Tensor] = {}
        for number, gate in enumerate(self.gates):
            self._attach(number, gate)

    def masks(self) -> Sequence[Tensor]:
        """Return ones: the network runs as it is while the predictors learn."""
        self._losses = {}
        return super().masks()

    def hard(self) -> list[Tensor]:
        """Return the static decisions; ones within `dynamic`, where each input has its own."""
        if self._dynamic:
            return [torch.ones(g.width, dtype=torch.bool) for g in self.gates]
        return [m >= 0.5 for m in self.mean_decisions]

    def loss(self) -> Tensor:
        """Return the mean cross-entropy of the predictors in the last forward call."""
        if not self._losses:
            return super().loss()
        return torch.stack(list(self._losses.values())).mean()

    @contextmanager
    def dynamic(self) -> Iterator[None]:
        """Run the model with a decision per input inside a ``with`` block."""
        self._dynamic = True
        try:
            yield
        finally:
            self._dynamic = False

    def _learns(self, model: nn.Module) -> bool:
        return self.training and not self._dynamic

    def _attach(self, number: int, gate: Gate) -> None:
        output, layer = output_of(gate), gate.sides[0].layer
        self._watch_module(layer.weight.rpartition(".")[0], self._predict(number, layer.y_axis))
        self._watch_module(output.module, self._decide(number, output.axis))

    def _predict(self, number: int, axis: int) -> Callable[[Tensor, Tensor], None]:
        def hook(x: Tensor, y: Tensor) -> None:
            pooled = (
                x.detach().movedim(axis, 1).flatten(2) if x.dim() > 2 else x.detach()[..., None]
            )
            with torch.set_grad_enabled(self._learning):  # also where the network runs without
                self._logits[number] = self.predictors[number](pooled.amax(-1))

        return hook

    def _decide(self, number: int, axis: int) -> Callable[[Tensor, Tensor], Tensor | None]:
        def hook(x: Tensor, y: Tensor) -> Tensor | None:
            logits = self._logits.pop(number)
            if self._learning:
                target = firing(y, self.mass, axis).to(logits.dtype)
                with torch.enable_grad():
                    self._losses[number] = F.binary_cross_entropy_with_logits(logits, target)
                decided = (logits.detach() > 0).float().mean(0).cpu()
                self.mean_decisions[number].lerp_(decided, self.momentum)
            if not self._dynamic:
                return None
            view = [len(y)] + [-1 if a == axis else 1 for a in range(1, y.dim())]
            return y * (logits > 0).to(y.dtype).view(view)

        return hook


__all__ = ["Predictors", "firing"]
