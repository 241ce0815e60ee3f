"""Widths and depths that are searched by interpolated feature maps (TAS).

X. Dong, Y. Yang: Network Pruning via Transformable Architecture Search, NeurIPS 2019.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from narrows.errors import UsageError
from narrows.training.footprint import Footprint
from narrows.training.gates import Gates, Hook
from narrows.training.schedules import Schedule, temperature_at
from narrows.training.sites import Gate, Names, gates_of, listed, output_of


def interpolated(features: Tensor, width: int, axis: int = 1) -> Tensor:
    """Return features with another number of channels, each the mean of those at its place.

    Channel ``i`` of ``width`` is the mean of the channels ``floor(i c / width)`` to
    ``ceil((i + 1) c / width) - 1`` of ``c``: adaptive average pooling along the channels.

    Args:
        features: A tensor with the channels on ``axis``.
        width: How many the result has.
        axis: The axis.
    """
    if features.shape[axis] == width:
        return features
    last = features.movedim(axis, -1)
    pooled = F.adaptive_avg_pool1d(last.reshape(-1, 1, last.shape[-1]), width)
    return pooled.view(*last.shape[:-1], width).movedim(-1, axis)


def drawn(scores: Tensor, samples: int, heat: float, generator: torch.Generator) -> Tensor:
    """Return the weights of ``samples`` choices that are drawn without replacement, zero elsewhere.

    With Gumbel numbers ``g``, the largest of ``log p + g`` are such a draw from ``p = softmax
    (scores)``; among them the weights are ``softmax((log p + g) / heat)``.

    Args:
        scores: ``[n]``.
        samples: ``K``.
        heat: The temperature.
        generator: What draws.
    """
    uniform = torch.rand(scores.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
    noisy = torch.log_softmax(scores, 0) - (-uniform.log()).log().to(scores.device)
    chosen = noisy.topk(min(samples, len(noisy))).indices
    return torch.zeros_like(noisy).scatter(0, chosen, torch.softmax(noisy[chosen] / heat, 0))


@dataclass(eq=False, repr=False, kw_only=True)
class SearchedWidths(Gates):
    """A distribution over widths for every layer, and over depths for every stage.

    A forward call in train mode draws ``K`` widths for a layer (`drawn`). Of each, the first
    channels of the features are brought to the largest drawn width (`interpolated`) and summed with
    their weights; the channels behind it are zero. A stage's result is the sum of what its blocks
    return, weighted in the same way by depths that are drawn. In the end the first channels stay,
    as many as the most probable width says, and the first blocks.

    `loss` keeps the expected share ``E`` of the multiplications (`Footprint`) near the target
    ``R``: ``strength`` times ``log E`` above ``1.05 R``, ``-log E`` below ``0.95 R``, else zero.

    Train the model's weights on some batches and the scores (``gates.parameters()``) on others, as
    the paper does; then train the pruned network with `training.distillation`.

    Each layer is a module, with one norm behind it at most.

    Args, beside the first three of `Gates`:
        widths: The shares of a layer's channels to choose from.
        depths: A stage each: per residual block, in their order, the path of its module and the
            weight that ends its branch. A block whose branch is gone has to return its input, as
            a residual block does (behind a ReLU: of what a ReLU made).
        target: ``R``, the share of the multiplications that is to be left.
        samples: ``K``.
        temperature: The temperature of the weights; a function of the step cools it.
        strength: The strength of `loss`.
        kind: What the share is of: ``macs`` or ``weights``.
        seed: The seed of the draws.
    """

    inputs: ClassVar[Names] = ()
    tied: ClassVar[bool] = False
    widths: Sequence[float] = (0.25, 0.5, 0.75, 1.0)
    depths: Sequence[Mapping[str, str]] = ()
    target: float = 0.5
    samples: int = 2
    temperature: Schedule = 1.0
    strength: float = 2.0
    kind: str = "macs"
    seed: int = 0

    def _named(self) -> Names:
        return [*listed(self.outputs), *(end for stage in self.depths for end in stage.values())]

    def _build(self) -> None:
        _refuse_shares(self.widths, self.target, self.samples)
        named = listed(self.outputs)
        wide = {g.name for g in gates_of(self._program, named).gates} if named else set[str]()
        numbers = {g.sides[0].weight: n for n, g in enumerate(self.gates)}
        self._wide = [n for n, g in enumerate(self.gates) if g.name in wide]
        self._stages = [
            [numbers[self._program.canonical(end)] for end in stage.values()]
            for stage in self.depths
        ]
        self.choices = [_choices(self.gates[n].width, self.widths) for n in self._wide]
        self.width_scores = _zeros(self.choices, self._device())
        self.depth_scores = _zeros(self._stages, self._device())
        self._footprint = Footprint(self._program, self.gates, self.kind)
        self._generator = torch.Generator().manual_seed(self.seed)
        for place, number in enumerate(self._wide):
            self._watch_width(place, self.gates[number])
        for place, stage in enumerate(self.depths):
            self._watch_depth(place, list(stage))

    # ------------------------------------------------------------------ masks

    def hard(self) -> list[Tensor]:
        """Return the first channels, by the most probable width, of blocks that are deep enough."""
        found = [torch.ones(g.width, dtype=torch.bool) for g in self.gates]
        for number, scores, choice in zip(self._wide, self.width_scores, self.choices, strict=True):
            found[number][choice[int(scores.argmax())] :] = False
        for stage, scores in zip(self._stages, self.depth_scores, strict=True):
            for number in stage[int(scores.argmax()) + 1 :]:
                found[number][:] = False
        return found

    def expected(self) -> list[Tensor]:
        """Return the probability that each channel is there, per gate ``[width]``."""
        found = list(self.masks())
        for number, scores, choice in zip(self._wide, self.width_scores, self.choices, strict=True):
            places = torch.arange(self.gates[number].width, device=scores.device)
            there = places[None] < torch.tensor(choice, device=scores.device)[:, None]
            found[number] = torch.softmax(scores, 0) @ there.float()
        for stage, scores in zip(self._stages, self.depth_scores, strict=True):
            reached = torch.softmax(scores, 0).flip(0).cumsum(0).flip(0)
            for number, share in zip(stage, reached, strict=True):
                found[number] = found[number] * share
        return found

    def loss(self) -> Tensor:
        """Return the penalty on the expected share of the network."""
        share = self._footprint.share(self.expected())
        left = share.item()
        if left > 1.05 * self.target:
            return self.strength * share.log()
        return -self.strength * share.log() if left < 0.95 * self.target else share * 0

    def _may_close(self, number: int) -> bool:
        return any(number in stage for stage in self._stages)

    # ------------------------------------------------------------------ features

    def _draw(self, scores: Tensor) -> Tensor:
        heat = temperature_at(self.temperature, self.done)
        return drawn(scores, self.samples, heat, self._generator)

    def _watch_width(self, place: int, gate: Gate) -> None:
        output, choice = output_of(gate), self.choices[place]

        def hook(x: Tensor, y: Tensor) -> Tensor | None:
            if not self._learning:
                return None
            weights = self._draw(self.width_scores[place])
            parts = [int(n) for n in torch.nonzero(weights.detach())]
            widest = max(choice[n] for n in parts)
            mixed = sum_of(
                weights[n] * interpolated(y.narrow(output.axis, 0, choice[n]), widest, output.axis)
                for n in parts
            )
            rest = y.shape[output.axis] - widest
            zeros = torch.zeros_like(y.narrow(output.axis, 0, rest))
            return torch.cat([mixed, zeros], output.axis)

        self._watch_module(output.module, hook)

    def _watch_depth(self, place: int, blocks: Sequence[str]) -> None:
        returned: dict[int, Tensor] = {}

        def keep(number: int) -> Hook:
            def hook(x: Tensor, y: Tensor) -> Tensor | None:
                if not self._learning:
                    return None
                returned[number] = y
                if number + 1 < len(blocks):
                    return None
                weights = self._draw(self.depth_scores[place])
                mixed = sum_of(
                    weights[n] * interpolated(returned[n], y.shape[1])
                    for n in range(len(blocks))
                    if bool(weights[n])
                )
                returned.clear()
                return mixed

            return hook

        for number, path in enumerate(blocks):
            self._watch_module(path, keep(number))


def sum_of(parts: Sequence[Tensor] | object) -> Tensor:
    """Return the sum of at least one tensor."""
    return torch.stack(list(parts)).sum(0)  # type: ignore[call-overload]


def _zeros(choices: Sequence[Sequence[int]], device: torch.device) -> nn.ParameterList:
    """Return a score of zero for each of several choices."""
    return nn.ParameterList(nn.Parameter(torch.zeros(len(c), device=device)) for c in choices)


def _choices(width: int, shares: Sequence[float]) -> list[int]:
    """Return the widths that shares of a width are, ascending, at least one channel each."""
    return sorted({max(1, round(width * share)) for share in shares})


def _refuse_shares(widths: Sequence[float], target: float, samples: int) -> None:
    given = {"widths": widths, "target": [target]}
    for name, shares in given.items():
        wrong = [s for s in shares if not 0 < s <= 1]
        if wrong or not shares:
            raise UsageError(
                f"{name} has no share of what is there: {wrong or 'nothing'}",
                where=name,
                why="shares lie above 0, and are at most 1",
                hint="widths=(0.25, 0.5, 0.75, 1.0), target=0.5",
            )
    if samples < 1:
        raise UsageError(
            f"{samples} widths cannot be drawn",
            where="samples",
            why="the features are a sum over those that are",
            hint="samples=2",
        )


__all__ = ["SearchedWidths", "drawn", "interpolated"]
