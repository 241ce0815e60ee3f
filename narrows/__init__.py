"""narrows: a graph-rewriting compiler on torch.fx.

::

    program = narrows.capture(model, inputs)         # a graph of ATen operators
    plan = narrows.plan(program, ratio=0.5)          # which channels to keep: data, JSON
    smaller = narrows.apply(program, plan)           # equals plan.masked(program)
    integers = narrows.quantize(smaller, images).program  # shifts in place of scales
    artifact = narrows.lower(smaller, "onnx")        # checked in ONNX Runtime
    artifact = narrows.compile(model, inputs, plan=plan)  # all of it

Names are imported when they are first used, so that ``import narrows`` costs next to nothing and
``narrows.load`` works without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from narrows.errors import (
    ArtifactError,
    CaptureError,
    FidelityError,
    LowerError,
    NarrowsError,
    OpError,
    PassError,
    PlanError,
    ProgramError,
    UsageError,
)
from narrows.ir.costfiles import BUILTIN as COSTS
from narrows.version import VERSION

if TYPE_CHECKING:
    from narrows.api import (
        apply,
        capture,
        compensate,
        compile,
        lower,
        plan,
        quantize,
        quantize_weights,
    )
    from narrows.api.compressing import compress
    from narrows.api.families import family
    from narrows.api.sensing import sense
    from narrows.backends.artifact import Artifact, load
    from narrows.ir.program import Program
    from narrows.passes.choosing.solved import Solved
    from narrows.passes.pipeline import Pipeline
    from narrows.passes.plans.plan import ChannelPlan
    from narrows.passes.quant.plan import QuantPlan
    from narrows.passes.quant.quantization import Quantized
    from narrows.passes.sensing.table import Sensitivity

__version__ = VERSION

# Which backends' cost tables a pass may be given the path of.
COSTS.update(
    {
        "onnxruntime": "narrows.backends.onnx.staircase:StairTable",
        "onnxruntime-int8": "narrows.backends.onnx.int8.table:Int8Table",
        "torch": "narrows.backends.torch.eager:EagerTable",
    }
)

_LAZY = {
    "capture": "narrows.api",
    "plan": "narrows.api",
    "apply": "narrows.api",
    "lower": "narrows.api",
    "compensate": "narrows.api",
    "compress": "narrows.api.compressing",
    "sense": "narrows.api.sensing",
    "family": "narrows.api.families",
    "quantize": "narrows.api",
    "quantize_weights": "narrows.api",
    "compile": "narrows.api",
    "load": "narrows.backends.artifact",
    "Solved": "narrows.passes.choosing.solved",
    "Program": "narrows.ir.program",
    "ChannelPlan": "narrows.passes.plans.plan",
    "QuantPlan": "narrows.passes.quant.plan",
    "Quantized": "narrows.passes.quant.quantization",
    "Sensitivity": "narrows.passes.sensing.table",
    "Pipeline": "narrows.passes.pipeline",
    "Artifact": "narrows.backends.artifact",
}

__all__ = [
    "Artifact",
    "ArtifactError",
    "CaptureError",
    "ChannelPlan",
    "FidelityError",
    "LowerError",
    "NarrowsError",
    "OpError",
    "PassError",
    "Pipeline",
    "PlanError",
    "Program",
    "ProgramError",
    "QuantPlan",
    "Quantized",
    "Sensitivity",
    "Solved",
    "UsageError",
    "apply",
    "capture",
    "compensate",
    "compile",
    "compress",
    "family",
    "load",
    "lower",
    "plan",
    "quantize",
    "quantize_weights",
    "sense",
]


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module 'narrows' has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value  # the next access is a plain attribute
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
