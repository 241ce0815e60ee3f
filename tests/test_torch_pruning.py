"""Couplings agree with Torch-Pruning where it is right, and with an experiment everywhere.

Both sides are brought to one form: a vertex is one index of one axis of one weight, and the
couplings partition the vertices. Channels that reach the model's output are left out.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Hashable, Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import narrows
from narrows.ir.program import Program
from tests.networks import NETWORKS
from tests.networks.reference import LAYERS, TRANSPOSED, channel_axis
from tests.networks.zoo import MODELS

Vertex = tuple[str, int, int]
Partition = set[frozenset[Vertex]]

# One change may vanish in a ReLU or a maximum; that all of these do is out of the question.
DRAWS = 8
OUTPUT = ("", "output", 0)  # stands for all outputs of the model


class Components:
    """Union-find; the classes of what was joined."""

    def __init__(self) -> None:
        self.parent: dict[Hashable, Hashable] = {}

    def find(self, a: Hashable) -> Hashable:
        self.parent.setdefault(a, a)
        while self.parent[a] != a:
            self.parent[a] = self.parent[self.parent[a]]
            a = self.parent[a]
        return a

    def join(self, members: Iterable[Hashable]) -> None:
        roots = [self.find(m) for m in members]
        for root in roots[1:]:
            self.parent[self.find(root)] = self.find(roots[0])

    def classes(self) -> list[set[Hashable]]:
        found: dict[Hashable, set[Hashable]] = {}
        for member in self.parent:
            found.setdefault(self.find(member), set()).add(member)
        return list(found.values())


def of_program(program: Program, weights: set[str]) -> Partition:
    """Return the partition that the couplings of a program make."""
    components = Components()
    for coupling in program.couplings():
        if coupling.barrier:
            continue
        members = [m for m in coupling.members if m.weight in weights]
        for channel in range(coupling.width):
            components.join((m.weight, m.axis, i) for m in members for i in m.indices[channel])
    return {frozenset(c) for c in components.classes()}  # type: ignore[arg-type]


# ------------------------------------------------------------------ Torch-Pruning


def of_torch_pruning(module: nn.Module, inputs: tuple[Tensor, ...]) -> Partition:
    """Return the partition that Torch-Pruning's groups make."""
    import torch_pruning  # pyright: ignore[reportMissingImports]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch_pruning.DependencyGraph().build_dependency(module, inputs)
        groups = list(graph.get_all_groups())
    names = {m: n for n, m in module.named_modules()}
    components = Components()
    for group in groups:
        channels: dict[int, list[Vertex]] = {}
        for item in group.items:
            layer = item.dep.target.module
            if not isinstance(layer, LAYERS):
                continue
            outputs = graph.is_out_channel_pruning_fn(item.dep.handler)
            axis = 0 if outputs or getattr(layer, "groups", 1) > 1 else 1
            for root, index in zip(item.root_idxs, item.idxs, strict=True):
                channels.setdefault(root, []).append((f"{names[layer]}.weight", axis, index))
        for vertices in channels.values():
            components.join(vertices)
    return {frozenset(c) for c in components.classes()}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name",
    ["resnet18", "vgg11_bn", "mobilenet_v2", "densenet121", "googlenet", "efficientnet_b0"],
)
def test_couplings_agree_with_torch_pruning(name: str) -> None:
    for package in ("torch_pruning", "torchvision"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    model = MODELS[name]
    module = model.build(torch.float32)
    inputs = model.inputs(2, 0, torch.float32)
    ours = of_program(narrows.capture(module, inputs), layer_weights(module))
    theirs = {c for c in of_torch_pruning(module, inputs) if not is_output(module, c)}
    assert ours == theirs


def layer_weights(module: nn.Module) -> set[str]:
    return {f"{n}.weight" for n, m in module.named_modules() if isinstance(m, LAYERS)}


def is_output(module: nn.Module, vertices: Iterable[Vertex]) -> bool:
    """Whether a class belongs to the classifier's outputs."""
    layers = [n for n, m in module.named_modules() if isinstance(m, LAYERS)]
    return any(weight == f"{layers[-1]}.weight" and axis == 0 for weight, axis, _ in vertices)


# ------------------------------------------------------------------ the experiment


def of_experiment(module: nn.Module, inputs: tuple[Tensor, ...]) -> Partition:
    """Return the partition found by perturbing one channel at a time.

    A producer's channel and the consumers' channels that it changes live or die together; so do a
    channel of a depthwise convolution and what it makes.
    """
    experiment = Experiment(module, inputs)
    components = Components()
    for name, layer in experiment.layers.items():
        for channel in range(experiment.made[name].shape[channel_axis(layer)]):
            components.join([(name, "out", channel), *experiment.reached(name, channel)])
        groups = getattr(layer, "groups", 1)
        if groups > 1:
            assert groups == layer.in_channels, f"{name} is grouped but not depthwise"
            each = layer.out_channels // groups  # type: ignore[operator]
            for c in range(layer.out_channels):  # type: ignore[arg-type]
                components.join([(name, "out", c), (name, "in", c // each)])
    found = set()
    for members in components.classes():
        if OUTPUT not in members and any(m[1] == "out" for m in members):  # type: ignore[index]
            found.add(frozenset(vertices(members, experiment.layers)))
    return found


class Experiment:
    """A module whose layers' results are held at what they were while one channel is changed.

    So a change reaches just the layers that read the channel directly.
    """

    def __init__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.module, self.inputs = module, inputs
        self.layers = {n: m for n, m in module.named_modules() if isinstance(m, LAYERS)}
        self.made: dict[str, Tensor] = {}
        self.read: dict[str, Tensor] = {}
        self.change: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            layer.register_forward_hook(self._hook(name))
        self.base = self._run()
        self.before = dict(self.read)

    def _hook(self, name: str):
        def hold(_: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> Tensor:
            self.read[name] = args[0]
            self.made.setdefault(name, result)
            return self.made[name] + self.change.get(name, torch.zeros(()))

        return hold

    def _run(self) -> list[Tensor]:
        with torch.no_grad():
            return [t for t in tree_leaves(self.module(*self.inputs)) if isinstance(t, Tensor)]

    def reached(self, name: str, channel: int) -> set[Hashable]:
        """Return the input channels that other values of an output channel change."""
        axis = channel_axis(self.layers[name])
        generator = torch.Generator().manual_seed(channel)
        found: set[Hashable] = set()
        for _ in range(DRAWS):
            change = torch.zeros_like(self.made[name])
            part = change.select(axis, channel)
            part.copy_(3 * torch.randn(part.shape, generator=generator, dtype=part.dtype))
            self.change = {name: change}
            outputs = self._run()
            if any(not torch.equal(a, b) for a, b in zip(outputs, self.base, strict=True)):
                found.add(OUTPUT)
            for other, layer in self.layers.items():
                differs = (self.read[other] != self.before[other]).movedim(channel_axis(layer), 0)
                found |= {(other, "in", int(c)) for c in differs.flatten(1).any(1).nonzero()}
        self.change = {}
        return found


def vertices(members: Iterable[Hashable], layers: dict[str, nn.Module]) -> Iterable[Vertex]:
    """Return the weights' indices behind layers' channels."""
    for name, side, channel in members:  # type: ignore[misc]
        layer = layers[name]
        swapped = isinstance(layer, TRANSPOSED)
        if side == "out":
            yield f"{name}.weight", int(swapped), channel
        elif getattr(layer, "groups", 1) == 1:
            yield f"{name}.weight", int(not swapped), channel


@pytest.mark.parametrize(
    "name",
    [
        "add_then_cat", "channel_shuffle", "channel_shuffle_op", "chunk_two_readers",
        "concat_negative_axis", "concat_of_residuals", "concat_same_twice", "concat_three_widths",
        "dense_block", "depthwise", "depthwise_multiplier", "flatten_linear", "flip_add", "glu",
        "layer_scale", "linear_then_view", "multiply_branches", "permute_linear",
        "pixel_shuffle", "pixel_unshuffle", "repeat_channels", "residual_chained", "roll_channels",
        "slice_overlapping", "split_equal", "split_residual", "squeeze_excite_linear",
        "stack_sum", "tensor_split", "transposed_conv", "two_inputs",
        "unbind", "unet_skip", "view_blocks", "view_linear",
    ],
)  # fmt: skip
def test_couplings_agree_with_one_at_a_time_perturbation(name: str) -> None:
    network = NETWORKS[name]
    module = network.build()
    ours = of_program(narrows.capture(module, network.inputs()), layer_weights(module))
    assert ours == of_experiment(module, network.inputs())
