"""The importer that TVM brings along, as a named way out for operators without a rule of ours.

It goes through ``torch.export``, keeps the channels second and packs no weights, so that what it
makes is several times slower. It decomposes the program first: without that, it takes the norms of
a network in eval mode for norms in train mode.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from narrows.errors import LowerError

EXPORTED = "model.pt2"


def export(program: Any, inputs: list[Any], outputs: list[Any], path: Path) -> None:
    """Write the program that computes ``outputs`` for one batch size, as torch exports it.

    Args:
        program: The `narrows.ir.program.Program`.
        inputs: Flat inputs of the batch size.
        outputs: The nodes whose values are wanted.
        path: The file to write.

    Raises:
        LowerError: torch cannot export it.
    """
    import torch
    import torch.utils._pytree as pytree

    wanted = [node.name for node in outputs]
    copy = program.copy(examples=tuple(inputs), out_spec=pytree.tree_structure((0,) * len(wanted)))
    copy.output.args = (tuple(copy.node(name) for name in wanted),)
    args, kwargs = copy.in_spec.unflatten(inputs)
    try:
        with torch.no_grad():
            exported = torch.export.export(copy.to_module().eval(), args, kwargs, strict=False)
        torch.export.save(exported, path)
    except Exception as error:  # the exporter raises all kinds
        why = next((line for line in str(error).splitlines() if line.strip()), "")
        raise LowerError("torch cannot export the program", why=why) from error


def imported(path: Path) -> Any:
    """Return the Relax module of what `export` wrote."""
    import torch
    from tvm.relax.frontend.torch import from_exported_program

    return from_exported_program(torch.export.load(path))
