"""A case: a model with random weights, an image size, and input masks at an amount."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# The models that apple-upscale can do, over which geometric means are taken, and others.
EIGHT = (
    "resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0", "efficientnet_v2_s", "densenet121",
    "googlenet", "inception_v3",
)  # fmt: skip
BEYOND = (
    "shufflenet_v2_x1_0", "regnet_y_400mf", "mobilenet_v3_small", "convnext_tiny",
    "resnext50_32x4d",
)  # fmt: skip

SIZES = {"inception_v3": 299}
USUAL_SIZE = 224
CAPTURED = 2  # images in a captured example

Keep = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Case:
    """What all forms of one comparison have in common.

    Attributes:
        model: A name of the tests' model zoo.
        amount: The share of input channels that every masked layer loses.
        masks: ``l1`` for the channels of the smallest weights, ``random`` for any.
        size: Height and width of the images; 0 for the model's usual one.
        batch: The number of examples that narrows chooses reads and widths for.
    """

    model: str
    amount: float
    masks: str = "l1"
    size: int = 0
    batch: int = 1

    @property
    def key(self) -> str:
        """A name for files."""
        return f"{self.model}-{self.images}-{self.masks}-{self.amount:g}"

    @property
    def images(self) -> int:
        """Height and width of the images."""
        return self.size or SIZES.get(self.model, USUAL_SIZE)

    def build(self) -> nn.Module:
        """Return the model in float32 and eval mode, with seeded random weights and statistics."""
        return self._model().build(torch.float32)

    def inputs(self, batch: int, seed: int = 1) -> tuple[Tensor, ...]:
        """Return seeded images in float32."""
        return self._model().inputs(batch, seed, torch.float32)

    def _model(self) -> Any:
        from tests.networks.zoo import MODELS

        return dataclasses.replace(MODELS[self.model], size=self.images)

    def keep(self, module: nn.Module) -> Keep:
        """Return the kept inputs of every masked layer of the model, by weight name."""
        choose = {"l1": strongest, "random": drawn}[self.masks]
        return choose(maskable(module, self.inputs(1)), self.amount)


def maskable(module: nn.Module, inputs: Any) -> dict[str, Tensor]:
    """Return the weights that get a mask, by name.

    They are those of the ungrouped convolutions that are called, on more channels than an image
    has, and of linear layers that are called on every pixel.
    """
    ranks: dict[nn.Module, int] = {}

    def note(layer: nn.Module, args: Any, _: Any) -> None:
        ranks[layer] = args[0].dim()

    kinds = (nn.Conv2d, nn.Linear)
    hooks = [m.register_forward_hook(note) for m in module.modules() if isinstance(m, kinds)]
    with torch.no_grad():
        module(*inputs)
    for hook in hooks:
        hook.remove()
    found = {}
    for name, layer in module.named_modules():
        if ranks.get(layer) != 4 or not isinstance(layer, kinds):
            continue
        if getattr(layer, "groups", 1) == 1 and layer.weight.shape[1] > 3:
            found[f"{name}.weight"] = layer.weight.detach()
    return found


def strongest(weights: dict[str, Tensor], amount: float) -> Keep:
    """Return the input channels of the largest L1 norms; ``int(amount * width)`` go."""
    keep = {}
    for name, weight in weights.items():
        score = weight.transpose(0, 1).flatten(1).abs().sum(1)
        order = score.argsort(descending=True, stable=True)
        keep[name] = tuple(sorted(order[: len(score) - int(amount * len(score))].tolist()))
    return keep


def drawn(weights: dict[str, Tensor], amount: float) -> Keep:
    """Return as many input channels of every weight, drawn at random."""
    draw = random.Random(0)
    keep = {}
    for name, weight in weights.items():
        width = weight.shape[1]
        keep[name] = tuple(sorted(draw.sample(range(width), width - int(amount * width))))
    return keep
