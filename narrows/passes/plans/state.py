"""State dicts across a plan: from the original shapes to the pruned ones, and back.

"The pruned program" is what ``prune-channels`` alone makes of a program; passes behind it, such as
``fold-batch-norm``, change weights further.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from narrows.errors import PlanError, ProgramError
from narrows.ir.program import Origin, Program
from narrows.passes.plans.plan import ChannelPlan

# Two slices of one weight may differ by the rounding of a folded constant, and no more.
AGREE = 1e-5


def pruned_by(plan: ChannelPlan, program: Program) -> Program:
    """Return what ``prune-channels`` makes of a program; its origins are weights of ``program``."""
    from narrows.passes.prune_channels import PruneChannels

    return PruneChannels(plan).run(program.replace(origins={})).program


def shrink(plan: ChannelPlan, program: Program, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of the pruned program, made of another checkpoint of the model.

    Args:
        plan: The plan.
        program: The program that was pruned.
        state: The other checkpoint, in the original shapes.

    Raises:
        PlanError: The checkpoint is of another model, or it prunes to other shapes: it has zeros of
            its own, or lacks those of ``program``.
    """
    try:
        other = pruned_by(plan, program.with_weights(state))
    except ProgramError as error:
        raise PlanError(error.what, why=error.why, hint=error.hint) from error
    wanted = {name: list(t.shape) for name, t in pruned_by(plan, program).weights.items()}
    found = {name: list(t.shape) for name, t in other.weights.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise PlanError(
                f"the checkpoint prunes to another shape: {name!r} is {found.get(name, 'absent')}, "
                f"in the pruned program {wanted.get(name, 'absent')}",
                why="a channel is zero or constant in one of the two and not in the other",
                hint="apply the plan to program.with_weights(state) instead",
            )
    return other.state_dict()


def restore(plan: ChannelPlan, program: Program, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict in the original shapes from one of the pruned program, perhaps trained.

    What was kept has the value of ``state``; what was removed has the value it has in the masked
    program: zero where a mask reached it, and else what it was. Constants that were folded into a
    bias are taken out again. So ``plan.masked(program).with_weights(restored)`` computes what the
    pruned program computes with ``state``; and so does ``program.with_weights(restored)``, unless
    the masked program multiplies by masks or unties weights (then an untied weight has a name of
    its own in the result).

    Args:
        plan: The plan.
        program: The program that was pruned.
        state: A state dict of the pruned program.

    Raises:
        PlanError: The state dict is not one of the pruned program; a tensor was trained that has no
            place in the original: a bias that was made for folded constants; or a weight that was
            shared came out as several tensors, which training moved apart.
    """
    program = program.replace(origins={})
    masked, pruned = plan.masked(program), pruned_by(plan, program)
    try:
        trained = pruned.with_weights(state)
    except ProgramError as error:
        raise PlanError(
            error.what,
            why="it is not a state dict of what prune-channels makes of this program",
            hint=error.hint or 'narrows.apply(program, plan, pipeline="prune-channels")',
        ) from error
    result = dict(masked.weights)
    written: dict[str, Tensor] = {}
    for name, tensor in trained.weights.items():
        origin = pruned.origins.get(name, Origin(name, tuple(tensor.shape), (None,) * tensor.dim()))
        target = name if name in masked.origins else origin.name
        if target not in masked.weights:
            _drop_made(name, tensor, pruned)
            continue
        place = place_of(origin)
        old, before = masked.weights[target][place], pruned.weights[name]
        moved = old + (tensor - before) if tensor.is_floating_point() else tensor
        new = torch.where(before == old, tensor, moved)
        _write(result, written, masked.weights[target], target, place, new)
    ours = program.weights.keys() | masked.origins.keys()
    restored = {name: t for name, t in result.items() if name in ours}
    return {**restored, **{a: restored[n] for a, n in program.aliases.items()}}


def _drop_made(name: str, tensor: Tensor, pruned: Program) -> None:
    """Let go of a tensor that pruning made, as long as it still is what pruning made."""
    if not torch.equal(tensor, pruned.weights[name]):
        raise PlanError(
            f"{name!r} has no place in the original shapes",
            why="pruning made it, to hold constants of removed channels, and it was trained",
            hint="do not train it, or train plan.masked(program)",
        )


def place_of(origin: Origin) -> tuple[Any, ...]:
    """Return the index of a weight's entries in the original, axis by axis, ready to broadcast."""
    rank, place = len(origin.shape), []
    nested = next((a for a, i in enumerate(origin.index) if i and isinstance(i[0], tuple)), None)
    rows = -1  # the axis whose entries have columns of their own on the nested axis
    if nested is not None:
        (rows,) = [a for a, i in enumerate(origin.index) if i is not None and a != nested]
    for axis, index in enumerate(origin.index):
        kept = torch.arange(origin.shape[axis]) if index is None else torch.tensor(index)
        view = [1] * rank
        view[axis] = -1
        if axis == nested:
            view[rows] = len(kept)
            kept = kept if rows < axis else kept.T
        place.append(kept.reshape(view))
    return tuple(place)


def _write(
    result: dict[str, Tensor],
    written: dict[str, Tensor],
    original: Tensor,
    name: str,
    place: tuple[Any, ...],
    new: Tensor,
) -> None:
    """Put a slice into its place; what another slice has put there must agree."""
    if name not in written:
        result[name] = original.detach().clone()
        written[name] = torch.zeros(original.shape, dtype=torch.bool)
    both = written[name][place]
    ours, theirs = new[both], result[name][place][both]
    if not torch.allclose(ours.double(), theirs.double(), rtol=AGREE, atol=AGREE):
        raise PlanError(
            f"{name!r} cannot be restored",
            why="layers shared it, each pruned in its own way, and training moved them apart",
        )
    result[name][place] = new
    written[name][place] = True


__all__ = ["place_of", "pruned_by", "restore", "shrink"]
