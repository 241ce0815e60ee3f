"""What a masked network computes, written on the eager module without any of narrows.

An input mask zeroes what the masked weight reads. An output mask zeroes what it makes: the result
of the norm that directly follows, and what other readers see. This is the definition the plans are
tested against, so it must not share code with them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)

NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)

Keep = Mapping[str, Sequence[int]]


def masked_module(
    module: nn.Module, keep_inputs: Keep, keep_outputs: Keep, inputs: Sequence[Any]
) -> nn.Module:
    """Return a copy of ``module`` that computes the masked network.

    It is run on ``inputs`` to learn which layers are called and which norm reads which layer.
    """
    module = copy.deepcopy(module)
    followers = _followers(module, inputs)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, keep in keep_inputs.items():
        layers = _called_layers(module, parameters[name], followers)
        for layer in layers:
            layer.register_forward_pre_hook(_zero_input(channel_axis(layer), keep))
        if not layers:
            _edit(module, parameters, name, keep, side="input")
    hooks = []
    for name, keep in keep_outputs.items():
        layers = _called_layers(module, parameters[name], followers)
        for layer in layers:
            norm = followers[layer]
            alone = norm is not None and _is_only_reader(module, layer, norm, inputs)
            hooks.append((layer, norm, alone, keep))
        if not layers:
            _edit(module, parameters, name, keep, side="output")
    for layer, norm, alone, keep in hooks:
        _zero_output(layer, norm, alone, keep)
    return module


def channel_axis(layer: nn.Module) -> int:
    """Return the axis on which a layer's inputs and outputs have their channels."""
    return -1 if isinstance(layer, nn.Linear) else 1


def _followers(module: nn.Module, inputs: Sequence[Any]) -> dict[nn.Module, nn.Module | None]:
    """Return every layer that is called, with the norm that is given its result, perhaps moved.

    Moved means permuted, viewed, shuffled or repeated: the norm reads the same numbers in some
    order, each as often as any other.
    """
    made: dict[nn.Module, Tensor] = {}
    followers: dict[nn.Module, nn.Module | None] = {}

    def record(layer: nn.Module, _: Any, result: Tensor) -> None:
        followers.setdefault(layer, None)
        made[layer] = result

    def match(norm: nn.Module, args: tuple[Any, ...]) -> None:
        numbers = args[0].flatten().sort().values
        for layer, result in made.items():
            times, rest = divmod(len(numbers), max(result.numel(), 1))
            made_again = result.flatten().sort().values.repeat_interleave(times)
            if times and not rest and torch.equal(made_again, numbers):
                followers[layer] = norm

    handles = []
    for child in module.modules():
        if isinstance(child, LAYERS):
            handles.append(child.register_forward_hook(record))
        elif isinstance(child, NORMS):
            handles.append(child.register_forward_pre_hook(match))
    with torch.no_grad():
        module(*inputs)
    for handle in handles:
        handle.remove()
    return followers


def _is_only_reader(
    module: nn.Module, layer: nn.Module, norm: nn.Module, inputs: Sequence[Any]
) -> bool:
    """Whether the norm alone reads the layer: with its result held, changes do not show."""
    held: list[Tensor] = []

    def hold(_: nn.Module, __: Any, result: Tensor) -> Tensor:
        held.append(result)
        return held[0]

    keeper = norm.register_forward_hook(hold)
    with torch.no_grad():
        before = module(*inputs)
        change = layer.register_forward_hook(lambda _, __, r: r + torch.linspace(1, 2, r.shape[-1]))
        after = module(*inputs)
    keeper.remove()
    change.remove()
    pairs = zip(tree_leaves(before), tree_leaves(after), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def _called_layers(
    module: nn.Module, weight: Tensor, called: Mapping[nn.Module, Any]
) -> list[nn.Module]:
    return [m for m in module.modules() if m in called and getattr(m, "weight", None) is weight]


def _zeroed(tensor: Tensor, axis: int, keep: Sequence[int]) -> Tensor:
    mask = torch.zeros(tensor.shape[axis], dtype=tensor.dtype)
    mask[list(keep)] = 1
    shape = [1] * tensor.dim()
    shape[axis] = -1
    return tensor * mask.view(shape)


def _zero_input(axis: int, keep: Sequence[int]) -> Callable[..., Any]:
    return lambda _, args: (_zeroed(args[0], axis, keep), *args[1:])


def _zero_output(
    layer: nn.Module, norm: nn.Module | None, alone: bool, keep: Sequence[int]
) -> None:
    """Zero channels of what the norm makes, and of what the layer makes for its other readers."""
    axis = channel_axis(layer)
    if norm is None:
        layer.register_forward_hook(lambda _, __, result: _zeroed(result, axis, keep))
        return
    masks: list[Tensor] = []

    def remember(_: nn.Module, __: Any, result: Tensor) -> Tensor:
        mask = _zeroed(torch.ones_like(result), axis, keep)
        seen = result if alone else result * mask
        masks[:] = [mask.flatten()[seen.flatten().argsort(stable=True)]]
        return seen

    def apply(_: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> Tensor:
        # The norm reads the layer's numbers in another order; equal numbers find each other.
        order = args[0].flatten().argsort(stable=True)
        mask = masks[0].new_empty(len(order))
        mask[order] = masks[0].repeat_interleave(len(order) // len(masks[0]))
        return result * mask.view(result.shape)

    layer.register_forward_hook(remember)
    norm.register_forward_hook(apply)


def _edit(
    module: nn.Module, parameters: Mapping[str, Tensor], name: str, keep: Sequence[int], side: str
) -> None:
    """Mask a weight that no layer's call shows: one of attention's projections, or a raw matrix."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    weight = parameters[name]
    bias = None
    if leaf == "in_proj_weight" or isinstance(owner, nn.Linear):  # [outputs, inputs]
        bias = owner.in_proj_bias if leaf == "in_proj_weight" else owner.bias
        axis = 1 if side == "input" else 0
    else:  # x @ weight, [inputs, outputs]
        axis = 0 if side == "input" else 1
    with torch.no_grad():
        weight.copy_(_zeroed(weight, axis, keep))
        if side == "output" and isinstance(bias, Tensor):
            bias.copy_(_zeroed(bias, 0, keep))
