"""Every pass by name, as ``"module:Class"``: a pass is imported when it is used.

A package adds its own passes through the entry point group ``narrows.passes``::

    [project.entry-points."narrows.passes"]
    merge-heads = "mypackage.merge_heads:MergeHeads"
"""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import TYPE_CHECKING

from narrows.errors import PassError, UsageError, suggest

if TYPE_CHECKING:
    from narrows.passes.base import Pass

GROUP = "narrows.passes"

BUILTIN: dict[str, str] = {
    "prune-channels": "narrows.passes.prune_channels:PruneChannels",
    "reorder-channels": "narrows.passes.reorder_channels:ReorderChannels",
    "legalize-reads": "narrows.passes.legalize_reads:LegalizeReads",
    "align-channels": "narrows.passes.legalize_reads:AlignChannels",
    "choose-kernels": "narrows.passes.choose_kernels:ChooseKernels",
    "fold-batch-norm": "narrows.passes.fold_batch_norm:FoldBatchNorm",
    "eliminate-dead": "narrows.passes.eliminate_dead:EliminateDead",
    "convert-batch-norm": "narrows.passes.convert_batch_norm:ConvertBatchNorm",
    "decompose-attention": "narrows.passes.decompose_attention:DecomposeAttention",
    "widen-clips": "narrows.passes.quant.widen_clips:WidenClips",
    "equalize-channels": "narrows.passes.quant.equalize_channels:EqualizeChannels",
    "scale-parts": "narrows.passes.quant.scale_parts:ScaleParts",
    "quantize": "narrows.passes.quant.quantize:Quantize",
    "fold-shifts": "narrows.passes.quant.fold_shifts:FoldShifts",
}


def providers() -> dict[str, str]:
    """Return ``name -> "module:Class"`` of every known pass.

    Two providers of one name are a `PassError` that names both: which of them runs must not hang on
    the order of installation.
    """
    found = dict(BUILTIN)
    for entry in metadata.entry_points(group=GROUP):
        other = found.get(entry.name)
        if other is not None and other != entry.value:
            raise PassError(
                f"two packages provide the pass {entry.name!r}",
                why=f"{other} and {entry.value} both claim the name",
                hint="uninstall one of them",
            )
        found[entry.name] = entry.value
    return found


def lookup(name: str) -> type[Pass]:
    """Return the class of the pass called ``name``; `UsageError` with a suggestion if unknown."""
    known = providers()
    if name not in known:
        listed = ", ".join(sorted(known))
        raise UsageError(
            f"there is no pass {name!r}", why=f"known are {listed}", hint=suggest(name, known)
        )
    module, _, attribute = known[name].partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as cause:
        raise PassError(f"cannot import the pass {name!r} from {known[name]}: {cause}") from cause
    if getattr(found, "name", None) != name:
        raise PassError(
            f"the pass {name!r} of {known[name]} calls itself {getattr(found, 'name', None)!r}"
        )
    return found
