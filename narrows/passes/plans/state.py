"""State dicts across a plan: from the original shapes to the pruned ones, and back.

"The pruned program" is what ``prune-channels`` makes of a program, its channels in the order that
suits the readers or in the old one. Norms that ``fold-batch-norm`` folded behind it are given back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from narrows.errors import PlanError, ProgramError
from narrows.ir.program import Origin, Program
from narrows.ir.structure.computed import settled
from narrows.passes.fold_batch_norm import fold
from narrows.passes.plans.plan import ChannelPlan
from narrows.passes.plans.unfold import unfolded

# Two slices of one weight may differ by the rounding of a folded constant, and no more.
AGREE = 1e-5
# By how much one order of channels has to be nearer than another, in squares, to be the right one.
CLEARLY = 2.0


def pruned_by(plan: ChannelPlan, program: Program) -> Program:
    """Return what ``prune-channels`` makes of a program; its origins are weights of ``program``."""
    from narrows.passes.prune_channels import PruneChannels

    return PruneChannels(plan).run(program.replace(origins={})).program


def shrink(plan: ChannelPlan, program: Program, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of the pruned program, made of another checkpoint of the model.

    Like `restore` it leaves out what no checkpoint holds.

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
    absent = _unheld(other)
    return {name: t for name, t in other.state_dict().items() if name not in absent}


def restore(
    plan: ChannelPlan,
    program: Program,
    state: Mapping[str, Tensor] | torch.nn.Module,
    pruned: Program | None = None,
) -> dict[str, Tensor]:
    """Return a state dict in the original shapes from one of the pruned program, perhaps trained.

    What was kept has the value of ``state``; what was removed has the value it has in the masked
    program: zero where a mask reached it, and else what it was. Constants that were folded into a
    bias are taken out again. So ``plan.masked(program).with_weights(restored)`` computes what the
    pruned program computes with ``state``; and so does ``program.with_weights(restored)``, unless
    the masked program multiplies by masks or unties weights (then an untied weight has a name of
    its own in the result). What no checkpoint of the model holds, such as buffers that are not
    persistent, is left out, so that ``model.load_state_dict`` takes the rest.

    Args:
        plan: The plan.
        program: The program that was pruned.
        state: A state dict of the pruned program, of norms folded or not; or the module that
            `Program.to_module` made of it.
        pruned: The pruned program itself, where other passes made it than those of `narrows.apply`
            without a target.

    Raises:
        PlanError: The state dict is not one of the pruned program, or it may be of two; a tensor
            was trained that has no place in the original: a bias that was made for folded
            constants; or a weight that was shared came out as several tensors, which training moved
            apart.
    """
    if isinstance(state, torch.nn.Module):
        pruned, state = _program_of(state, pruned), state.state_dict()
    if pruned is not None and pruned.folded:
        raise PlanError(
            "the batch norms of the pruned program were folded, which its channels cannot undo",
            hint="train narrows.apply(program, plan), which keeps them, or leave out pruned",
        )
    program = settled(program.replace(origins={}))
    masked, trained = plan.masked(program), _trained(plan, program, state, pruned)
    pruned = trained.untrained
    result = dict(masked.weights)
    written: dict[str, Tensor] = {}
    for name, tensor in trained.program.weights.items():
        before = pruned.weights[name]
        origin = pruned.origins.get(name, Origin(name, tuple(tensor.shape), (None,) * tensor.dim()))
        target = name if name in masked.origins else origin.name
        if target not in masked.weights:
            _drop_made(name, tensor, pruned)
            continue
        place = place_of(origin)
        tensor, before = without_zeros(tensor, origin), without_zeros(before, origin)
        old = masked.weights[target][place]
        moved = old + (tensor - before) if tensor.is_floating_point() else tensor
        new = torch.where(before == old, tensor, moved)
        _write(result, written, masked.weights[target], target, place, new)
    ours = (program.weights.keys() | masked.origins.keys()) - _unheld(program)
    restored = {name: t for name, t in result.items() if name in ours}
    return {**restored, **{a: restored[n] for a, n in program.aliases.items() if n in restored}}


def _unheld(program: Program) -> frozenset[str]:
    """Return the weights that no checkpoint holds."""
    return program.buffers - program.stored


@dataclass(frozen=True)
class _Trained:
    """A pruned program with a state dict's weights, and with those that pruning gave it."""

    program: Program
    untrained: Program


def _distances(fits: Sequence[_Trained]) -> list[float]:
    """Return how far training moved the weights that tell the forms apart, squared, in units of
    how far they are apart."""
    first, distances = fits[0].untrained.weights, [0.0] * len(fits)
    for name, weight in first.items():
        apart = max(_squared(weight, f.untrained.weights[name]) for f in fits)
        if apart > 0:
            for i, f in enumerate(fits):
                moved = _squared(f.program.weights[name], f.untrained.weights[name])
                distances[i] += moved / apart
    return distances


def _squared(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).square().sum())


def _trained(
    plan: ChannelPlan, program: Program, state: Mapping[str, Tensor], pruned: Program | None
) -> _Trained:
    """Return the pruned program that a state dict is of, with its weights.

    Two that differ in the order of the channels alone have the same shapes. Training leaves weights
    nearer to what they were than to those of other channels; where it did not, nobody can tell.
    """
    forms = [pruned] if pruned is not None else _forms(plan, program)
    fits, refused = [], None
    for form in forms:
        try:
            fits.append(_fitted(form, state))
        except ProgramError as error:
            refused = refused or error
    if refused is not None and not fits:
        raise PlanError(
            refused.what,
            why="it is not a state dict of what prune-channels makes of this program",
            hint=refused.hint or "restore(program, state, pruned), if other passes made it",
        ) from refused
    distances = _distances(fits)
    nearest, *others = sorted(range(len(fits)), key=distances.__getitem__)
    if others and distances[nearest] * CLEARLY > distances[others[0]]:
        raise PlanError(
            "the state dict may be of channels in two orders",
            why="it is as far from what pruning gave in the one as in the other",
            hint="restore(program, state, pruned), with the program that was trained",
        )
    return fits[nearest]


def _forms(plan: ChannelPlan, program: Program) -> list[Program]:
    """Return what prune-channels makes of a program, in the readers' order and in the old one."""
    from narrows.passes.prune_channels import PruneChannels

    ordered = PruneChannels(plan, order=True).run(program).program
    plain = pruned_by(plan, program)
    return [ordered] if ordered.origins == plain.origins else [ordered, plain]


def _fitted(form: Program, state: Mapping[str, Tensor]) -> _Trained:
    """Return a form with the weights of a state dict; `ProgramError` if it is not one of it."""
    try:
        return _Trained(form.with_weights(state), form)
    except ProgramError:
        trained = _with_weights(fold(form)[0], state)
        if trained is None:
            raise
    return _Trained(unfolded(form, trained), form)


def _with_weights(program: Program, state: Mapping[str, Tensor]) -> Program | None:
    try:
        return program.with_weights(state)
    except ProgramError:
        return None


def _drop_made(name: str, tensor: Tensor, pruned: Program) -> None:
    """Let go of a tensor that pruning made, as long as it still is what pruning made."""
    if not torch.equal(tensor, pruned.weights[name]):
        raise PlanError(
            f"{name!r} has no place in the original shapes",
            why="pruning made it, to hold constants of removed channels, and it was trained",
            hint="do not train it, or train plan.masked(program)",
        )


def _program_of(module: torch.nn.Module, pruned: Program | None) -> Program | None:
    """Return the program that a module was made of, unless its norms were folded."""
    held = getattr(module, "_program", None)
    return pruned if held is None or held.folded else held


def without_zeros(tensor: Tensor, origin: Origin) -> Tensor:
    """Return a tensor without the channels of zeros that were added to it."""
    for axis, index in enumerate(origin.index):
        if index is not None and len(places := _places(index)) < tensor.shape[axis]:
            tensor = tensor.index_select(axis, torch.tensor(places))
    return tensor


def _places(index: tuple[Any, ...]) -> list[int]:
    """Return at which places of an axis there is something of the original."""
    if index and isinstance(index[0], tuple):  # every row that is there has them at the same ones
        index = next(row for row in index if any(i != -1 for i in row))
    return [place for place, i in enumerate(index) if i != -1]


def _there(index: tuple[Any, ...]) -> list[Any]:
    """Return the original indices of what is there; of rows, those that are."""
    if index and isinstance(index[0], tuple):
        return [there for row in index if (there := _there(row))]
    return [i for i in index if i != -1]


def place_of(origin: Origin) -> tuple[Any, ...]:
    """Return the index of a weight's entries in the original, axis by axis, ready to broadcast."""
    rank, place = len(origin.shape), []
    nested = next((a for a, i in enumerate(origin.index) if i and isinstance(i[0], tuple)), None)
    rows = -1  # the axis whose entries have columns of their own on the nested axis
    if nested is not None:
        (rows,) = [a for a, i in enumerate(origin.index) if i is not None and a != nested]
    for axis, index in enumerate(origin.index):
        kept = torch.arange(origin.shape[axis]) if index is None else torch.tensor(_there(index))
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


__all__ = ["place_of", "pruned_by", "restore", "shrink", "without_zeros"]
