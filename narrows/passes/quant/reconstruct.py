"""One block of a network, reconstructed: its exponents chosen, then its rounding learned.

The block is held to what it computes in floating-point, while its inputs come from the quantized
network before it. Three papers are behind it: AdaRound (Nagel et al., ICML 2020) learns for every
weight whether to round it up or down, BRECQ (Li et al., ICLR 2021) does so block by block, and
QDrop (Wei et al., ICLR 2022) leaves activations unrounded at random meanwhile. That exponents are
chosen by the same loss, and first, is RAPQ's (Yao et al., IJCAI 2022); here they are whole numbers
from the beginning, tried one by one.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from narrows.ir.ops import table
from narrows.passes.quant.trial import Drop, Kernel, Site, Span, Trial

REGULARISER = 2.0  # against the relative loss of a block, per weight
SOFT = 0.2  # the share of the iterations without the regulariser
BETA = (20.0, 2.0)  # its sharpness, from the first iteration that has it to the last
TRAVEL = 16.0  # how far the learning rate takes a weight's alpha in all iterations together
FASTEST = 0.1  # but no faster than this at a time
BIAS = 2.0  # the same for a bias, in steps of the accumulator's rounding error
GAIN = 0.998  # another exponent is taken if the loss falls below this share of what it was

Values = dict[fx.Node, Tensor]


@dataclass(eq=False)
class Block:
    """A block with what goes into it and what should come out, item by item.

    Attributes:
        span: What to run.
        plain: What it reads in the floating-point network.
        rounded: What it reads in the quantized one.
        targets: What it computes in floating-point.
        groups: The grids of activations that may still change; those of a group do so together.
        kernels: The layers whose rounding is not learned yet.
        power: ``p`` of the loss.
    """

    span: Span
    plain: list[Values]
    rounded: list[Values]
    targets: list[Tensor]
    groups: list[list[Site]] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)
    power: float = 2.0


@dataclass(frozen=True)
class Steps:
    """Which steps are tried for a grid, as factors.

    Attributes:
        activation: Around the step that there is.
        weight: Around the step of every channel.
    """

    activation: tuple[float, ...] = (0.5, 2.0)
    weight: tuple[float, ...] = (1.0, 0.5, 2.0)  # of equals the first: a channel of zeros stays


POWERS_OF_TWO = Steps()


def distance(made: Tensor, target: Tensor, power: float) -> Tensor:
    """Return the mean of ``|made - target| ** power``."""
    error = made - target
    return (error * error).mean() if power == 2.0 else error.abs().pow(power).mean()


def apart(made: Sequence[Any], targets: Sequence[Any]) -> float:
    """Return how far outputs are apart: squared errors over squares, one after the other."""
    total = 0.0
    for a, b in zip(made, targets, strict=True):
        if isinstance(b, Tensor) and b.is_floating_point():
            total += float((a - b).square().sum() / b.square().sum().clamp(min=1e-30))
    return total


def loss_of(trial: Trial, block: Block, items: Sequence[int]) -> float:
    """Return the loss of a block as it is, everything rounded."""
    total = 0.0
    with torch.no_grad():
        for i in items:
            made = trial.run(block.span, on(block.rounded[i], trial), "hard")
            total += float(distance(made, block.targets[i].to(trial.device), block.power))
    return total / len(items)


def on(values: Values, trial: Trial) -> Values:
    """Return values on the device of a trial."""
    return {n: v.to(trial.device) if isinstance(v, Tensor) else v for n, v in values.items()}


# ------------------------------------------------------------------ exponents


def choose_steps(trial: Trial, block: Block, items: Sequence[int], steps: Steps) -> float:
    """Choose the steps of a block's weights and activations by its loss; return the loss.

    Every channel of a weight takes the step whose rounding leaves the layer's output closest to
    the floating-point one, given the rounded input; the layer keeps them if the block's loss says
    so. Every activation's step is tried beside its neighbours. Both are done twice, as each
    depends on the other.
    """
    best = loss_of(trial, block, items)
    for _ in range(2):
        before = best
        for group in block.groups:
            best = choose_activation(group, steps, best, lambda: loss_of(trial, block, items))
        for kernel in block.kernels:
            held = kernel.steps
            kernel.steps = _closest(trial, block, kernel, items, steps.weight)
            loss = loss_of(trial, block, items)
            if loss < best:
                best = loss
            else:
                kernel.steps = held
        if best > GAIN * before:
            break
    return best


def choose_activation(
    sites: Sequence[Site], steps: Steps, best: float, loss: Callable[[], float]
) -> float:
    """Give sites that share a grid another step if the loss falls; return the loss."""
    for factor in steps.activation:
        while True:
            held = [s.step for s in sites]
            for site in sites:
                site.step *= factor
            now = loss()
            if now < GAIN * best:
                best = now  # and one more in the same direction
                continue
            for site, step in zip(sites, held, strict=True):
                site.step = step
            break
    return best


def _closest(
    trial: Trial, block: Block, kernel: Kernel, items: Sequence[int], factors: Iterable[float]
) -> Tensor:
    """Return the step of every channel at which its output is closest to the float one."""
    layer = kernel.layer
    form = table.integer_form(layer)
    assert form is not None
    operand = form.operands(layer)[0]
    part = trial.span(layer, [operand])
    pairs = []
    with torch.no_grad():
        for i in items:
            kept: dict[fx.Node, Tensor] = dict.fromkeys([operand])  # type: ignore[arg-type]
            trial.run(block.span, on(block.rounded[i], trial), "hard", keep=kept)
            goal: dict[fx.Node, Tensor] = dict.fromkeys([layer])  # type: ignore[arg-type]
            trial.run(block.span, on(block.plain[i], trial), "float", keep=goal)
            pairs.append((kept, goal[layer]))
        held = kernel.steps
        tried = [torch.maximum(held * f, kernel.finest) for f in factors]
        errors = []
        for steps in tried:
            kernel.steps = steps
            made = ((trial.run(part, kept, "hard") - goal) for kept, goal in pairs)
            errors.append(sum(_per_channel(e, kernel) for e in made))
        kernel.steps = held
    best = torch.stack(errors).argmin(0)  # type: ignore[arg-type]
    return torch.gather(torch.stack([t.flatten() for t in tried]), 0, best.reshape(1, -1)).reshape(
        held.shape
    )


def _per_channel(error: Tensor, kernel: Kernel) -> Tensor:
    """Return the squared error per step of a kernel."""
    if kernel.steps.numel() == 1:
        return (error * error).sum().reshape(1)
    return (error * error).sum(_other_axes(error, kernel))


# ------------------------------------------------------------------ rounding


def correct_biases(trial: Trial, block: Block, items: Sequence[int]) -> None:
    """Take every layer's mean error from its bias, channel by channel, where the loss falls."""
    best = loss_of(trial, block, items)
    for kernel in block.kernels:
        if kernel.bias is None:
            continue
        errors = _errors(trial, block, kernel, items)
        mean = torch.stack([e.mean(_other_axes(e, kernel)) for e in errors]).mean(0)
        held = kernel.shift
        moved = -mean.reshape(kernel.bias.shape)
        kernel.shift = moved if held is None else held + moved
        loss = loss_of(trial, block, items)
        if loss < best:
            best = loss
        else:
            kernel.shift = held


def _errors(trial: Trial, block: Block, kernel: Kernel, items: Sequence[int]) -> list[Tensor]:
    """Return by how much a layer's outputs differ from what they should be, item by item."""
    found = []
    with torch.no_grad():
        for i in items:
            kept: dict[fx.Node, Tensor] = dict.fromkeys([kernel.layer])  # type: ignore[arg-type]
            goal: dict[fx.Node, Tensor] = dict.fromkeys([kernel.layer])  # type: ignore[arg-type]
            trial.run(block.span, on(block.rounded[i], trial), "hard", keep=kept)
            trial.run(block.span, on(block.plain[i], trial), "float", keep=goal)
            found.append(kept[kernel.layer] - goal[kernel.layer])
    return found


def _other_axes(error: Tensor, kernel: Kernel) -> list[int]:
    """Return the axes of a layer's output that are not its channels'."""
    axis = 1 if kernel.weight.dim() > 2 else error.dim() - 1
    return [a for a in range(error.dim()) if a != axis]


def learn(
    trial: Trial,
    block: Block,
    iterations: int,
    seed: int,
    *,
    share: float = 0.5,
    biases: bool = True,
    seconds: float | None = None,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Learn the rounding of a block's weights; return how many iterations there were.

    Args:
        trial: The network.
        block: The block; its kernels have codes afterwards.
        iterations: How many, each on one item.
        seed: What chance comes from.
        share: Of the activations, how many are left unrounded.
        biases: Whether biases are learned, too.
        seconds: How long it may take, in place of a number of iterations.
        tell: Told how far it is.
    """
    if not block.kernels:
        return 0
    scale = max(loss_of(trial, block, range(min(4, len(block.targets)))), 1e-30)
    for kernel in block.kernels:
        kernel.open()
    free = [k for k in block.kernels if biases and k.bias is not None]
    units = _bias_units(trial, block, free)
    first = [
        torch.zeros_like(u) if k.shift is None else k.shift
        for k, u in zip(free, units, strict=True)
    ]
    shifts = [torch.zeros_like(unit) for unit in units]
    alphas = [k.alpha for k in block.kernels if k.alpha is not None]
    for tensor in (*alphas, *shifts):
        tensor.requires_grad_(True)
    drop = Drop(share, torch.Generator(trial.device).manual_seed(seed))
    draw = random.Random(seed)
    start = time.monotonic()
    optimiser: torch.optim.Optimizer | None = None
    done = 0
    while done < iterations:
        if seconds is not None and done == 2:  # what one takes is known now
            left = seconds - (time.monotonic() - start)
            iterations = max(8, done + int(left / max((time.monotonic() - start) / done, 1e-9)))
            optimiser = None
        if optimiser is None:
            optimiser = torch.optim.Adam(
                [
                    {"params": alphas, "lr": min(FASTEST, max(1e-3, TRAVEL / iterations))},
                    {"params": shifts, "lr": BIAS / iterations},
                ]
            )
        i = draw.randrange(len(block.targets))
        for kernel, begin, unit, shift in zip(free, first, units, shifts, strict=True):
            kernel.shift = begin + shift * unit
        plain, rounded = on(block.plain[i], trial), on(block.rounded[i], trial)
        given = {n: _mixed(v, plain[n], drop) for n, v in rounded.items()}
        made = trial.run(block.span, given, "soft", drop)
        loss = distance(made, block.targets[i].to(trial.device), block.power) / scale
        progress = done / iterations
        if progress >= SOFT:
            beta = BETA[1] + (BETA[0] - BETA[1]) * (1 - (progress - SOFT) / (1 - SOFT))
            loss = loss + _indecision(block.kernels, beta)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        done += 1
        tell(done, iterations)
    with torch.no_grad():
        for kernel, begin, unit, shift in zip(free, first, units, shifts, strict=True):
            kernel.shift = (begin + shift * unit).detach()
        for kernel in block.kernels:
            kernel.settle()
    return done


def _mixed(rounded: Any, plain: Any, drop: Drop) -> Any:
    """Return an input of a block, some of its elements as in the floating-point network."""
    if not (isinstance(rounded, Tensor) and rounded.is_floating_point()):
        return rounded
    return torch.lerp(rounded, plain, drop.mask(rounded))


def _indecision(kernels: Sequence[Kernel], beta: float) -> Tensor:
    """Return how far the roundings are from 0 and 1, on average."""
    total = sum((1 - (2 * k.rounding() - 1).abs().pow(beta)).sum() for k in kernels)
    return REGULARISER * total / sum(k.weight.numel() for k in kernels)  # type: ignore[return-value]


def _bias_units(trial: Trial, block: Block, kernels: Sequence[Kernel]) -> list[Tensor]:
    """Return per layer the error of every output channel at present, in root mean square."""
    units = []
    for kernel in kernels:
        (error,) = _errors(trial, block, kernel, [0])
        unit = error.square().mean(_other_axes(error, kernel)).sqrt()
        units.append(unit.clamp(min=1e-12).reshape(kernel.bias.shape))  # type: ignore[union-attr]
    return units


__all__ = [
    "POWERS_OF_TWO", "Block", "Steps", "apart", "choose_activation", "choose_steps",
    "correct_biases", "learn", "loss_of", "on",
]  # fmt: skip
