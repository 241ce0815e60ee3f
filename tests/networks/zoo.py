"""Real models: torchvision's, built with weights and statistics that hide no mistake."""

from __future__ import annotations

import importlib
import operator
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .registry import randomise


@dataclass(frozen=True)
class Model:
    """A torchvision model, and the image size to run it at.

    Attributes:
        name: The factory in ``torchvision.models``.
        size: The smallest comfortable image; exactness does not depend on it.
        options: Keywords of the factory.
        path: The factory's place under ``torchvision.models``, where it is not the name.
    """

    name: str
    size: int = 64
    options: tuple[tuple[str, Any], ...] = ()
    path: str = ""

    def build(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
        """Return the model in eval mode with random weights, statistics and scales."""
        torch.manual_seed(seed)
        factory = operator.attrgetter(self.path or self.name)(import_models())
        options = dict(self.options) if self.path else {"weights": None, **dict(self.options)}
        module = factory(**options).to(dtype)
        randomise(module, seed, self.inputs(4, seed + 1, dtype))
        return module

    def inputs(
        self, batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64
    ) -> tuple[Tensor, ...]:
        """Return one batch of random images."""
        generator = torch.Generator().manual_seed(seed)
        shape = (batch, 3, self.size, self.size)
        return (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype),)


MODELS: dict[str, Model] = {
    model.name: model
    for model in (
        Model("alexnet"),
        Model("vgg11_bn"),
        Model("resnet18"),
        Model("resnet50"),
        Model("wide_resnet50_2"),
        Model("resnext50_32x4d"),
        Model("regnet_y_400mf"),
        Model("densenet121"),
        Model("googlenet", options=(("init_weights", False),)),
        Model("inception_v3", 96, (("init_weights", False),)),
        Model("mobilenet_v2"),
        Model("mobilenet_v3_small"),
        Model("mnasnet1_0"),
        Model("shufflenet_v2_x1_0"),
        Model("squeezenet1_1"),
        Model("efficientnet_b0"),
        Model("efficientnet_v2_s"),
        Model("convnext_tiny"),
        Model("vit_b_16", options=(("image_size", 64),)),
        Model("swin_t"),
    )
}

# Two blocks a stage, few channels: transformers whose tests take a second.
SMALL_TRANSFORMERS: dict[str, Model] = {
    "small_vit": Model(
        "small_vit",
        32,
        (
            ("image_size", 32), ("patch_size", 8), ("num_layers", 2), ("num_heads", 4),
            ("hidden_dim", 32), ("mlp_dim", 64), ("num_classes", 10),
        ),
        "VisionTransformer",
    ),
    "small_swin": Model(
        "small_swin",
        64,
        (
            ("patch_size", [4, 4]), ("embed_dim", 24), ("depths", [2, 2]), ("num_heads", [2, 4]),
            ("window_size", [4, 4]), ("num_classes", 10),
        ),
        "SwinTransformer",
    ),
}  # fmt: skip

# What torchvision's Python side expects its compiled side to have defined.
_SCHEMAS = {
    "torchvision::nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "torchvision::qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def import_models() -> Any:
    """Return ``torchvision.models``, also where torchvision's compiled operators do not load.

    A torchvision wheel built for another flavour of torch (CUDA beside CPU) fails on import because
    its operators are missing. The classifiers need none of them: their schemas are enough.
    """
    try:
        return importlib.import_module("torchvision.models")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    for name, schema in _SCHEMAS.items():
        torch.library.define(name, schema)
    for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    return importlib.import_module("torchvision.models")


# ------------------------------------------------------------------ timm


def import_timm() -> Any:
    """Return ``timm``, which imports torchvision."""
    import_models()
    return importlib.import_module("timm")


def timm_model(name: str, size: int = 96, seed: int = 0) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Return a model of timm in float64 with random weights, statistics and scales, and 2 images.

    The images are ``size`` wide at most, unless the model takes one size only.
    """
    torch.manual_seed(seed)
    module = import_timm().create_model(name, pretrained=False).double()
    facts = module.pretrained_cfg
    channels, height, width = facts["input_size"]
    if not facts.get("fixed_input_size"):
        height, width = min(height, size), min(width, size)
    images = (torch.randn(2, channels, height, width, dtype=torch.float64),)
    randomise(module, seed, images)
    return module, images
