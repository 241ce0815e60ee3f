"""Every pass by name, as ``"module:Class"``: a pass is imported when it is used.

A package adds its own passes through the entry point group ``narrows.passes``::

    [project.entry-points."narrows.passes"]
    merge-heads = "mypackage.merge_heads:MergeHeads"
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from narrows.errors import PassError
from narrows.registry import Registry

if TYPE_CHECKING:
    from narrows.passes.base import Pass

BUILTIN: dict[str, str] = {
    "prune-channels": "narrows.passes.prune_channels:PruneChannels",
    "reorder-channels": "narrows.passes.reorder_channels:ReorderChannels",
    "legalize-reads": "narrows.passes.legalize_reads:LegalizeReads",
    "align-channels": "narrows.passes.align_channels:AlignChannels",
    "choose-kernels": "narrows.passes.choose_kernels:ChooseKernels",
    "fold-batch-norm": "narrows.passes.fold_batch_norm:FoldBatchNorm",
    "merge-linear": "narrows.passes.merge_linear:MergeLinear",
    "eliminate-dead": "narrows.passes.eliminate_dead:EliminateDead",
    "fold-weights": "narrows.passes.quant.fold_weights:FoldWeights",
    "convert-batch-norm": "narrows.passes.convert_batch_norm:ConvertBatchNorm",
    "decompose-attention": "narrows.passes.decompose_attention:DecomposeAttention",
    "widen-clips": "narrows.passes.quant.widen_clips:WidenClips",
    "equalize-channels": "narrows.passes.quant.equalize_channels:EqualizeChannels",
    "scale-parts": "narrows.passes.quant.scale_parts:ScaleParts",
    "quantize": "narrows.passes.quant.quantize:Quantize",
    "fold-shifts": "narrows.passes.quant.fold_shifts:FoldShifts",
}


PASSES = Registry("pass", "narrows.passes", BUILTIN, PassError)


def providers() -> dict[str, str]:
    """Return ``name -> "module:Class"`` of every known pass; see `Registry.providers`."""
    return PASSES.providers()


def lookup(name: str) -> type[Pass]:
    """Return the class of the pass called ``name``; `UsageError` with a suggestion if unknown."""
    return PASSES.load_class(name)
