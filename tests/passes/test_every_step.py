"""What becomes of many small networks, step by step: what equal numbers cannot tell.

Every form of a pruned program gives the same numbers. Which one is chosen, what stays and why it
does is written down here, for masks that a seed draws and for costs that are made up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

import narrows
from narrows.backends.measured.grid import Grid
from narrows.backends.measured.layout import Layout
from narrows.backends.onnx.staircase import StairTable
from narrows.ir.meta import op_name
from narrows.ir.program import Program
from narrows.passes.align_channels import AlignChannels
from narrows.passes.base import Pass, PassResult
from narrows.passes.legalize_reads import LegalizeReads
from narrows.passes.prune_channels import PruneChannels
from narrows.passes.reorder_channels import ReorderChannels
from tests.networks import NETWORKS, random_masks

# The fewest of a quarter of the networks whose steps have every note, and every copy of channels,
# that is in those of the others.
TOLD = (
    "argmax_gate", "bilinear_pooling", "channel_pad_constant", "channels_last_flatten",
    "class_token", "constant_elu", "conv_next_block", "cumsum_space", "depthwise_no_pad", "fan_out",
    "group_norm_each_channel", "grouped_conv_widening", "layer_norm_whole_image",
    "linear_over_tokens", "maxout", "position_embedding", "repeat_channels", "residual_projection",
    "rms_norm_by_hand", "same_padding", "shared_head", "slice_negative", "spatial_gate",
    "stack_sum", "swiglu_mlp", "topk_channels", "transposed_conv_grouped", "weights_beside_heads",
)  # fmt: skip


def costs() -> StairTable:
    """Return costs of a runtime with blocks of four channels, in which copies are dear."""

    def rising(rate: float, *names: str) -> Grid:
        us = np.full([2] * len(names), rate)
        for axis in range(len(names)):
            us = us * np.array([1.0, 1e4]).reshape([-1 if a == axis else 1 for a in range(us.ndim)])
        return Grid(tuple((n, (1.0, 1e4)) for n in names), us)

    sizes = ("positions", "inputs", "outputs")
    grids = {
        **{f"{form} conv 3x3/1": rising(rate, *sizes)
           for form, rate in (("blocked", 1e-2), ("direct", 1.5e-2), ("plain", 2e-2))},
        **{f"{form} depthwise 3x3/1": rising(rate, "positions", "outputs")
           for form, rate in (("blocked", 1e-2), ("plain", 5e-2))},
        "linear": rising(1e-3, "rows", "inputs", "outputs"),
        "matmul": rising(1e-3, "rows", "inputs", "outputs"),
        **{n: rising(1e-2, "elements") for n in ("reorder in", "reorder out")},
        **{n: rising(1e-2, "elements") for n in ("pointwise", "scale")},
        **{n: rising(2e-2, "elements") for n in ("copy", "gather", "concat", "slice")},
    }  # fmt: skip
    layout = Layout(4, 2, 2, fused=("relu",), blocked=("relu", "add"))
    return StairTable("made up", "1", "cpu", layout, 1e-9, grids)


def told(result: PassResult, before: Program) -> str:
    """Return how many parameters are left, which operators, of what widths, and the notes."""
    notes = [f"  {n.where}, {n.reason}, {n.channels}: {n.message}\n" for n in result.notes]
    if not result.changed:
        return "".join(notes)
    program = result.program
    ops = Counter(op_name(n) for n in program.graph.nodes if n.op == "call_function")
    shapes = {n: t.shape for n, t in sorted(program.weights.items()) if t.dim() > 1}
    lines = [
        f"{program.parameter_count} of {before.parameter_count} parameters",
        ", ".join(f"{n} {'x'.join(map(str, shape))}" for n, shape in shapes.items()),
        ", ".join(f"{n} {count}" for n, count in sorted(ops.items())),
    ]
    return "".join([*(f"  {line}\n" for line in lines), *notes])


@pytest.mark.parametrize("name", TOLD)
def test_every_step_is_as_it_was(name: str, golden: Callable[[str, str], None]) -> None:
    network = NETWORKS[name]
    program = narrows.capture(network.build(), network.inputs())
    text = ""
    for amount, side in ((0.5, "both"), (0.3, "input")):
        inputs, outputs = random_masks(program, amount, side)
        plan = narrows.plan(program, keep_inputs=inputs, keep_outputs=outputs, zeros=False)
        steps: list[Pass] = [PruneChannels(plan, order=True)]
        if side == "input":
            steps = [
                PruneChannels(plan),
                LegalizeReads(costs()),
                AlignChannels(),
                ReorderChannels(),
            ]
        now = program
        for pass_ in steps:
            result = pass_.run(now)
            if result.changed or result.notes:
                text += f"{pass_.name}, {amount:.0%} of {side}\n{told(result, now)}"
            now = result.program
    golden(f"steps/{name}", text)
